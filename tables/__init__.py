"""Tables that are looked up hot and changed cold: one file per table."""

from libfp.tables.acl import Acl, AclView
from libfp.tables.acl_rule import Rule
from libfp.tables.array import Array, ArrayView
from libfp.tables.flow import Flow, FlowCounts, FlowInfo, FlowKey, FlowPart
from libfp.tables.flow_record import FlowEntry
from libfp.tables.flow_view import FlowView
from libfp.tables.hash import Hash, HashView, WideHashView
from libfp.tables.lpm import Lpm
from libfp.tables.lpm4 import Lpm4, Lpm4View
from libfp.tables.lpm6 import Lpm6, Lpm6View
from libfp.tables.per_worker import PerWorker
from libfp.tables.table import Table

__all__ = [
    "Acl",
    "AclView",
    "Array",
    "ArrayView",
    "Flow",
    "FlowCounts",
    "FlowEntry",
    "FlowInfo",
    "FlowKey",
    "FlowPart",
    "FlowView",
    "Hash",
    "HashView",
    "Lpm",
    "Lpm4",
    "Lpm4View",
    "Lpm6",
    "Lpm6View",
    "PerWorker",
    "Rule",
    "Table",
    "WideHashView",
]
