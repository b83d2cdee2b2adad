"""Vectors of eight lanes in emitted code: gathers where the processor has them, as many loads where it has not."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from libfp.jit.primitive import I8, I32, I64, declare

LANES = 8
WORDS, HALVES = ir.VectorType(I64, LANES), ir.VectorType(I32, LANES)
_MASK, _POINTERS = ir.VectorType(ir.IntType(1), LANES), ir.VectorType(I8.as_pointer(), LANES)


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
    function = declare(builder, name, kind, _POINTERS, I32, _MASK, kind)
    pointers = builder.inttoptr(addresses, _POINTERS)
    return builder.call(function, [pointers, ir.Constant(I32, 4), same(_MASK, 1), ir.Constant(kind, ir.Undefined)])


def unary(builder: Any, name: str, value: Any) -> Any:
    """An LLVM intrinsic of one vector: ``ctpop``, ``bswap``."""
    kind = value.type
    return builder.call(declare(builder, f"llvm.{name}.v{LANES}{kind.element}", kind, kind), [value])


def mask(builder: Any, lanes: Any) -> Any:
    """Eight truth values as the low bits of an int64, lane 0 the lowest."""
    return builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), I64)
