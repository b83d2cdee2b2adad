"""The far end of a memory port for whole bursts: numpy does what the kernel or a NIC does to a real port's rings."""

from __future__ import annotations

from typing import Any

import numpy as np

from libfp.jit import load_acquire32, store_release32
from libfp.jit.memory import view
from libfp.ports.memory import Wire
from libfp.ports.rings import RingAddresses

Array = np.ndarray[Any, Any]
NUMBER = 6  # which word of a frame is its number: bytes 6 to 13 of a UDP payload, whole words being quick to move


class FastWire:
    """Puts numbered copies of one UDP frame on a port's receive ring, and reads the numbers of what the port sent."""

    def __init__(self, wire: Wire, frame: bytes = b"\0" * 60) -> None:
        if len(frame) < 8 * (NUMBER + 1):
            raise ValueError(f"a frame of {len(frame)} bytes has no room for a number")
        self._wire, self._length = wire, len(frame)
        self._frame = np.frombuffer(frame + b"\0" * (-len(frame) % 8), np.uint64)
        memory = wire.frames
        self._umem: Array = np.frombuffer(view(memory.address, memory.size), np.uint64).reshape(-1, memory.stride // 8)
        self._stride, self._mask = memory.stride, wire.ring_size - 1
        self._rx, self._tx = _words(wire.rx, 2), _words(wire.tx, 2)
        self._fill, self._completion = _words(wire.fill, 1), _words(wire.completion, 1)

    def inject(self, first: int, count: int) -> int:
        """Receive frames numbered from `first`, at most `count`, as far as the rings have room; how many it were."""
        wire = self._wire
        consumer, produced = load_acquire32(wire.fill.consumer), load_acquire32(wire.rx.producer)
        available = (load_acquire32(wire.fill.producer) - consumer) & 0xFFFFFFFF
        waiting = (produced - load_acquire32(wire.rx.consumer)) & 0xFFFFFFFF
        count = min(count, available, wire.ring_size - waiting)
        if count <= 0:
            return 0
        offsets = self._fill[self._slots(consumer, count), 0]
        rows = offsets // self._stride
        self._umem[rows, : self._frame.size] = self._frame
        self._umem[rows, NUMBER] = np.arange(first, first + count)
        slots = self._slots(produced, count)
        self._rx[slots, 0], self._rx[slots, 1] = rows * self._stride, self._length
        store_release32(wire.fill.consumer, (consumer + count) & 0xFFFFFFFF)
        store_release32(wire.rx.producer, (produced + count) & 0xFFFFFFFF)
        return count

    def collect(self) -> Array:
        """The numbers of the frames that the port has sent since the last call, in order; the frames go back."""
        wire = self._wire
        consumer = load_acquire32(wire.tx.consumer)
        count = (load_acquire32(wire.tx.producer) - consumer) & 0xFFFFFFFF
        if count == 0:
            return np.empty(0, np.int64)
        offsets = self._tx[self._slots(consumer, count), 0]
        numbers = self._umem[offsets // self._stride, NUMBER].astype(np.int64)
        completed = load_acquire32(wire.completion.producer)
        self._completion[self._slots(completed, count), 0] = offsets
        store_release32(wire.tx.consumer, (consumer + count) & 0xFFFFFFFF)
        store_release32(wire.completion.producer, (completed + count) & 0xFFFFFFFF)
        return numbers

    def _slots(self, index: int, count: int) -> Array:
        return np.arange(index, index + count) & self._mask


def _words(ring: RingAddresses, width: int) -> Array:
    """The ring's descriptors as 64-bit words, `width` of them each."""
    return np.frombuffer(view(ring.descs, 8 * width * ring.size), np.int64).reshape(-1, width)
