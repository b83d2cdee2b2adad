"""The route that decided about a packet, in the words of `ip route`: what `fp trace` asks a running router."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from libfp.engine.dissect import dissect
from libfp.linux.decide import Via
from libfp.stages.next_hops import Multipath

if TYPE_CHECKING:
    from libfp.linux.mirror import Mirror
    from libfp.stages.routes import Routes


def explain(routes: Routes, mirror: Mirror, next_hop: int, packet: bytes) -> str:
    """``198.51.100.0/24 via 192.0.2.1 dev eth1``; empty where no route had a say."""
    headers = dissect(packet)
    if headers.version == 0:
        return ""
    found = routes.match(packet)
    if found is None:
        yet = "" if routes.complete else " in the tables yet"
        return f"no route to {headers.address(headers.dst)}{yet}"
    prefix, index = found
    actions = routes.next_hops.actions
    action = actions.get(index)
    paths = [path for path, _ in action.paths] if isinstance(action, Multipath) else [index]
    if next_hop and next_hop not in paths and next_hop != index:
        return f"next hop {next_hop}; by now {prefix} leads to another"
    chosen = next_hop if next_hop in paths else paths[0] if len(paths) == 1 else index
    via = mirror.fib.publisher.said(chosen)
    if not isinstance(via, Via):
        return f"{prefix} {getattr(actions.get(chosen), 'reason', '')}".strip()
    state = mirror.state
    link = state.links.get(via.link)
    device = link.name if link is not None else f"link {via.link}"
    gateway = str(ip_address(via.gateway))
    if prefix.partition("/")[0] == gateway:  # a host: an entry of our own, beside the route to its network
        neighbour = state.usable(via.link, via.gateway)
        mac = f" lladdr {neighbour.mac.hex(':')}" if neighbour is not None else ""
        return f"neighbour {gateway}{mac} dev {device}"
    mtu = f" mtu {via.mtu}" if via.mtu and (link is None or via.mtu < link.mtu) else ""
    share = f" (of {len(paths)} paths)" if isinstance(action, Multipath) else ""
    return f"{prefix} via {gateway} dev {device}{mtu}{share}"
