"""A pipeline over packets in memory: the loop's own `step`, one burst after the other, and what became of each.

Between memory ports, whose far ends are compiled here: what comes in and what goes out stays in order, whatever ports
it takes. The pcap port of the router is made of it (`libfp.ports.pcap` reads and writes the files).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from libfp.engine import context, slots
from libfp.engine.context import RECORD
from libfp.engine.state import WorkerState
from libfp.engine.stats import Counters
from libfp.engine.tap import Block
from libfp.jit import (
    Arena,
    copy,
    entry,
    load32,
    load64,
    load_acquire32,
    store32,
    store64,
    store_release32,
    u32,
)
from libfp.jit.memory import view
from libfp.packet.burst import BURST
from libfp.ports.memory import MemoryPort, Wire
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE

if TYPE_CHECKING:
    from libfp.engine.pipeline import Pipeline

FRAME_SIZE = 1 << 16  # whatever a capture holds fits
RING = 2 * BURST


@entry
def _feed(rx, fill, size, umem, source, places, count):  # type: ignore[no-untyped-def]
    """Receive `count` packets: `places` are pairs of (address behind `source`, length). `rx`, `fill`: see `_ends`."""
    for i in range(count):
        taken, put = load32(load64(fill + 8)), load32(load64(rx))
        if taken == load_acquire32(load64(fill)) or u32(put - load_acquire32(load64(rx + 8))) >= size:
            return i
        frame = load64(load64(fill + 16) + 8 * (taken & (size - 1)))
        length = load64(places + 16 * i + 8)
        copy(umem + frame, source + load64(places + 16 * i), length)
        desc = load64(rx + 16) + 16 * (put & (size - 1))
        store64(desc, frame)
        store64(desc + 8, length)
        store_release32(load64(fill + 8), u32(taken + 1))
        store_release32(load64(rx), u32(put + 1))
    return count


@entry
def _give_back(tx, completion, size):  # type: ignore[no-untyped-def]
    """Everything sent has left: its frames go back to the worker."""
    sent, put = load32(load64(tx + 8)), load32(load64(completion))
    while sent != load_acquire32(load64(tx)):
        store64(load64(completion + 16) + 8 * (put & (size - 1)), load64(load64(tx + 16) + 16 * (sent & (size - 1))))
        sent, put = u32(sent + 1), u32(put + 1)
    store_release32(load64(tx + 8), sent)
    store_release32(load64(completion), put)
    return 0


class Outcome(NamedTuple):
    """What became of one packet: its verdict word, next hop and, if it is sent, bytes."""

    verdict: int
    next_hop: int
    data: bytes


class Replay:
    """`pipeline` between `names`d ports whose packets come from memory. Needs no root, no thread; takes no time off.

    Rate limits of punts are what the pipeline says: give it none, for here time does not pass as packets come.
    """

    def __init__(self, pipeline: Pipeline, names: Sequence[str]) -> None:
        self.pipeline, self.names = pipeline, list(names)
        self.ports = [MemoryPort(name, ring_size=RING) for name in names]
        reasons = pipeline.reasons.names
        self._counters = Arena(context.FIRST_PORT + COUNTERS_SIZE * len(names) + 8 * len(reasons))
        self.state = WorkerState(
            pipeline, MemoryPort.open_all, self.ports, 0, self._counters.address, frame_size=FRAME_SIZE
        )
        self._ring = Arena(slots.size_of(BURST, 0, 0))
        self._block = Block([(self._ring.address, BURST, 0)], 0, 0)
        self.state.memory.set(RECORD, self._block.address)
        self._places = Arena(16 * BURST)
        self._ends = [self._describe(port.wires[0]) for port in self.ports]
        self._step = pipeline.module().step
        self._arguments = self.state.direct_arguments()
        pipeline.first_call(self._step, self._arguments)  # fills the fill rings, too

    def _describe(self, wire: Wire) -> Arena:
        """For each ring (rx, tx, fill, completion) the addresses of its indexes and entries."""
        made = Arena(4 * 32)
        for k, ring in enumerate(wire.rings):
            for j, value in enumerate((ring.producer, ring.consumer, ring.descs)):
                store64(made.address + 32 * k + 8 * j, value)
        return made

    def run(self, source: int, places: Sequence[tuple[int, int]], port: int) -> Iterator[Outcome]:
        """One burst, 64 packets at most, that arrive on `port`: (offset, length) each in the memory at `source`."""
        assert len(places) <= BURST
        array = np.array(places, np.int64).reshape(-1, 2)
        self._places.words[: 2 * len(places)] = array.reshape(-1)
        ring, umem, ends = self._ring.address, self.state.frames.address, self._ends[port].address
        first = load32(ring + slots.PRODUCER)
        store32(ring + slots.CONSUMER, first)
        fed = _feed(ends, ends + 64, RING, umem, source, self._places.address, len(places))
        assert fed == len(places), "a burst fits the rings"
        self._step(*self._arguments)
        words = np.frombuffer(view(ring + slots.SLOTS, BURST * slots.STAGES), np.uint32).reshape(BURST, -1)
        for number in range(first, first + len(places)):
            slot = words[number & (BURST - 1)]
            frame = int(slot[slots.FRAME // 4]) | int(slot[slots.FRAME // 4 + 1]) << 32
            verdict, length = int(slot[slots.VERDICT // 4]), int(slot[slots.LENGTH_OUT // 4])
            sent = verdict >> slots.KIND_SHIFT == 1
            data = bytes(view(umem + frame, length)) if sent else b""
            yield Outcome(verdict, int(slot[slots.NEXT_HOP // 4]), data)
        for one in self._ends:
            _give_back(one.address + 32, one.address + 96, RING)

    @property
    def counters(self) -> Counters:
        """What has been counted so far."""
        description = {
            "ports": self.names,
            "reasons": self.pipeline.reasons.names,
            "worker_counters": context.WORKER_COUNTERS,
            "port_counters": COUNTER_NAMES,
            "first_port": context.FIRST_PORT,
            "port_stride": COUNTERS_SIZE,
        }
        return Counters(description, [self._counters.words.tolist()])

    def close(self) -> None:
        self.state.close()
        self._block.close()
        for arena in (self._ring, self._places, self._counters, *self._ends):
            arena.close()
