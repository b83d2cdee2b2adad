"""The processor's constant-rate counter, read without a system call."""

from __future__ import annotations

import functools
import platform
import time
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from libfp.jit.cache import entry
from libfp.jit.primitive import I64, declare, primitive

_ARM = platform.machine() == "aarch64"
if _ARM:
    llvm.initialize_native_asmparser()  # for the one instruction below


def _emit_clock(context: Any, builder: Any) -> Any:
    _barrier(builder)
    if _ARM:  # llvm.readcyclecounter reads a register that user space may not
        ticks = builder.asm(ir.FunctionType(I64, []), "mrs $0, cntvct_el0", "=r", [], True)
    else:
        ticks = builder.call(declare(builder, "llvm.readcyclecounter", I64), [])
    _barrier(builder)
    return ticks


def _barrier(builder: Any) -> None:
    """No instruction; the compiler keeps loads and stores on their side of it, so that the time they take is theirs."""
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)


@primitive(_emit_clock)
def clock() -> int:
    """Ticks of the time stamp counter (arm64: the virtual counter); `clock_hz` of them are a second.

    The interpreted definition counts nanoseconds.
    """
    return time.perf_counter_ns()


@entry
def now() -> int:
    """`clock`, for Python: in compiled programs the counter that hot code reads."""
    return clock()


@functools.cache
def clock_hz() -> int:
    """Ticks of `clock` a second, measured once against the monotonic clock over 20 ms."""
    now()  # compiles
    begin, ticks = time.perf_counter_ns(), now()
    while (passed := time.perf_counter_ns() - begin) < 20_000_000:
        pass
    return (now() - ticks) * 1_000_000_000 // passed
