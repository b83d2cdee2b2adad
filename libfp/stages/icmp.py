"""ICMP errors that libfp makes itself, about packets that Linux must never get: RFC 792 and RFC 1812 4.3.2 for IPv4,
RFC 4443 for IPv6. All others are Linux's: punt the packet.
"""

from __future__ import annotations

from libfp.jit import (
    copy,
    kernel,
    load8,
    load16be,
    load32,
    load64,
    load64be,
    shr64,
    store8,
    store16be,
    store32,
    store32be,
    store64,
)
from libfp.packet.burst import KIND, KIND_FLAGS, KIND_IPV4, KIND_IPV6, NEXT_HOP, Burst
from libfp.packet.checksum import checksum
from libfp.packet.headers import ETHERNET_SIZE, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMP, ICMPV6, IPV6_SIZE
from libfp.stages.notes import may_send_error
from libfp.stages.routes import RoutesView

UNREACHABLE, TIME_EXCEEDED = 3, 11  # ICMP types
FRAGMENTATION_NEEDED = 4  # a code of the first
UNREACHABLE6, TOO_BIG6, TIME_EXCEEDED6 = 1, 2, 3  # ICMPv6 types

_MOST, _MOST6 = 576, 1280  # bytes of the whole packet: RFC 1812 4.3.2.3, RFC 4443 2.4 (c)
_TTL = 65  # 64 when it leaves: `forward` is yet to take one
_ERRORS = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 11 | 1 << 12  # ICMP types
_EXTENSIONS = 1 << 0 | 1 << 43 | 1 << 44 | 1 << 51 | 1 << 60  # behind which an ICMPv6 error may hide


@kernel
def icmp_error(burst: Burst, i: int, routes: RoutesView, kind: int, code: int, info: int) -> bool:
    """Make packet `i` the ICMP error, or ICMPv6 error, about itself, to its source: `forward` then sends it.

    It comes from the address of the port that the packet came in by (RFC 1812 4.3.2.4), and `packet.made` holds.
    `info` is the last word of the ICMP header: for "fragmentation needed" and "packet too big" the MTU. Afterwards
    headers are those of the error.

    False, and the packet is as it was (drop it): about other ICMP errors and later fragments, to or from addresses that
    are not one host's (RFC 1812 4.3.2.7, RFC 4443 2.4 (e)); where the port has no address of that family or the frame
    no room for the headers (28 bytes, IPv6 48); and beyond `ERRORS_A_SECOND` of `libfp.stages.notes`. `parse` has run.
    """
    if load8(burst.data(i)) & 1 != 0:  # to a group
        return False
    if burst.is_ipv4(i):
        return _error4(burst, i, routes, kind, code, info)
    if burst.is_ipv6(i):
        return _error6(burst, i, routes, kind, code, info)
    return False


@kernel
def is_error(kind: int) -> bool:
    """Whether ICMP messages of that type are about another packet."""
    return kind < 64 and shr64(_ERRORS, kind) & 1 != 0


@kernel
def _error4(burst: Burst, i: int, routes: RoutesView, kind: int, code: int, info: int) -> bool:
    packet = burst.packet(i)
    ip, ours = packet.l3, load32(routes.address(burst.port))
    first, last, total = load8(ip + 12), load8(ip + 16), load16be(ip + 2)
    if ours == 0 or first == 0 or first == 127 or first >= 224 or last >= 224 or load16be(ip + 6) & 0x1FFF != 0:
        return False
    header = (load8(ip) & 15) << 2
    if load8(ip + 9) == ICMP and (header >= total or is_error(load8(ip + header))):
        return False
    size = 28 + min(total, _MOST - 28)
    source = load32(ip + 12)
    if not _begin(burst, i, routes, ip - 28, size):
        return False
    at = ip - 28
    store16be(at - 2, ETHERTYPE_IPV4)
    store32be(at, 0x45C0_0000 | size)  # internetwork control: RFC 1812 4.3.2.5
    store32be(at + 4, 0x4000)  # cannot be fragmented, so it needs no identification: RFC 6864
    store32be(at + 8, _TTL << 24 | ICMP << 16)
    store32(at + 12, ours)
    store32(at + 16, source)
    store16be(at + 10, checksum(at, 20))
    _icmp(at + 20, kind, code, info)
    store16be(at + 22, checksum(at + 20, size - 20))
    store32(burst.at + KIND + 4 * i, KIND_IPV4 | KIND_FLAGS)
    return True


@kernel
def _error6(burst: Burst, i: int, routes: RoutesView, kind: int, code: int, info: int) -> bool:
    packet = burst.packet(i)
    ip, ours = packet.l3, routes.address(burst.port) + 8
    high, low, following = load64be(ip + 8), load64be(ip + 16), load8(ip + 6)
    if load64(ours) == 0 or (high == 0 and (low == 0 or low == 1)) or load8(ip + 8) == 0xFF or load8(ip + 24) == 0xFF:
        return False
    total = IPV6_SIZE + load16be(ip + 4)
    if following < 64 and shr64(_EXTENSIONS, following) & 1 != 0:
        return False
    if following == ICMPV6 and (total == IPV6_SIZE or load8(ip + 40) < 128 or load8(ip + 40) == 137):
        return False  # an error, or a redirect
    size = 48 + min(total, _MOST6 - 48)
    if not _begin(burst, i, routes, ip - 48, size):
        return False
    at = ip - 48
    store16be(at - 2, ETHERTYPE_IPV6)
    store32be(at, 0x6000_0000)
    store16be(at + 4, size - IPV6_SIZE)
    store8(at + 6, ICMPV6)
    store8(at + 7, _TTL)
    copy(at + 24, ip + 8, 16)
    copy(at + 8, ours, 16)
    _icmp(at + 40, kind, code, info)
    # of the pseudo-header (RFC 8200 8.1), the addresses lie in front of the message; protocol and length are added
    total = (checksum(at + 8, size - 8) ^ 0xFFFF) + ICMPV6 + size - IPV6_SIZE
    store16be(at + 42, ((total & 0xFFFF) + (total >> 16)) ^ 0xFFFF)
    store32(burst.at + KIND + 4 * i, KIND_IPV6 | KIND_FLAGS)
    return True


@kernel
def _begin(burst: Burst, i: int, routes: RoutesView, at: int, size: int) -> bool:
    """Let the packet be an Ethernet header and `size` bytes from `at` on, if it has room and the error may be sent."""
    packet = burst.packet(i)
    before = packet.data
    if packet.headroom < before - (at - ETHERNET_SIZE) or not may_send_error(routes.notes):
        return False
    packet.prepend(before - (at - ETHERNET_SIZE))
    packet.trim(packet.length - ETHERNET_SIZE - size)
    store64(at - ETHERNET_SIZE, 0)  # `forward` writes the addresses
    store32(at - 6, 0)
    store32(burst.at + NEXT_HOP + 4 * i, 0)
    return True


@kernel
def _icmp(at: int, kind: int, code: int, info: int) -> None:
    """The header of an ICMP error, checksum 0."""
    store32be(at, kind << 24 | code << 16)
    store32be(at + 4, info)
