"""Eight or 64 lookups at a time in `libfp.tables.lpm4`, by vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit import load32, load64, popcount64, shl64, shr64, store32
from libfp.jit.lanes import (
    HALVES,
    LANES,
    MASK,
    WORDS,
    bring_next,
    gather_some,
    load,
    same,
    splat,
    store,
    unary,
    which_have,
)
from libfp.jit.primitive import I32, I64, primitive
from libfp.tables.lpm4_slot import DEEPER, SLOT_BITS, SLOTS, WHERE


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of eight, a step of all before the next: many loads are on their way."""

    def emit(context: Any, builder: Any, base: Any, keys: Any, results: Any) -> Any:
        slots, always = builder.add(base, ir.Constant(I64, 8 * SLOTS)), same(MASK, 1)
        offsets = [ir.Constant(I64, 4 * LANES * i) for i in range(groups)]
        if groups > 1:
            bring_next(builder, keys, 4 * LANES * groups)
        key = [builder.zext(load(builder, builder.add(keys, offset), HALVES), WORDS) for offset in offsets]
        index = [builder.lshr(one, same(WORDS, 32 - SLOT_BITS)) for one in key]
        word = [gather_some(builder, slots, one, always, same(WORDS, 0)) for one in index]
        leaf = [_leaf(builder, *both) for both in zip(key, word, strict=True)]
        value = [gather_some(builder, base, at, always, same(HALVES, 0)) for at in leaf]
        for offset, one in zip(offsets, value, strict=True):
            store(builder, builder.add(results, offset), one)
        default = builder.load(builder.inttoptr(base, I32.as_pointer()))
        with builder.if_then(builder.icmp_signed("!=", default, ir.Constant(I32, 0))):  # all of them at the end: 6 %
            instead = splat(builder, default, HALVES)
            for offset, one in zip(offsets, value, strict=True):
                found = builder.icmp_signed("!=", one, same(HALVES, 0))
                store(builder, builder.add(results, offset), builder.select(found, one, instead))
        return which_have(builder, word, DEEPER)

    return emit


def _leaf(builder: Any, key: Any, word: Any) -> Any:
    """Where eight leaves are, in halves from the base."""
    place = builder.or_(builder.xor(builder.lshr(key, same(WORDS, 8)), same(WORDS, -1)), same(WORDS, 32))
    rank = unary(builder, "ctpop", builder.shl(word, builder.and_(place, same(WORDS, 63))))
    return builder.add(builder.lshr(word, same(WORDS, WHERE)), rank)


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
