"""64 lookups at a time in `libfp.tables.acl`: 16 headers side by side down the trees, then 8 rules for each header."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from libfp.jit import load32be, store32
from libfp.jit.lanes import HALVES, load, mask, same, splat
from libfp.jit.primitive import I8, I16, I32, I64, declare, primitive
from libfp.tables.acl_layout import LANES, MISS, ROW, TREES, find, leaf_size, row_count, unit_size, where_bit

GROUP = 16
_MANY = ir.VectorType(I32, GROUP)
_TRUTHS = ir.VectorType(ir.IntType(1), GROUP)
_POINTERS = ir.VectorType(I8.as_pointer(), GROUP)
_PAIRS = ir.VectorType(I16, 2 * LANES)


def _number(value: int) -> Any:
    return ir.Constant(I64, value)


def _each(value: int) -> Any:
    return ir.Constant(_MANY, [value] * GROUP)


def _gather(builder: Any, base: Any, index: Any, wanted: Any, otherwise: Any) -> Any:
    """The dwords numbered `index` from a pointer on, in those lanes that are wanted."""
    at = builder.gep(base, [index], source_etype=I32)
    at.type = _POINTERS  # llvmlite does not know of vectors of indexes
    name = f"llvm.masked.gather.v{GROUP}i32.v{GROUP}p0"
    function = declare(builder, name, _MANY, _POINTERS, I32, _TRUTHS, _MANY)
    return builder.call(function, [at, ir.Constant(I32, 4), wanted, otherwise])


def _swapped(builder: Any, value: Any) -> Any:
    return builder.call(declare(builder, f"llvm.bswap.v{GROUP}i32", _MANY, _MANY), [value])


def _dwords4(builder: Any, headers: Any) -> list[Any]:
    """The four dwords of 16 headers of IPv4, in host order."""
    parts = [load(builder, builder.add(headers, _number(64 * i)), _MANY) for i in range(4)]
    made = []
    for field in range(4):
        wanted = ir.Constant(HALVES, [field + 4 * i for i in range(LANES)])
        halves = [builder.shuffle_vector(*parts[i : i + 2], wanted) for i in (0, 2)]
        whole = builder.shuffle_vector(*halves, ir.Constant(_MANY, list(range(GROUP))))
        made.append(_swapped(builder, whole))
    return made


def _step(builder: Any, addresses: int, base: Any, entry: Any, active: Any, dword: Any) -> Any:
    """The entries one level down."""
    code = builder.and_(entry, _each(7))
    shift = builder.and_(builder.lshr(entry, _each(3)), _each(31))
    wanted = builder.sub(builder.shl(_each(2), code), _each(1))
    index = builder.and_(builder.lshr(dword, shift), wanted)
    where = builder.lshr(entry, _each(where_bit(addresses)))
    at = builder.add(builder.mul(where, _each(unit_size(addresses) // 4)), index)
    return _gather(builder, base, at, active, entry)


def _dword4(builder: Any, entry: Any, dwords: list[Any]) -> Any:
    """Of each lane, the dword that its entry names."""

    def bit(value: int) -> Any:
        return builder.icmp_signed("!=", builder.and_(entry, _each(value)), _each(0))

    low, high = bit(1 << 8), bit(1 << 9)
    pairs = [builder.select(low, dwords[i + 1], dwords[i]) for i in (0, 2)]
    return builder.select(high, pairs[1], pairs[0])


def _any(builder: Any, truths: Any) -> Any:
    return builder.icmp_signed("!=", builder.bitcast(truths, I16), ir.Constant(I16, 0))


class _Loop:
    """``with _Loop(builder) as loop: ...; loop.until(condition)``: a body that runs at least once."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def __enter__(self) -> _Loop:
        self.body, self.after = self.builder.append_basic_block("body"), self.builder.append_basic_block("after")
        self.builder.branch(self.body)
        self.builder.position_at_end(self.body)
        return self

    def until(self, condition: Any) -> None:
        self.builder.cbranch(condition, self.after, self.body)
        self.builder.position_at_end(self.after)

    def __exit__(self, *_: Any) -> None:
        pass


def _scan(builder: Any, base: Any, leaf: Any, addresses: int, header: Any, ports: Any) -> Any:
    """The word of the first rule that the header at address `header` matches, in a leaf by its offset or its chain."""
    i32, came_from = I32.as_pointer(), builder.block
    chain = _Loop(builder).__enter__()
    where = builder.phi(I64)
    where.add_incoming(leaf, came_from)
    at = builder.add(base, where)

    def row(number: int) -> Any:
        return load(builder, builder.add(at, _number(ROW * number)), HALVES)

    def dword(number: int) -> Any:
        value = builder.load(builder.inttoptr(builder.add(header, _number(4 * number)), i32))
        value.align = 1
        return splat(builder, value, HALVES)

    wrong = None
    for i in [*range(addresses), addresses + 1]:
        bits = builder.and_(builder.xor(dword(i), row(2 * i)), row(2 * i + 1))
        wrong = bits if wrong is None else builder.or_(wrong, bits)
    beyond = declare(builder, f"llvm.usub.sat.v{2 * LANES}i16", _PAIRS, _PAIRS, _PAIRS)
    asked = builder.bitcast(splat(builder, ports, HALVES), _PAIRS)
    lowest, highest = (builder.bitcast(row(2 * addresses + i), _PAIRS) for i in range(2))
    for pair in ([lowest, asked], [asked, highest]):
        wrong = builder.or_(wrong, builder.bitcast(builder.call(beyond, pair), HALVES))
    found = mask(builder, builder.icmp_signed("==", wrong, same(HALVES, 0)))
    first = builder.cttz(builder.or_(found, _number(1 << (LANES - 1))), ir.Constant(ir.IntType(1), 1))
    place = builder.add(builder.add(at, _number(ROW * row_count(addresses))), builder.shl(first, _number(3)))
    word = builder.load(builder.inttoptr(place, I64.as_pointer()))
    word = builder.select(builder.icmp_signed("!=", found, _number(0)), word, _number(MISS))
    where.add_incoming(builder.sub(_number(0), word), builder.block)
    chain.until(builder.icmp_signed(">=", word, _number(0)))
    return word


def _emitter(groups: int) -> Any:
    """Emits the lookup of so many groups of 16, a level of all before the next: many loads are on their way."""

    def emit(context: Any, builder: Any, base: Any, addresses: Any, headers: Any, results: Any) -> Any:
        known, count = addresses.constant, groups * GROUP
        size = 4 * known + 8
        start = builder.inttoptr(base, I8.as_pointer())
        entries = cgutils.alloca_once(builder, ir.ArrayType(_MANY, groups))
        ports = cgutils.alloca_once(builder, ir.ArrayType(_MANY, groups))
        best = cgutils.alloca_once(builder, ir.ArrayType(I64, count))
        current = [cgutils.alloca_once(builder, _MANY) for _ in range(groups)]
        tree, i = cgutils.alloca_once(builder, I64), cgutils.alloca_once(builder, I64)
        entries_at, ports_at, best_at = (builder.ptrtoint(one, I64) for one in (entries, ports, best))
        dwords = [_fields(builder, known, builder.add(headers, _number(size * GROUP * g))) for g in range(groups)]
        for g in range(groups):
            told = dwords[g](None, known)
            builder.store(told, builder.inttoptr(builder.add(ports_at, _number(64 * g)), _MANY.as_pointer())).align = 4
        for k in range(0, count, LANES):
            to = builder.inttoptr(builder.add(best_at, _number(8 * k)), ir.VectorType(I64, LANES).as_pointer())
            builder.store(ir.Constant(ir.VectorType(I64, LANES), [MISS] * LANES), to).align = 8
        builder.store(_number(0), tree)
        with _Loop(builder) as trees:
            at = builder.add(base, _number(leaf_size(known)))
            at = builder.add(at, builder.shl(builder.load(tree), _number(3)))
            root = builder.load(builder.inttoptr(at, I64.as_pointer()))
            with builder.if_then(builder.icmp_signed("!=", root, _number(0))):
                first = builder.trunc(root, I32)
                lanes = builder.insert_element(ir.Constant(_MANY, ir.Undefined), first, ir.Constant(I32, 0))
                lanes = builder.shuffle_vector(lanes, ir.Constant(_MANY, ir.Undefined), _each(0))
                for one in current:
                    builder.store(lanes, one)
                with _Loop(builder) as levels:
                    more = ir.Constant(ir.IntType(1), 0)
                    for g in range(groups):
                        entry = builder.load(current[g])
                        active = builder.icmp_signed("!=", builder.and_(entry, _each(7)), _each(0))
                        entry = _step(builder, known, start, entry, active, dwords[g](entry, -1))
                        builder.store(entry, current[g])
                        active = builder.icmp_signed("!=", builder.and_(entry, _each(7)), _each(0))
                        more = builder.or_(more, _any(builder, active))
                    levels.until(builder.not_(more))
                for g in range(groups):
                    to = builder.inttoptr(builder.add(entries_at, _number(64 * g)), _MANY.as_pointer())
                    builder.store(builder.load(current[g]), to).align = 4
                builder.store(_number(0), i)
                with _Loop(builder) as packets:
                    k = builder.load(i)
                    four = builder.shl(k, _number(2))
                    entry = builder.load(builder.inttoptr(builder.add(entries_at, four), I32.as_pointer()))
                    asked = builder.load(builder.inttoptr(builder.add(ports_at, four), I32.as_pointer()))
                    where = builder.lshr(builder.zext(entry, I64), _number(where_bit(known)))
                    leaf = builder.mul(where, _number(unit_size(known)))
                    header = builder.add(headers, builder.mul(k, _number(size)))
                    word = _scan(builder, base, leaf, known, header, asked)
                    to = builder.inttoptr(builder.add(best_at, builder.shl(k, _number(3))), I64.as_pointer())
                    before = builder.load(to)
                    builder.store(builder.select(builder.icmp_signed("<", word, before), word, before), to)
                    k = builder.add(k, _number(1))
                    builder.store(k, i)
                    packets.until(builder.icmp_signed("==", k, _number(count)))
            after = builder.add(builder.load(tree), _number(1))
            builder.store(after, tree)
            trees.until(builder.icmp_signed("==", after, _number(TREES)))
        for k in range(0, count, LANES):
            words = load(builder, builder.add(best_at, _number(8 * k)), ir.VectorType(I64, LANES))
            to = builder.inttoptr(builder.add(results, _number(4 * k)), HALVES.as_pointer())
            builder.store(builder.trunc(words, HALVES), to).align = 1
        return _number(0)

    return emit


def _fields(builder: Any, addresses: int, headers: Any) -> Any:
    """What gives the dword that an entry names, or one by its number, of 16 headers."""
    if addresses == 2:
        dwords = _dwords4(builder, headers)
        return lambda entry, number: dwords[number] if entry is None else _dword4(builder, entry, dwords)
    start = builder.inttoptr(headers, I8.as_pointer())
    first = ir.Constant(_MANY, [(addresses + 2) * i for i in range(GROUP)])
    all_of_them = ir.Constant(_TRUTHS, [1] * GROUP)

    def get(entry: Any, number: int) -> Any:
        field = _each(number)
        if entry is not None:
            field = builder.and_(builder.lshr(entry, _each(8)), _each(15))
        value = _gather(builder, start, builder.add(first, field), all_of_them, _each(0))
        return _swapped(builder, value)

    return get


@primitive(_emitter(4))
def lookup64(base: int, addresses: int, headers: int, results: int) -> int:
    """Look up the 64 headers at `headers` in the table at `base`: the values (u32) go to `results`.

    `addresses` is a number the compiler sees.
    """
    size = 4 * addresses + 8
    for i in range(64):
        at = headers + size * i
        ports, meta = load32be(at + 4 * addresses), load32be(at + 4 * addresses + 4)
        store32(results + 4 * i, find(base, addresses, at, ports, meta))
    return 0
