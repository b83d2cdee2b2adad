"""Everything one worker owns: its UMEM, burst, port blocks, private words, and replicas of the tables."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from libfp.engine import context as c
from libfp.engine.context import ContextMemory
from libfp.engine.crew import Crew, Member
from libfp.engine.handoff import MOST
from libfp.engine.punt import PuntRing
from libfp.engine.replicas import Replicas
from libfp.jit import Arena, store64
from libfp.jit.libc import address_of
from libfp.jit.memory import view
from libfp.packet.burst import BURST, FRAME_SIZE, STRIDE, WORKER, WORKERS, BurstMemory
from libfp.ports.frames import BlockWords, FrameMemory, OpenPort
from libfp.ports.rings import COUNTERS_SIZE, PortBlocks, PortRings

if TYPE_CHECKING:
    from libfp.engine.pipeline import Pipeline

_POLLIN = 1
IDLE_LIMIT = 20_000  # empty turns before a worker parks: about a millisecond


class WorkerState:
    """The memory of worker number `queue` of a pipeline, its queue of each port opened over one UMEM.

    `statistics` is the address of its counters, which outlives it. `punt` gives it a punt ring. `workers` is what
    stages are told. `crew` outlives it, too; where the pipeline hands packets off and there is none, it is alone.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        open_all: Callable[[Any, int, FrameMemory], list[OpenPort]],
        ports: Sequence[Any],
        queue: int,
        statistics: int,
        *,
        frame_size: int = 2048,
        guard: str = "",
        punt: bool = False,
        workers: int = 1,
        crew: Crew | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.member: Member | None = None
        self._closers: list[Callable[[], None]] = []
        try:
            if crew is None and pipeline.hands_off:
                crew = self._own(Crew(1))
            self._build(open_all, ports, queue, statistics, frame_size, guard, punt)
            store64(self._burst.burst.at + WORKER, queue)
            store64(self._burst.burst.at + WORKERS, workers)
            store64(self._burst.burst.at + STRIDE, self.frames.stride)
            store64(self._burst.burst.at + FRAME_SIZE, self.frames.frame_size)
            if crew is not None:
                self.member = crew.join(queue, self.memory, self.frames)
                store64(self._poll_fds + 8 * len(self.open_ports), self.member.wake | _POLLIN << 32)
        except BaseException:
            self.close()
            raise

    def _build(
        self,
        open_all: Callable[[Any, int, FrameMemory], list[OpenPort]],
        ports: Sequence[Any],
        queue: int,
        statistics: int,
        frame_size: int,
        guard: Any,
        punt: bool,
    ) -> None:
        ring_size = max((port.ring_size for port in ports), default=0)
        frames = 3 * ring_size * len(ports) + BURST + (MOST if self.pipeline.hands_off else 0)
        self.frames = self._own(FrameMemory(frames, frame_size, guard=guard))
        self.blocks = PortBlocks(len(ports))  # closed after the ports, whose own threads may look into it until then
        self._closers.append(self.blocks.arena.close)
        self.open_ports = open_all(ports, queue, self.frames)
        self._closers += [port.close for port in self.open_ports]
        self._burst = BurstMemory()
        self._closers.append(self._burst.arena.close)
        self.memory = ContextMemory(getattr(type(ports[0]), "rings", PortRings))
        self._closers += [self.memory.arena.close, self.memory.control.close]
        self.replicas = self._own(Replicas(self.pipeline.tables, worker=queue))
        self.punt_ring = self._own(PuntRing(frame_size=frame_size)) if punt else None
        headers_only = self.pipeline.headers_only and not punt
        for number, port in enumerate(self.open_ports):
            counters = statistics + c.FIRST_PORT + COUNTERS_SIZE * number
            words = BlockWords(counters, self.memory.arena.address + c.RECORD, headers_only)
            port.fill_in(self.blocks, number, self.frames, words)
        self._fill_context(statistics)
        self._arguments = self.pipeline.bind(self.replicas.view)

    def _own(self, made: Any) -> Any:
        self._closers.append(made.close)
        return made

    def _arena(self, size: int) -> Arena:
        return self._own(Arena(size))

    def _fill_context(self, statistics: int) -> None:
        reasons, poll_fds = self.pipeline.reasons, self._arena(8 * len(self.open_ports) + 8)
        for number, port in enumerate(self.open_ports):
            struct.pack_into("<ihh", view(poll_fds.address, poll_fds.size), 8 * number, port.fd, _POLLIN, 0)
        self._poll_fds = poll_fds.address
        buckets = self._own(reasons.buckets())
        values = {
            c.STATISTICS: statistics,
            c.PORT_COUNT: len(self.open_ports),
            c.PORTS: self.blocks.arena.address,
            c.FREE: self.frames.free.at,
            c.REASONS: reasons.table.address,
            c.REASON_MASK: reasons.mask,
            c.BUCKETS: buckets.address,
            c.UMEM: self.frames.address,
            c.POLL_FDS: poll_fds.address,
            c.IDLE_LIMIT: IDLE_LIMIT,
            c.LIBC_SENDTO: address_of("sendto"),
            c.LIBC_RECV: address_of("recv"),
            c.LIBC_POLL: address_of("poll"),
            c.LIBC_WRITE: address_of("write"),
            c.LIBC_READ: address_of("read"),
            c.LIBC_PRCTL: address_of("prctl"),
        }
        if self.punt_ring is not None:
            slots, described = self.punt_ring.slots, self._arena(64)
            for k, value in enumerate((slots.at, slots.size, slots.stride, self.punt_ring.fd, 1)):
                store64(described.address + 8 * k, value)
            values[c.PUNT_RING] = described.address
        for offset, value in values.items():
            self.memory.set(offset, value)

    @property
    def arguments(self) -> list[Any]:
        """What the loop is called with."""
        return [self.memory.context, self._burst.burst, self.replicas.mailbox, *self._arguments]

    def direct_arguments(self) -> list[Any]:
        """The same; table updates reach the replicas first."""
        self.replicas.flush()
        return self.arguments

    def close(self) -> None:
        """Free everything, in reverse order. The worker must not run."""
        while self._closers:
            self._closers.pop()()
