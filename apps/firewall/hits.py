"""How often each rule has decided: packets and bytes, counted by each worker in memory of its own."""

from __future__ import annotations

import numpy as np

from libfp.jit import Arena, load64, native, store64, word
from libfp.tables.per_worker import PerWorker

#: How many outcomes are counted apart; an outcome's number is below that.
NUMBERS = 1 << 15


@native
class HitsView:
    """One worker's counters: two words an outcome, packets and bytes, at `at` + 16 * number."""

    at: word

    def count(self, number, length):  # type: ignore[no-untyped-def]
        """A packet of `length` bytes (of IP, as nftables counts: its header on) that outcome `number` decided."""
        at = self.at + 16 * number
        store64(at, load64(at) + 1)
        store64(at + 8, load64(at + 8) + length)


class HitsPart:
    """One worker's own; `view` is what its stages receive."""

    def __init__(self) -> None:
        self._arena = Arena(16 * NUMBERS)
        self.view = HitsView(self._arena.address)
        self.counted = np.frombuffer(self._arena.buffer, np.int64).reshape(-1, 2)

    def close(self) -> None:
        del self.counted
        self._arena.close()


class Hits(PerWorker[HitsPart]):
    """The counters of all outcomes. Bind it to a stage: ``hits.count(number, length)``."""

    def __init__(self) -> None:
        super().__init__()
        self._gone = np.zeros((NUMBERS, 2), np.int64)

    def make(self, worker: int) -> HitsPart:
        return HitsPart()

    def leave(self, part: HitsPart) -> None:
        self._gone += part.counted
        super().leave(part)

    def counted(self) -> np.ndarray:
        """What all workers have counted since they were made: (packets, bytes) by number."""
        with self._lock:
            return sum((part.counted for part in self._parts), self._gone.copy())
