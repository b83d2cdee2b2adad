"""IPv6 unicast forwarding (RFC 8200), for the packets of a burst that are IPv6: a part of the stage `forward`."""

from __future__ import annotations

from libfp.jit import (
    kernel,
    load8,
    load32,
    load64,
    load64be,
    prefetch,
    shr64,
    store8,
    store32,
    store64,
    ult64,
    unlikely,
)
from libfp.packet.burst import (
    FOUND,
    FRAME,
    KIND,
    KIND_FLAGS,
    KIND_IPV6,
    LENGTH,
    NEXT_HOP,
    PICKED,
    VERDICT,
    WIDE,
    Burst,
)
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import FORWARD, KIND_SHIFT
from libfp.stages.multipath import look_closer
from libfp.stages.next_hops import HOP_SIZE
from libfp.stages.routes import RoutesView

_IP = ETHERNET_SIZE


@kernel
def look_up6(burst: Burst, routes: RoutesView) -> int:
    """The NEXT_HOP of every IPv6 packet, or a verdict; how many there are without. `PICKED` says which."""
    at, base = burst.at, burst.base
    keys, picked, found, m = at + WIDE, at + PICKED, at + FOUND, 0
    for i in range(burst.count):
        if load32(at + KIND + 4 * i) & ~KIND_FLAGS != KIND_IPV6:
            continue
        ip = base + load64(at + FRAME + 8 * i) + _IP
        unusual = is_unusual6(load8(ip + 8)) | is_unusual6(load8(ip + 24)) | (load8(ip + 7) < 2)
        if unlikely(unusual):
            check_unusual6(burst, i, ip)
            if load32(at + VERDICT + 4 * i) != 0:
                continue
        store64(keys + 16 * m, load64(ip + 24))
        store64(keys + 16 * m + 8, load64(ip + 32))
        store32(picked + 4 * m, i)
        m += 1
    routes.fib6.lookup_burst(keys, found, m)
    hops, most = routes.hops, routes.capacity
    for k in range(m):
        hop = load32(found + 4 * k)
        if unlikely(ult64(hop, most) == 0):
            hop = 0  # no such next hop: as if there were no route
        prefetch(hops + HOP_SIZE * hop)
        store32(at + NEXT_HOP + 4 * load32(picked + 4 * k), hop)
    return m


@kernel
def forward6(burst: Burst, routes: RoutesView) -> None:
    """Give every IPv6 packet of the burst its verdict."""
    at, base = burst.at, burst.base
    picked, m = at + PICKED, look_up6(burst, routes)
    hops, hits, epoch = routes.hops, routes.hits, routes.epoch
    back = (FORWARD << KIND_SHIFT) + burst.port
    for k in range(m):
        i = load32(picked + 4 * k)
        hop = load32(at + NEXT_HOP + 4 * i)
        entry = hops + HOP_SIZE * hop
        if unlikely(load32(at + LENGTH + 4 * i) > load64(entry + 24)):
            hop = look_closer(burst, i, routes, hop)
            if hop == 0:
                continue
            entry = hops + HOP_SIZE * hop
        data, last = base + load64(at + FRAME + 8 * i), load64(entry + 16)
        verdict = shr64(last, 32)
        if unlikely(verdict == back) and load32(at + KIND + 4 * i) & KIND_FLAGS == 0:
            burst.punt(i, "redirect")  # RFC 4861 section 8.2; no setting forbids it
            continue
        store64(data, load64(entry + 8))
        store32(data + 8, last)
        store8(data + _IP + 7, load8(data + _IP + 7) - 1)
        store32(hits + 4 * hop, epoch)
        store32(at + VERDICT + 4 * i, verdict)


@kernel
def is_unusual6(first: int) -> bool:
    """Whether an address with that first byte may be no plain global unicast: 00 (::, ::1), fe, ff."""
    return (first + 2) & 0xFF < 3


@kernel
def check_unusual6(burst: Burst, i: int, ip: int) -> None:
    """The verdict, if there is one, on a packet whose addresses or hop limit want a closer look, as Linux would."""
    source, destination = load64be(ip + 8), load64be(ip + 24)
    source_low, destination_low = load64be(ip + 16), load64be(ip + 32)
    if shr64(source, 56) == 0xFF or (source == 0 and source_low == 1):
        burst.drop(i, "martian-source")
    elif destination == 0 and destination_low == 1:
        burst.drop(i, "martian-destination")
    elif shr64(destination, 56) == 0xFF:
        burst.punt(i, "multicast")
    elif shr64(source, 54) == 0x3FA or shr64(destination, 54) == 0x3FA or (destination == 0 and destination_low == 0):
        burst.punt(i, "link-local")
    elif source == 0 and source_low == 0:
        burst.drop(i, "martian-source")
    elif load8(ip + 7) < 2:
        burst.punt(i, "ttl-expired")
