"""The full IPv4 forwarding compute, without any wire: parse, verify the checksum, look up, rewrite, hand to a port.

Ours is the pipeline `Pipeline(parse, forward(routes))` as workers run it. The peer `flat` is one hand-written numba
kernel that does the same to the same frames; the peer in C is peers/forward.c over rte_fib, by gcc or by clang,
whichever is faster here. A round is 1,048,576 packets in chunks of 8,192 frames, whose
destinations, all different, are written between chunks, outside the timing.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import flat, peers, rib
from bench.harness import Case
from libfp.engine.pipeline import Pipeline
from libfp.engine.state import WorkerState
from libfp.jit import Arena, clock_hz, load64, store64
from libfp.packet.burst import BURST
from libfp.ports.memory import MemoryPort
from libfp.ports.rings import COUNTERS, FLIGHT_LIMIT, TX_PACKETS
from libfp.stages import Forward, Routes, forward, parse

FRAMES, STRIDE, CHUNKS = 8192, 128, 128
NEXT_HOPS = 64


class Bed:
    """Frames, destinations, a filled table, and our two ways to forward."""

    def __init__(self, addresses: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> None:
        self.prefixes, self.drawn = (
            (addresses, lengths),
            np.random.default_rng(3).integers(0, NEXT_HOPS, len(addresses)),
        )
        self.routes = Routes(routes=max(len(addresses), 1024))
        hops = [self.routes.next_hops.add(_hop(number)) for number in range(NEXT_HOPS)]
        self.routes.fib.load(addresses, lengths, np.array(hops)[self.drawn])
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
        sent = sum(load64(load64(self.state.blocks.rings(port).at + COUNTERS) + TX_PACKETS) for port in range(2))
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


class InC:
    """forward.c over an rte_fib with the routes of a bed, the same frames and destinations."""

    def __init__(self, bed: Bed) -> None:
        self._bed, (self._ffi, self._lib) = bed, peers.load()
        self._compiled = {"gcc": self._lib}
        try:
            self._compiled["clang"] = peers.by_clang("forward.c")
        except peers.Skipped as reason:
            print(f"bench: forward.c by gcc alone: {reason}", file=sys.stderr)
        (addresses, lengths), hops = bed.prefixes, bed.drawn + 1  # 0 is "no route"
        columns = addresses.astype(np.uint32), lengths.astype(np.uint8), hops.astype(np.uint32)
        rows = [self._ffi.cast(f"uint{8 * column.itemsize}_t *", column.ctypes.data) for column in columns]
        self._fib = self._lib.forward_fib(*rows, len(addresses), 0)
        assert self._fib, "DPDK has room for the routes"
        self._hops = self._ffi.new("struct next_hop[]", NEXT_HOPS + 1)
        for number in range(NEXT_HOPS):
            hop = _hop(number)
            self._hops[number + 1] = {"dst": list(hop.dst), "src": list(hop.src), "port": hop.port}
        self._offsets = np.arange(FRAMES, dtype=np.uint64) * STRIDE
        self._out = Arena(16 * FRAMES)
        self._way = "gcc", 0

    def fastest(self) -> tuple[str, str]:
        """Use the fastest of the compilers and of rte_fib's lookup functions, five rounds each; its name, and all."""
        kinds = [(number, name) for number, name in peers.FIB.items() if self._lib.fib_select(self._fib, number) == 0]
        ways = {f"{compiler}, {name}": (compiler, number) for compiler in self._compiled for number, name in kinds}
        figures: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(5):
            for name, self._way in ways.items():
                figures[name].append(self.round())
        medians = {name: statistics.median(values) for name, values in figures.items()}
        best = min(medians, key=lambda name: medians[name])
        self._way = ways[best]
        return best, "; ".join(f"{name} {median:.1f}" for name, median in medians.items())

    def round(self) -> float:
        """Nanoseconds a packet."""
        ffi, bed, (compiler, number) = self._ffi, self._bed, self._way
        self._lib.fib_select(self._fib, number)
        base, timed = ffi.cast("uint8_t *", bed.frames.address), self._compiled[compiler].forward_timed
        ports, addresses = (
            ffi.cast(f"{kind} *", self._out.address + at) for kind, at in (("uint16_t", 0), ("uint64_t", 4 * FRAMES))
        )
        offsets = ffi.cast("uint64_t *", self._offsets.ctypes.data)
        drops, sent = ffi.new("uint64_t[4]"), ffi.new("int *")
        ticks = forwarded = 0
        for chunk in range(CHUNKS):
            flat.renew(bed.frames.address, FRAMES, STRIDE, bed.keys.ctypes.data + 4 * FRAMES * chunk)
            ticks += timed(base, offsets, FRAMES, self._fib, self._hops, ports, addresses, drops, sent)
            forwarded += sent[0]
        assert forwarded == FRAMES * CHUNKS, f"forward.c dropped {list(drops)}"
        return bed._ns(ticks)

    def close(self) -> None:
        self._lib.fib_free(self._fib)


def _hop(number: int) -> Forward:
    dst, src = b"\x02\0\0\0\1" + bytes([number]), b"\x02\0\0\0\0" + bytes([number & 1])
    return Forward(number & 1, dst, src, 1500)


def cases() -> Iterator[Case]:
    """`full table` with the real routes, `beside C` the same, `one route` with a default route alone."""
    addresses, lengths, origin = rib.ipv4()
    count = FRAMES * CHUNKS
    keys = np.unique(rib.inside(addresses, lengths, count + count // 2))
    keys = np.random.default_rng(4).permutation(keys)[:count]
    full = Bed(addresses, lengths, keys)
    about = f"{len(addresses)} routes ({origin}), {len(keys)} distinct destinations a round, bursts of {BURST}"
    common: dict[str, Any] = {"bench": "forward", "unit": "ns/packet", "better": "lower", "peer": "flat"}
    yield Case(case="full table", ours=full.stages, theirs=full.flat, about=about, bar=0.85, **common)
    yield from _beside_c(full, about)
    one = Bed(np.array([0]), np.array([0]), keys)
    yield Case(case="one route", ours=one.stages, theirs=one.flat, about="a default route", **common)


def _beside_c(bed: Bed, about: str) -> Iterator[Case]:
    common: dict[str, Any] = {
        "bench": "forward",
        "case": "beside C",
        "unit": "ns/packet",
        "better": "lower",
        "bar": 1.0,
    }
    if peers.found() is None:
        yield Case(ours=bed.stages, about=about, **common)
        return
    other = InC(bed)
    best, medians = other.fastest()
    about = f"{about}; {medians}; {peers.about()}"
    yield Case(ours=bed.stages, peer=f"forward.c ({best})", theirs=other.round, about=about, **common)
    other.close()
