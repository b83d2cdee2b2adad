"""Route changes that a worker takes in under full load: the forwarding compute of `bench.forward`, and what it loses.

One core forwards bursts of 64 and drains its mailbox before each, as a worker does; the other withdraws routes of the
full table, drawn at random, and announces them again a little later with another next hop, by `Lpm4.apply`. Its clock
is the worker's: `rate` changes for each second that the worker spends draining and forwarding. Writing the frames'
next destinations is in nobody's time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench import flat, rib
from bench.changes import AT_ONCE, Changes
from bench.forward import CHUNKS, FRAMES, STRIDE, Bed
from bench.harness import Case
from bench.processes import preferred
from libfp.engine.replicas import MAILBOX, drain
from libfp.errors import Unsupported
from libfp.jit import Arena, clock, clock_hz, kernel, load64, load_acquire64, store32, store64, store_release64
from libfp.tables.words import BUDGET

WORKER_CORE, CONTROL_CORE = 0, 1
RATE, _ALL = 500_000, 1 << 40
PASSES = 12  # over all frames in a round: half a second and more
_TICKS, _DONE, _WORDS = 0, 64, 128  # what the worker says: its time so far, that it has ended, words it has stored


def worker_round(pipeline: Any) -> Any:
    """A kernel that forwards all frames `chunks` times; ticks of each burst go to `times`, four bytes each."""
    run = flat.stages_burst(pipeline)

    @kernel
    def round_(context, burst, mailbox, view, base, frames, stride, descs, keys, chunks, total, times, shared):  # type: ignore[no-untyped-def]
        ticks = words = count = 0
        for number in range(total):
            flat.renew(base, frames, stride, keys + 4 * frames * (number % chunks))
            for first in range(0, frames, 64):
                start = clock()
                words += drain(mailbox, BUDGET)
                run(context, burst, view, base, descs, first)
                took = clock() - start
                ticks += took
                store32(times + 4 * count, took)
                count += 1
                store_release64(shared + _TICKS, ticks)
        store64(shared + _WORDS, words)
        store_release64(shared + _DONE, 1)
        return ticks

    return round_


class Churn:
    """The two threads, and what the last round of each kind was like."""

    def __init__(self, bed: Bed, addresses: np.ndarray, lengths: np.ndarray, undo: ExitStack) -> None:
        self.bed, self._shared = bed, Arena(192)
        self._threads = [
            undo.enter_context(ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {core})))
            for core in (WORKER_CORE, CONTROL_CORE)
        ]
        self._round = worker_round(bed.pipeline)
        self._times = Arena(4 * PASSES * CHUNKS * FRAMES // 64, huge=True)
        self._changes = Changes(bed.routes.fib, addresses, lengths)
        bed.state.replicas.reset()
        self.about = {0: ""}

    def _control(self, rate: int) -> None:
        """Make changes as the worker's time goes on; never more than the mailbox has room for."""
        replicas, shared, changes = self.bed.state.replicas, self._shared.address, self._changes
        changes.made = 0
        ticks_each = clock_hz() / rate if rate else 0
        while not load_acquire64(shared + _DONE):
            due = load_acquire64(shared + _TICKS) / ticks_each if rate else 0
            if changes.made < due and replicas.waiting < MAILBOX // 2:
                changes.make()
            else:
                time.sleep(0)

    def run(self, rate: int) -> float:
        """Nanoseconds a packet, while `rate` changes a second arrive."""
        bed, shared = self.bed, self._shared
        copies, shared.words[:] = bed.state.replicas.copies, 0
        context, burst, mailbox, view, *_ = bed.state.arguments
        control = self._threads[1].submit(self._control, rate)
        ticks = self._threads[0].submit(
            self._round, context, burst, mailbox, view, bed.frames.address, FRAMES, STRIDE, bed.descs.address,
            bed.keys.ctypes.data, CHUNKS, PASSES * CHUNKS, self._times.address, shared.address,
        ).result()  # fmt: skip
        control.result()
        assert bed.state.replicas.copies == copies, "every change came by the log"
        times = np.frombuffer(self._times.buffer, np.uint32) / clock_hz() * 1e6
        seconds, words, made = ticks / clock_hz(), load64(shared.address + _WORDS), self._changes.made
        self.about[rate] = (
            f"{made / seconds / 1e3:.0f} k changes/s, {words / max(made, 1):.1f} words each; a burst takes "
            f"{np.median(times):.2f}, p99 {np.percentile(times, 99):.2f}, p99.9 {np.percentile(times, 99.9):.2f} us"
        )
        self.changes = made / seconds
        while not bed.state.replicas.acknowledged():
            drain_now(mailbox)
        return seconds * 1e9 / (PASSES * CHUNKS * FRAMES)


@kernel
def drain_now(mailbox):  # type: ignore[no-untyped-def]
    drain(mailbox, BUDGET)


def cases() -> Iterator[Case]:
    """`forwarding` under `RATE` changes a second, beside none; `most`, changes a second when more are always due."""
    if not {WORKER_CORE, CONTROL_CORE} <= os.sched_getaffinity(0):
        raise Unsupported("bench churn needs cores 0 and 1: one forwards, the other changes routes")
    addresses, lengths, origin = rib.ipv4()
    count = FRAMES * CHUNKS
    keys = np.unique(rib.inside(addresses, lengths, count + count // 2))
    keys = np.random.default_rng(4).permutation(keys)[:count]
    with preferred({WORKER_CORE, CONTROL_CORE}), ExitStack() as undo:
        churn = Churn(Bed(addresses, lengths, keys), addresses, lengths, undo)
        churn.run(RATE)  # compiles
        text = f"{len(addresses)} routes ({origin}), {AT_ONCE} changes a call"

        def forwarding() -> float:
            value = churn.run(RATE)
            case.about = f"{text}; {churn.about[RATE]}; without: {churn.about[0]}"
            return value

        def most() -> float:
            churn.run(_ALL)
            limits.about = f"{text}; {churn.about[_ALL]}"
            return churn.changes / 1e3

        peer = "the same without changes"
        case = Case("churn", "forwarding", "ns/packet", "lower", forwarding, peer, lambda: churn.run(0), bar=0.9)
        yield case
        limits = Case("churn", "most", "k changes/s", "higher", most)
        yield limits
