"""Linux stays in charge: its routes and neighbours as tables, and what the fast path cannot finish handed back to it.

`Linux` is what applications use. The parts, from the kernel inwards: `netlink` (framing, sockets), `rtnetlink` (what
messages mean), `bulk` (route messages by the million), `prefixes`, `rib` and `state` (the kernel's state, kept),
`decide` (what a prefix means for a packet), `fib` and `publish` (into the forwarding tables), `mirror` (the thread that
runs it all), `verify` (whether it is right). Beside them `guard` (hosts whose kernel would decide otherwise),
`netfilter`, `neighbours` (hit marks), `ports`, `tap` and `punt` (packets to Linux).
"""

from libfp.linux.conflict import Conflict
from libfp.linux.host import Linux
from libfp.linux.ports import PortPolicy

__all__ = ["Conflict", "Linux", "PortPolicy"]
