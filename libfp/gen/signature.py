"""What a generated packet carries, so that its receiver can tell what became of it: 18 bytes of UDP payload.

    0            word     sequence number (40 bits), stream (16 bits), magic (8 bits); in the machine's order
    8            word     when it was sent: ticks of `libfp.jit.clock`, which are those of this machine alone
    last two     check    at an even offset: the payload's 16-bit words add up to zero, modulo 2^16 - 1 (RFC 1071)

The check covers the whole payload, and its two parts are at both ends, so that the head of one packet with the tail of
another does not pass. It also makes the payload count for nothing in the UDP checksum, which is therefore right and the
same in all packets of a flow. An IPv4 frame of 60 bytes, 64 on the wire, has just room; one of IPv6 has 80, 84.
"""

from __future__ import annotations

from libfp.jit import (
    inline,
    kernel,
    load8,
    load16,
    load16be,
    load32,
    load64,
    load64_in,
    shr64,
    store16,
    store64,
)
from libfp.packet.checksum import is_zero_sum

SIGNATURE = 18
FCS = 4  # bytes of a frame on the wire that no port sees

#: Where the UDP payload of a packet begins, without IPv4 options or IPv6 extension headers.
PAYLOAD4, PAYLOAD6 = 14 + 20 + 8, 14 + 40 + 8
#: The UDP ports of a test: to echo, and those it comes from begin with that of RFC 2544, C.2.6.4.
ECHO, FIRST_SOURCE = 7, 0xC020

SEQUENCE_BITS, STREAM_BITS = 40, 16
MAGIC = 0x5F
SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1
STREAM_MASK = (1 << STREAM_BITS) - 1
_MAGIC_AT = SEQUENCE_BITS + STREAM_BITS

_IPV4, _IPV6, _UDP, _PLAIN = 0x0008, 0xDD86, 17, 0x45  # the types as the machine loads them


def first_word(stream: int) -> int:
    """The first word of sequence number 0."""
    return MAGIC << _MAGIC_AT | stream << SEQUENCE_BITS


@kernel
@inline
def fold(total):  # type: ignore[no-untyped-def]
    """A sum of words below 2^47, as 16 bits."""
    total = (total & 0xFFFFFFFF) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@kernel
@inline
def halves(value):  # type: ignore[no-untyped-def]
    """The two 32-bit halves of a word, added: the same modulo 2^16 - 1."""
    return (value & 0xFFFFFFFF) + shr64(value, 32)


@kernel
@inline
def sign(data, payload, length, word, time, total):  # type: ignore[no-untyped-def]
    """Write the signature of a frame of `length` bytes at `data`. `total` is the sum of its filler and of `time`."""
    store64(data + payload, word)
    store64(data + payload + 8, time)
    store16(data + payload + ((length - payload - 2) & ~1), fold(total + halves(word)) ^ 0xFFFF)


@kernel
@inline
def payload_of(data, length):  # type: ignore[no-untyped-def]
    """Where the payload begins in the frame of `length` bytes at `data`, if it can be a packet of ours; else 0."""
    if length < PAYLOAD4 + SIGNATURE:
        return 0
    kind = load16(data + 12)
    if kind == _IPV4:
        ours = int(load8(data + 14) == _PLAIN) & int(load8(data + 23) == _UDP)
        payload = PAYLOAD4
    else:
        ours = int(kind == _IPV6) & int(load8(data + 20) == _UDP) & int(length >= PAYLOAD6 + SIGNATURE)
        payload = PAYLOAD6
    if not ours:
        return 0
    size = load16be(data + payload - 4) - 8
    fits = int(size >= SIGNATURE) & int(payload + size <= length) & int(load16be(data + payload - 6) == ECHO)
    return payload if fits & int(load8(data + payload + 7) == MAGIC) else 0


@kernel
@inline
def is_intact(data, payload):  # type: ignore[no-untyped-def]
    """Whether the payload adds up."""
    at, size = data + payload, load16be(data + payload - 4) - 8
    total, words = 0, size >> 3
    for i in range(words):
        total += halves(load64_in(at, 8 * i))
    at, rest = at + 8 * words, size & 7
    if rest & 4:
        total += load32(at)
        at += 4
    if rest & 2:
        total += load16(at)
        at += 2
    if rest & 1:
        total += load8(at)
    return is_zero_sum(total)


@kernel
@inline
def word_of(data, payload):  # type: ignore[no-untyped-def]
    """The first word of the signature."""
    return load64(data + payload)
