"""Which path a flow takes (RFC 2992): a hash of the fields that the kernel's `fib_multipath_hash_fields` names.

The hash is the same in both directions of a flow, as the kernel's is. All fragments of a datagram, the first included,
hash on addresses only. An ICMP error about a flow goes the way of the flow where flows are addresses alone, so that it
reaches the host that sent the packet (RFC 7690).
"""

from __future__ import annotations

from libfp.jit import kernel, load8, load16, load16be, load32, load64, mul64, shr64
from libfp.packet.burst import Burst
from libfp.packet.headers import ICMP, TCP, UDP
from libfp.stages.routes import (
    BUCKETS,
    FIELD_DPORT,
    FIELD_DST,
    FIELD_PROTOCOL,
    FIELD_SPORT,
    FIELD_SRC,
    HOP_SIZE,
    RoutesView,
)

_SCTP, _DCCP, _UDPLITE = 132, 33, 136
_FRAGMENT = 0xFF3F  # more fragments, or an offset: the 16 bits as the machine loads them


@kernel
def path_of(burst: Burst, i: int, routes: RoutesView, run: int) -> int:
    """The next hop for packet `i`, whose group has its buckets from entry `run` on."""
    fields, seed = load64(routes.hashing), load64(routes.hashing + 8)
    bucket = flow_hash(burst.data(i) + 14, fields, seed) & BUCKETS - 1
    return load32(routes.hops + HOP_SIZE * run + 4 * bucket)


@kernel
def flow_hash(ip: int, fields: int, seed: int) -> int:
    """56 bits of hash of the flow of the sound IPv4 packet at `ip`."""
    protocol, fragment = load8(ip + 9), load16(ip + 6) & _FRAGMENT != 0
    at, ports = ip, 0
    if fragment:
        fields &= FIELD_SRC | FIELD_DST
    elif fields & (FIELD_SPORT | FIELD_DPORT) == 0:
        at = _addresses_at(ip, protocol)
    elif _has_ports(protocol) and load16be(ip + 2) >= ((load8(ip) & 15) << 2) + 4:
        l4 = ip + ((load8(ip) & 15) << 2)
        source, destination = load16be(l4), load16be(l4 + 2)
        ports = _both(source if fields & FIELD_SPORT else 0, destination if fields & FIELD_DPORT else 0)
    source = load32(at + 12) if fields & FIELD_SRC else 0
    destination = load32(at + 16) if fields & FIELD_DST else 0
    key = _both(source, destination) ^ mul64(ports, 0x9E3779B97F4A7C15 - (1 << 64))
    return mix(key ^ (protocol << 56 if fields & FIELD_PROTOCOL else 0), seed)


@kernel
def mix(key: int, seed: int) -> int:
    """Every bit of the result depends on every bit of `key` (the finisher of MurmurHash3)."""
    key = mul64(key ^ seed, 0xFF51AFD7ED558CCD - (1 << 64))
    key = mul64(key ^ shr64(key, 33), 0xC4CEB9FE1A85EC53 - (1 << 64))
    return shr64(key ^ shr64(key, 33), 8)


@kernel
def _both(a: int, b: int) -> int:
    """A number that is the same for (b, a)."""
    return mul64(a + b, 0xC2B2AE3D27D4EB4F - (1 << 64)) ^ a ^ b


@kernel
def _has_ports(protocol: int) -> bool:
    return protocol in (TCP, UDP, _SCTP, _DCCP, _UDPLITE)


@kernel
def _addresses_at(ip: int, protocol: int) -> int:
    """The header whose addresses tell the flow: of an ICMP error (RFC 792), that of the packet it is about."""
    if protocol != ICMP:
        return ip
    l4, end = ip + ((load8(ip) & 15) << 2), ip + load16be(ip + 2)
    if l4 + 28 > end:
        return ip
    kind = load8(l4)
    error = kind == 3 or kind == 4 or kind == 5 or kind == 11 or kind == 12
    return l4 + 8 if error and load8(l4 + 8) >> 4 == 4 else ip
