"""Eight lookups at a time in `libfp.tables.lpm4`, by vector instructions."""

from __future__ import annotations

from typing import Any

from libfp.jit import load32, load64, popcount64, shl64, store32
from libfp.jit.primitive import I32, primitive
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.tables.lpm4_slot import DEEPER, SLOTS


def _emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
    key = builder.zext(load(builder, keys, HALVES), WORDS)
    bases = splat(builder, base, WORDS)
    slot = builder.add(bases, builder.shl(builder.lshr(key, same(WORDS, 14)), same(WORDS, 4)))
    second = gather(builder, WORDS, builder.add(slot, same(WORDS, 8 * SLOTS + 8)))
    bitmap = gather(builder, WORDS, builder.add(slot, same(WORDS, 8 * SLOTS)))
    place = builder.lshr(key, same(WORDS, 8))
    left = builder.and_(builder.xor(place, same(WORDS, -1)), same(WORDS, 63))
    rank = unary(builder, "ctpop", builder.shl(bitmap, left))
    deeper = builder.icmp_signed("!=", builder.and_(second, same(WORDS, DEEPER)), same(WORDS, 0))
    at = builder.add(builder.add(bases, builder.and_(second, same(WORDS, ~DEEPER))), builder.shl(rank, same(WORDS, 2)))
    value = gather(builder, HALVES, at)
    default = splat(builder, builder.load(builder.inttoptr(base, I32.as_pointer())), HALVES)
    store(builder, results, builder.select(builder.icmp_signed("==", value, same(HALVES, 0)), default, value))
    return mask(builder, deeper)


@primitive(_emit)
def lookup8(base: int, keys: int, results: int) -> int:
    """Look up the 8 addresses (u32, host order) at `keys`, in the table at `base`: the values (u32) go to `results`.

    Bit i of what is returned says that the i-th is in a slot with deep blocks: its result means nothing.
    """
    deep = 0
    for i in range(LANES):
        key = load32(keys + 4 * i)
        slot = base + 8 * SLOTS + (key >> 14) * 16
        second = load64(slot + 8)
        deep |= (second & DEEPER) << i
        value = load32(base + (second & ~DEEPER) + 4 * popcount64(shl64(load64(slot), ~(key >> 8))))
        store32(results + 4 * i, value if value else load32(base))
    return deep
