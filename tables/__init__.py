"""Tables that are looked up hot and changed cold: one file per table."""

from libfp.tables.hash import Hash, HashView, WideHashView
from libfp.tables.lpm4 import Lpm4, Lpm4View
from libfp.tables.lpm6 import Lpm6, Lpm6View
from libfp.tables.table import Table

__all__ = ["Hash", "HashView", "Lpm4", "Lpm4View", "Lpm6", "Lpm6View", "Table", "WideHashView"]
