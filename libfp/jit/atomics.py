"""Words that two threads see: acquire loads, release stores, and the few read-modify-writes that shared rings need.

x86 ordering is no promise from LLVM, and arm64 keeps none of it: a word another thread reads or writes goes through
here. Addresses must be aligned to the width. Nothing but `compare_and_swap64` and `fetch_add64` locks the bus.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from typing import Any

from llvmlite import ir

from libfp.jit import memory
from libfp.jit.primitive import I16, I32, I64, declare, primitive, signed64
from libfp.jit.raw import _pointer

_lock = threading.Lock()  # stands for the bus where read-modify-writes are interpreted


def _load(kind: Any) -> Any:
    def emit(context: Any, builder: Any, address: Any) -> Any:
        pointer = _pointer(context, builder, address, kind)
        value = builder.load_atomic(pointer, "acquire", kind.width // 8)
        return value if kind is I64 else builder.zext(value, I64)

    return primitive(emit)


def _store(kind: Any) -> Any:
    def emit(context: Any, builder: Any, address: Any, value: Any) -> None:
        narrow = value if kind is I64 else builder.trunc(value, kind)
        builder.store_atomic(narrow, _pointer(context, builder, address, kind), "release", kind.width // 8)

    return primitive(emit, void=True)


@_load(I16)
def load_acquire16(address: int) -> int:
    """A 16-bit word and, after it, everything its writer stored before releasing it."""
    memory.check(address, 2)
    return ctypes.c_uint16.from_address(address).value


@_load(I32)
def load_acquire32(address: int) -> int:
    """A 32-bit word and, after it, everything its writer stored before releasing it."""
    memory.check(address, 4)
    return ctypes.c_uint32.from_address(address).value


@_load(I64)
def load_acquire64(address: int) -> int:
    """A 64-bit word and, after it, everything its writer stored before releasing it."""
    memory.check(address, 8)
    return ctypes.c_int64.from_address(address).value


@_store(I16)
def store_release16(address: int, value: int) -> None:
    """Store the low 16 bits of `value` after everything stored before."""
    memory.check(address, 2)
    ctypes.c_uint16.from_address(address).value = value & 0xFFFF


@_store(I32)
def store_release32(address: int, value: int) -> None:
    """Store the low 32 bits of `value` after everything stored before."""
    memory.check(address, 4)
    ctypes.c_uint32.from_address(address).value = value & 0xFFFFFFFF


@_store(I64)
def store_release64(address: int, value: int) -> None:
    """Store `value` after everything stored before."""
    memory.check(address, 8)
    ctypes.c_int64.from_address(address).value = signed64(value)


def _emit_cas(context: Any, builder: Any, address: Any, expected: Any, new: Any) -> Any:
    pointer = _pointer(context, builder, address, I64)
    return builder.extract_value(builder.cmpxchg(pointer, expected, new, "acq_rel", "acquire"), 0)


@primitive(_emit_cas)
def compare_and_swap64(address: int, expected: int, new: int) -> int:
    """Store `new` if the word is `expected`; return what it was. A locked instruction: never on a worker's path."""
    with _lock:
        was = load_acquire64(address)
        if was == expected:
            store_release64(address, new)
        return was


def _emit_add(context: Any, builder: Any, address: Any, value: Any) -> Any:
    return builder.atomic_rmw("add", _pointer(context, builder, address, I64), value, "acq_rel")


@primitive(_emit_add)
def fetch_add64(address: int, value: int) -> int:
    """Add `value` to the word; return what it was. A locked instruction: never on a worker's path."""
    with _lock:
        was = load_acquire64(address)
        store_release64(address, was + value)
        return was


_MACHINE = platform.machine()


def _emit_pause(context: Any, builder: Any) -> None:
    if _MACHINE == "x86_64":
        builder.call(declare(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
    elif _MACHINE == "aarch64":
        builder.call(declare(builder, "llvm.aarch64.hint", ir.VoidType(), I32), [ir.Constant(I32, 1)])


@primitive(_emit_pause, void=True)
def pause() -> None:
    """Tell the core that this is a spin loop."""
