"""Unicast forwarding, deciding as Linux would and leaving to Linux what it must decide itself: IPv4 (RFC 1812) here,
IPv6 in `libfp.stages.forwarding6`.
"""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import (
    BOUNDSCHECK,
    bswap32,
    ctz64,
    kernel,
    load8,
    load32,
    load32be,
    load64,
    prefetch,
    shr64,
    store8,
    store32,
    store64,
    ult64,
    unlikely,
    without_lowest64,
)
from libfp.packet.burst import (
    FLAG,
    FRAME,
    KEY,
    KIND,
    KIND_FLAGS,
    KIND_IPV4,
    KIND_IPV4_OPTIONS,
    KIND_IPV6,
    KIND_IPV6_OPTIONS,
    KIND_KEPT,
    KIND_MADE,
    LENGTH,
    NEXT_HOP,
    VERDICT,
    Burst,
)
from libfp.packet.checksum import checksum, is_ipv4_sum
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import FORWARD, KIND_SHIFT
from libfp.stages.forwarding6 import forward6, look_up6
from libfp.stages.ipv4_vector import ALL, forwardable8
from libfp.stages.multipath import look_closer
from libfp.stages.routes import (
    ACTION_FORWARD,
    ACTION_MULTIPATH,
    CHECK_SOURCES,
    HOP_SIZE,
    LOCAL,
    PORT_ACCEPT_LOCAL,
    PORT_REDIRECTS,
    PORT_RPF_LOOSE,
    PORT_RPF_STRICT,
    UNKNOWN,
    RoutesView,
    is_unusual,
    out_port,
)

_IP = ETHERNET_SIZE


@stage.headers_only
@stage.burst
def forward(burst: Burst, routes: RoutesView) -> None:
    """Verify, look up, rewrite and send the IP packets of the burst: `route` and `rewrite` in one, and faster.

    Dropped: wrong header checksum (RFC 1812 5.2.2), martian addresses (5.3.7; RFC 4291; as Linux draws the line),
    IPv4 sources that are this host's own, and what a route drops. Punted unchanged: sources that may fail the port's
    reverse path filter (RFC 3704), anything but IP, multicast, broadcast and link-local addresses, options, TTL or hop
    limit 1 and less, larger than the MTU of the next hop, no route, no neighbour yet, routes that only Linux can
    follow. Linux sends the ICMP errors.

    Packets that Linux must never get (`packet.keep`) have no reverse path to be filtered by, and what would be punted
    of them is dropped by the same name; those that libfp has made may have a source of this host's own.
    """
    look_up(burst, routes)
    at, n, base = burst.at, burst.count, burst.base
    hops, hits, epoch = routes.hops, routes.hits, routes.epoch
    back = (FORWARD << KIND_SHIFT) + burst.port if routes.checks(burst.port) & PORT_REDIRECTS != 0 else -1
    if unlikely(load64(at + FLAG) != 0):
        forward6(burst, routes)  # which leaves no packet of its own to the rest
    for i in range(n):
        if unlikely(load32(at + VERDICT + 4 * i) != 0):
            continue
        hop = load32(at + NEXT_HOP + 4 * i)
        entry = hops + HOP_SIZE * hop
        data = base + load64(at + FRAME + 8 * i)
        last = load64(entry + 16)
        verdict = shr64(last, 32)
        if unlikely(load32(at + LENGTH + 4 * i) > load64(entry + 24)):
            hop = look_closer(burst, i, routes, hop)
            if hop == 0:
                continue
            entry = hops + HOP_SIZE * hop
            last = load64(entry + 16)
            verdict = shr64(last, 32)
        if unlikely(verdict == back) and not is_kept(burst, i):
            burst.punt(i, "redirect")
            continue
        word = load32(data + _IP + 8) + 0xFFFF  # TTL - 1, checksum + 1 (RFC 1141): TTL, protocol, checksum
        store64(data, load64(entry + 8))
        store32(data + 8, last)
        store32(data + _IP + 8, word + (word + 0x10000 >> 32 << 16))  # the carry; and never -0: RFC 1624
        store32(hits + 4 * hop, epoch)
        store32(at + VERDICT + 4 * i, verdict)


@stage.headers_only
@stage.burst
def route(burst: Burst, routes: RoutesView) -> None:
    """The first half of `forward`: verify and look up, and drop or punt what `forward` would.

    Packets that can be sent go on unchanged. `out_port(routes, burst.next_hop(i))` is the port they will leave by, for
    stages that have a say in that; `rewrite`, the other half, comes after those, on the same worker.
    """
    look_up(burst, routes)
    at = burst.at
    if unlikely(load64(at + FLAG) != 0):
        look_up6(burst, routes)
    redirects = routes.checks(burst.port) & PORT_REDIRECTS != 0
    for i in range(burst.count):
        if unlikely(load32(at + VERDICT + 4 * i) != 0):
            continue
        hop = load32(at + NEXT_HOP + 4 * i)
        if unlikely(load32(at + LENGTH + 4 * i) > load64(routes.hops + HOP_SIZE * hop + 24)):
            hop = look_closer(burst, i, routes, hop)
            if hop == 0:
                continue
        if unlikely(out_port(routes, hop) == burst.port) and (redirects or burst.is_ipv6(i)) and not is_kept(burst, i):
            burst.punt(i, "redirect")


@stage.headers_only
@stage.burst
def rewrite(burst: Burst, routes: RoutesView) -> None:
    """The second half of `forward`: one less TTL or hop limit, MAC addresses, and out by the port of the next hop."""
    at, hops = burst.at, routes.hops
    for i in range(burst.count):
        hop = load32(at + NEXT_HOP + 4 * i)
        if unlikely(ult64(hop, routes.capacity) == 0):
            hop = 0
        if unlikely(load32(at + LENGTH + 4 * i) > load64(hops + HOP_SIZE * hop + 24)):
            hop = look_closer(burst, i, routes, hop)
            if hop == 0:
                continue
        entry, data = hops + HOP_SIZE * hop, burst.data(i)
        last = load64(entry + 16)
        if burst.is_ipv4(i):
            word = load32(data + _IP + 8) + 0xFFFF  # as in `forward`
            store32(data + _IP + 8, word + (word + 0x10000 >> 32 << 16))
        elif burst.is_ipv6(i):
            store8(data + _IP + 7, load8(data + _IP + 7) - 1)
        else:
            burst.punt(i, "not-ip")
            continue
        store64(data, load64(entry + 8))
        store32(data + 8, last)
        store32(routes.hits + 4 * hop, routes.epoch)
        store32(at + VERDICT + 4 * i, shr64(last, 32))


@kernel
def look_up(burst: Burst, routes: RoutesView) -> None:
    """The NEXT_HOP of every IPv4 packet, or a verdict; FLAG is 1 if there is IPv6, which is left for `look_up6`."""
    at, n, base = burst.at, burst.count, burst.base
    checks, sources = routes.checks(burst.port), routes.sources
    store64(at + FLAG, 0)
    whole = 0 if BOUNDSCHECK or checks & CHECK_SOURCES != 0 else n & ~7
    for i in range(0, whole, 8):
        odd = forwardable8(at, base, i, sources) ^ ALL
        for k in range(i, i + 8):
            routes.fib.prefetch(load32(at + KEY + 4 * k))
        while unlikely(odd != 0):
            check(burst, i + ctz64(odd), routes)
            odd = without_lowest64(odd)
    for i in range(whole, n):
        check(burst, i, routes)
    routes.fib.lookup_burst(at + KEY, at + NEXT_HOP, n)
    hops, most = routes.hops, routes.capacity
    for i in range(n):
        hop = load32(at + NEXT_HOP + 4 * i)
        if unlikely(ult64(hop, most) == 0):
            store32(at + NEXT_HOP + 4 * i, 0)  # no such next hop: as if there were no route
        prefetch(hops + HOP_SIZE * hop)


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
