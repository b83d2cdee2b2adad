"""Eight packets at a time: which of them are plain IPv4, and which of those are as forwarding wants them.

Nearly all are, so vector instructions ask of eight at once, and only the others go packet by packet. A lane whose
header may lie outside its frame reads the burst's own columns in its place.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.jit.primitive import I64, primitive
from libfp.packet.burst import FRAME, KEY, KIND, KIND_IPV4, LENGTH
from libfp.packet.headers import ETHERNET_SIZE
from libfp.stages.routes import FIRST_BYTES, HASH, HASH_SHIFT

ALL = (1 << LANES) - 1
PLAIN = 0x0045_0008  # EtherType, version 4 and a header of five words, as the machine loads them
IPV4_MIN = ETHERNET_SIZE + 20
_LOW16 = 0xFFFF


def _column(builder: Any, at: Any, offset: int, i: Any, size: int) -> Any:
    return builder.add(builder.add(at, ir.Constant(I64, offset)), builder.mul(i, ir.Constant(I64, size)))


def _headers(builder: Any, at: Any, base: Any, i: Any, usable: Any) -> Any:
    """Addresses of the network headers; where they are not usable, one in the burst."""
    frames = load(builder, _column(builder, at, FRAME, i, 8), WORDS)
    start = splat(builder, builder.add(base, ir.Constant(I64, ETHERNET_SIZE)), WORDS)
    own = splat(builder, builder.add(at, ir.Constant(I64, FRAME)), WORDS)
    return builder.select(usable, builder.add(frames, start), own)


def _emit_plain(context: Any, builder: Any, at: Any, base: Any, i: Any) -> Any:
    lengths = load(builder, _column(builder, at, LENGTH, i, 4), HALVES)
    whole = builder.icmp_unsigned(">=", lengths, same(HALVES, IPV4_MIN))
    headers = _headers(builder, at, base, i, whole)
    word = gather(builder, WORDS, builder.sub(headers, same(WORDS, 2)))  # EtherType, version, TOS, total length
    plain = builder.icmp_signed("==", builder.and_(word, same(WORDS, 0x00FF_FFFF)), same(WORDS, PLAIN))
    total = unary(builder, "bswap", builder.trunc(builder.lshr(word, same(WORDS, 16)), HALVES))
    total = builder.and_(total, same(HALVES, _LOW16))
    room = builder.sub(lengths, same(HALVES, IPV4_MIN))
    fits = builder.icmp_unsigned("<=", builder.sub(total, same(HALVES, 20)), room)  # 20 <= total <= length - 14
    good = builder.and_(builder.and_(whole, plain), fits)
    store(builder, _column(builder, at, KIND, i, 4), builder.select(good, same(HALVES, KIND_IPV4), same(HALVES, 0)))
    return mask(builder, good)


@primitive(_emit_plain)
def plain8(at: int, base: int, i: int) -> int:
    """A bit for each of packets `i` to `i` + 7 of the burst at `at` that is plain sound IPv4, and its KIND says so.

    It may leave any of them to the caller: without a compiler, all.
    """
    return 0


def _is_sum(builder: Any, low: Any, high: Any, last: Any) -> Any:
    """Of eight headers each: `libfp.packet.checksum.is_ipv4_sum`."""
    half, low16 = same(WORDS, 0xFFFFFFFF), same(WORDS, _LOW16)
    total = builder.zext(last, WORDS)
    for word in (low, high):
        total = builder.add(total, builder.add(builder.and_(word, half), builder.lshr(word, same(WORDS, 32))))
    total = builder.add(builder.and_(total, low16), builder.lshr(total, same(WORDS, 16)))
    total = builder.trunc(total, HALVES)  # below 2**20
    for _ in range(2):
        total = builder.add(builder.and_(total, same(HALVES, _LOW16)), builder.lshr(total, same(HALVES, 16)))
    return builder.icmp_signed("==", total, same(HALVES, _LOW16))


def _emit_forwardable(context: Any, builder: Any, at: Any, base: Any, i: Any, sources: Any) -> Any:
    kinds = load(builder, _column(builder, at, KIND, i, 4), HALVES)
    ipv4 = builder.icmp_signed("==", kinds, same(HALVES, KIND_IPV4))
    headers = _headers(builder, at, base, i, ipv4)
    low, high = gather(builder, WORDS, headers), gather(builder, WORDS, builder.add(headers, same(WORDS, 8)))
    last = gather(builder, HALVES, builder.add(headers, same(WORDS, 16)))
    source = builder.trunc(builder.lshr(high, same(WORDS, 32)), HALVES)
    good = builder.and_(ipv4, _is_sum(builder, low, high, last))
    byte = same(HALVES, 0xFF)
    ttl = builder.and_(builder.trunc(high, HALVES), byte)
    good = builder.and_(good, builder.icmp_unsigned(">=", ttl, same(HALVES, 2)))
    for address in (source, last):  # the first byte: 1 to 223 but for 127
        first = builder.and_(address, byte)
        good = builder.and_(good, builder.icmp_unsigned("<", builder.sub(first, same(HALVES, 1)), same(HALVES, 223)))
        good = builder.and_(good, builder.icmp_signed("!=", first, same(HALVES, 127)))
    place = builder.lshr(builder.mul(source, same(HALVES, HASH - (1 << 32))), same(HALVES, HASH_SHIFT))
    marks = splat(builder, builder.add(sources, ir.Constant(I64, FIRST_BYTES)), WORDS)
    mark = builder.and_(gather(builder, HALVES, builder.add(builder.zext(place, WORDS), marks)), byte)
    good = builder.and_(good, builder.icmp_signed("==", mark, same(HALVES, 0)))
    store(builder, _column(builder, at, KEY, i, 4), unary(builder, "bswap", last))
    return mask(builder, good)


@primitive(_emit_forwardable)
def forwardable8(at: int, base: int, i: int, sources: int) -> int:
    """A bit for each of eight packets that `forward` need not look at closer; their KEY is the destination.

    Those are plain IPv4 with a right checksum, a TTL of two or more, ordinary unicast addresses, and a source that is
    none of this host's by the filter at `sources`. It may leave any of them to the caller: without a compiler, all.
    """
    return 0
