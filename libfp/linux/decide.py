"""What Linux would do with a packet to a prefix, as something the forwarding tables can say.

Pure functions of the mirrored state. The rule throughout: where we cannot tell for certain what Linux would do, the
packet is punted, and Linux does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from libfp.linux import rtnetlink as rt
from libfp.linux.state import State
from libfp.stages.next_hops import Drop, Forward, Punt

LOCAL, BROADCAST, MULTICAST = Punt("local"), Punt("broadcast"), Punt("multicast")
NO_ROUTE, UNREACHABLE, PROHIBIT = Punt("no-route"), Punt("unreachable"), Punt("prohibit")
NO_NEIGHBOUR, VIA_LINUX, BLACKHOLE = Punt("no-neighbour"), Punt("via-linux"), Drop("blackhole")

_BY_TYPE: Mapping[int, Punt | Drop] = {
    rt.LOCAL: LOCAL,
    rt.BROADCAST: BROADCAST,
    rt.ANYCAST: LOCAL,
    rt.MULTICAST: MULTICAST,
    rt.BLACKHOLE: BLACKHOLE,  # Linux drops without an answer; for the next two it sends ICMP
    rt.UNREACHABLE: UNREACHABLE,
    rt.PROHIBIT: PROHIBIT,
    rt.THROW: NO_ROUTE,  # Linux goes on with table 253, which is not mirrored
}
_WITHOUT_HOP = (rt.LOCAL, rt.BLACKHOLE, rt.UNREACHABLE, rt.PROHIBIT, rt.THROW)  # hold whatever their link's state


class Via(NamedTuple):
    """Out of a port, to a neighbour's MAC address: `gateway` is 4 or 16 bytes. `mtu` is the route's own, or 0."""

    link: int
    gateway: bytes
    mtu: int = 0


class Direct(NamedTuple):
    """Out of a port, destinations being on the link itself: each has a MAC address, and so an entry, of its own."""

    link: int
    mtu: int = 0


class Paths(NamedTuple):
    """Flows are spread over several: (path, weight) each."""

    paths: tuple[tuple[Via | Punt, int], ...]


Target = Via | Direct | Paths | Punt | Drop


def target(
    routes: tuple[rt.Route, ...], bits: int, covered: bool, state: State, ports: Mapping[int, int]
) -> Target | None:
    """What happens to packets whose longest match is a prefix with these routes; None when Linux looks at shorter ones.

    `bits` is the family's, `covered` whether a prefix of the local table covers this one, `ports` maps link indexes to
    port numbers. The same for all prefixes, but that `Direct` on one of full length is a `Via`: see `on_link`.
    """
    for number, route in enumerate(routes):
        if route.tos:
            return VIA_LINUX  # Linux chooses by a header field that is not looked at here
        if route.nhid and not route.hops and route.type == rt.UNICAST:
            return VIA_LINUX  # net.ipv4.nexthop_compat_mode is 0: the kernel does not say where it leads
        if route.type not in _WITHOUT_HOP and not any(_hop_holds(hop, state, bits) for hop in route.hops):
            continue
        if route.table != rt.TABLE_LOCAL and covered:
            # The local table wins if the host ever had a policy rule (the kernel then keeps the tables apart for
            # good), else the longer prefix: from outside one cannot tell.
            return VIA_LINUX
        if bits == 128 and any((one.table, one.metric) == (route.table, route.metric) for one in routes[number + 1 :]):
            return VIA_LINUX  # Linux chooses by router preference and by which neighbour answers (RFC 4191)
        if route.type != rt.UNICAST:
            return _BY_TYPE.get(route.type, VIA_LINUX)
        return _unicast(route, state, ports, bits)
    return None


def is_covered(prefix: rt.Prefix, state: State) -> bool:
    """Whether a prefix of the local table covers this one."""
    return any(local.covers(prefix) for local in state.ribs[prefix.bits].local_prefixes)


def _unicast(route: rt.Route, state: State, ports: Mapping[int, int], bits: int) -> Target:
    usable = [hop for hop in route.hops if _hop_holds(hop, state, bits)]
    if len(usable) == 1:
        return _through(usable[0], route, state, ports, bits)
    paths: dict[Via | Punt, int] = {}
    for hop in usable:
        path = _through(hop, route, state, ports, bits)
        # a path whose destinations are on the link itself would need a neighbour for each of them
        key = VIA_LINUX if isinstance(path, Direct) else path
        paths[key] = paths.get(key, 0) + hop.weight
    return Paths(tuple(sorted(paths.items(), key=repr))) if len(paths) > 1 else next(iter(paths))


def _through(hop: rt.Hop, route: rt.Route, state: State, ports: Mapping[int, int], bits: int) -> Via | Direct | Punt:
    if hop.link not in ports or hop.encapsulated:
        return VIA_LINUX
    mtu = route.mtu
    if bits == 128:
        link = state.links[hop.link]
        mtu = min(mtu or link.mtu, link.mtu6 or link.mtu)
    return Via(hop.link, hop.gateway, mtu) if hop.gateway else Direct(hop.link, mtu)


def on_link(direct: Direct, address: int, bits: int) -> Via:
    """An address that is on the link itself is its own gateway."""
    return Via(direct.link, address.to_bytes(bits // 8, "big"), direct.mtu)


def _hop_holds(hop: rt.Hop, state: State, bits: int) -> bool:
    """Whether a lookup in Linux would take this hop (fib_lookup_good_nhc, __rt6_nh_dev_match)."""
    link = state.links.get(hop.link)
    if hop.dead or link is None:
        return False
    return link.carrier or not state.ignores_linkdown(hop.link, bits)


def action(via: Via, state: State, ports: Mapping[int, int]) -> Forward | Punt:
    """What the next hop does now, given its link and its neighbour."""
    link = state.links.get(via.link)
    port = ports.get(via.link)
    if link is None or port is None or len(link.mac) != 6:
        return VIA_LINUX
    neighbour = state.usable(via.link, via.gateway)
    if neighbour is None or not link.carrier or not link.up:
        return NO_NEIGHBOUR
    return Forward(port, neighbour.mac, link.mac, min(via.mtu or link.mtu, link.mtu))
