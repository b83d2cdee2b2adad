"""The punt ring: packets a worker hands to Linux, copied unchanged with the port they came by.

Fixed slots, one producer (the worker), one consumer (the slow path, `libfp.linux.punt`). A full ring is the
producer's loss: it never waits. Layout: producer index at 0, consumer index at 64, sleeping flag at 128, then slots of
16 bytes of header (length, port) and the frame.
"""

from __future__ import annotations

import os
import select

import numpy as np

from libfp.jit import (
    Arena,
    call,
    copy,
    entry,
    kernel,
    load32,
    load64,
    load_acquire32,
    native,
    store32,
    store_release32,
    u32,
    word,
)
from libfp.jit.libc import address_of

_SLOTS, _HEADER = 192, 16
_PRODUCER, _CONSUMER, _SLEEPING = 0, 64, 128


@native
class PuntSlots:
    """The ring at `at` with `size` slots (a power of 2) of `stride` bytes each."""

    at: word
    size: word
    stride: word

    def put(self, data: int, length: int, port: int) -> bool:
        """Copy a packet in; False if the ring is full or the packet larger than a slot. Producer only."""
        own = load32(self.at + _PRODUCER)
        full = u32(own - load_acquire32(self.at + _CONSUMER)) >= self.size
        if full or length > self.stride - _HEADER:
            return False
        slot = self.at + _SLOTS + (own & (self.size - 1)) * self.stride
        store32(slot, length)
        store32(slot + 4, port)
        copy(slot + _HEADER, data, length)
        store_release32(self.at + _PRODUCER, u32(own + 1))
        return True

    def sleeper(self) -> bool:
        """Whether packets wait while the consumer sleeps."""
        waiting = load32(self.at + _PRODUCER) != load_acquire32(self.at + _CONSUMER)
        return waiting and load_acquire32(self.at + _SLEEPING) != 0


@kernel
def slots_of(ring: int) -> PuntSlots:
    """The ring that a worker's context describes at address `ring`: three words."""
    return PuntSlots(load64(ring), load64(ring + 8), load64(ring + 16))


@entry
def _drain(at, size, stride, fds, ports, write):  # type: ignore[no-untyped-def]
    own, producer = load32(at + _CONSUMER), load_acquire32(at + _PRODUCER)
    done = u32(producer - own)
    for _ in range(done):
        slot = at + _SLOTS + (own & (size - 1)) * stride
        port = load32(slot + 4)
        if port < ports:
            call(write, load32(fds + 4 * port), slot + _HEADER, load32(slot), 0, 0, 0)
        own = u32(own + 1)
        store_release32(at + _CONSUMER, own)
    return done


class PuntRing:
    """One worker's punt ring and the event that wakes its consumer. `fd` may be polled beside others."""

    def __init__(self, *, slots: int = 512, frame_size: int = 2048) -> None:
        self._arena = Arena(_SLOTS + slots * frame_size)
        self.slots = PuntSlots(self._arena.address, slots, frame_size)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.drain(np.zeros(0, np.int32))  # compiles now, not when the first packet waits

    def drain(self, fds: np.ndarray) -> int:
        """Write every waiting frame to the file descriptor of its port, without the GIL; return how many.

        `fds` is an int32 array by port index. A frame that a full queue refuses is lost, as on any interface.
        """
        slots = self.slots
        return _drain(slots.at, slots.size, slots.stride, fds.ctypes.data, len(fds), address_of("write"))

    def take(self) -> tuple[int, bytes] | None:
        """The next packet as (port, frame), for consumers in Python; None if there is none."""
        at, own = self.slots.at, load32(self.slots.at + _CONSUMER)
        if own == load_acquire32(at + _PRODUCER):
            return None
        slot = _SLOTS + (own & (self.slots.size - 1)) * self.slots.stride
        frame = bytes(self._arena.buffer[slot + _HEADER : slot + _HEADER + load32(at + slot)])
        port = load32(at + slot + 4)
        store_release32(at + _CONSUMER, u32(own + 1))
        return port, frame

    def sleep(self, timeout: float) -> None:
        """Wait for packets, `timeout` seconds at most.

        The producer looks at the sleeping flag without a fence, and so may miss it once; it looks again in every turn.
        """
        at = self.slots.at
        store_release32(at + _SLEEPING, 1)
        if load32(at + _CONSUMER) == load_acquire32(at + _PRODUCER):
            select.select([self.fd], [], [], timeout)
        store_release32(at + _SLEEPING, 0)
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def wake(self) -> None:
        """End a `sleep` from another thread."""
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        os.close(self.fd)
        self._arena.close()
