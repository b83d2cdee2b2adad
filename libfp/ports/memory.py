"""A port without a kernel: the four AF_XDP rings in plain memory, with Python at the other end.

The worker's side is, to the last instruction, the one that drives a real interface. The far end is a `Wire`:
`inject` puts frames on the port's receive ring, `collect` takes what the port has sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from libfp.jit import Arena, load32, load64, load_acquire32, store32, store64, store_release32, u32
from libfp.jit.memory import view
from libfp.ports.frames import FrameMemory, OpenPort
from libfp.ports.rings import RingAddresses

HEADROOM = 256  # in front of a received packet, as with AF_XDP; none where it ends or begins at a guard page


class Wire:
    """The far end of one queue of a memory port: what the kernel is to a real one."""

    def __init__(self, frames: FrameMemory, ring_size: int, first_index: int = 0) -> None:
        if ring_size & (ring_size - 1) or ring_size <= 0:
            raise ValueError(f"a ring of {ring_size} entries; make it a power of 2")
        self.frames, self.ring_size = frames, ring_size
        self._arena = Arena(4 * (192 + 16 * ring_size))
        rings = []
        for k in range(4):
            at = self._arena.address + k * (192 + 16 * ring_size)
            rings.append(RingAddresses(at, at + 64, at + 128, at + 192, ring_size))
            store32(at, first_index)
            store32(at + 64, first_index)
        self.rx, self.tx, self.fill, self.completion = rings

    @property
    def rings(self) -> tuple[RingAddresses, RingAddresses, RingAddresses, RingAddresses]:
        """In the order of `OpenPort.rings`."""
        return self.rx, self.tx, self.fill, self.completion

    def inject(self, packets: Iterable[bytes]) -> list[int]:
        """Receive `packets` as far as the fill ring has frames and the receive ring room.

        Returns the frame offsets they went to, in order.
        """
        used = []
        for packet in packets:
            consumer, producer = load32(self.fill.consumer), load32(self.rx.producer)
            full = u32(producer - load_acquire32(self.rx.consumer)) >= self.ring_size
            if full or consumer == load_acquire32(self.fill.producer):
                break
            if len(packet) > self.frames.frame_size:
                raise ValueError(f"a packet of {len(packet)} bytes, frames have {self.frames.frame_size}")
            frame = load64(self.fill.descs + (consumer & (self.ring_size - 1)) * 8)
            store_release32(self.fill.consumer, u32(consumer + 1))
            if self.frames.guard == "end":
                frame += self.frames.frame_size - len(packet)
            elif not self.frames.guard and HEADROOM + len(packet) <= self.frames.frame_size:
                frame += HEADROOM
            view(self.frames.address + frame, len(packet))[:] = packet
            desc = self.rx.descs + (producer & (self.ring_size - 1)) * 16
            store64(desc, frame)
            store64(desc + 8, len(packet))
            store_release32(self.rx.producer, u32(producer + 1))
            used.append(frame)
        return used

    def collect(self) -> list[bytes]:
        """What the port has sent since the last call; the frames go back to the worker."""
        sent = []
        consumer = load32(self.tx.consumer)
        while consumer != load_acquire32(self.tx.producer):
            desc = self.tx.descs + (consumer & (self.ring_size - 1)) * 16
            frame, length = load64(desc), load32(desc + 8)
            sent.append(bytes(view(self.frames.address + frame, length)))
            consumer = u32(consumer + 1)
            store_release32(self.tx.consumer, consumer)
            producer = load32(self.completion.producer)
            store64(self.completion.descs + (producer & (self.ring_size - 1)) * 8, frame)
            store_release32(self.completion.producer, u32(producer + 1))
        return sent

    def close(self) -> None:
        """Free the rings."""
        self._arena.close()


class MemoryPort:
    """A port in memory. `wires[q]` is the far end of queue q once a pipeline has opened it.

    `first_index` is where the ring indexes start (just below 2^32, to see them wrap).
    """

    def __init__(self, name: str = "memory", *, ring_size: int = 1024, first_index: int = 0) -> None:
        self.name, self.ring_size, self.first_index = name, ring_size, first_index
        self.wires: dict[int, Wire] = {}

    @staticmethod
    def open_all(ports: Sequence[MemoryPort], queue: int, frames: FrameMemory) -> list[OpenPort]:
        """See `Port`."""
        opened = []
        for port in ports:
            wire = port.wires[queue] = Wire(frames, port.ring_size, port.first_index)
            opened.append(OpenPort(wire.rings, -1, True, port.ring_size, wire))
        return opened

    def take(self, queue: int) -> None:
        """Nothing to steer."""

    def leave(self, queue: int) -> None:
        """Nothing to steer."""

    def close(self) -> None:
        """Nothing to give up."""

    def inject(self, packets: Iterable[bytes], queue: int = 0) -> list[int]:
        """See `Wire.inject`."""
        return self.wires[queue].inject(packets)

    def collect(self, queue: int = 0) -> list[bytes]:
        """See `Wire.collect`."""
        return self.wires[queue].collect()
