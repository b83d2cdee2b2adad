"""Unicast forwarding, deciding as Linux would and leaving to Linux what it must decide itself.

What is asked of IPv4 packets is in `libfp.stages.forwarding4`, IPv6 in `forwarding6`.
"""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import (
    BOUNDSCHECK,
    ctz64,
    kernel,
    load8,
    load32,
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
    LENGTH,
    NEXT_HOP,
    VERDICT,
    Burst,
)
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import FORWARD, KIND_SHIFT
from libfp.stages.forwarding4 import check, is_kept
from libfp.stages.forwarding6 import forward6, look_up6
from libfp.stages.ipv4_vector import ALL, forwardable8
from libfp.stages.multipath import look_closer
from libfp.stages.next_hops import HOP_SIZE
from libfp.stages.routes import CHECK_SOURCES, PORT_REDIRECTS, RoutesView, out_port

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
