"""`Pipeline.run_once`: one worker's state around memory ports, stepped by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from libfp.engine import slots
from libfp.engine.context import RECORD
from libfp.engine.state import WorkerState
from libfp.engine.tap import Block
from libfp.errors import BadInput
from libfp.jit import Arena, load32, load64, store32
from libfp.jit.memory import view
from libfp.packet.burst import BURST
from libfp.ports.memory import MemoryPort

if TYPE_CHECKING:
    from libfp.engine.pipeline import Outcome, Pipeline


class Once:
    """A pipeline on memory ports, run for one burst at a time."""

    def __init__(self, pipeline: Pipeline, ports: int, guard: str) -> None:
        self.pipeline, self.shape = pipeline, (ports, guard)
        self.ports = [MemoryPort(f"memory{number}", ring_size=2 * BURST) for number in range(ports)]
        self._counters = Arena(64 * 1024)
        self.state = WorkerState(
            pipeline, MemoryPort.open_all, self.ports, 0, self._counters.address, frame_size=16384, guard=guard
        )
        self._ring = Arena(slots.size_of(BURST, 0, 0))
        self._block = Block([(self._ring.address, BURST, 0)], 0, 0)
        self.state.memory.set(RECORD, self._block.address)
        self._step = pipeline.module().step

    def run(self, packets: list[bytes], port: int) -> list[Outcome]:
        if not 0 <= port < len(self.ports):
            raise BadInput(f"packets for port {port} of {len(self.ports)}", "ports count from 0")
        room = self.state.frames.frame_size
        if (largest := max(map(len, packets), default=0)) > room:
            raise BadInput(f"a packet of {largest} bytes", f"a frame holds {room}")
        found: list[Outcome] = []
        arguments = self.state.direct_arguments()
        self.pipeline.first_call(self._step, arguments)  # fills the fill rings the first time
        for first in range(0, len(packets), BURST):
            found += self._burst(packets[first : first + BURST], port, arguments)
        return found

    def _burst(self, packets: list[bytes], port: int, arguments: list[Any]) -> list[Outcome]:
        from libfp.engine.pipeline import outcome

        ring, umem = self._ring.address, self.state.frames.address
        store32(ring + slots.CONSUMER, load32(ring + slots.PRODUCER))
        first = load32(ring + slots.PRODUCER)
        placed = self.ports[port].inject(packets)
        assert len(placed) == len(packets), "a burst fits the rings"
        self._step(*arguments)
        found: list[Outcome] = []
        for number in range(first, first + len(placed)):  # in the order in which they came
            slot = ring + slots.SLOTS + (number & (BURST - 1)) * slots.stride_of(0, 0)
            data = bytes(view(umem + load64(slot + slots.FRAME), load32(slot + slots.LENGTH_OUT)))
            verdict, next_hop = load32(slot + slots.VERDICT), load32(slot + slots.NEXT_HOP)
            found.append(outcome(self.pipeline.reasons, verdict, data, next_hop))
        for one in self.ports:
            one.collect()
        return found

    def close(self) -> None:
        self.state.close()
        self._block.close()
        self._ring.close()
        self._counters.close()
