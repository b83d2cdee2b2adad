"""What the benches of the tables share: rounds over an array of keys, ours in numba and a peer's in C."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case
from libfp.jit import Arena, clock, clock_hz, kernel

BURST = 64
KEYS = 1 << 22
PASSES = 4  # over all keys in a round: 50 ms and more
NEXT_HOPS = 1 << 20


@kernel
def _round(view, keys, size, count, passes, results, kept):  # type: ignore[no-untyped-def]
    began = clock()
    for _ in range(passes):
        for i in range(0, count, BURST):
            view.lookup_burst(keys + size * i, results + kept * i, BURST)
    return clock() - began


@dataclass
class Peer:
    """A lookup function of a peer: `run(keys, count, passes, results)` returns ticks."""

    name: str
    run: Callable[[Any, int, int, Any], int]


def selected(name: str, fib: Any, select: Any, lookup: Any, kinds: dict[int, str]) -> list[Peer]:
    """The lookup functions of one of DPDK's FIBs, by number, that there are on this machine; each selects itself."""

    def run(number: int, *given: Any) -> int:
        select(fib, number)
        return int(lookup(fib, *given))

    return [Peer(f"{name} {kind}", partial(run, one)) for one, kind in kinds.items() if select(fib, one) == 0]


class Keys:
    """One array of keys, of `size` bytes each, and what finds them: values of `value` bytes."""

    def __init__(self, keys: np.ndarray, size: int, ffi: Any = None, value: int = 4) -> None:
        assert keys.nbytes == size * KEYS
        self.size, self.value, self._ffi = size, value, ffi
        self._keys, self._results = Arena(keys.nbytes, huge=True), Arena(value * KEYS, huge=True)
        self._keys.buffer[:] = np.ascontiguousarray(keys).reshape(-1).view(np.uint8).data

    def ours(self, view: Any, *, passes: int = PASSES, keep: bool = False) -> float:
        """Million lookups a second."""
        kept = self.value if keep else 0
        ticks = _round(view, self._keys.address, self.size, KEYS, passes, self._results.address, kept)
        return _millions(passes, ticks)

    def theirs(self, peer: Peer, *, passes: int = PASSES, keep: bool = False) -> float:
        """The same of a peer."""
        keys = self._ffi.cast("void *", self._keys.address)
        results = self._ffi.cast("void *", self._results.address) if keep else self._ffi.NULL
        return _millions(passes, peer.run(keys, KEYS, passes, results))

    def case(
        self, bench: str, name: str, view: Any, peers: list[Peer], about: str, bar: float, unit: str = "M lookups/s"
    ) -> Case:
        """The case of these keys: the peer is the fastest of `peers`."""
        best, medians = self.best(view, peers)
        theirs = partial(self.theirs, best) if best else None
        peer, text = best.name if best else None, f"{about}; {medians}"
        return Case(bench, name, unit, "higher", partial(self.ours, view), peer, theirs, about=text, bar=bar)

    def best(self, view: Any, peers: list[Peer]) -> tuple[Peer | None, str]:
        """The fastest of the peers, each asked in turn, five rounds; and all of their medians, for the report.

        Each must find what ours does.
        """
        self.ours(view, passes=1, keep=True)
        expected = np.frombuffer(self._results.buffer, np.uint32).copy()
        for peer in peers:
            self.theirs(peer, passes=1, keep=True)
            found = np.frombuffer(self._results.buffer, np.uint32)
            assert np.array_equal(found, expected), f"{peer.name} and ours find different values"
        rounds = [[self.theirs(peer) for peer in peers] for _ in range(5)]
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        text = ", ".join(f"{peer.name} {median:.0f}" for peer, median in zip(peers, medians, strict=True))
        return (peers[int(np.argmax(medians))] if peers else None), text


def _millions(passes: int, ticks: int) -> float:
    return passes * KEYS / (ticks / clock_hz()) / 1e6
