"""Workers as processes that have nothing of one another: what a worker touches that is not its own ends it.

    with IsolatedApplication(pipeline, ports, cores).start() as app:
        ...

An `Application` on memory ports whose every worker is a process, forked when the worker starts, on the same memory at
the same addresses. Before its loop turns, all pages that anybody could write are taken from it (mprotect), but for

- those that were made for it alone, its block of the statistics and its stack: it reads and writes them;
- its mailbox, which the control plane fills and it empties;
- what is declared: the words that the control plane alone writes and workers read. These it may only read.

Python's own memory goes, too, so a worker never returns there: it ends when its loop does. A load or store of anything
else is a segmentation fault, which `Application.wait` raises as an error that names the worker.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import resource
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_int, c_long, c_size_t, c_ulong, c_void_p
from typing import Any, NoReturn

import numba
import numpy as np

from libfp.engine.application import Application
from libfp.engine.context import PARKED, THREAD
from libfp.engine.state import WorkerState
from libfp.engine.worker import Worker
from libfp.errors import BadInput, Error
from libfp.jit import Arena, call, load64, store64
from libfp.jit import memory as _memory
from libfp.jit.libc import address_of
from libfp.jit.memory import PAGE
from libfp.jit.policy import kernel

__all__ = ["IsolatedApplication", "IsolatedWorker"]

log = logging.getLogger("libfp.testing")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes, _libc.mmap.restype = [c_void_p, c_size_t, c_int, c_int, c_int, c_long], c_void_p
_libc.pthread_getattr_np.argtypes = [c_ulong, c_void_p]
_libc.pthread_attr_getstack.argtypes = [c_void_p, c_void_p, c_void_p]

_NONE, _READ, _READ_WRITE = 0, 1, 3
_SHARED_FIXED_ANONYMOUS = 0x01 | 0x10 | 0x20
_PR_SET_PDEATHSIG = 1
_CHUNK = 1 << 20
_NOT_CONFINED = 3  # exit status

Span = tuple[int, int]  # start and end, whole pages


def _pages(start: int, end: int) -> Span:
    return start // PAGE * PAGE, -(-end // PAGE) * PAGE


def _of(arena: Arena) -> Span:
    return _pages(arena.address, arena.address + arena.size)


def share(span: Span) -> None:
    """Let processes that are forked later share these pages with this one. Nobody may write there meanwhile."""
    start, end = span
    kept = {}
    for at in range(start, end, _CHUNK):
        piece = np.frombuffer(_memory.view(at, min(_CHUNK, end - at)), np.uint8)
        if piece.any():  # pages that nobody has used stay so
            kept[at] = piece.copy()
    if _libc.mmap(start, end - start, _READ_WRITE, _SHARED_FIXED_ANONYMOUS, -1, 0) != start:
        raise MemoryError(f"cannot share {end - start} bytes at {start:#x}")
    for at, data in kept.items():
        _memory.view(at, len(data))[:] = data.tobytes()


def writable() -> Iterator[Span]:
    """The mappings of this process that it could write, or that it shares with others."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            where, rights, *_ = line.split(None, 2)
            if "w" in rights or "s" in rights:
                start, _, end = where.partition("-")
                yield int(start, 16), int(end, 16)


def without(spans: Iterable[Span], kept: Iterable[Span]) -> Iterator[Span]:
    """What is left of `spans` where nothing of `kept` is."""
    kept = sorted(kept)
    for start, end in spans:
        for low, high in kept:
            if low < end and start < high:
                if start < low:
                    yield start, low
                start = max(start, high)
        if start < end:
            yield start, end


def _stack() -> Span:
    """Of the calling thread."""
    attributes, at, size = (ctypes.c_char * 256)(), c_void_p(), c_size_t()
    if _libc.pthread_getattr_np(threading.get_ident(), attributes):
        raise Error("cannot tell where the stack is")
    _libc.pthread_attr_getstack(attributes, ctypes.byref(at), ctypes.byref(size))
    return _pages(at.value or 0, (at.value or 0) + size.value)


def confined(loop: Any) -> Any:
    """A compiled function that takes `count` spans' rights away, runs the loop, and ends the process."""

    @kernel
    def run(spans, count, mprotect, leave, context, burst, mailbox, arguments):  # type: ignore[no-untyped-def]
        failed = 0
        for i in range(count):
            at = spans + 24 * i
            failed |= call(mprotect, load64(at), load64(at + 8), load64(at + 16), 0, 0, 0)
        if failed & 0xFFFFFFFF == 0:
            loop(context, burst, mailbox, *arguments)
        call(leave, _NOT_CONFINED * (failed & 1), 0, 0, 0, 0, 0)

    return run


class IsolatedWorker(Worker):
    """A worker whose thread waits for a process, which runs the loop. `own` and `declared` are its pages."""

    def __init__(self, worker: Worker, run: Any, own: Sequence[Span], declared: Sequence[Span]) -> None:
        super().__init__(worker.number, worker.core, worker.state, worker._ports, worker._loop)
        self.process = 0
        self._confined, self._own, self._declared = run, list(own), list(declared)
        self._spans = Arena(1 << 18)

    def prepare(self) -> None:
        """See `Worker`; and compile what begins a process."""
        super().prepare()
        context, burst, mailbox, *rest = self.state.arguments
        arguments = 0, 0, 0, 0, context, burst, mailbox, tuple(rest)
        self._confined.compile(tuple(numba.typeof(value) for value in arguments))

    def _run(self, arguments: list[Any]) -> None:
        try:
            replicas = [_of(arena) for arena in self.state.replicas.arenas]  # made anew for this start
            for span in replicas:
                share(span)
            self.process = os.fork()
            if self.process == 0:
                self._become([*self._own, *replicas], arguments)
            _, status = os.waitpid(self.process, 0)
            if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
                raise self._ended(status)
        except BaseException as error:
            self.error = error
            log.error("%s", error)

    def _ended(self, status: int) -> Error:
        what = f"worker {self.number} (process {self.process}) "
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            if name == "SIGSEGV":
                return Error(f"{what}touched memory that is neither its own nor declared ({name})", "declare it")
            return Error(f"{what}was ended by {name}")
        return Error(f"{what}could not give up what is not its own (status {os.WEXITSTATUS(status)})")

    def _become(self, own: list[Span], arguments: list[Any]) -> NoReturn:
        """In the process: be the worker, and end."""
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            for one in (signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM):
                signal.signal(one, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # for who has started us
            os.sched_setaffinity(0, {self.core})
            store64(self._statistics + THREAD, os.getpid())
            store64(self._statistics + PARKED, 0)
            context, burst, mailbox, *rest = arguments
            spans, mprotect, leave = self._spans.address, address_of("mprotect"), address_of("_exit")
            count = self._list([*own, _stack(), _of(self._spans)])
            self._confined(spans, count, mprotect, leave, context, burst, mailbox, tuple(rest))
        finally:
            os._exit(_NOT_CONFINED)

    def _list(self, own: list[Span]) -> int:
        """Write down what is taken away, for compiled code to do; how many spans."""
        rest = list(without(writable(), [*own, *self._declared]))
        rows = [(*span, _READ) for span in self._declared] + [(*span, _NONE) for span in rest]
        for number, (start, end, rights) in enumerate(rows):
            for word, value in enumerate((start, end - start, rights)):
                store64(self._spans.address + 24 * number + 8 * word, value)
        return len(rows)


class IsolatedApplication(Application):
    """`Application`, but workers are processes; on memory ports, without hand-off, and none is added later.

    `declared`: arenas that workers may read beside those that the pipeline's tables declare (`Table.shares`).
    """

    def __init__(self, *arguments: Any, declared: Sequence[Arena] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.real or self.pipeline.hands_off:
            raise BadInput("workers as processes with these ports or stages", "memory ports, and no hand-off")
        self._own_spans: list[list[Span]] = []
        self._declared = [*declared, self.pipeline.reasons.table]
        for table in self.pipeline.tables:
            self._declared += getattr(table, "shares", ())

    def _open(self) -> None:
        super()._open()
        for span in {_of(arena) for arena in self._declared}:
            share(span)
        run = confined(self._loop)
        everybodys = [_of(arena) for arena in self._declared]
        for number, (worker, own) in enumerate(zip(self.workers, self._own_spans, strict=True)):
            control = _of(worker.state.memory.control)  # which it only reads
            mine = [span for span in own if span != control]
            self.workers[number] = IsolatedWorker(worker, run, mine, [*everybodys, control])

    def _state(self, number: int) -> WorkerState:
        assert self.page is not None
        before = _memory.known()
        state = super()._state(number)
        replicas = {_of(arena) for arena in state.replicas.arenas}
        own = [_pages(*region) for region in _memory.known() - before]
        own = [span for span in own if span not in replicas]
        for span in own:
            share(span)
        block = self._page_start + self.page.block_offset(number)
        self._own_spans.append([*own, (block, block + int(self.page.description["block"]))])
        return state
