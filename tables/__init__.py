"""Tables that are looked up hot and changed cold: one file per table."""

from libfp.tables.lpm4 import Lpm4, Lpm4View
from libfp.tables.table import Table

__all__ = ["Lpm4", "Lpm4View", "Table"]
