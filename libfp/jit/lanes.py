"""Vectors of eight lanes in emitted code: gathers where the processor has them, as many loads where it has not."""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import config
from numba.core.codegen import get_host_cpu_features

from libfp.jit.primitive import I8, I32, I64, declare

LANES = 8
WORDS, HALVES = ir.VectorType(I64, LANES), ir.VectorType(I32, LANES)
MASK, _POINTERS = ir.VectorType(ir.IntType(1), LANES), ir.VectorType(I8.as_pointer(), LANES)

_PAGE = 4096
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
_MASKS = "+avx512f" in _FEATURES.split(",")


def same(kind: Any, value: int) -> Any:
    """A constant, the same in all lanes."""
    return ir.Constant(kind, [value] * LANES)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """`value` in all lanes."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), same(HALVES, 0))


def load(builder: Any, address: Any, kind: Any) -> Any:
    """The vector at `address`, however it is aligned."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, address: Any, value: Any) -> None:
    """Store a vector at `address`, however it is aligned."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def gather(builder: Any, kind: Any, addresses: Any) -> Any:
    """What is at each of eight addresses: all are read."""
    name = f"llvm.masked.gather.v{LANES}{kind.element}.v{LANES}p0"
    function = declare(builder, name, kind, _POINTERS, I32, MASK, kind)
    pointers = builder.inttoptr(addresses, _POINTERS)
    return builder.call(function, [pointers, ir.Constant(I32, 4), same(MASK, 1), ir.Constant(kind, ir.Undefined)])


def gather_some(builder: Any, base: Any, offsets: Any, wanted: Any, others: Any) -> Any:
    """What is so many lanes (words or halves, as `others` are) from `base`, for those that are `wanted`.

    With AVX-512 the rest read nothing; elsewhere, where a mask would be a branch a lane, they read what is at `base`.
    """
    kind = others.type
    if not _MASKS:
        offsets = builder.select(wanted, offsets, same(WORDS, 0))
    pointers = builder.gep(builder.inttoptr(base, kind.element.as_pointer()), [offsets], source_etype=kind.element)
    pointers.type = _POINTERS
    name = f"llvm.masked.gather.v{LANES}{kind.element}.v{LANES}p0"
    function = declare(builder, name, kind, _POINTERS, I32, MASK, kind)
    if _MASKS:
        return builder.call(function, [pointers, ir.Constant(I32, 4), wanted, others])
    there = builder.call(function, [pointers, ir.Constant(I32, 4), same(MASK, 1), ir.Constant(kind, ir.Undefined)])
    return builder.select(wanted, there, others)


def prefetch(builder: Any, address: Any, near: int = 3) -> None:
    """Ask for the line at `address`, which need not be anywhere: a hint reads nothing. `near`: 3, into the nearest
    cache; 2, into the second."""
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
    hint = [ir.Constant(I32, n) for n in (0, near, 1)]  # to read; data
    builder.call(function, [builder.inttoptr(address, I8.as_pointer()), *hint])


def bring_next(builder: Any, keys: Any, size: int) -> None:
    """Ask for `size` bytes of the keys a page on, likely soon the next ones: processors do not look beyond a page."""
    for at in range(0, size, 64):
        prefetch(builder, builder.add(keys, ir.Constant(I64, _PAGE + at)))


def unary(builder: Any, name: str, value: Any) -> Any:
    """An LLVM intrinsic of one vector: ``ctpop``, ``bswap``."""
    kind = value.type
    return builder.call(declare(builder, f"llvm.{name}.v{LANES}{kind.element}", kind, kind), [value])


def mask(builder: Any, lanes: Any) -> Any:
    """Eight truth values as the low bits of an int64, lane 0 the lowest."""
    return builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), I64)


def have(builder: Any, words: Any, bits: int) -> Any:
    """Which of eight words have any of these bits."""
    return builder.icmp_signed("!=", builder.and_(words, same(WORDS, bits)), same(WORDS, 0))


def which_have(builder: Any, vectors: Any, bits: int) -> Any:
    """A bit of an int64 for each word of up to eight vectors that has any of these bits: there rarely is one."""
    before, none = builder.block, ir.Constant(I64, 0)
    some = mask(builder, have(builder, reduce(builder.or_, vectors), bits))
    with builder.if_then(builder.icmp_signed("!=", some, none), likely=False):
        which = none
        for i, words in enumerate(vectors):
            found = mask(builder, have(builder, words, bits))
            which = builder.or_(which, builder.shl(found, ir.Constant(I64, LANES * i)))
        there = builder.block
    result = builder.phi(I64)
    result.add_incoming(none, before)
    result.add_incoming(which, there)
    return result
