"""`Spsc` between two processes: in a sealed memfd, each side trusting nothing that the other can store to.

    first page      what ring this is: magic, version, bytes an element, size
    then            as `Spsc`: the two published indexes, the slots

What a side goes by, its own index and the other's as last seen, is in memory of its own. An index in the ring that is
not within `size` of ours is not taken, so neither counts nor addresses leave the ring, whatever the other process
stores. The elements are the other's word all the same, and in place they may change under the reader's eyes: copy
them out before checking them.

The file must be sealed against shrinking, or reading it could end this process (SIGBUS). Each side holds a lock on one
byte of the file, through an open description of its own; the kernel drops it when that process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from typing import Any, Literal, Self

import numpy as np

from libfp.errors import AlreadyRunning, BadInput, PeerGone, PeerLied
from libfp.jit import Arena, load_acquire32, store32, u32
from libfp.jit.memory import SharedMap
from libfp.rings.ring import Ring
from libfp.rings.spsc import CONSUMER, OWN, PRODUCER, SEEN, SLOTS, SpscView

VERSION = 1
Side = Literal["producer", "consumer"]

_MAGIC = b"libfpspc"
_HEADER = struct.Struct("<8sIIQ")
_START = 4096  # of the ring in the file
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_INDEX = {"producer": PRODUCER, "consumer": CONSUMER}
_LOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


class SharedSpsc(Ring):
    """One side of a ring between two processes. One creates it and gives the other `fd`, which attaches it.

        ring = SharedSpsc.create(1024, side="producer")      # then send ring.fd: os.fork, pass_fds, SCM_RIGHTS
        ring = SharedSpsc.attach(fd, side="consumer")

    A side may be used by one thread at a time. Who attaches after another process of that side has ended goes on where
    it was. `view` is a `SpscView`, for compiled code, of which only the calls of this side may be used. A child that
    is forked while this is open holds its lock, too: attach in the process that uses it.
    """

    _ends = ("view", "fd", "_lock")

    def __init__(self, fd: int, side: Side, size: int, element: int) -> None:
        """See `create` and `attach`, which have looked at the file."""
        super().__init__(size, element)
        self.side, self._other = side, "producer" if side == "consumer" else "consumer"
        self._lock = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        #: The file; pass it to the other side.
        self.fd = os.dup(fd)
        self._leave = weakref.finalize(self, _leave, self._lock, self.fd)
        try:
            self._take()
            self._map = SharedMap(self._lock, _file_size(size, element))
        except BaseException:
            self._leave()
            raise
        base = self._map.address + _START
        self.arena = Arena(256)
        own = {"producer": self.arena.address, "consumer": self.arena.address + 128}
        self.view = SpscView(base, own["producer"], own["consumer"], size, element)
        index = load_acquire32(base + _INDEX[side])
        store32(own[side] + OWN, index)
        store32(own[side] + SEEN, index if side == "consumer" else u32(index - size))  # so that it is looked for

    @classmethod
    def create(cls, size: int, *, side: Side, element: int = 8, start: int = 0) -> Self:
        """A new ring, of which this process is `side`. `start` is the first index, for tests."""
        Ring(size, element)  # is it one?
        _check_side(side)
        fd = os.memfd_create("libfp-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _file_size(size, element))
            os.pwrite(fd, _HEADER.pack(_MAGIC, VERSION, element, size), 0)
            for at in _INDEX.values():
                os.pwrite(fd, struct.pack("<I", u32(start)), _START + at)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            return cls(fd, side, size, element)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, fd: int, *, side: Side, element: int = 8, size: int | None = None) -> Self:
        """The ring that another process has created, of `element` bytes and, if it matters, `size` elements.

        `fd` may be closed afterwards. Raises BadInput if this is no such ring, or not sealed; AlreadyRunning if some
        process is that side.
        """
        _check_side(side)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise BadInput(f"file descriptor {fd} is no memfd", "pass the fd of a SharedSpsc") from None
        if seals & _SEALS != _SEALS:
            raise BadInput("the ring's file could shrink or grow", "seal it: F_SEAL_SHRINK and F_SEAL_GROW")
        header = os.pread(fd, _HEADER.size, 0)  # once: the other side may change it at any time
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise BadInput(f"file descriptor {fd} holds no ring", "pass the fd of a SharedSpsc")
        _, version, its_element, its_size = _HEADER.unpack(header)
        if version != VERSION:
            raise BadInput(f"the ring is of version {version}, and this is {VERSION}", "use one libfp on both sides")
        if its_element != element:
            raise BadInput(f"the ring's elements have {its_element} bytes, not {element}", "agree on one")
        if size is not None and its_size != size:
            raise BadInput(f"the ring has {its_size} elements, not {size}", "agree on one")
        Ring(its_size, element)  # is it one?
        if os.fstat(fd).st_size != _file_size(its_size, element):
            raise BadInput(f"the ring's file has {os.fstat(fd).st_size} bytes", f"{its_size} elements take others")
        return cls(fd, side, its_size, element)

    @property
    def peer_alive(self) -> bool:
        """Whether some process is the other side now. One system call."""
        asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _INDEX[self._other], 1, 0)
        kind = _LOCK.unpack(fcntl.fcntl(self._lock, fcntl.F_OFD_GETLK, asked))[0]
        return bool(kind != fcntl.F_UNLCK)

    def check(self) -> None:
        """Raises PeerLied if the other side's index cannot be, PeerGone if there is no other side.

        What a peer that has gone did publish can be taken out all the same.
        """
        ours = load_acquire32(self.view.base + _INDEX[self.side])
        theirs = load_acquire32(self.view.base + _INDEX[self._other])
        if u32(theirs - ours if self.side == "consumer" else ours - theirs) > self.size:
            raise PeerLied(f"the {self._other}'s index is {theirs}, ours {ours}, of {self.size}", "close the ring")
        if not self.peer_alive:
            raise PeerGone(f"the ring has no {self._other}", "wait for another one to attach, or close the ring")

    def enqueue_burst(self, values: Any) -> int:
        return self._only("producer", super().enqueue_burst)(values)

    def enqueue_bulk(self, values: Any) -> int:
        return self._only("producer", super().enqueue_bulk)(values)

    def dequeue_burst(self, count: int) -> np.ndarray:
        return self._only("consumer", super().dequeue_burst)(count)

    def dequeue_bulk(self, count: int) -> np.ndarray:
        return self._only("consumer", super().dequeue_bulk)(count)

    def close(self) -> None:
        """Leave this side, and unmap; what `Ring.close` says. So does the end of the object."""
        self._map.close()
        self._leave()
        super().close()

    def _take(self) -> None:
        """Be this side, until the process ends or the ring is closed."""
        try:
            fcntl.fcntl(self._lock, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _INDEX[self.side], 1, 0))
        except OSError:
            raise AlreadyRunning(f"the ring has a {self.side}", f"be its {self._other}, or end the other one") from None

    def _only(self, side: str, call: Any) -> Any:
        if self.side != side:
            raise BadInput(f"this is the ring's {self.side}", f"its {side} does that")
        return call


def _check_side(side: str) -> None:
    if side not in _INDEX:
        raise BadInput(f"a ring's {side!r}", "its sides are producer and consumer")


def _leave(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _file_size(size: int, element: int) -> int:
    return _START + SLOTS + size * element
