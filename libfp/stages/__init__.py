"""The shared stages: `parse` first, then yours, then `forward` with the `Routes` it reads, or `route`, yours and
`rewrite` where yours want to know the way out; `by_flow` where a flow's two directions must meet on one worker.
"""

from libfp.stages.flows import by_flow, flow_owner, symmetric_hash
from libfp.stages.forwarding import forward, rewrite, route
from libfp.stages.icmp import icmp_error
from libfp.stages.next_hops import Drop, Forward, Multipath, NextHops, Punt
from libfp.stages.parsing import parse, parse_again
from libfp.stages.routes import Routes, RoutesView, out_port

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
    "icmp_error",
    "out_port",
    "parse",
    "parse_again",
    "rewrite",
    "route",
    "symmetric_hash",
]
