"""The reader's side of a tap: packets of a running instance, in another process, as its workers handle them.

This module loads neither numba nor the rest of the engine.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from collections.abc import Iterator
from typing import Any, Self

from libfp.engine.control import Connection
from libfp.engine.slots import PAIR, PARTS, ROW, STAGE_ROW, Record, RingReader, Verdicts, size_of

NAP = 0.002  # seconds between looks at rings that were empty
CALIBRATE = 10.0  # seconds between looks at both clocks
_PAIR = struct.Struct("=QQ")


def _map(file: int, size: int, readonly: bool = False) -> mmap.mmap:
    try:
        return mmap.mmap(file, size, prot=mmap.PROT_READ | (0 if readonly else mmap.PROT_WRITE))
    finally:
        os.close(file)


class Listener:
    """A tap on the instance that `connection` leads to, until `close` or the end of this process.

    `snap`: bytes of each packet; `slots`: packets that the ring of each worker holds, a power of 2. What does not fit
    because nobody reads is lost here, and counted in `dropped`; the instance goes on.
    """

    def __init__(self, connection: Connection, *, snap: int, slots: int) -> None:
        self.connection = connection
        told = connection.ask("tap", snap=snap, slots=slots)
        self.stages: list[str] = told["stages"]
        self.ports: list[str] = told["ports"]
        self._clock = _Clock(told)
        size, verdicts = size_of(slots, len(self.stages), snap), Verdicts(told["verdicts"])
        self._memory = [_map(file, size) for file in connection.take_files()]
        self.rings = [
            RingReader(memory, slots=slots, stages=len(self.stages), snap=snap, verdicts=verdicts)
            for memory in self._memory
        ]

    def records(self, seconds: float | None = None) -> Iterator[tuple[int, Record]]:
        """(worker, packet) as they come, for so long, or until the instance ends. Each ring's packets are in order."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            found = False
            for worker, ring in enumerate(self.rings):
                for record in ring.read():
                    found = True
                    yield worker, record
            if found:
                continue
            if end is not None and time.monotonic() >= end:
                return
            if select.select([self.connection], [], [], NAP)[0]:
                for worker, ring in enumerate(self.rings):  # it has ended, or says so
                    yield from ((worker, record) for record in ring.read())
                return

    def time_ns(self, record: Record) -> int:
        """When the packet came, in nanoseconds since 1970."""
        if self._clock.age > CALIBRATE:
            self._clock = _Clock(self.connection.ask("now"))
        return self._clock(record.ticks)

    def explain(self, record: Record) -> str:
        """The route or table entry that decided, as the instance has it now; empty if none did."""
        return str(self.connection.ask("explain", next_hop=record.next_hop, packet=record.data.hex())["entry"])

    @property
    def dropped(self) -> int:
        """Packets that this reader was too slow for."""
        return sum(ring.dropped for ring in self.rings)

    def close(self) -> None:
        self.connection.close()
        for memory in self._memory:
            memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Clock:
    """From an instance's ticks to nanoseconds since 1970."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._ticks, self._ns, self._hz = int(told["ticks"]), int(told["ns"]), int(told["hz"])
        self._at = time.monotonic()

    @property
    def age(self) -> float:
        return time.monotonic() - self._at

    def __call__(self, ticks: int) -> int:
        return self._ns + (ticks - self._ticks) * 1_000_000_000 // self._hz


class Stopwatch:
    """Nanoseconds a part of an instance's loop, measured from here on and until `close`."""

    def __init__(self, connection: Connection) -> None:
        told = connection.ask("clock")
        self._stages: list[str] = told["stages"]
        self._hz = int(told["hz"])
        size = max(PAIR * (STAGE_ROW + len(self._stages)), mmap.PAGESIZE)
        self._pages = [_map(file, size, readonly=True) for file in connection.take_files()]
        self._began = self._before = self._read()

    def _read(self) -> list[tuple[int, int]]:
        rows = range(STAGE_ROW + len(self._stages))
        pairs = [[_PAIR.unpack_from(page, PAIR * row) for row in rows] for page in self._pages]
        return [(sum(t for t, _ in one), sum(n for _, n in one)) for one in zip(*pairs, strict=True)]

    def lap(self) -> dict[str, Any]:
        """Since the last lap. `bursts`, `burst_ns` each through the stages. `stages`: name, packets that came to it,
        nanoseconds each; "carry out" is what becomes of those with a verdict. `packets` in all, and `parts`, the whole
        loop: name and nanoseconds for each of these. `idle_ns` in all: turns without packets.
        """
        now, before = self._read(), self._before
        self._before = now
        return self._told(now, before)

    def total(self) -> dict[str, Any]:
        """The same, since it was made."""
        return self._told(self._read(), self._began)

    def _told(self, now: list[tuple[int, int]], before: list[tuple[int, int]]) -> dict[str, Any]:
        ns = [1e9 * (a[0] - b[0]) / self._hz for a, b in zip(now, before, strict=True)]
        packets = [a[1] - b[1] for a, b in zip(now, before, strict=True)]

        def each(row: int, count: int) -> float:
            return round(ns[row] / count, 2) if count else 0.0

        behind, count = PARTS.index("carry out"), packets[ROW["carry out"]]
        stages = [*zip(self._stages, range(STAGE_ROW, len(ns)), strict=True)]
        rows = [*stages, ("carry out", ROW["carry out"])]
        around = [(name, ROW[name]) for name in PARTS if name != "idle"]
        parts = [*around[:behind], *stages, *around[behind:]]
        return {
            "bursts": packets[0],
            "burst_ns": each(0, packets[0]),
            "stages": [{"stage": name, "packets": packets[row], "ns": each(row, packets[row])} for name, row in rows],
            "packets": count,
            "parts": [{"part": name, "ns": each(row, count)} for name, row in parts if ns[row]],
            "idle_ns": round(ns[ROW["idle"]]),
        }

    def close(self) -> None:
        for page in self._pages:
            page.close()
