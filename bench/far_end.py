"""The far end of memory ports, played by the worker itself: a generator and a sink that need no core of their own.

The worker's loop is the real one, to the last instruction. Bound to a stage that does nothing, the far end is called
once a turn (`PerWorker`): it takes what every port has sent, gives the frames back, and has up to a burst of 64 come in
by every port, as the driver of a NIC would, each to a destination of its own. What that takes it counts itself, so that
it is in nobody's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.flat import SIZE
from libfp import stage
from libfp.jit import (
    Arena,
    clock,
    kernel,
    load32,
    load64,
    load_acquire32,
    native,
    store16,
    store16be,
    store32be,
    store64,
    store_release32,
    u32,
    word,
)
from libfp.packet.burst import BURST, Burst
from libfp.packet.checksum import checksum
from libfp.ports.memory import HEADROOM, MemoryPort
from libfp.tables.per_worker import PerWorker

# What one worker's far end keeps, each written by it alone: when its last turn ended, how many packets it has taken
# from the ports so far, the ticks that it has used itself, and how many destinations it has given out.
_STAMP, _PACKETS, _OWN, _NEXT = range(0, 32, 8)
_RINGS = 64  # then the address of each port's rings


@kernel
def _collect(tx: int, completion: int, mask: int) -> int:
    """Take all that was sent, and give the frames back; how many."""
    consumer, sent, back = load32(tx + 64), load_acquire32(tx), load32(completion)
    count = u32(sent - consumer)
    for i in range(count):
        frame = load64(tx + 192 + (consumer + i & mask) * 16)
        store64(completion + 192 + (back + i & mask) * 8, frame)
    if count != 0:
        store_release32(tx + 64, sent)
        store_release32(completion, u32(back + count))
    return count


@kernel
def _write(at: int, destination: int) -> None:
    """A UDP packet of `SIZE` bytes with TTL 64 and a right checksum."""
    store64(at, 0x0200_0000_0000_0002)
    store64(at + 8, 0x0045_0008_0000_0000)
    store64(at + 16, 0x1140_0000_0000_0000 | (SIZE - 14) << 8)
    store16(at + 24, 0)
    store32be(at + 26, 0xC6120001)
    store32be(at + 30, destination)
    store64(at + 34, 0)
    store16be(at + 24, checksum(at + 14, 20))


@native
class FarEndView:
    """`at`: what it keeps; `base`: of the frames; `keys`: `mask + 1` destinations, u32."""

    at: word
    base: word
    keys: word
    mask: word
    ports: word
    size: word

    def each_turn(self) -> int:
        """Once a turn of the worker's loop; nothing to wait for."""
        start = clock()
        at, ring, mask = self.at, 192 + 16 * self.size, self.size - 1
        packets, number = load64(at + _PACKETS), load64(at + _NEXT)
        for port in range(self.ports):
            rx = load64(at + _RINGS + 8 * port)
            packets += _collect(rx + ring, rx + 3 * ring, mask)
            fill = rx + 2 * ring
            taken, own = load32(fill + 64), load32(rx)
            room = self.size - u32(own - load_acquire32(rx + 64))
            count = min(BURST, room, u32(load_acquire32(fill) - taken))
            for i in range(count):
                frame = load64(fill + 192 + (taken + i & mask) * 8) + HEADROOM
                _write(self.base + frame, load32(self.keys + 4 * (number + i & self.mask)))
                desc = rx + 192 + (own + i & mask) * 16
                store64(desc, frame)
                store64(desc + 8, SIZE)
            number += count
            store_release32(fill + 64, u32(taken + count))
            store_release32(rx, u32(own + count))
        store64(at + _PACKETS, packets)
        store64(at + _NEXT, number)
        end = clock()
        store64(at + _OWN, load64(at + _OWN) + end - start)
        store64(at + _STAMP, end)
        return 0


@dataclass(frozen=True)
class Reading:
    """Ticks when the last turn ended, packets forwarded so far, ticks so far that the worker had for itself."""

    stamp: int
    packets: int
    worked: int


class FarEnd:
    """One worker's."""

    def __init__(self, ports: Sequence[MemoryPort], worker: int, keys: np.ndarray) -> None:
        assert len(keys) & len(keys) - 1 == 0, "a power of 2"
        wires = [port.wires[worker] for port in ports]
        self._words = Arena(_RINGS + 8 * len(ports))
        self._keys = Arena(4 * len(keys), huge=True)  # a copy: no two workers read the same line
        np.frombuffer(self._keys.buffer, np.uint32)[:] = np.roll(keys, worker * 9973)
        for number, wire in enumerate(wires):
            store64(self._words.address + _RINGS + 8 * number, wire.rx.producer)
        base, size = wires[0].frames.address, ports[0].ring_size
        self.view = FarEndView(self._words.address, base, self._keys.address, len(keys) - 1, len(ports), size)

    def read(self) -> Reading:
        stamp, packets, own = (load64(self._words.address + at) for at in (_STAMP, _PACKETS, _OWN))
        return Reading(stamp, packets, stamp - own)

    def close(self) -> None:
        self._words.close()
        self._keys.close()


class FarEnds(PerWorker[FarEnd]):
    """Of `ports`, whose packets go to `keys` (u32, a power of 2 of them), for each worker in another order."""

    def __init__(self, ports: Sequence[MemoryPort], keys: np.ndarray) -> None:
        super().__init__()
        self._ports, self._destinations = ports, keys

    def make(self, worker: int) -> FarEnd:
        """See `PerWorker.make`."""
        return FarEnd(self._ports, worker, self._destinations)


@stage.burst
def far_end(burst: Burst, wires: FarEnds) -> None:
    """The last stage, where no packet comes any more: the far end is called by the loop."""
