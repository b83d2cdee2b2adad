"""What `forward` and `route` ask of an IPv4 packet before it is looked up (RFC 1812), in the order that Linux has."""

from __future__ import annotations

from libfp.jit import bswap32, kernel, load8, load32, load32be, load64, shr64, store32, store64, unlikely
from libfp.packet.burst import (
    FLAG,
    KEY,
    KIND,
    KIND_FLAGS,
    KIND_IPV4,
    KIND_IPV4_OPTIONS,
    KIND_IPV6,
    KIND_IPV6_OPTIONS,
    KIND_KEPT,
    KIND_MADE,
    Burst,
)
from libfp.packet.checksum import checksum, is_ipv4_sum
from libfp.packet.headers import ETHERNET_SIZE
from libfp.stages.next_hops import ACTION_FORWARD, ACTION_MULTIPATH, HOP_SIZE, LOCAL, UNKNOWN
from libfp.stages.routes import (
    CHECK_SOURCES,
    PORT_ACCEPT_LOCAL,
    PORT_RPF_LOOSE,
    PORT_RPF_STRICT,
    RoutesView,
    is_unusual,
)

_IP = ETHERNET_SIZE


@kernel
def check(burst: Burst, i: int, routes: RoutesView) -> None:
    """The KEY of one packet, or a verdict."""
    at = burst.at
    if unlikely(load32(at + KIND + 4 * i) != KIND_IPV4):
        check_other(burst, i, routes)
        return
    ip = burst.data(i) + _IP
    high, last = load64(ip + 8), load32(ip + 16)
    if unlikely(not is_ipv4_sum(load64(ip), high, last)):
        burst.drop(i, "ipv4-checksum")
        return
    store32(at + KEY + 4 * i, bswap32(last))
    unusual = is_unusual(routes.sources, shr64(high, 32), last) | routes.checks(burst.port) & CHECK_SOURCES
    if unlikely(unusual != 0) or unlikely((high & 0xFF) < 2):
        check_unusual(burst, i, routes)


@kernel
def is_special_source(address: int) -> bool:
    """What no host may send from: 0/8, 127/8, multicast, the limited broadcast address."""
    first = address >> 24
    return first == 0 or first == 127 or (first >= 224 and (first < 240 or address == 0xFFFFFFFF))


@kernel
def check_unusual(burst: Burst, i: int, routes: RoutesView) -> None:
    """The verdict, if there is one, on a packet whose addresses or TTL want a closer look; in the order Linux looks."""
    ip = burst.data(i) + _IP
    check_addresses(burst, i, ip)
    if burst.is_live(i) and source_is_valid(burst, i, routes, load32be(ip + 12), routes.checks(burst.port)):
        check_ttl(burst, i, ip)


@kernel
def check_addresses(burst: Burst, i: int, ip: int) -> None:
    """The verdict on IPv4 addresses that are not plain unicast. Class E (240/4) is routed, as by Linux."""
    destination = load32be(ip + 16)
    first = destination >> 24
    if is_special_source(load32be(ip + 12)):
        burst.drop(i, "martian-source")
    elif destination == 0xFFFFFFFF:
        burst.punt(i, "broadcast")
    elif first == 0 or first == 127:
        burst.drop(i, "martian-destination")
    elif first >= 224 and first < 240:
        burst.punt(i, "multicast")


@kernel
def check_ttl(burst: Burst, i: int, ip: int) -> None:
    if load8(ip + 8) < 2:
        burst.punt(i, "ttl-expired")


@kernel
def check_other(burst: Burst, i: int, routes: RoutesView) -> None:
    """What is no plain IPv4 goes to Linux, but for IPv6, and for options whose header has a wrong checksum."""
    ip, kind = burst.data(i) + _IP, load32(burst.at + KIND + 4 * i)
    if kind & KIND_FLAGS != 0:
        check_kept(burst, i, kind, routes)
    elif kind == KIND_IPV6:
        store64(burst.at + FLAG, 1)
    elif kind == KIND_IPV4_OPTIONS and checksum(ip, (load8(ip) & 15) << 2) != 0:
        burst.drop(i, "ipv4-checksum")
    elif kind in (KIND_IPV4_OPTIONS, KIND_IPV6_OPTIONS):
        burst.punt(i, "ip-options")
    else:
        burst.punt(i, "not-ip")


@kernel
def check_kept(burst: Burst, i: int, kind: int, routes: RoutesView) -> None:
    """The KEY, or a verdict, of a packet that Linux must never get: no reverse path, and our own source if we made it.

    Punts are by the reasons that others have; carrying them out makes drops of them.
    """
    ip, plain = burst.data(i) + _IP, kind & ~KIND_FLAGS
    if plain == KIND_IPV6:
        store64(burst.at + FLAG, 1)
    elif plain != KIND_IPV4:
        if plain in (KIND_IPV4_OPTIONS, KIND_IPV6_OPTIONS):
            burst.punt(i, "ip-options")
        else:
            burst.punt(i, "not-ip")
    elif not is_ipv4_sum(load64(ip), load64(ip + 8), load32(ip + 16)):
        burst.drop(i, "ipv4-checksum")
    else:
        store32(burst.at + KEY + 4 * i, load32be(ip + 16))
        hop = routes.fib.lookup(load32be(ip + 12)) if kind & KIND_MADE == 0 else 0
        if hop != 0 and hop < routes.capacity and load64(routes.hops + HOP_SIZE * hop) & LOCAL != 0:
            burst.drop(i, "martian-source")
        else:
            check_addresses(burst, i, ip)
            check_ttl(burst, i, ip)


@kernel
def is_kept(burst: Burst, i: int) -> bool:
    return load32(burst.at + KIND + 4 * i) & KIND_KEPT != 0


@kernel
def source_is_valid(burst: Burst, i: int, routes: RoutesView, source: int, checks: int) -> bool:
    """What Linux's fib_validate_source asks: not our own address, and the way back as the port's rp_filter wants it.

    Where the way back is not plain (no neighbour yet, another device, tables that are not complete) Linux is left to
    decide.
    """
    hop = routes.fib.lookup(source)
    entry = routes.hops + HOP_SIZE * hop if hop < routes.capacity else routes.hops
    what = load64(entry)
    if what & LOCAL != 0 and checks & PORT_ACCEPT_LOCAL == 0:
        burst.drop(i, "martian-source")
        return False
    if what & UNKNOWN != 0:
        burst.punt(i, "via-linux")
        return False
    if checks & (PORT_RPF_STRICT | PORT_RPF_LOOSE) == 0:
        return True
    if what & 0xFF == ACTION_FORWARD and (checks & PORT_RPF_STRICT == 0 or what >> 8 & 0xFFFF == burst.port):
        return True
    if what & 0xFF == ACTION_MULTIPATH:
        ports = load64(entry + 16)
        if ports != 0 and (checks & PORT_RPF_STRICT == 0 or (burst.port < 64 and shr64(ports, burst.port) & 1 != 0)):
            return True
    burst.punt(i, "rp-filter")
    return False
