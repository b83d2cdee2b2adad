"""Eight or 64 lookups at a time in `libfp.tables.lpm4`, by vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit import load32, load64, popcount64, shl64, shr64, store32
from libfp.jit.primitive import I32, I64, primitive
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary
from libfp.tables.lpm4_slot import DEEPER, SLOT_BITS, SLOTS, WHERE


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of eight, a step of all before the next: many loads are on their way."""

    def emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
        bases = splat(builder, base, WORDS)
        slots = builder.add(bases, same(WORDS, 8 * SLOTS))
        offsets = [ir.Constant(I64, 4 * LANES * i) for i in range(groups)]
        key = [builder.zext(load(builder, builder.add(keys, offset), HALVES), WORDS) for offset in offsets]
        index = [builder.shl(builder.lshr(one, same(WORDS, 32 - SLOT_BITS)), same(WORDS, 3)) for one in key]
        word = [gather(builder, WORDS, builder.add(slots, one)) for one in index]
        leaf = [_leaf(builder, bases, *both) for both in zip(key, word, strict=True)]
        default = splat(builder, builder.load(builder.inttoptr(base, I32.as_pointer())), HALVES)
        for i, at in enumerate(leaf):
            value = gather(builder, HALVES, at)
            value = builder.select(builder.icmp_signed("==", value, same(HALVES, 0)), default, value)
            store(builder, builder.add(results, offsets[i]), value)
        deep = ir.Constant(I64, 0)
        for i, one in enumerate(word):
            marked = builder.icmp_signed("!=", builder.and_(one, same(WORDS, DEEPER)), same(WORDS, 0))
            deep = builder.or_(deep, builder.shl(mask(builder, marked), ir.Constant(I64, LANES * i)))
        return deep

    return emit


def _leaf(builder: Any, bases: Any, key: Any, word: Any) -> Any:
    """The addresses of eight leaves."""
    place = builder.or_(builder.xor(builder.lshr(key, same(WORDS, 8)), same(WORDS, -1)), same(WORDS, 32))
    rank = unary(builder, "ctpop", builder.shl(word, builder.and_(place, same(WORDS, 63))))
    leaf = builder.add(builder.lshr(word, same(WORDS, WHERE)), rank)
    return builder.add(bases, builder.shl(leaf, same(WORDS, 2)))


def _plain(base: int, keys: int, results: int, count: int) -> int:
    deep = 0
    for i in range(count):
        key = load32(keys + 4 * i)
        word = load64(base + 8 * SLOTS + 8 * (key >> (32 - SLOT_BITS)))
        deep |= shl64(shr64(word, 32) & 1, i)
        value = load32(base + 4 * (shr64(word, WHERE) + popcount64(shl64(word, ~(key >> 8) | 32))))
        store32(results + 4 * i, value if value else load32(base))
    return deep


@primitive(_emitter(1))
def lookup8(base: int, keys: int, results: int) -> int:
    """Look up the 8 addresses (u32, host order) at `keys`, in the table at `base`: the values (u32) go to `results`.

    Bit i of what is returned says that the i-th is in a slot with deep blocks: its result means nothing.
    """
    return _plain(base, keys, results, 8)


@primitive(_emitter(8))
def lookup64(base: int, keys: int, results: int) -> int:
    """The same of 64 addresses."""
    return _plain(base, keys, results, 64)
