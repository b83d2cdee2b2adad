"""Rings between two threads on two cores, elements of 8 bytes: `Spsc` beside rte_ring SP/SC, `Mpmc` beside MP/MC.

A round moves elements from one array, walked round and round, in bursts; the consumer adds them up, and the sum must
be right. Both sides have rings of as many slots and the same two loops, one in numba and one in C, compiled for each
length of burst; a loop that finds the ring full, or empty, pauses once and tries again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from numba import typeof

from bench import peers
from bench.harness import Case
from bench.processes import preferred
from libfp.errors import Unsupported
from libfp.jit import (
    Arena,
    clock,
    clock_hz,
    kernel,
    load_acquire64,
    pause,
    store_release64,
)
from libfp.rings import Mpmc, Spsc

SIZE = 1024  # slots; rte_ring uses all but one
SOURCE = 1024  # elements that a round is made of, 8 KiB
BURSTS = (1, 8, 32, 128)
PRODUCER_CORE, CONSUMER_CORE = 1, 0
#: Elements a round, by kind and burst: 50 ms and more for whichever side is faster.
TOTAL = {"spsc": (1 << 25, 1 << 26, 1 << 26, 1 << 26), "mpmc": (1 << 22, 1 << 24, 1 << 25, 1 << 26)}


@kernel
def _meet(words, side):  # type: ignore[no-untyped-def]
    store_release64(words + 128 * side, 1)
    while load_acquire64(words + 128 - 128 * side) == 0:
        pause()


def loops(burst: int) -> tuple[Any, Any]:
    """The producer's loop, and the consumer's, for bursts of one length."""

    @kernel
    def produce(ring, source, mask, total, words):  # type: ignore[no-untyped-def]
        _meet(words, 0)
        done = 0
        while done < total:
            put = ring.enqueue_burst(source + 8 * (done & mask), min(burst, total - done))
            if put == 0:
                pause()
            done += put

    @kernel
    def consume(ring, taken, at, total, words):  # type: ignore[no-untyped-def]
        _meet(words, 1)
        began = clock()
        done = added = 0
        while done < total:
            got = ring.dequeue_burst(at, burst)
            if got == 0:
                pause()
            for i in range(got):
                added += taken[i]
            done += got
        ticks = clock() - began
        taken[0] = added
        return ticks

    return produce, consume


class Bed:
    """The two threads, what they move, and how a round is run."""

    def __init__(self, undo: ExitStack) -> None:
        self._threads = [
            undo.enter_context(ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {core})))
            for core in (PRODUCER_CORE, CONSUMER_CORE)
        ]
        self.source, self.words, self.taken = (Arena(8 * n) for n in (SOURCE + max(BURSTS), 32, max(BURSTS)))
        self.source.words[:SOURCE] = np.random.default_rng(5).integers(-(1 << 63), 1 << 63, SOURCE)
        self.source.words[SOURCE:] = self.source.words[: max(BURSTS)]
        self._sum = int(self.source.words[:SOURCE].view(np.uint64).sum())

    def round(self, produce: Callable[..., Any], consume: Callable[..., Any], total: int) -> float:
        """Million elements a second."""
        self.words.words[:] = 0
        producer = self._threads[0].submit(produce)
        ticks = self._threads[1].submit(consume).result()
        producer.result()
        added = int(self.taken.words[0])
        assert (added - self._sum * (total // SOURCE)) % (1 << 64) == 0, "elements were lost or changed"
        return total / (ticks / clock_hz()) / 1e6

    def ours(self, ring: Any, burst: int, total: int) -> Callable[[], float]:
        """A round of one of libfp's rings."""
        produce, consume = loops(burst)
        view, taken = ring.view, self.taken.words
        source, at, words = self.source.address, self.taken.address, self.words.address
        produce.compile(tuple(map(typeof, (view, source, SOURCE - 1, total, words))))
        consume.compile(tuple(map(typeof, (view, taken, at, total, words))))

        def measured() -> float:
            return self.round(
                lambda: produce(view, source, SOURCE - 1, total, words),
                lambda: consume(view, taken, at, total, words),
                total,
            )

        return measured

    def theirs(self, multi: int, burst: int, total: int) -> Callable[[], float] | None:
        """A round of rte_ring; None if there is no DPDK."""
        if (found := peers.found()) is None:
            return None
        ffi, lib = found
        ring = lib.ring_create(f"{multi} {burst}".encode(), SIZE, multi)
        source, words, taken = (ffi.cast("uint64_t *", one.address) for one in (self.source, self.words, self.taken))

        def measured() -> float:
            return self.round(
                lambda: lib.ring_produce(ring, multi, source, SOURCE - 1, total, burst, words),
                lambda: lib.ring_consume(ring, multi, total, burst, words, taken),
                total,
            )

        return measured


KINDS: dict[str, Any] = {"spsc": Spsc, "mpmc": Mpmc}
BARS = {"spsc": ("rte_ring SP/SC", 1.3), "mpmc": ("rte_ring MP/MC", 1.2)}


def cases() -> Iterator[Case]:
    """`spsc burst 8` and so on."""
    if not {PRODUCER_CORE, CONSUMER_CORE} <= os.sched_getaffinity(0):
        raise Unsupported("bench ring needs cores 0 and 1: one produces, the other consumes")
    with preferred({PRODUCER_CORE, CONSUMER_CORE}), ExitStack() as undo:
        bed = Bed(undo)
        for kind, ring_class in KINDS.items():
            for burst, total in zip(BURSTS, TOTAL[kind], strict=True):
                ring = ring_class(SIZE)
                undo.callback(ring.close)
                peer, bar = BARS[kind]
                theirs = bed.theirs(int(kind == "mpmc"), burst, total)
                yield Case(
                    bench="ring",
                    case=f"{kind} burst {burst}",
                    unit="M elements/s",
                    better="higher",
                    ours=bed.ours(ring, burst, total),
                    peer=peer if theirs else None,
                    theirs=theirs,
                    about=f"{SIZE} slots of 8 bytes, {total} elements a round; {peers.about()}",
                    bar=bar,
                )
