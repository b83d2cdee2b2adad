"""The first stage of every pipeline that looks at packets: where the headers are, and that they lie in the frame."""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import (
    BOUNDSCHECK,
    bswap16,
    ctz64,
    kernel,
    load8,
    load16,
    load16be,
    load32,
    load64,
    shr64,
    store32,
    ult64,
    unlikely,
    without_lowest64,
)
from libfp.packet.burst import (
    KIND,
    KIND_FLAGS,
    KIND_IPV4,
    KIND_IPV4_OPTIONS,
    KIND_IPV6,
    KIND_IPV6_OPTIONS,
    Burst,
)
from libfp.packet.headers import ETHERNET_SIZE, HOP_BY_HOP, IPV6_SIZE
from libfp.stages.ipv4_vector import ALL, IPV4_MIN, PLAIN, plain8

_IPV4_TYPE = 0x0008  # 0x0800 as the machine loads it
_IPV6_TYPE = 0xDD86


@stage.headers_only
@stage.burst
def parse(burst: Burst) -> None:
    """Mark sound IPv4 packets (RFC 791, RFC 1812 section 5.2.2 without the checksum, which `forward` verifies) and
    sound IPv6 packets (RFC 8200).

    Afterwards `packet.is_ipv4` says that the header, options and all `total_length` bytes are inside the frame, and
    `packet.is_ipv6` that the header and all `payload_length` bytes are. Malformed packets are dropped by name; other
    protocols pass unmarked.
    """
    n, at, base = burst.count, burst.at, burst.base
    whole = 0 if BOUNDSCHECK else n & ~7
    for i in range(0, whole, 8):
        odd = plain8(at, base, i) ^ ALL
        while unlikely(odd != 0):
            parse_one(burst, i + ctz64(odd))
            odd = without_lowest64(odd)
    for i in range(whole, n):
        parse_one(burst, i)


@kernel
def parse_again(burst: Burst, i: int) -> None:
    """What `parse` does, for one packet that a stage has changed. What has been said of it (`keep`, `made`) holds."""
    kind = burst.at + KIND + 4 * i
    flags = load32(kind) & KIND_FLAGS
    store32(kind, 0)
    parse_one(burst, i)
    store32(kind, load32(kind) | flags)


@kernel
def parse_one(burst: Burst, i: int) -> None:
    """The KIND of one packet, or a verdict."""
    at, length = burst.data(i), burst.length(i)
    if unlikely(length < IPV4_MIN):
        if length < ETHERNET_SIZE:
            burst.drop(i, "ethernet-truncated")
        elif load16(at + 12) == _IPV4_TYPE:
            burst.drop(i, "ipv4-truncated")
        elif load16(at + 12) == _IPV6_TYPE:
            burst.drop(i, "ipv6-truncated")
        return
    word = load64(at + 12)  # type, version and header length, TOS, total length
    total = bswap16(shr64(word, 32))
    # 20 <= total <= length - 14, in one comparison
    if unlikely(word & 0x00FF_FFFF != PLAIN) or unlikely(ult64(total - 20, length - IPV4_MIN + 1) == 0):
        look_closer(burst, i, at, total, length)
        return
    store32(burst.at + KIND + 4 * i, KIND_IPV4)


@kernel
def look_closer(burst: Burst, i: int, at: int, total: int, length: int) -> None:
    """What is not a plain IPv4 header: IPv6, another protocol, options, or malformed. 34 bytes at least are there."""
    if load16(at + 12) == _IPV6_TYPE:
        parse_ipv6(burst, i, at + ETHERNET_SIZE, length - ETHERNET_SIZE)
        return
    if load16(at + 12) != _IPV4_TYPE:
        return
    header = (load8(at + ETHERNET_SIZE) & 15) << 2
    if load8(at + ETHERNET_SIZE) >> 4 != 4:
        burst.drop(i, "ipv4-version")
    elif header < 20 or total < header:
        burst.drop(i, "ipv4-header-length")
    elif ETHERNET_SIZE + total > length:
        burst.drop(i, "ipv4-truncated")
    else:
        store32(burst.at + KIND + 4 * i, KIND_IPV4_OPTIONS)


@kernel
def parse_ipv6(burst: Burst, i: int, ip: int, room: int) -> None:
    """`room` bytes at `ip` claim to be IPv6. A jumbogram (RFC 2675) has options, and is left to Linux as those are."""
    if load8(ip) >> 4 != 6:
        burst.drop(i, "ipv6-version")
    elif room < IPV6_SIZE or IPV6_SIZE + load16be(ip + 4) > room:
        burst.drop(i, "ipv6-truncated")
    else:
        options = load8(ip + 6) == HOP_BY_HOP
        store32(burst.at + KIND + 4 * i, KIND_IPV6_OPTIONS if options else KIND_IPV6)
