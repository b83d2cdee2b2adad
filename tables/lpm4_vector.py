"""Eight lookups at a time in `libfp.tables.lpm4`, by vector instructions."""

from __future__ import annotations

from typing import Any

from libfp.jit import load32, load64, popcount64, shl64, shr64, store32
from libfp.jit.primitive import I32, primitive
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.tables.lpm4_slot import DEEPER, SLOT_BITS, SLOTS, WHERE


def _emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
    key = builder.zext(load(builder, keys, HALVES), WORDS)
    bases = splat(builder, base, WORDS)
    index = builder.lshr(key, same(WORDS, 32 - SLOT_BITS))
    slot = builder.add(builder.add(bases, same(WORDS, 8 * SLOTS)), builder.shl(index, same(WORDS, 3)))
    word = gather(builder, WORDS, slot)
    place = builder.or_(builder.xor(builder.lshr(key, same(WORDS, 8)), same(WORDS, -1)), same(WORDS, 32))
    rank = unary(builder, "ctpop", builder.shl(word, builder.and_(place, same(WORDS, 63))))
    leaf = builder.add(builder.lshr(word, same(WORDS, WHERE)), rank)
    value = gather(builder, HALVES, builder.add(bases, builder.shl(leaf, same(WORDS, 2))))
    deeper = builder.icmp_signed("!=", builder.and_(word, same(WORDS, DEEPER)), same(WORDS, 0))
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
        word = load64(base + 8 * SLOTS + 8 * (key >> (32 - SLOT_BITS)))
        deep |= (shr64(word, 32) & 1) << i
        value = load32(base + 4 * (shr64(word, WHERE) + popcount64(shl64(word, ~(key >> 8) | 32))))
        store32(results + 4 * i, value if value else load32(base))
    return deep
