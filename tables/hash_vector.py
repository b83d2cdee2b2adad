"""Eight or 64 lookups at a time in `libfp.tables.hash`, by vector instructions: the first bucket of each key."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from libfp.jit import ctz64, load64, shl64, store64
from libfp.jit.primitive import I8, I64, declare, primitive
from libfp.tables.buckets import (
    HALF,
    K2,
    SECRETS,
    SLOTS,
    TAGS,
    K,
    ask_second,
    elsewhere,
    entry_of,
    first_bucket,
    hash_at,
    matching,
    tag_of,
)
from libfp.tables.lanes import HALVES, LANES, WORDS, gather, load, mask, same, splat, store, unary

_BYTES = ir.VectorType(I8, 8 * LANES)
_SPREAD = ir.Constant(ir.VectorType(ir.IntType(32), 8 * LANES), [i & ~7 for i in range(8 * LANES)])
_TRUTHS = ir.VectorType(ir.IntType(1), LANES)

_SLOTS = 0x0080808080808080


def _keys(builder: Any, keys: Any, words: int) -> list[Any]:
    """Eight keys: a vector for each of their words."""
    if words > 2:
        rows = builder.add(splat(builder, keys, WORDS), ir.Constant(WORDS, [8 * words * i for i in range(LANES)]))
        return [gather(builder, WORDS, builder.add(rows, same(WORDS, 8 * i))) for i in range(words)]
    both = [load(builder, builder.add(keys, ir.Constant(I64, 8 * LANES * i)), WORDS) for i in range(words)]
    if words == 1:
        return both
    return [builder.shuffle_vector(*both, ir.Constant(HALVES, [2 * i + w for i in range(LANES)])) for w in range(2)]


def _folded(builder: Any, value: Any) -> Any:
    return builder.xor(value, builder.lshr(value, same(WORDS, 32)))


def _hash(builder: Any, key: list[Any], secrets: list[Any]) -> Any:
    total = same(WORDS, 0)
    for one, secret in zip(key, secrets, strict=True):
        word = builder.add(one, secret)
        halves = builder.and_(word, same(WORDS, HALF)), builder.lshr(word, same(WORDS, 32))
        total = builder.add(total, builder.add(builder.mul(*halves), word))
    mixed = builder.mul(_folded(builder, total), same(WORDS, K))
    return _folded(builder, builder.mul(_folded(builder, mixed), same(WORDS, K2)))


def _candidates(builder: Any, hashed: Any, tags: Any) -> Any:
    """Bit 7 of each byte of the tags that equals the key's."""
    least = builder.and_(hashed, same(WORDS, 0xFF))
    tag = builder.select(builder.icmp_unsigned("<", least, same(WORDS, 2)), same(WORDS, 2), least)
    spread = builder.bitcast(tag, _BYTES)
    spread = builder.shuffle_vector(spread, spread, _SPREAD)
    equal = builder.sext(builder.icmp_signed("==", spread, builder.bitcast(tags, _BYTES)), _BYTES)
    return builder.and_(builder.bitcast(equal, WORDS), same(WORDS, _SLOTS))


def _lowest(builder: Any, found: Any) -> Any:
    """Eight times the number of the lowest candidate, 0 where there is none."""
    below = builder.and_(builder.sub(found, same(WORDS, 1)), builder.xor(found, same(WORDS, -1)))
    return builder.and_(unary(builder, "ctpop", below), same(WORDS, 56))


def _any(builder: Any, lanes: Any) -> Any:
    """Whether any of eight words is not 0."""
    some = mask(builder, builder.icmp_signed("!=", lanes, same(WORDS, 0)))
    return builder.icmp_signed("!=", some, ir.Constant(I64, 0))


def _prefetch(builder: Any, address: Any) -> None:
    pointer, i32 = I8.as_pointer(), HALVES.element
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, i32, i32, i32)
    builder.call(function, [builder.inttoptr(address, pointer), *(ir.Constant(i32, one) for one in (0, 3, 1))])


def _ask_second(context: Any, builder: Any, *arguments: Any) -> None:
    found = context.compile_subroutine(builder, ask_second, types.void(*[types.int64] * len(arguments)))
    callee = context.declare_function(builder.module, found.fndesc)
    context.call_conv.call_function(builder, callee, types.void, [types.int64] * len(arguments), list(arguments))


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of eight, a step of all before the next: many loads are on their way."""

    def emit(
        context: Any, builder: Any, base: Any, buckets: Any, words: Any, keys: Any, results: Any, default: Any
    ) -> Any:
        count = words.constant
        at = [builder.add(keys, ir.Constant(I64, 8 * LANES * count * i)) for i in range(groups)]
        secret_at = [builder.add(base, ir.Constant(I64, SECRETS + 8 * i)) for i in range(count)]
        secrets = [splat(builder, builder.load(builder.inttoptr(one, I64.as_pointer())), WORDS) for one in secret_at]
        many = builder.and_(splat(builder, buckets, WORDS), same(WORDS, HALF))
        tags_at = splat(builder, builder.add(base, ir.Constant(I64, TAGS)), WORDS)
        lines = builder.and_(
            builder.add(builder.shl(buckets, ir.Constant(I64, 3)), ir.Constant(I64, 63)), ir.Constant(I64, -64)
        )
        entries = splat(builder, builder.add(builder.add(base, ir.Constant(I64, TAGS)), lines), WORDS)
        hashes = [_hash(builder, _keys(builder, one, count), secrets) for one in at]
        parts = [builder.mul(builder.lshr(one, same(WORDS, 32)), many) for one in hashes]
        numbers = [builder.lshr(one, same(WORDS, 32)) for one in parts]
        tags = [gather(builder, WORDS, builder.add(tags_at, builder.shl(one, same(WORDS, 3)))) for one in numbers]
        places, found = [], []
        for hashed, number, word in zip(hashes, numbers, tags, strict=True):
            candidates = _candidates(builder, hashed, word)
            index = builder.add(builder.mul(number, same(WORDS, 8 * SLOTS)), _lowest(builder, candidates))
            found.append(candidates)
            places.append(builder.add(entries, builder.mul(index, same(WORDS, count + 1))))
        for place, candidates in zip(places, found, strict=True):
            with builder.if_then(_any(builder, candidates)):
                for lane in range(LANES):
                    _prefetch(builder, builder.extract_element(place, ir.Constant(HALVES.element, lane)))
        more, defaults, second = ir.Constant(I64, 0), splat(builder, default, WORDS), []
        to = [builder.add(results, ir.Constant(I64, 8 * LANES * i)) for i in range(groups)]
        asked = ir.Constant(I64, 0)
        for i, (hashed, word) in enumerate(zip(hashes, tags, strict=True)):
            shift = builder.add(builder.and_(builder.lshr(hashed, same(WORDS, 8)), same(WORDS, 7)), same(WORDS, 56))
            second.append(builder.trunc(builder.lshr(word, shift), _TRUTHS))
            store(builder, to[i], builder.select(second[i], hashed, defaults))
            asked = builder.or_(asked, builder.shl(mask(builder, second[i]), ir.Constant(I64, LANES * i)))
        _ask_second(context, builder, base, buckets, results, asked)
        for i in range(groups):
            before, left = builder.block, mask(builder, second[i])
            with builder.if_then(_any(builder, found[i])):
                different = same(WORDS, 0)
                for w, key in enumerate(_keys(builder, at[i], count)):
                    stored = gather(builder, WORDS, builder.add(places[i], same(WORDS, 8 * w)))
                    different = builder.or_(different, builder.xor(stored, key))
                there = builder.icmp_signed("!=", found[i], same(WORDS, 0))
                hit = builder.and_(there, builder.icmp_signed("==", different, same(WORDS, 0)))
                value = gather(builder, WORDS, builder.add(places[i], same(WORDS, 8 * count)))
                others = builder.and_(found[i], builder.sub(found[i], same(WORDS, 1)))
                open_ = builder.or_(second[i], builder.icmp_signed("!=", others, same(WORDS, 0)))
                open_ = builder.and_(open_, builder.not_(hit))
                store(builder, to[i], builder.select(hit, value, builder.select(open_, hashes[i], defaults)))
                left_now, inside = mask(builder, open_), builder.block
            after = builder.phi(I64)
            after.add_incoming(left, before)
            after.add_incoming(left_now, inside)
            more = builder.or_(more, builder.shl(after, ir.Constant(I64, LANES * i)))
        return more

    return emit


def _plain(base: int, buckets: int, words: int, keys: int, results: int, default: int, count: int) -> int:
    more = 0
    for i in range(count):
        key = keys + 8 * words * i
        hashed = hash_at(base, key, words)
        bucket = first_bucket(hashed, buckets)
        tags = load64(base + TAGS + 8 * bucket)
        found = matching(tags, tag_of(hashed))
        entry = entry_of(base, buckets, words, bucket, ctz64(found) >> 3 if found else 0)
        if found and all(load64(entry + 8 * w) == load64(key + 8 * w) for w in range(words)):
            store64(results + 8 * i, load64(entry + 8 * words))
        elif found & (found - 1) or elsewhere(tags, hashed):
            store64(results + 8 * i, hashed)
            more |= shl64(1, i)
        else:
            store64(results + 8 * i, default)
    return more


@primitive(_emitter(1))
def lookup8(base: int, buckets: int, words: int, keys: int, results: int, default: int) -> int:
    """Look up the 8 keys at `keys` in the table at `base`: the values, or `default`, go to `results`.

    Bit i of what is returned says that the i-th needs its second bucket, or its first again: its result is its hash.
    `words` is a number the compiler sees.
    """
    return _plain(base, buckets, words, keys, results, default, 8)


@primitive(_emitter(8))
def lookup64(base: int, buckets: int, words: int, keys: int, results: int, default: int) -> int:
    """The same of 64 keys."""
    return _plain(base, buckets, words, keys, results, default, 64)
