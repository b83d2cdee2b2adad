"""Memory that hot code reaches by address: arenas between guard pages, and the register of what may be touched."""

from __future__ import annotations

import bisect
import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from ctypes import c_int, c_long, c_size_t, c_ssize_t, c_void_p

import numpy as np

from libfp.jit.policy import BOUNDSCHECK

_libc = ctypes.CDLL(None)
_mmap, _munmap, _mprotect, _madvise = _libc.mmap, _libc.munmap, _libc.mprotect, _libc.madvise
_mmap.argtypes, _mmap.restype = [c_void_p, c_size_t, c_int, c_int, c_int, c_long], c_void_p
_munmap.argtypes = [c_void_p, c_size_t]
_mprotect.argtypes = _madvise.argtypes = [c_void_p, c_size_t, c_int]
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes, _view.restype = [c_void_p, c_ssize_t, c_int], ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE

PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE_PAGE = 2 << 20

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MADV_HUGEPAGE = 14
_MAP_FAILED = (1 << 64) - 1

# Known regions, sorted by start: starts and ends, replaced together so that another thread never sees half a change.
_known: tuple[list[int], list[int]] = ([], [])
_lock = threading.RLock()  # an arena that is collected meanwhile comes back here

# The same for the boundscheck build, whose compiled checks read it while threads register more: word 0 counts changes,
# and its lowest bit says which half is current: a count, then (start, end) pairs.
REGION_LIMIT = 16384
REGION_HALF = 1 + 2 * REGION_LIMIT
regions = np.zeros(1 + 2 * REGION_HALF, np.int64)


def register(address: int, size: int) -> None:
    """Declare `size` bytes at `address` as memory that loads and stores may touch.

    Regions do not overlap: what was declared of these bytes before is of a mapping that has gone, and is forgotten.
    """

    def add(starts: list[int], ends: list[int]) -> None:
        begin, end = bisect.bisect_right(ends, address), bisect.bisect_left(starts, address + size)
        starts[begin:end], ends[begin:end] = [address], [address + size]

    _change(add)


def unregister(address: int) -> None:
    """Take back a `register` of the region that starts at `address`."""

    def remove(starts: list[int], ends: list[int]) -> None:
        at = bisect.bisect_right(starts, address) - 1
        if at < 0 or starts[at] != address:
            raise ValueError(f"no region starts at {address:#x}")
        del starts[at], ends[at]

    _change(remove)


def forget(address: int, size: int) -> None:
    """Take back every `register` of a region that starts in these bytes: they are about to be unmapped."""

    def remove(starts: list[int], ends: list[int]) -> None:
        begin, end = bisect.bisect_left(starts, address), bisect.bisect_left(starts, address + size)
        del starts[begin:end], ends[begin:end]

    _change(remove)


def known() -> set[tuple[int, int]]:
    """(start, end) of every registered region."""
    starts, ends = _known
    return set(zip(starts, ends, strict=True))


def _change(edit: Callable[[list[int], list[int]], None]) -> None:
    global _known
    with _lock:
        while True:
            before = _known
            after = list(before[0]), list(before[1])
            edit(*after)
            if _known is before:
                _known = after
                break
        if BOUNDSCHECK:
            _publish()


def _publish() -> None:
    starts, ends = _known
    count = len(starts)
    if count > REGION_LIMIT:
        raise MemoryError(f"more than {REGION_LIMIT} memory regions")
    current = int(regions[0]) + 1
    half = regions[1 + (current & 1) * REGION_HALF :][:REGION_HALF]
    half[1 : 1 + 2 * count : 2] = starts
    half[2 : 2 + 2 * count : 2] = ends
    half[0] = count
    regions[0] = current


def check(address: int, size: int) -> None:
    """Raise IndexError unless all `size` bytes at `address` lie in one registered region."""
    starts, ends = _known
    at = bisect.bisect_right(starts, address) - 1
    if at < 0 or address + size > ends[at]:
        raise IndexError(f"{size} bytes at {address:#x} are outside every registered region")


def protect(address: int, size: int) -> None:
    """Make whole pages unreadable: a guard inside an arena, which goes when the arena does."""
    if _mprotect(address, size, _PROT_NONE):
        raise MemoryError(f"cannot protect {size} bytes at {address:#x}")


def view(address: int, size: int) -> memoryview:
    """The `size` bytes at `address` as a writable memoryview; the caller keeps the memory alive."""
    found: memoryview = _view(address, size, _WRITABLE)
    return found


class Arena:
    """One anonymous, zeroed mapping between two guard pages; it never moves.

    `size` bytes are reserved and populated by use. `huge` asks for 2 MiB pages, which a table of megabytes wants.
    `address` is where it begins, aligned to the page size (2 MiB when `huge`). Freed by `close` or with the object.
    `flush_end` puts the usable bytes against the upper guard page (so `address` is only 8-byte aligned).
    """

    def __init__(self, size: int, *, huge: bool = False, flush_end: bool = False) -> None:
        if size <= 0:
            raise ValueError(f"an arena of {size} bytes")
        align = HUGE_PAGE if huge else PAGE
        room = -(-size // align) * align
        total = room + 2 * PAGE + (align - PAGE)
        start = _mmap(None, total, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        if start == _MAP_FAILED:
            raise MemoryError(f"cannot map {total} bytes")
        base = -(-(start + PAGE) // align) * align
        if _mprotect(base, room, _PROT_READ | _PROT_WRITE):
            _munmap(start, total)
            raise MemoryError(f"cannot make {room} bytes writable")
        if huge:
            _madvise(base, room, _MADV_HUGEPAGE)
        self.size = size
        self.address = base + (room - size) // 8 * 8 if flush_end else base
        self._own(start, total)

    def _own(self, start: int, total: int) -> None:
        """These are the pages, guards and all; `size` and `address` are set."""
        register(self.address, self.size)
        self._finalizer = weakref.finalize(self, _release, start, total)
        self._finalizer.atexit = False  # a thread that nobody could stop may use it until the process has ended

    @property
    def buffer(self) -> memoryview:
        """All bytes as a memoryview, not to be used after `close`. Raises ValueError then."""
        if not self._finalizer.alive:
            raise ValueError(f"memory of {self.size} bytes that has been freed")
        return view(self.address, self.size)

    @property
    def words(self) -> np.ndarray:
        """The same as an int64 array."""
        return np.frombuffer(self.buffer[: self.size // 8 * 8], np.int64)

    def close(self) -> None:
        """Unmap; a later access through an old address faults."""
        self._finalizer()


class SharedMap(Arena):
    """The first `size` bytes of the file `fd`, shared with whoever maps it too, between two guard pages.

    The file must be as large, and stay so: what lies beyond its end ends the process that touches it (SIGBUS). `fd` may
    be closed. Freed as an arena. Raises MemoryError.
    """

    def __init__(self, fd: int, size: int) -> None:
        room = -(-size // PAGE) * PAGE
        total = room + 2 * PAGE
        start = _mmap(None, total, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        if start == _MAP_FAILED:
            raise MemoryError(f"cannot map {total} bytes")
        self.size, self.address = size, start + PAGE
        both, how = _PROT_READ | _PROT_WRITE, _MAP_SHARED | _MAP_FIXED
        if _mmap(self.address, size, both, how, fd, 0) == _MAP_FAILED:
            _munmap(start, total)
            raise MemoryError(f"cannot map {size} bytes of file descriptor {fd}")
        self._own(start, total)


def _release(start: int, total: int) -> None:
    forget(start, total)
    _munmap(start, total)
