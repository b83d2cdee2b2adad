"""Eight lookups at a time in `libfp.tables.lpm6`, by vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit import load64, load64be, popcount64, shl64, shr64, store32
from libfp.jit.primitive import I64, primitive
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.tables.lpm6_block import ROOT_BITS, ROOTS, STEP, WHERE

#: Where the last block ends that `lookup8` looks into.
REACH = 48
_STEPS = (REACH - ROOT_BITS) // STEP


def _emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
    both = [load(builder, builder.add(keys, ir.Constant(I64, 8 * LANES * i)), WORDS) for i in range(2)]
    high = builder.shuffle_vector(*both, ir.Constant(HALVES, [2 * i for i in range(LANES)]))
    high = unary(builder, "bswap", high)
    bases = splat(builder, base, WORDS)
    index = builder.shl(builder.lshr(high, same(WORDS, 64 - ROOT_BITS)), same(WORDS, 3))
    word = gather(builder, WORDS, builder.add(builder.add(bases, same(WORDS, 8 * ROOTS)), index))
    none = same(WORDS, 0)
    for step in range(_STEPS):
        going = builder.icmp_signed("!=", builder.lshr(word, same(WORDS, 32)), none)
        place = builder.lshr(high, same(WORDS, 64 - ROOT_BITS - STEP * (step + 1)))
        left = builder.or_(builder.xor(place, same(WORDS, -1)), same(WORDS, 32))
        rank = unary(builder, "ctpop", builder.shl(word, builder.and_(left, same(WORDS, 63))))
        offset = builder.add(builder.lshr(word, same(WORDS, WHERE)), rank)  # who has arrived reads where it all begins
        found = gather(builder, WORDS, builder.add(bases, builder.shl(offset, same(WORDS, 3))))
        word = builder.select(going, found, word)
    default = splat(builder, builder.load(builder.inttoptr(base, I64.as_pointer())), WORDS)
    value = builder.select(builder.icmp_signed("==", word, none), default, word)
    store(builder, results, builder.trunc(value, HALVES))
    return mask(builder, builder.icmp_signed("!=", builder.lshr(word, same(WORDS, 32)), none))


@primitive(_emit)
def lookup8(base: int, keys: int, results: int) -> int:
    """Look up the 8 addresses of 16 bytes at `keys`, in the table at `base`: the values (u32) go to `results`.

    Bit i of what is returned says that the i-th goes on beyond REACH: its result means nothing.
    """
    more = 0
    for i in range(LANES):
        high = load64be(keys + 16 * i)
        word = load64(base + 8 * ROOTS + 8 * shr64(high, 64 - ROOT_BITS))
        for step in range(_STEPS):
            if shr64(word, 32):
                place = shr64(high, 64 - ROOT_BITS - STEP * (step + 1))
                word = load64(base + 8 * (shr64(word, WHERE) + popcount64(shl64(word, ~place | 32))))
        more |= int(shr64(word, 32) != 0) << i
        store32(results + 4 * i, word if word else load64(base))
    return more
