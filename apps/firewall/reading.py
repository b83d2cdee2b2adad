"""What a packet is to connection tracking: the flow it belongs to, its key among the rules, and whether it is sound.

Of each packet of a burst a 32-bit word is made: a WHAT, in its low half, and the slot of its header for the Acl above
it. What Linux would have to see (fragments, extension headers, other protocols) is punted by name.
"""

from __future__ import annotations

from libfp.apps.firewall.conntrack_tcp import BAD, CHECKSUM, TCP_INDEX
from libfp.jit import (
    bswap16,
    kernel,
    load8,
    load16be,
    load32,
    load32be,
    load64,
    load64be,
    shr64,
    store32,
    store32be,
    store64,
    unlikely,
)
from libfp.packet.burst import Burst
from libfp.packet.checksum import is_ipv4_sum
from libfp.packet.headers import ICMP, ICMPV6, IPV6_SIZE, TCP, UDP
from libfp.tables.flow_view import KIND, key4, key6

# A WHAT: 0 for a packet that has its verdict; else one of these, and what kind of segment or message in the low bits.
UNSOUND, SEGMENT, DATAGRAM, ECHO, ERROR = 0x10, 0x20, 0x30, 0x40, 0x50
REQUEST, REPLY = 1, 2  # of ECHO, and of an ERROR about one
WHOLE_KIND = 0xF0
UNKNOWN = 0x100  # no flow was found for it

_ERRORS = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 11 | 1 << 12
_KNOWN = 18  # the highest type of ICMP that Linux knows


@kernel
def sum_of(at, size):  # type: ignore[no-untyped-def]
    """A number whose ones' complement sum is that of the `size` bytes, 8 at least, at `at`."""
    total = 0
    for k in range(0, size & ~7, 8):
        word = load64(at + k)
        total += (word & 0xFFFFFFFF) + shr64(word, 32)
    rest = size & 7
    if rest != 0:
        word = shr64(load64(at + size - 8), 64 - 8 * rest)
        total += (word & 0xFFFFFFFF) + shr64(word, 32)
    return total


@kernel
def is_sum(total):  # type: ignore[no-untyped-def]
    """Whether data that add up to `total` have a right checksum."""
    return total != 0 and is_ipv4_sum(total, 0, 0)


@kernel
def _pseudo(protocol, size):  # type: ignore[no-untyped-def]
    """Protocol and length of the pseudo-header, as the machine loads them."""
    return (protocol << 8) + bswap16(size & 0xFFFF)


@kernel
def _told(l4, size, protocol, rules):  # type: ignore[no-untyped-def]
    """The WHAT of `size` bytes of TCP or UDP, a whole header at least, without their checksum."""
    if protocol == TCP:
        header = load8(l4 + 12) >> 4 << 2
        index = load8(rules + TCP_INDEX + (load8(l4 + 13) & 0x37))
        return UNSOUND if header < 20 or header > size or index == BAD else SEGMENT | index
    length = load16be(l4 + 4)
    return UNSOUND if length < 8 or length > size else DATAGRAM


@kernel
def read4(burst: Burst, i, ip, line, header, rules):  # type: ignore[no-untyped-def]
    """The WHAT of a plain IPv4 packet; its key goes to `line`, and its `header`, but for the last two bytes."""
    protocol, l4, size = load8(ip + 9), ip + 20, load16be(ip + 2) - 20
    store64(line + KIND, 0)
    if unlikely(load16be(ip + 6) & 0x3FFF != 0):
        burst.punt(i, "fragment")
        return 0
    ends = load64(ip + 12)
    if protocol in (TCP, UDP):
        if unlikely(size < (20 if protocol == TCP else 8)):
            burst.punt(i, "truncated")
            return 0
        what = _told(l4, size, protocol, rules)
        if load64(rules + CHECKSUM) != 0 and (protocol == TCP or load16be(l4 + 6) != 0):
            total = (ends & 0xFFFFFFFF) + shr64(ends, 32) + _pseudo(protocol, size)
            if unlikely(not is_sum(total + sum_of(l4, size))):
                what = UNSOUND
        ports = load32be(l4)
        swapped = key4(line, load32be(ip + 12), ports >> 16, load32be(ip + 16), ports & 0xFFFF, protocol)
        store64(line + KIND, 2 | swapped << 8)
    elif protocol == ICMP:
        if size < 8:
            burst.punt(i, "truncated")
            return 0
        what = _icmp4(burst, i, ip, l4, size, line, rules)
    else:
        burst.punt(i, "untracked-protocol")
        return 0
    store64(header, ends)
    store32(header + 8, load32(l4))
    store32be(header + 12, protocol << 24 | (load8(l4 + 13) << 16 if protocol == TCP else 0))
    return what


@kernel
def _icmp4(burst: Burst, i, ip, l4, size, line, rules):  # type: ignore[no-untyped-def]
    kind, code = load8(l4), load8(l4 + 1)
    if kind > _KNOWN or (load64(rules + CHECKSUM) != 0 and not is_sum(sum_of(l4, size))):
        return UNSOUND
    if kind & ~8 == 0 and code == 0:
        source, destination, identifier = load32be(ip + 12), load32be(ip + 16), load16be(l4 + 4)
        store64(line + KIND, 2 | key4(line, source, identifier, destination, identifier, ICMP) << 8)
        return ECHO | (REQUEST if kind == 8 else REPLY)
    if shr64(_ERRORS, kind) & 1 != 0:
        return _quoted4(l4 + 8, l4 + size, load32be(ip + 16), line)
    burst.punt(i, "untracked-icmp")
    return 0


@kernel
def _quoted4(ip, end, to, line):  # type: ignore[no-untyped-def]
    """The WHAT of an error to address `to` about the packet at `ip`, whose flow's key goes to `line`."""
    if ip + 20 > end:
        return UNSOUND
    header, protocol = (load8(ip) & 15) << 2, load8(ip + 9)
    l4, source = ip + header, load32be(ip + 12)
    if header < 20 or l4 > end or load16be(ip + 6) & 0x1FFF != 0 or source != to:
        return UNSOUND
    ports, what = 0, ERROR
    if protocol in (TCP, UDP):
        if l4 + 4 > end:
            return UNSOUND
        ports = load32be(l4)
    elif protocol == ICMP:
        if l4 + 8 > end:
            return UNSOUND
        kind = load8(l4)
        if kind & ~8 != 0 or load8(l4 + 1) != 0:
            return ERROR
        ports, what = load16be(l4 + 4) * 0x10001, ERROR | (REQUEST if kind == 8 else REPLY)
    else:
        return ERROR
    store64(line + KIND, 2 | key4(line, source, ports >> 16, load32be(ip + 16), ports & 0xFFFF, protocol) << 8)
    return what


@kernel
def _key_of(ip, line, ports, protocol):  # type: ignore[no-untyped-def]
    """Store the key of the flow of an IPv6 packet."""
    source, destination = (load64be(ip + 8), load64be(ip + 16)), (load64be(ip + 24), load64be(ip + 32))
    store64(line + KIND, 5 | key6(line, source, ports >> 16, destination, ports & 0xFFFF, protocol) << 8)


@kernel
def read6(burst: Burst, i, ip, line, header, rules):  # type: ignore[no-untyped-def]
    """`read4` of an IPv6 packet."""
    protocol, l4, size = load8(ip + 6), ip + IPV6_SIZE, load16be(ip + 4)
    store64(line + KIND, 0)
    if protocol != TCP and protocol != UDP and protocol != ICMPV6:
        extension = protocol in (0, 43, 44, 51, 60, 135, 139, 140)
        if extension:
            burst.punt(i, "ipv6-extension")
        else:
            burst.punt(i, "untracked-protocol")
        return 0
    if unlikely(size < (20 if protocol == TCP else 8)):
        burst.punt(i, "truncated")
        return 0
    sound = True
    if load64(rules + CHECKSUM) != 0 and (protocol != UDP or load16be(l4 + 6) != 0):
        sound = is_sum(sum_of(ip + 8, 32 + size) + _pseudo(protocol, size))
    if protocol == ICMPV6:
        what = _icmp6(burst, i, ip, l4, size, line) if sound else UNSOUND
        if what == 0:
            return 0
    else:
        what = _told(l4, size, protocol, rules) if sound else UNSOUND
        _key_of(ip, line, load32be(l4), protocol)
    for k in range(0, 32, 8):
        store64(header + k, load64(ip + 8 + k))
    store32(header + 32, load32(l4))
    store32be(header + 36, protocol << 24 | (load8(l4 + 13) << 16 if protocol == TCP else 0))
    return what


@kernel
def _icmp6(burst: Burst, i, ip, l4, size, line):  # type: ignore[no-untyped-def]
    kind, code = load8(l4), load8(l4 + 1)
    if kind < 128:
        return _quoted6(l4 + 8, l4 + size, ip, line)
    if kind < 130 and code == 0:
        _key_of(ip, line, load16be(l4 + 4) * 0x10001, ICMPV6)
        return ECHO | (REQUEST if kind == 128 else REPLY)
    if (kind >= 130 and kind <= 137) or kind == 143:
        burst.punt(i, "neighbour-discovery")
    else:
        burst.punt(i, "untracked-icmp")
    return 0


@kernel
def _quoted6(ip, end, outer, line):  # type: ignore[no-untyped-def]
    """The WHAT of the error in the packet at `outer` about the packet at `ip`, whose flow's key goes to `line`."""
    l4, protocol = ip + IPV6_SIZE, 0
    if l4 > end or load8(ip) >> 4 != 6:
        return UNSOUND
    if load64(ip + 8) != load64(outer + 24) or load64(ip + 16) != load64(outer + 32):
        return UNSOUND
    ports, what, protocol = 0, ERROR, load8(ip + 6)
    if protocol in (TCP, UDP):
        if l4 + 4 > end:
            return UNSOUND
        ports = load32be(l4)
    elif protocol == ICMPV6:
        if l4 + 8 > end:
            return UNSOUND
        kind = load8(l4)
        if kind >> 1 != 64 or load8(l4 + 1) != 0:
            return ERROR
        ports, what = load16be(l4 + 4) * 0x10001, ERROR | (REQUEST if kind == 128 else REPLY)
    else:
        return ERROR
    _key_of(ip, line, ports, protocol)
    return what
