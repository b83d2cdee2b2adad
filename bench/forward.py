"""The full IPv4 forwarding compute, without any wire: parse, verify the checksum, look up, rewrite, hand to a port.

Ours is the pipeline `Pipeline(parse, forward(routes))` as workers run it; the peer `flat` is one hand-written numba
kernel that does the same to the same frames. A round is 1,048,576 packets in chunks of 8,192 frames, whose
destinations, all different, are written between chunks, outside the timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import flat, rib
from bench.harness import Case
from libfp.engine.pipeline import Pipeline
from libfp.engine.state import WorkerState
from libfp.jit import Arena, clock_hz, load64, store64
from libfp.packet.burst import BURST
from libfp.ports.memory import MemoryPort
from libfp.ports.rings import FLIGHT_LIMIT
from libfp.stages import Forward, Routes, forward, parse

FRAMES, STRIDE, CHUNKS = 8192, 128, 128
NEXT_HOPS = 64


class Bed:
    """Frames, destinations, a filled table, and the two ways to forward."""

    def __init__(self, addresses: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> None:
        random = np.random.default_rng(3)
        self.routes = Routes(routes=max(len(addresses), 1024))
        hops = [self.routes.next_hops.add(_hop(number)) for number in range(NEXT_HOPS)]
        self.routes.fib.load(addresses, lengths, np.array(hops)[random.integers(0, NEXT_HOPS, len(addresses))])
        self.keys = np.ascontiguousarray(keys, np.uint32)
        assert len(self.keys) == FRAMES * CHUNKS
        self.frames = Arena(FRAMES * STRIDE, huge=True)
        self.descs = Arena(16 * FRAMES)
        flat.make_frames(self.frames.address, FRAMES, STRIDE, self.descs.address)
        self.pipeline = Pipeline(parse, forward(self.routes))
        self._counters = Arena(64 * 1024)
        self.ports = [MemoryPort("a"), MemoryPort("b")]
        self.state = WorkerState(self.pipeline, MemoryPort.open_all, self.ports, 0, self._counters.address)
        for port in range(2):
            store64(self.state.blocks.rings(port).at + FLIGHT_LIMIT, 1 << 31)
        self.out = Arena(64 * FRAMES)
        self._stages = flat.stages_round(self.pipeline)

    def stages(self) -> float:
        """Nanoseconds a packet through the pipeline."""
        context, burst, _mailbox, view, *_ = self.state.direct_arguments()
        ticks = self._stages(
            context, burst, view, self.frames.address, FRAMES, STRIDE, self.descs.address, self.keys.ctypes.data, CHUNKS
        )
        self._all_forwarded()
        return self._ns(ticks)

    def _all_forwarded(self) -> None:
        sent = sum(load64(self._counters.address + 64 + 64 * port + 16) for port in range(2))
        before, self._sent = getattr(self, "_sent", 0), sent
        assert sent - before == FRAMES * CHUNKS, f"{sent - before} of {FRAMES * CHUNKS} packets were forwarded"

    def flat(self) -> float:
        """Nanoseconds a packet through the flat kernel, over the worker's tables: neither side evicts the other's."""
        _context, _burst, _mailbox, view, *_ = self.state.direct_arguments()
        ticks = flat.flat_round(
            view,
            self.frames.address,
            FRAMES,
            STRIDE,
            self.descs.address,
            self.keys.ctypes.data,
            CHUNKS,
            self.out.address,
        )
        assert load64(self.out.address) == FRAMES * CHUNKS, "the flat kernel forwarded everything"
        return self._ns(ticks)

    @staticmethod
    def _ns(ticks: int) -> float:
        return ticks * 1e9 / clock_hz() / (FRAMES * CHUNKS)


def _hop(number: int) -> Forward:
    dst, src = b"\x02\0\0\0\1" + bytes([number]), b"\x02\0\0\0\0" + bytes([number & 1])
    return Forward(number & 1, dst, src, 1500)


def cases() -> Iterator[Case]:
    """`full table` with the real routes, `one route` with a default route alone."""
    addresses, lengths, origin = rib.ipv4()
    count = FRAMES * CHUNKS
    keys = np.unique(rib.inside(addresses, lengths, count + count // 2))
    keys = np.random.default_rng(4).permutation(keys)[:count]
    full = Bed(addresses, lengths, keys)
    about = f"{len(addresses)} routes ({origin}), {len(keys)} distinct destinations a round, bursts of {BURST}"
    common: dict[str, Any] = {"bench": "forward", "unit": "ns/packet", "better": "lower", "peer": "flat"}
    yield Case(case="full table", ours=full.stages, theirs=full.flat, about=about, **common)
    one = Bed(np.array([0]), np.array([0]), keys)
    yield Case(case="one route", ours=one.stages, theirs=one.flat, about="a default route", **common)
