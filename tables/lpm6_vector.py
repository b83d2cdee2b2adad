"""Eight or 64 lookups at a time in `libfp.tables.lpm6`, by vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit import load64, load64be, shl64, shr64, store32
from libfp.jit.lanes import (
    HALVES,
    LANES,
    MASK,
    WORDS,
    bring_next,
    gather_some,
    have,
    load,
    same,
    splat,
    store,
    unary,
    which_have,
)
from libfp.jit.primitive import I32, I64, primitive
from libfp.tables.lpm6_block import BITMAP, ROOT_BITS, ROOTS, STEP, WHERE, WIDE, entry_at, five, is_child

#: Where the last block ends that they look into: one of values, below so many that lead on.
REACH = 48
_STEPS = (REACH - ROOT_BITS) // STEP - 1


def _first(builder: Any, roots: Any, keys: Any) -> tuple[Any, Any, Any]:
    """The high words of eight keys, their roots, and how far to shift the former for the next five bits."""
    both = [load(builder, builder.add(keys, ir.Constant(I64, 8 * LANES * i)), WORDS) for i in range(2)]
    high = builder.shuffle_vector(*both, ir.Constant(HALVES, [2 * i for i in range(LANES)]))
    high = unary(builder, "bswap", high)
    index = builder.lshr(high, same(WORDS, 64 - ROOT_BITS))
    root = gather_some(builder, roots, index, same(MASK, 1), same(WORDS, 0))
    return high, root, same(WORDS, 64 - ROOT_BITS - STEP)


def _rank(builder: Any, word: Any, place: Any) -> Any:
    left = builder.and_(builder.or_(builder.xor(place, same(WORDS, -1)), same(WORDS, 32)), same(WORDS, 63))
    return unary(builder, "ctpop", builder.shl(word, left))


def _next(builder: Any, base: Any, high: Any, word: Any, shift: Any, step: int) -> tuple[Any, Any, Any]:
    """A step of those whose blocks are WIDE; the others stay."""
    going, now = have(builder, word, WIDE), 64 - ROOT_BITS - STEP * (step + 1)
    rank = _rank(builder, word, builder.lshr(high, same(WORDS, now)))
    offset = builder.add(builder.lshr(word, same(WORDS, WHERE + 1)), rank)
    shift = builder.select(going, same(WORDS, now - STEP), shift)
    return high, gather_some(builder, base, offset, going, word), shift


def _last(builder: Any, base: Any, high: Any, word: Any, shift: Any) -> Any:
    """The values of eight words: what they are, or what the blocks that are not WIDE say."""
    rank = _rank(builder, word, builder.lshr(high, shift))
    offset = builder.add(builder.lshr(word, same(WORDS, WHERE)), rank)
    going = builder.icmp_unsigned(">", word, same(WORDS, BITMAP))
    return gather_some(builder, base, offset, going, builder.trunc(word, HALVES))


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of eight, a step of all before the next: many loads are on their way."""

    def emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
        roots = builder.add(base, ir.Constant(I64, 8 * ROOTS))
        starts = [builder.add(keys, ir.Constant(I64, 16 * LANES * i)) for i in range(groups)]
        if groups > 1:
            bring_next(builder, keys, 16 * LANES * groups)
        lanes = [_first(builder, roots, at) for at in starts]
        for step in range(_STEPS):
            lanes = [_next(builder, base, *one, step) for one in lanes]
        default = splat(builder, builder.load(builder.inttoptr(base, I32.as_pointer())), HALVES)
        for i, (high, word, shift) in enumerate(lanes):
            value = _last(builder, base, high, word, shift)
            value = builder.select(builder.icmp_signed("==", value, same(HALVES, 0)), default, value)
            store(builder, builder.add(results, ir.Constant(I64, 4 * LANES * i)), value)
        return which_have(builder, [word for _, word, _ in lanes], WIDE)

    return emit


def _plain(base: int, keys: int, results: int, count: int) -> int:
    more = 0
    for i in range(count):
        high, depth = load64be(keys + 16 * i), ROOT_BITS
        word = load64(base + 8 * ROOTS + 8 * shr64(high, 64 - ROOT_BITS))
        while is_child(word) and depth < REACH:
            word = entry_at(base, word, five(high, 0, depth))
            depth += STEP
        more |= shl64(is_child(word), i)
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
