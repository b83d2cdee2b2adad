"""Which path a flow takes (RFC 2992): a hash of the fields that the kernel's `fib_multipath_hash_fields` names.

The hash is the same in both directions of a flow, as the kernel's is. All fragments of a datagram, the first included,
hash on addresses only. An ICMP error about a flow goes the way of the flow where flows are addresses alone, so that it
reaches the host that sent the packet (RFC 7690).
"""

from __future__ import annotations

from libfp.jit import kernel, load8, load16, load16be, load32, load64, mul64, shr64, store32, ult64
from libfp.packet.burst import KIND, KIND_KEPT, NEXT_HOP, Burst
from libfp.packet.headers import ETHERNET_SIZE, FRAGMENT, ICMP, ICMPV6, IPV6_SIZE, TCP, UDP
from libfp.packet.verdict import KIND_SHIFT, PUNT, reason_code
from libfp.stages.next_hops import ACTION_FORWARD, ACTION_MULTIPATH, BUCKETS, HOP_SIZE
from libfp.stages.notes import note
from libfp.stages.routes import FIELD_DPORT, FIELD_DST, FIELD_LABEL, FIELD_PROTOCOL, FIELD_SPORT, FIELD_SRC, RoutesView

# As sets of bits: a chain of comparisons may become a jump by way of a table.
_WITH_PORTS = 1 << TCP | 1 << UDP | 1 << 33  # DCCP
_WITH_PORTS_128 = 1 << 132 - 128 | 1 << 136 - 128  # SCTP, UDP-Lite
_ERRORS = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 11 | 1 << 12
_PORTS = FIELD_SPORT | FIELD_DPORT
_NO_NEIGHBOUR = (PUNT << KIND_SHIFT) + reason_code("no-neighbour")
ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_FRAGMENT = 0xFF3F  # more fragments, or an offset: the 16 bits as the machine loads them


@kernel
def look_closer(burst: Burst, i: int, routes: RoutesView, hop: int) -> int:
    """The next hop of a packet whose own does not simply send it: a path of a multipath route, or 0: it is settled."""
    entry, ip = routes.hops + HOP_SIZE * hop, burst.data(i) + ETHERNET_SIZE
    if load64(entry) & 0xFF == ACTION_MULTIPATH:
        hop = path_of(ip, routes, load64(entry + 8))
        if ult64(hop, routes.capacity) == 0:
            hop = 0
        store32(burst.at + NEXT_HOP + 4 * i, hop)
        entry = routes.hops + HOP_SIZE * hop
    what = load64(entry)
    if what & 0xFF != ACTION_FORWARD:
        verdict = shr64(load64(entry + 16), 32)
        if verdict == _NO_NEIGHBOUR and load32(burst.at + KIND + 4 * i) & KIND_KEPT != 0:
            note(routes.notes, hop, ip, routes.epoch)
        burst.settle(i, verdict)
    elif (IPV6_SIZE + load16be(ip + 4) if load8(ip) >> 4 == 6 else load16be(ip + 2)) > what >> 24:
        burst.punt(i, "fragment-needed")
    else:
        return hop  # a frame that is longer than its packet
    return 0


@kernel
def path_of(ip: int, routes: RoutesView, run: int) -> int:
    """The next hop for the packet at `ip`, whose group has its buckets from entry `run` on."""
    seed = load64(routes.hashing)
    if load8(ip) >> 4 == 6:
        key = flow6(ip, load64(routes.hashing + 48))
    else:
        key = flow4(ip, ip + load16be(ip + 2), load64(routes.hashing + 32))
    return load32(routes.hops + HOP_SIZE * run + 4 * (mix(key, seed) & BUCKETS - 1))


@kernel
def flow4(ip: int, end: int, fields: int) -> int:
    """A number for the flow of the sound IPv4 packet at `ip`."""
    protocol, l4, at = load8(ip + 9), ip + ((load8(ip) & 15) << 2), ip
    if load16(ip + 6) & _FRAGMENT != 0:
        fields &= FIELD_SRC | FIELD_DST
    elif protocol == ICMP and fields & _PORTS == 0 and is_error(l4, end - 20):
        at = l4 + 8 if load8(l4 + 8) >> 4 == 4 else ip
    source = load32(at + 12) if fields & FIELD_SRC else 0
    destination = load32(at + 16) if fields & FIELD_DST else 0
    return both(source, destination) ^ upper(fields, protocol, l4, end)


@kernel
def flow6(ip: int, fields: int) -> int:
    """A number for the flow of the sound IPv6 packet at `ip`. Extension headers are not skipped."""
    protocol, l4, at = load8(ip + 6), ip + IPV6_SIZE, ip
    end = l4 + load16be(ip + 4)
    if protocol == FRAGMENT:
        fields &= FIELD_SRC | FIELD_DST
    elif protocol == ICMPV6 and fields & _PORTS == 0 and is_error6(l4, end):
        at = l4 + 8
        protocol = load8(at + 6)
    source = load64(at + 8) ^ mul64(load64(at + 16), ODD) if fields & FIELD_SRC else 0
    destination = load64(at + 24) ^ mul64(load64(at + 32), ODD) if fields & FIELD_DST else 0
    label = load32(at) & 0xFFFF0F00 if fields & FIELD_LABEL else 0
    return both(source, destination) ^ label << 24 ^ upper(fields, protocol, l4, end)


@kernel
def upper(fields: int, protocol: int, l4: int, end: int) -> int:
    """Protocol and ports, as far as they belong to the flow."""
    key = protocol << 56 if fields & FIELD_PROTOCOL else 0
    known = _WITH_PORTS if protocol < 64 else _WITH_PORTS_128 if protocol >> 6 == 2 else 0
    if fields & _PORTS != 0 and shr64(known, protocol & 63) & 1 != 0 and l4 + 4 <= end:
        source, destination = load16be(l4), load16be(l4 + 2)
        key ^= mul64(both(source if fields & FIELD_SPORT else 0, destination if fields & FIELD_DPORT else 0), ODD)
    return key


@kernel
def is_error(l4: int, end: int) -> bool:
    """Whether the ICMP message (RFC 792) at `l4` is about another packet, whose first 20 bytes end before `end`."""
    if l4 + 8 > end:
        return False
    kind = load8(l4)
    return kind < 64 and shr64(_ERRORS, kind) & 1 != 0


@kernel
def is_error6(l4: int, end: int) -> bool:
    """Whether the ICMPv6 message (RFC 4443) at `l4` is about another packet, whose header ends before `end`."""
    return l4 + 8 + IPV6_SIZE <= end and load8(l4) < 128 and load8(l4 + 8) >> 4 == 6


@kernel
def mix(key: int, seed: int) -> int:
    """Every bit of the result depends on every bit of `key` (the finisher of MurmurHash3)."""
    key ^= seed
    key = mul64(key ^ shr64(key, 33), 0xFF51AFD7ED558CCD - (1 << 64))
    key = mul64(key ^ shr64(key, 33), 0xC4CEB9FE1A85EC53 - (1 << 64))
    return shr64(key ^ shr64(key, 33), 8)


@kernel
def both(a: int, b: int) -> int:
    """A number that is the same for (b, a)."""
    return mul64(a + b, 0xC2B2AE3D27D4EB4F - (1 << 64)) ^ a ^ b
