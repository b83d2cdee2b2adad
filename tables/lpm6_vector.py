"""Eight or 64 lookups at a time in `libfp.tables.lpm6`, by vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit import load64, load64be, popcount64, shl64, shr64, store32
from libfp.jit.primitive import I64, primitive
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.tables.lpm6_block import ROOT_BITS, ROOTS, STEP, WHERE

#: Where the last block ends that they look into.
REACH = 48
_STEPS = (REACH - ROOT_BITS) // STEP


def _first(builder: Any, bases: Any, keys: Any) -> tuple[Any, Any]:
    """The high words of eight keys, and their roots."""
    both = [load(builder, builder.add(keys, ir.Constant(I64, 8 * LANES * i)), WORDS) for i in range(2)]
    high = builder.shuffle_vector(*both, ir.Constant(HALVES, [2 * i for i in range(LANES)]))
    high = unary(builder, "bswap", high)
    index = builder.shl(builder.lshr(high, same(WORDS, 64 - ROOT_BITS)), same(WORDS, 3))
    return high, gather(builder, WORDS, builder.add(builder.add(bases, same(WORDS, 8 * ROOTS)), index))


def _next(builder: Any, bases: Any, high: Any, word: Any, step: int) -> Any:
    """The words that eight words lead to; those that lead nowhere read where the table begins, and stay."""
    going = builder.icmp_signed("!=", builder.lshr(word, same(WORDS, 32)), same(WORDS, 0))
    place = builder.lshr(high, same(WORDS, 64 - ROOT_BITS - STEP * (step + 1)))
    left = builder.or_(builder.xor(place, same(WORDS, -1)), same(WORDS, 32))
    rank = unary(builder, "ctpop", builder.shl(word, builder.and_(left, same(WORDS, 63))))
    offset = builder.add(builder.lshr(word, same(WORDS, WHERE)), rank)
    return builder.select(going, gather(builder, WORDS, builder.add(bases, builder.shl(offset, same(WORDS, 3)))), word)


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of eight, a step of all before the next: many loads are on their way."""

    def emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
        bases = splat(builder, base, WORDS)
        starts = [builder.add(keys, ir.Constant(I64, 16 * LANES * i)) for i in range(groups)]
        lanes = [_first(builder, bases, at) for at in starts]
        for step in range(_STEPS):
            lanes = [(high, _next(builder, bases, high, word, step)) for high, word in lanes]
        default = splat(builder, builder.load(builder.inttoptr(base, I64.as_pointer())), WORDS)
        more = ir.Constant(I64, 0)
        for i, (_, word) in enumerate(lanes):
            value = builder.select(builder.icmp_signed("==", word, same(WORDS, 0)), default, word)
            store(builder, builder.add(results, ir.Constant(I64, 4 * LANES * i)), builder.trunc(value, HALVES))
            beyond = mask(builder, builder.icmp_signed("!=", builder.lshr(word, same(WORDS, 32)), same(WORDS, 0)))
            more = builder.or_(more, builder.shl(beyond, ir.Constant(I64, LANES * i)))
        return more

    return emit


def _plain(base: int, keys: int, results: int, count: int) -> int:
    more = 0
    for i in range(count):
        high = load64be(keys + 16 * i)
        word = load64(base + 8 * ROOTS + 8 * shr64(high, 64 - ROOT_BITS))
        for step in range(_STEPS):
            if shr64(word, 32):
                place = shr64(high, 64 - ROOT_BITS - STEP * (step + 1))
                word = load64(base + 8 * (shr64(word, WHERE) + popcount64(shl64(word, ~place | 32))))
        more |= shl64(shr64(word, 32) != 0, i)
        store32(results + 4 * i, word if word else load64(base))
    return more


@primitive(_emitter(1))
def lookup8(base: int, keys: int, results: int) -> int:
    """Look up the 8 addresses of 16 bytes at `keys`, in the table at `base`: the values (u32) go to `results`.

    Bit i of what is returned says that the i-th goes on beyond REACH: its result means nothing.
    """
    return _plain(base, keys, results, 8)


@primitive(_emitter(8))
def lookup64(base: int, keys: int, results: int) -> int:
    """The same of 64 addresses."""
    return _plain(base, keys, results, 64)
