"""The shared stages: `parse` first, then yours, then `forward` with the `Routes` it reads; `by_flow` where a
flow's two directions must meet on one worker."""

from libfp.stages.flows import by_flow, flow_owner, symmetric_hash
from libfp.stages.forwarding import forward
from libfp.stages.parsing import parse
from libfp.stages.routes import Drop, Forward, Multipath, NextHops, Punt, Routes, RoutesView

__all__ = [
    "Drop",
    "Forward",
    "Multipath",
    "NextHops",
    "Punt",
    "Routes",
    "RoutesView",
    "by_flow",
    "flow_owner",
    "forward",
    "parse",
    "symmetric_hash",
]
