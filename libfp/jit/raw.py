"""Loads, stores and bit operations on int64 values: all the arithmetic and memory access hot code needs.

Everything in hot code is an int64: addresses, lengths, keys, 64-bit patterns. Mixing int64 with uint64 makes numba
fall back to float64, and user constants are int64; so the few operations for which signedness matters have names
here instead. Loads of fewer than 64 bits extend with zeros; addresses need no alignment. ``be`` is network byte order.

From Python, and with ``NUMBA_DISABLE_JIT=1``, an access outside every registered region raises IndexError.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba.core import types

from libfp.jit import memory
from libfp.jit.policy import BOUNDSCHECK
from libfp.jit.primitive import I8, I16, I32, I64, MASK64, declare, primitive, signed64


def _outside(address: int, size: int) -> None:
    """The compiled bounds check: stop the process on the spot, as a guard page would."""
    while True:
        current = _peek(_REGIONS)
        table = _REGIONS + 8 + (current & 1) * _HALF
        for i in range(_peek(table)):
            if _peek(table + 8 + 16 * i) <= address and address + size <= _peek(table + 16 + 16 * i):
                return
        if _peek(_REGIONS) == current:  # nobody has registered memory meanwhile
            break
    _trap(address, size)


def _emit_peek(context: Any, builder: Any, address: Any) -> Any:
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


def _emit_trap(context: Any, builder: Any, address: Any, size: Any) -> None:
    builder.call(declare(builder, "llvm.trap", ir.VoidType()), [])


@primitive(_emit_peek)
def _peek(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


@primitive(_emit_trap, void=True)
def _trap(address: int, size: int) -> None:
    raise IndexError(address)


CLEARED = 128  # bytes that `clear128` zeroes
LINE = 64  # bytes that `copy64` copies
_REGIONS, _HALF = memory.regions.ctypes.data, 8 * memory.REGION_HALF


def _pointer(context: Any, builder: Any, address: Any, kind: Any) -> Any:
    if BOUNDSCHECK:
        guard(context, builder, address, ir.Constant(I64, kind.width // 8))
    return builder.inttoptr(address, kind.as_pointer())


def guard(context: Any, builder: Any, address: Any, size: Any) -> None:
    """Emit the bounds check of `size` bytes at `address`."""
    found = context.compile_subroutine(builder, _outside, types.void(types.int64, types.int64))
    callee = context.declare_function(builder.module, found.fndesc)
    both = [types.int64, types.int64]  # called, not inlined: there are thousands of these, and compiling takes minutes
    context.call_conv.call_function(builder, callee, types.void, both, [address, size], attrs=("noinline",))


def _loader(kind: Any, swap: bool = False) -> Any:
    def emit(context: Any, builder: Any, address: Any) -> Any:
        load = builder.load(_pointer(context, builder, address, kind))
        load.align = 1
        value = builder.bswap(load) if swap else load
        return value if kind is I64 else builder.zext(value, I64)

    return primitive(emit)


def _storer(kind: Any, swap: bool = False) -> Any:
    def emit(context: Any, builder: Any, address: Any, value: Any) -> None:
        narrow = value if kind is I64 else builder.trunc(value, kind)
        store = builder.store(builder.bswap(narrow) if swap else narrow, _pointer(context, builder, address, kind))
        store.align = 1

    return primitive(emit, void=True)


def _read(address: int, size: int, order: Any = "little") -> int:
    memory.check(address, size)
    return int.from_bytes(ctypes.string_at(address, size), order)


def _write(address: int, size: int, value: int, order: Any = "little") -> None:
    memory.check(address, size)
    ctypes.memmove(address, (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, order), size)


@_loader(I8)
def load8(address: int) -> int:
    """The byte at `address`."""
    return _read(address, 1)


@_loader(I16)
def load16(address: int) -> int:
    """16 bits at `address`, in the machine's (little-endian) order."""
    return _read(address, 2)


@_loader(I32)
def load32(address: int) -> int:
    """32 bits at `address`, in the machine's order."""
    return _read(address, 4)


@_loader(I64)
def load64(address: int) -> int:
    """64 bits at `address`, in the machine's order, as an int64 pattern."""
    return signed64(_read(address, 8))


@_loader(I16, swap=True)
def load16be(address: int) -> int:
    """16 bits at `address`, in network order."""
    return _read(address, 2, "big")


@_loader(I32, swap=True)
def load32be(address: int) -> int:
    """32 bits at `address`, in network order."""
    return _read(address, 4, "big")


@_loader(I64, swap=True)
def load64be(address: int) -> int:
    """64 bits at `address`, in network order, as an int64 pattern."""
    return signed64(_read(address, 8, "big"))


def _emit_load64_in(context: Any, builder: Any, base: Any, offset: Any) -> Any:
    if BOUNDSCHECK:
        guard(context, builder, builder.add(base, offset), ir.Constant(I64, 8))
    at = builder.gep(builder.inttoptr(base, I8.as_pointer()), [offset], source_etype=I8)
    load = builder.load(builder.bitcast(at, I64.as_pointer()))
    load.align = 1
    return load


@primitive(_emit_load64_in)
def load64_in(base: int, offset: int) -> int:
    """``load64(base + offset)``, said so that a loop over `offset` with a fixed `base` becomes vector loads."""
    return signed64(_read(base + offset, 8))


@_storer(I8)
def store8(address: int, value: int) -> None:
    """Store the low byte of `value`."""
    _write(address, 1, value)


@_storer(I16)
def store16(address: int, value: int) -> None:
    """Store the low 16 bits of `value`, in the machine's order."""
    _write(address, 2, value)


@_storer(I32)
def store32(address: int, value: int) -> None:
    """Store the low 32 bits of `value`, in the machine's order."""
    _write(address, 4, value)


@_storer(I64)
def store64(address: int, value: int) -> None:
    """Store `value`, in the machine's order."""
    _write(address, 8, value)


@_storer(I16, swap=True)
def store16be(address: int, value: int) -> None:
    """Store the low 16 bits of `value`, in network order."""
    _write(address, 2, value, "big")


@_storer(I32, swap=True)
def store32be(address: int, value: int) -> None:
    """Store the low 32 bits of `value`, in network order."""
    _write(address, 4, value, "big")


def _emit_copy(context: Any, builder: Any, target: Any, source: Any, size: Any) -> None:
    if BOUNDSCHECK:
        guard(context, builder, target, size)
        guard(context, builder, source, size)
    pointer = I8.as_pointer()
    memcpy = declare(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), pointer, pointer, I64, ir.IntType(1))
    into, out = builder.inttoptr(target, pointer), builder.inttoptr(source, pointer)
    builder.call(memcpy, [into, out, size, ir.Constant(ir.IntType(1), 0)])


@primitive(_emit_copy, void=True)
def copy(target: int, source: int, size: int) -> None:
    """Copy `size` bytes; the two must not overlap."""
    memory.check(target, size)
    memory.check(source, size)
    ctypes.memmove(target, source, size)


def _emit_copy64(context: Any, builder: Any, target: Any, source: Any) -> None:
    if BOUNDSCHECK:
        for one in (target, source):
            guard(context, builder, one, ir.Constant(I64, LINE))
    pointer = I8.as_pointer()
    memcpy = declare(builder, "llvm.memcpy.inline.p0.p0.i64", ir.VoidType(), pointer, pointer, I64, ir.IntType(1))
    size, plain = ir.Constant(I64, LINE), ir.Constant(ir.IntType(1), 0)
    builder.call(memcpy, [builder.inttoptr(target, pointer), builder.inttoptr(source, pointer), size, plain])


@primitive(_emit_copy64, void=True)
def copy64(target: int, source: int) -> None:
    """Copy 64 bytes: a few wide loads and stores, never a call; the two must not overlap."""
    memory.check(target, LINE)
    memory.check(source, LINE)
    ctypes.memmove(target, source, LINE)


def _emit_clear(context: Any, builder: Any, address: Any) -> None:
    if BOUNDSCHECK:
        guard(context, builder, address, ir.Constant(I64, CLEARED))
    pointer = I8.as_pointer()
    memset = declare(builder, "llvm.memset.inline.p0.i64", ir.VoidType(), pointer, I8, I64, ir.IntType(1))
    zero, size, plain = ir.Constant(I8, 0), ir.Constant(I64, CLEARED), ir.Constant(ir.IntType(1), 0)
    builder.call(memset, [builder.inttoptr(address, pointer), zero, size, plain])


@primitive(_emit_clear, void=True)
def clear128(address: int) -> None:
    """Zero the 128 bytes at `address`: a handful of wide stores, never a call."""
    memory.check(address, CLEARED)
    ctypes.memset(address, 0, CLEARED)


def _prefetcher(write: int) -> Any:
    def emit(context: Any, builder: Any, address: Any) -> None:
        pointer = I8.as_pointer()
        prefetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32, I32, I32)
        keep, data = ir.Constant(I32, 3), ir.Constant(I32, 1)
        builder.call(prefetch, [builder.inttoptr(address, pointer), ir.Constant(I32, write), keep, data])

    return primitive(emit, void=True)


@_prefetcher(0)
def prefetch(address: int) -> None:
    """Ask for the cache line of `address`. Never faults."""


@_prefetcher(1)
def prefetch_write(address: int) -> None:
    """Ask for the cache line of `address` to be this core's alone, as a store will want it. Never faults."""


@primitive(lambda context, builder, value: builder.zext(builder.bswap(builder.trunc(value, I16)), I64))
def bswap16(value: int) -> int:
    """The low 16 bits of `value` with their bytes reversed."""
    return int.from_bytes((value & 0xFFFF).to_bytes(2, "little"), "big")


@primitive(lambda context, builder, value: builder.zext(builder.bswap(builder.trunc(value, I32)), I64))
def bswap32(value: int) -> int:
    """The low 32 bits of `value` with their bytes reversed."""
    return int.from_bytes((value & 0xFFFFFFFF).to_bytes(4, "little"), "big")


@primitive(lambda context, builder, value: builder.bswap(value))
def bswap64(value: int) -> int:
    """`value` with its eight bytes reversed."""
    return signed64(int.from_bytes((value & MASK64).to_bytes(8, "little"), "big"))


@primitive(lambda context, builder, value: builder.ctpop(value))
def popcount64(value: int) -> int:
    """How many of the 64 bits are set."""
    return (value & MASK64).bit_count()


@primitive(lambda context, builder, value: builder.cttz(value, ir.Constant(ir.IntType(1), 0)))
def ctz64(value: int) -> int:
    """The index of the lowest set bit; 64 if there is none."""
    return 64 if value & MASK64 == 0 else (value & -value).bit_length() - 1


@primitive(lambda context, builder, value: builder.ctlz(value, ir.Constant(ir.IntType(1), 0)))
def clz64(value: int) -> int:
    """How many zero bits are above the highest set bit; 64 if there is none."""
    return 64 - (value & MASK64).bit_length()


@primitive(lambda context, builder, value: builder.and_(value, builder.sub(value, ir.Constant(I64, 1))))
def without_lowest64(value: int) -> int:
    """`value` with its lowest set bit cleared."""
    return signed64(value & (value - 1))


def _emit_shift(operation: str) -> Any:
    def emit(context: Any, builder: Any, value: Any, bits: Any) -> Any:
        return getattr(builder, operation)(value, builder.and_(bits, ir.Constant(I64, 63)))

    return emit


@primitive(_emit_shift("lshr"))
def shr64(value: int, bits: int) -> int:
    """Shift right, zeros entering from the left; `bits` modulo 64."""
    return signed64((value & MASK64) >> (bits & 63))


@primitive(_emit_shift("shl"))
def shl64(value: int, bits: int) -> int:
    """Shift left; `bits` modulo 64."""
    return signed64(value << (bits & 63))


@primitive(lambda context, builder, a, b: builder.mul(a, b))
def mul64(a: int, b: int) -> int:
    """The low 64 bits of the product."""
    return signed64(a * b)


def _emit_mulhi(context: Any, builder: Any, a: Any, b: Any) -> Any:
    wide = ir.IntType(128)
    product = builder.mul(builder.zext(a, wide), builder.zext(b, wide))
    return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), I64)


@primitive(_emit_mulhi)
def mulhi64(a: int, b: int) -> int:
    """The high 64 bits of the unsigned product."""
    return signed64(((a & MASK64) * (b & MASK64)) >> 64)


@primitive(lambda context, builder, a, b: builder.zext(builder.icmp_unsigned("<", a, b), I64))
def ult64(a: int, b: int) -> int:
    """1 if `a` is below `b`, both taken as unsigned, else 0."""
    return int((a & MASK64) < (b & MASK64))


@primitive(lambda context, builder, value: builder.and_(value, ir.Constant(I64, 0xFFFFFFFF)))
def u32(value: int) -> int:
    """The low 32 bits of `value`: a ring index that has wrapped."""
    return value & 0xFFFFFFFF


def _emit_unlikely(context: Any, builder: Any, value: Any) -> Any:
    return builder.call(declare(builder, "llvm.expect.i64", I64, I64, I64), [value, ir.Constant(I64, 0)])


@primitive(_emit_unlikely)
def unlikely(value: int) -> int:
    """`value`, which is nearly always 0 or False: code for the other case is kept out of the way."""
    return value


def _emit_apart(context: Any, builder: Any) -> None:
    builder.function.attributes.add("noinline")


@primitive(_emit_apart, void=True)
def apart() -> None:
    """Keep the kernel that calls this out of its callers: what is in it is compiled by itself."""


def _emit_call(context: Any, builder: Any, address: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(I64, [I64] * len(arguments))
    return builder.call(builder.inttoptr(address, kind.as_pointer()), list(arguments))


@primitive(_emit_call)
def call(address: int, a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    """Call the C function at `address` with six integer arguments (it may take fewer) and return its 64-bit result.

    An address passed at run time, not a symbol: that keeps the caller cacheable. An `int` result arrives with
    undefined upper bits: compare its low 32 bits alone.
    """
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 6)(address)
    return int(function(a, b, c, d, e, f))
