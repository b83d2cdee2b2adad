"""IPv4 unicast forwarding (RFC 1812), deciding as Linux would and leaving to Linux what it must decide itself."""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import kernel, load8, load16be, load32, load32be, load64, prefetch, shr64, store32, store64
from libfp.packet.burst import FRAME, KEY, KIND, KIND_IPV4, NEXT_HOP, OUT_PORT, VERDICT, Burst
from libfp.packet.checksum import checksum, ipv4_checksum_ok
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import FORWARD, KIND_SHIFT
from libfp.stages.routes import (
    ACTION_FORWARD,
    CHECK_SOURCES,
    HOP_SIZE,
    LOCAL,
    PORT_ACCEPT_LOCAL,
    PORT_REDIRECTS,
    PORT_RPF_LOOSE,
    PORT_RPF_STRICT,
    RoutesView,
    is_marked,
)

_IP = ETHERNET_SIZE


@stage.burst
def forward(burst: Burst, routes: RoutesView) -> None:
    """Verify, look up, rewrite and send the IPv4 packets of the burst.

    Dropped: wrong header checksum (RFC 1812 5.2.2), martian addresses (5.3.7, as Linux draws the line), sources that
    are this host's own, and what a route drops. Punted unchanged: sources that may fail the port's
    reverse path filter (RFC 3704), anything but IPv4, multicast and broadcast, options, TTL 1 and less, larger than the MTU of the
    next hop, no route, no neighbour yet, routes that only Linux can follow. Linux sends the ICMP errors.
    """
    at, n, base = burst.at, burst.count, burst.base
    for i in range(n):
        if load32(at + KIND + 4 * i) != KIND_IPV4:
            burst.punt(i, "not-ipv4")
            continue
        ip = base + load64(at + FRAME + 8 * i) + _IP
        if load8(ip) != 0x45:
            check_with_options(burst, i, ip)
            continue
        if not ipv4_checksum_ok(ip):
            burst.drop(i, "ipv4-checksum")
            continue
        destination, source = load32be(ip + 16), load32be(ip + 12)
        store32(at + KEY + 4 * i, destination)
        if load8(ip + 8) <= 1 or is_special(destination) or is_special(source):
            check_special(burst, i, destination, source, load8(ip + 8))
    routes.fib.lookup_burst(at + KEY, at + NEXT_HOP, n)
    hops, limit, local = routes.hops, routes.capacity, routes.local_bits
    for i in range(n):
        prefetch(hops + HOP_SIZE * load32(at + NEXT_HOP + 4 * i))
    checks, port_in = routes.checks(burst.port), burst.port
    hits, epoch = routes.hits, routes.epoch
    for i in range(n):
        if load32(at + VERDICT + 4 * i) != 0:
            continue
        hop = load32(at + NEXT_HOP + 4 * i)
        if hop >= limit or hop == 0:
            burst.punt(i, "no-route")
            continue
        data = base + load64(at + FRAME + 8 * i)
        source = load32be(data + _IP + 12)
        if checks & CHECK_SOURCES != 0 or is_marked(local, source):
            if not source_is_valid(burst, i, routes, source, checks):
                continue
        entry = hops + HOP_SIZE * hop
        what = load64(entry)
        if what & 0xFF != ACTION_FORWARD:
            burst.packet(i).settle(shr64(load64(entry + 16), 32))
            continue
        port = what >> 8 & 0xFFFF
        if load16be(data + _IP + 2) > what >> 24 & 0xFFFFFF:
            burst.punt(i, "fragment-needed")
            continue
        if port == port_in and checks & PORT_REDIRECTS != 0:
            burst.punt(i, "redirect")
            continue
        first, last = load64(entry + 8), load64(entry + 16)
        word = load64(data + _IP + 8)  # TTL, protocol, checksum, source
        checked = (word >> 16 & 0xFFFF) + 1  # RFC 1141: the TTL is the first byte of its 16-bit word
        store64(data, first)
        store32(data + 8, last)
        store32(data + _IP + 8, (word & 0xFFFF) - 1 | (checked + (checked >> 16)) << 16)
        if load32(hits + 4 * hop) != epoch:
            store32(hits + 4 * hop, epoch)
        store32(at + OUT_PORT + 4 * i, port)
        store32(at + VERDICT + 4 * i, FORWARD << KIND_SHIFT)


@kernel
def is_special(address: int) -> bool:
    """0/8, 127/8, and 224/4 and above: no plain unicast destination."""
    first = address >> 24
    return first == 0 or first == 127 or first >= 224


@kernel
def is_special_source(address: int) -> bool:
    """What no host may send from: 0/8, 127/8, multicast, the limited broadcast address."""
    first = address >> 24
    return first == 0 or first == 127 or (first >= 224 and (first < 240 or address == 0xFFFFFFFF))


@kernel
def check_special(burst: Burst, i: int, destination: int, source: int, ttl: int) -> None:
    """The verdict on a packet that `is_special` or whose TTL ends, by name; class E (240/4) is routed, as by Linux."""
    first = destination >> 24
    if is_special_source(source):
        burst.drop(i, "martian-source")
    elif destination == 0xFFFFFFFF:
        burst.punt(i, "broadcast")
    elif first == 0 or first == 127:
        burst.drop(i, "martian-destination")
    elif first >= 224 and first < 240:
        burst.punt(i, "multicast")
    elif ttl <= 1:
        burst.punt(i, "ttl-expired")


@kernel
def check_with_options(burst: Burst, i: int, ip: int) -> None:
    """A header with options goes to Linux if it is sound."""
    if checksum(ip, (load8(ip) & 15) << 2) != 0:
        burst.drop(i, "ipv4-checksum")
    else:
        burst.punt(i, "ip-options")


@kernel
def source_is_valid(burst: Burst, i: int, routes: RoutesView, source: int, checks: int) -> bool:
    """What Linux's fib_validate_source asks: not our own address, and the way back as the port's rp_filter wants it.

    Where the way back is not plain (no neighbour yet, another device) Linux is left to decide.
    """
    hop = routes.fib.lookup(source)
    what = load64(routes.hops + HOP_SIZE * hop) if hop < routes.capacity else 0
    if what & LOCAL != 0 and checks & PORT_ACCEPT_LOCAL == 0:
        burst.drop(i, "martian-source")
        return False
    if checks & (PORT_RPF_STRICT | PORT_RPF_LOOSE) == 0:
        return True
    if what & 0xFF == ACTION_FORWARD and (checks & PORT_RPF_STRICT == 0 or what >> 8 & 0xFFFF == burst.port):
        return True
    burst.punt(i, "rp-filter")
    return False
