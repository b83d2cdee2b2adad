"""Which system calls one thread makes, counted by ptrace(2): every one of them, with nothing to install.

    counted = count_syscalls(tid, seconds=2.0, look=lambda: app.counters.workers[0]["syscalls"])
    assert counted.total == 0

`strace -c -p TID` does the same. A tracer, unlike a sample of ``/proc/PID/task/TID/syscall``, cannot miss one. The
contrast: `force_syscall` has a thread make one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Syscalls", "count_syscalls", "force_syscall"]

T = TypeVar("T")

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 0x4206, 0x4207, 0x4208
PTRACE_SYSCALL, PTRACE_DETACH, PTRACE_GET_SYSCALL_INFO = 24, 17, 0x420E
PTRACE_O_TRACESYSGOOD = 1
PTRACE_GETREGS, PTRACE_SETREGS = 12, 13
PTRACE_EVENT_STOP = 128
SYSCALL_INFO_ENTRY = 1
WALL = 0x40000000  # waitpid: threads too, whoever made them
SPIN = 200  # looks without a pause before the tracer sleeps: a thread that makes calls makes many

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@dataclass(frozen=True)
class Syscalls(Generic[T]):
    """What `count_syscalls` saw: calls by system call number, and what `look` returned at both ends."""

    calls: Counter[int]
    before: T
    after: T

    @property
    def total(self) -> int:
        """Calls in all."""
        return sum(self.calls.values())


def _ptrace(request: int, tid: int, address: int | None, data: int | None) -> int:
    result = int(_libc.ptrace(request, tid, address, data))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request:#x}) of thread {tid}: {os.strerror(error)}")
    return result


def count_syscalls(tid: int, seconds: float, look: Callable[[], T]) -> Syscalls[T]:
    """Trace thread `tid` (not one of this process) for `seconds`, and count the system calls it begins.

    `look` is called twice while the thread stands still, before the first call that counts and after the last: a call
    that is in progress at either moment is the only difference there can be to a counter that the thread keeps itself.
    The thread runs on afterwards. Raises OSError (EPERM, ESRCH) when it cannot be traced, ProcessLookupError when it
    ends meanwhile, TimeoutError when it does not stop within ten seconds.
    """
    with ThreadPoolExecutor(1, "tracer") as tracer:  # a thread of its own: its end lets go of the traced, in any case
        return tracer.submit(_trace, tid, seconds, look).result()


def force_syscall(pid: int, tid: int, number: int) -> None:
    """Have thread `tid` of process `pid` (x86-64, not this one), as it computes, make system call `number` instead of
    what it would do next. What becomes of it then is not defined, unless seccomp kills it. Raises as `count_syscalls`.
    """
    with open(f"/proc/{pid}/maps") as maps:
        fields = next(line.split() for line in maps if "/libc.so" in line and " r-xp " in line)
    start, end = (int(text, 16) for text in fields[0].split("-"))
    with open(fields[5], "rb") as libc:
        libc.seek(int(fields[2], 16))
        instruction = start + libc.read(end - start).index(b"\x0f\x05")

    def force() -> None:
        _ptrace(PTRACE_SEIZE, tid, None, 0)
        _interrupt(tid)
        registers = (ctypes.c_uint64 * 27)()  # struct user_regs_struct
        _ptrace(PTRACE_GETREGS, tid, None, ctypes.addressof(registers))
        registers[10] = number  # rax
        registers[16] = instruction  # rip
        _ptrace(PTRACE_SETREGS, tid, None, ctypes.addressof(registers))
        _ptrace(PTRACE_DETACH, tid, None, None)

    with ThreadPoolExecutor(1, "tracer") as tracer:
        tracer.submit(force).result()


def _trace(tid: int, seconds: float, look: Callable[[], T]) -> Syscalls[T]:
    calls: Counter[int] = Counter()
    _ptrace(PTRACE_SEIZE, tid, None, PTRACE_O_TRACESYSGOOD)
    _interrupt(tid)
    before = look()
    _ptrace(PTRACE_SYSCALL, tid, None, None)
    _follow(tid, calls, time.monotonic() + seconds)
    _count(tid, _interrupt(tid), calls)
    after = look()
    _ptrace(PTRACE_DETACH, tid, None, None)
    return Syscalls(calls, before, after)


def _interrupt(tid: int) -> int:
    """Stop it, if it does not just stop by itself, and return why it stands."""
    _ptrace(PTRACE_INTERRUPT, tid, None, None)
    status = _wait(tid, time.monotonic() + 10.0)
    if status is None:
        raise TimeoutError(f"thread {tid} did not stop for its tracer")
    return status


def _wait(tid: int, until: float) -> int | None:
    """The thread's next stop, as `waitpid` describes it; None when the time is over."""
    looks = 0
    while True:
        found, status = os.waitpid(tid, WALL | os.WNOHANG)
        if found:
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError(f"thread {tid} ended while it was traced (status {status:#x})")
            return status
        if time.monotonic() > until:
            return None
        looks += 1
        if looks > SPIN:
            time.sleep(0.0005)


def _follow(tid: int, calls: Counter[int], until: float) -> None:
    while (status := _wait(tid, until)) is not None:
        if status >> 16 == PTRACE_EVENT_STOP and os.WSTOPSIG(status) != signal.SIGTRAP:
            _ptrace(PTRACE_LISTEN, tid, None, None)  # the whole process has been stopped: let it be
            continue
        _ptrace(PTRACE_SYSCALL, tid, None, _count(tid, status, calls))


def _count(tid: int, status: int, calls: Counter[int]) -> int | None:
    """Count the stop if a system call begins with it. The signal to deliver, if that is what it stopped for."""
    stop = os.WSTOPSIG(status)
    if stop != signal.SIGTRAP | 0x80:
        return None if stop == signal.SIGTRAP else stop
    info = ctypes.create_string_buffer(88)  # struct ptrace_syscall_info: op, 3 bytes, arch, ip, sp, number, ...
    _ptrace(PTRACE_GET_SYSCALL_INFO, tid, len(info), ctypes.addressof(info))
    if info.raw[0] == SYSCALL_INFO_ENTRY:
        calls[struct.unpack_from("=Q", info, 24)[0]] += 1
    return None
