"""Eight lookups at a time in `libfp.tables.lpm6`, by vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit import load32, load64, load64be, popcount64, shl64, shr64, store32
from libfp.jit.primitive import I32, I64, primitive
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.tables.lpm6_block import CHILD, FAR, OFFSET, ROOT_BITS, ROOTS, STEP

#: Where the last block ends that `lookup8` looks into.
REACH = 48
_STEPS = (REACH - ROOT_BITS) // STEP


def _emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
    both = [load(builder, builder.add(keys, ir.Constant(I64, 8 * LANES * i)), WORDS) for i in range(2)]
    high = builder.shuffle_vector(*both, ir.Constant(HALVES, [2 * i for i in range(LANES)]))
    high = unary(builder, "bswap", high)
    bases = splat(builder, base, WORDS)
    index = builder.shl(builder.lshr(high, same(WORDS, 64 - ROOT_BITS)), same(WORDS, 2))
    entry = gather(builder, HALVES, builder.add(builder.add(bases, same(WORDS, 8 * ROOTS)), index))
    for step in range(_STEPS):
        going = builder.icmp_signed("<", entry, same(HALVES, FAR - (1 << 32)))
        offset = builder.and_(builder.zext(entry, WORDS), same(WORDS, OFFSET))
        offset = builder.select(going, offset, same(WORDS, 0))  # who has arrived reads where the table begins
        at = builder.add(bases, builder.shl(offset, same(WORDS, 3)))
        place = builder.lshr(high, same(WORDS, 64 - ROOT_BITS - STEP * (step + 1)))
        left = builder.and_(builder.xor(place, same(WORDS, -1)), same(WORDS, 63))
        rank = unary(builder, "ctpop", builder.shl(gather(builder, WORDS, at), left))
        at = builder.add(at, builder.add(builder.shl(rank, same(WORDS, 2)), same(WORDS, 4)))
        entry = builder.select(going, gather(builder, HALVES, at), entry)
    default = splat(builder, builder.load(builder.inttoptr(base, I32.as_pointer())), HALVES)
    store(builder, results, builder.select(builder.icmp_signed("==", entry, same(HALVES, 0)), default, entry))
    return mask(builder, builder.icmp_signed("<", entry, same(HALVES, 0)))


@primitive(_emit)
def lookup8(base: int, keys: int, results: int) -> int:
    """Look up the 8 addresses of 16 bytes at `keys`, in the table at `base`: the values (u32) go to `results`.

    Bit i of what is returned says that the i-th has not arrived, or that its value has a word of its own: its result
    is its entry.
    """
    more = 0
    for i in range(LANES):
        high = load64be(keys + 16 * i)
        entry = load32(base + 8 * ROOTS + 4 * shr64(high, 64 - ROOT_BITS))
        for step in range(_STEPS):
            if CHILD <= entry < FAR:
                at = base + 8 * (entry & OFFSET)
                place = shr64(high, 64 - ROOT_BITS - STEP * (step + 1))
                entry = load32(at + 4 + 4 * popcount64(shl64(load64(at), ~place)))
        more |= entry >> 31 << i
        store32(results + 4 * i, entry if entry else load32(base))
    return more
