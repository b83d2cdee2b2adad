"""Eight or 64 lookups at a time in `libfp.tables.hash`, by vector instructions.

Groups of eight are taken through the steps one behind the other, so that what they wait for arrives side by side:
tags, entries, and then keys and values. Keys that may be in their second bucket, one in twelve, are listed, and their
list is taken eight at a time too.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from libfp.jit import store64
from libfp.jit.lanes import (
    HALVES,
    LANES,
    MASK,
    WORDS,
    bring_next,
    gather,
    load,
    mask,
    prefetch,
    same,
    splat,
    store,
    unary,
)
from libfp.jit.primitive import I8, I64, declare, primitive
from libfp.tables.buckets import EDGE, HALF, K2, K3, SECRETS, SLOTS, SPAN, TAGS, K, entry_words, value_at

_BYTES = ir.VectorType(I8, 8 * LANES)
_SPREAD = ir.Constant(ir.VectorType(ir.IntType(32), 8 * LANES), [i & ~7 for i in range(8 * LANES)])
_SLOTS = 0x0080808080808080

# Room on the stack, in words: 64 hashes and one for lanes that are not used; where those store; of the keys that are
# listed the numbers and the candidates.
_NONE, _NOWHERE, _LIST, _FOUND, _ROOM = 64, 65, 72, 136, 200

# Groups whose tags are asked for before the first are looked at: what one waits for, others compute.
_AHEAD = 2
# Groups whose entries are compared before the tags of second buckets are looked at: these have come by then, and the
# entries they name come while the other groups are compared.
_TURN = 2
# Buckets beyond which entries are mostly far away, and are asked for in the second cache: the nearest one's few buffers
# are left to tags then (4 M entries: 5 percent faster; 1 M: 7 percent slower).
_LARGE = 1 << 18


def _at(builder: Any, address: Any, words: int) -> Any:
    return builder.add(address, ir.Constant(I64, 8 * words))


def _word(builder: Any, address: Any) -> Any:
    return splat(builder, builder.load(builder.inttoptr(address, I64.as_pointer())), WORDS)


def _folded(builder: Any, value: Any) -> Any:
    return builder.xor(value, builder.lshr(value, same(WORDS, 32)))


def _lowest(builder: Any, found: Any) -> Any:
    """Eight times the number of the lowest candidate, 0 where there is none."""
    below = builder.and_(builder.sub(found, same(WORDS, 1)), builder.xor(found, same(WORDS, -1)))
    return builder.and_(unary(builder, "ctpop", below), same(WORDS, 56))


def _some(builder: Any, lanes: Any) -> Any:
    return builder.icmp_signed("!=", lanes, same(WORDS, 0))


def _any(builder: Any, lanes: Any) -> Any:
    """Whether any of eight words is not 0."""
    return builder.icmp_signed("!=", mask(builder, _some(builder, lanes)), ir.Constant(I64, 0))


def _lanes(builder: Any, vector: Any) -> list[Any]:
    return [builder.extract_element(vector, ir.Constant(HALVES.element, lane)) for lane in range(LANES)]


def _prefetch(builder: Any, addresses: Any, near: int = 3) -> None:
    """`prefetch` of eight addresses."""
    for one in _lanes(builder, addresses):
        prefetch(builder, one, near)


class _Table:
    """The table in which all of a burst is looked up: what is the same for all keys."""

    def __init__(self, builder: Any, base: Any, buckets: Any, words: int) -> None:
        self.builder, self.words = builder, words
        lines = builder.add(builder.shl(buckets, ir.Constant(I64, 3)), ir.Constant(I64, 63))
        lines = builder.and_(lines, ir.Constant(I64, -64))
        first = builder.add(base, ir.Constant(I64, TAGS))
        self.tags, self.entries = splat(builder, first, WORDS), splat(builder, builder.add(first, lines), WORDS)
        self.secrets = [_word(builder, builder.add(base, ir.Constant(I64, SECRETS + 8 * i))) for i in range(words)]
        self.span, self.edge = (_word(builder, builder.add(base, ir.Constant(I64, one))) for one in (SPAN, EDGE))
        self.span = builder.and_(self.span, same(WORDS, HALF))
        span = builder.extract_element(self.span, ir.Constant(HALVES.element, 0))
        self.large = builder.icmp_unsigned(">", span, ir.Constant(I64, _LARGE))

    def keys(self, at: Any) -> list[Any]:
        """The eight keys at an address: a vector for each of their words."""
        builder, words = self.builder, self.words
        if words > 2:
            rows = builder.add(splat(builder, at, WORDS), ir.Constant(WORDS, [8 * words * i for i in range(LANES)]))
            return self.key(rows)
        both = [load(builder, _at(builder, at, LANES * i), WORDS) for i in range(words)]
        if words == 1:
            return both
        return [builder.shuffle_vector(*both, ir.Constant(HALVES, [2 * i + w for i in range(LANES)])) for w in range(2)]

    def key(self, places: Any) -> list[Any]:
        """The keys at eight addresses."""
        builder = self.builder
        return [gather(builder, WORDS, builder.add(places, same(WORDS, 8 * w))) for w in range(self.words)]

    def hash(self, key: list[Any]) -> Any:
        builder, total = self.builder, same(WORDS, 0)
        for one, secret in zip(key, self.secrets, strict=True):
            word = builder.add(one, secret)
            halves = builder.and_(word, same(WORDS, HALF)), builder.lshr(word, same(WORDS, 32))
            total = builder.add(total, builder.add(builder.mul(*halves), word))
        mixed = builder.mul(_folded(builder, total), same(WORDS, K))
        return _folded(builder, builder.mul(_folded(builder, mixed), same(WORDS, K2)))

    def bucket(self, part: Any) -> Any:
        builder = self.builder
        number = builder.lshr(builder.mul(builder.lshr(part, same(WORDS, 32)), self.span), same(WORDS, 32))
        halved = builder.icmp_unsigned("<", number, self.edge)
        return builder.select(halved, builder.lshr(number, same(WORDS, 1)), number)

    def tags_at(self, bucket: Any) -> Any:
        return self.builder.add(self.tags, self.builder.shl(bucket, same(WORDS, 3)))

    def candidates(self, hashed: Any, tags: Any) -> Any:
        """Bit 7 of each byte of the tags that equals the key's."""
        builder = self.builder
        least = builder.and_(hashed, same(WORDS, 0xFF))
        tag = builder.select(builder.icmp_unsigned("<", least, same(WORDS, 2)), same(WORDS, 2), least)
        spread = builder.bitcast(tag, _BYTES)
        spread = builder.shuffle_vector(spread, spread, _SPREAD)
        equal = builder.sext(builder.icmp_signed("==", spread, builder.bitcast(tags, _BYTES)), _BYTES)
        return builder.and_(builder.bitcast(equal, WORDS), same(WORDS, _SLOTS))

    def places(self, bucket: Any, found: Any, tags_at: Any) -> Any:
        """The address of the entry of the lowest candidate; where there is none, one that was read before."""
        builder = self.builder
        index = builder.add(builder.mul(bucket, same(WORDS, 8 * SLOTS)), _lowest(builder, found))
        place = builder.add(self.entries, builder.mul(index, same(WORDS, entry_words(self.words))))
        return builder.select(_some(builder, found), place, tags_at)

    def compare(self, key: list[Any], places: Any, found: Any) -> tuple[Any, Any]:
        """Which lanes' candidates are the keys', and their values."""
        builder, different = self.builder, same(WORDS, 0)
        for one, stored in zip(key, self.key(places), strict=True):
            different = builder.or_(different, builder.xor(stored, one))
        hit = builder.and_(_some(builder, found), builder.icmp_signed("==", different, same(WORDS, 0)))
        return hit, gather(builder, WORDS, builder.add(places, same(WORDS, 8 * self.words)))

    def settle(self, key: list[Any], bucket: Any, tags_at: Any, places: Any, found: Any) -> tuple[Any, Any]:
        """Which lanes' keys are among the candidates, `places` being those of the lowest; and their values."""
        builder = self.builder

        def others(hit: Any, candidates: Any) -> Any:
            fewer = builder.and_(candidates, builder.sub(candidates, same(WORDS, 1)))
            return builder.select(hit, same(WORDS, 0), fewer)

        first_hit, first_value = self.compare(key, places, found)
        first_left, before = others(first_hit, found), builder.block
        again, done = builder.append_basic_block("others"), builder.append_basic_block("settled")
        builder.cbranch(_any(builder, first_left), again, done)  # another key's tag is as its own
        builder.position_at_end(again)
        hit, value, left = builder.phi(MASK), builder.phi(WORDS), builder.phi(WORDS)
        this, its_value = self.compare(key, self.places(bucket, left, tags_at), left)
        now_hit, now_value = builder.or_(hit, this), builder.select(this, its_value, value)
        now_left = others(this, left)
        for phi, was, now in (hit, first_hit, now_hit), (value, first_value, now_value), (left, first_left, now_left):
            phi.add_incoming(was, before)
            phi.add_incoming(now, again)
        builder.cbranch(_any(builder, now_left), again, done)
        builder.position_at_end(done)
        hit, value = builder.phi(MASK), builder.phi(WORDS)
        for phi, was, now in (hit, first_hit, now_hit), (value, first_value, now_value):
            phi.add_incoming(was, before)
            phi.add_incoming(now, again)
        return hit, value


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of eight."""

    def emit(
        context: Any, builder: Any, base: Any, buckets: Any, words: Any, keys: Any, results: Any, default: Any
    ) -> None:
        count = words.constant
        table = _Table(builder, base, buckets, count)
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(I64, _ROOM))
            room.align = 64
        room = builder.ptrtoint(room, I64)
        at = [_at(builder, keys, LANES * count * i) for i in range(groups)]
        to = [_at(builder, results, LANES * i) for i in range(groups)]

        def word(index: Any, field: int) -> Any:
            return builder.add(_at(builder, room, field), builder.shl(index, ir.Constant(I64, 3)))

        def row(index: Any, field: int) -> Any:
            return word(builder.shl(index, ir.Constant(I64, 3)), field)

        asked, places, found = list[Any](), list[Any](), list[Any]()
        second, defaults = ir.Constant(I64, 0), splat(builder, default, WORDS)
        for turn in range(groups + _AHEAD):
            if turn < groups:
                if groups > 1:
                    bring_next(builder, at[turn], 8 * LANES * count)
                hashed = table.hash(table.keys(at[turn]))
                bucket = table.bucket(hashed)
                tags_at = table.tags_at(bucket)
                asked.append((hashed, bucket, tags_at, gather(builder, WORDS, tags_at)))
            if turn < _AHEAD:
                continue
            i = turn - _AHEAD
            hashed, bucket, tags_at, tags = asked[i]
            found.append(table.candidates(hashed, tags))
            places.append(table.places(bucket, found[i], tags_at))
            with builder.if_then(_any(builder, found[i])), builder.if_else(table.large) as (yes, no):
                with yes:
                    _prefetch(builder, places[i], 2)
                with no:
                    _prefetch(builder, places[i])
            shift = builder.add(builder.and_(builder.lshr(hashed, same(WORDS, 8)), same(WORDS, 7)), same(WORDS, 56))
            there = mask(builder, builder.trunc(builder.lshr(tags, shift), MASK))
            second = builder.or_(second, builder.shl(there, ir.Constant(I64, LANES * i)))
            store(builder, _at(builder, room, LANES * i), hashed)
            store(builder, to[i], defaults)

        many = builder.call(declare(builder, "llvm.ctpop.i64", I64, I64), [second])
        rows = builder.lshr(builder.add(many, ir.Constant(I64, LANES - 1)), ir.Constant(I64, 3))
        left = cgutils.alloca_once_value(builder, second)
        builder.store(ir.Constant(I64, 0), builder.inttoptr(_at(builder, room, _NONE), I64.as_pointer()))

        def seconds(which: Any) -> tuple[Any, Any, Any]:
            """Of a row of the list: their hashes, buckets, and where the tags are."""
            hash_at = builder.add(splat(builder, room, WORDS), builder.shl(which, same(WORDS, 3)))
            hashed = gather(builder, WORDS, hash_at)
            bucket = table.bucket(builder.mul(hashed, same(WORDS, K3)))
            return hashed, bucket, table.tags_at(bucket)

        with cgutils.for_range(builder, rows) as loop:  # no branch depends on the bits but that
            bits, which = builder.load(left), ir.Constant(WORDS, ir.Undefined)
            for lane in range(LANES):
                number = builder.cttz(bits, ir.Constant(ir.IntType(1), 0))
                which = builder.insert_element(which, number, ir.Constant(HALVES.element, lane))
                bits = builder.and_(bits, builder.sub(bits, ir.Constant(I64, 1)))
            builder.store(bits, left)
            store(builder, row(loop.index, _LIST), which)
            _prefetch(builder, seconds(which)[2])

        def ask() -> None:
            with cgutils.for_range(builder, rows) as loop:
                which = load(builder, row(loop.index, _LIST), WORDS)
                hashed, bucket, where = seconds(which)
                candidates = table.candidates(hashed, gather(builder, WORDS, where))
                used = builder.icmp_unsigned("<", which, same(WORDS, 64))
                candidates = builder.select(used, candidates, same(WORDS, 0))
                _prefetch(builder, table.places(bucket, candidates, where))
                store(builder, row(loop.index, _FOUND), candidates)

        for i in range(groups):
            if i == _TURN:
                ask()
            with builder.if_then(_any(builder, found[i])):
                _hashed, bucket, tags_at, _tags = asked[i]
                hit, value = table.settle(table.keys(at[i]), bucket, tags_at, places[i], found[i])
                store(builder, to[i], builder.select(hit, value, defaults))
        if groups <= _TURN:
            ask()
        with cgutils.for_range(builder, rows) as loop:
            candidates = load(builder, row(loop.index, _FOUND), WORDS)
            with builder.if_then(_any(builder, candidates)):
                which = load(builder, row(loop.index, _LIST), WORDS)
                _hashed, bucket, where = seconds(which)
                which = builder.and_(which, same(WORDS, 63))
                key = builder.add(splat(builder, keys, WORDS), builder.mul(which, same(WORDS, 8 * count)))
                place = table.places(bucket, candidates, where)
                hit, value = table.settle(table.key(key), bucket, where, place, candidates)
                target = builder.add(splat(builder, results, WORDS), builder.shl(which, same(WORDS, 3)))
                target = builder.select(hit, target, splat(builder, _at(builder, room, _NOWHERE), WORDS))
                for one, stored in zip(_lanes(builder, target), _lanes(builder, value), strict=True):
                    builder.store(stored, builder.inttoptr(one, I64.as_pointer()))

    return emit


def _plain(base: int, buckets: int, words: int, keys: int, results: int, default: int, count: int) -> None:
    for i in range(count):
        store64(results + 8 * i, value_at(base, buckets, words, keys + 8 * words * i, default))


@primitive(_emitter(1), void=True)
def lookup8(base: int, buckets: int, words: int, keys: int, results: int, default: int) -> None:
    """Look up the 8 keys at `keys` in the table at `base`: the values, or `default`, go to `results`.

    `words` is a number the compiler sees.
    """
    _plain(base, buckets, words, keys, results, default, 8)


@primitive(_emitter(8), void=True)
def lookup64(base: int, buckets: int, words: int, keys: int, results: int, default: int) -> None:
    """The same of 64 keys."""
    _plain(base, buckets, words, keys, results, default, 64)
