"""`libfp.rings.SharedSpsc` between two processes: nothing lost, doubled or out of order; and beside a lying one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from libfp.errors import PeerGone
from libfp.jit import (
    INTERPRETED,
    Arena,
    call,
    kernel,
    load64,
    load_acquire64,
    mul64,
    pause,
    shr64,
    store64,
    store_release32,
    store_release64,
)
from libfp.jit.libc import address_of
from libfp.rings import SharedSpsc

COUNT = 200 if INTERPRETED else int(os.environ.get("LIBFP_STRESS", 1_000_000))
pytestmark = [pytest.mark.stress, pytest.mark.timeout(120 + COUNT // 100_000)]
WRAP = 1 << 32
SCHED_YIELD = address_of("sched_yield")
CHILD = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"


@kernel
def _produce(ring, scratch, done, count, burst, sched_yield):  # type: ignore[no-untyped-def]
    idle = 0
    while done < count:
        for i in range(burst):
            store64(scratch + 8 * i, done + i)
        put = ring.enqueue_burst(scratch, min(burst, count - done))
        idle = idle + 1 if put == 0 else 0
        if idle & 15 == 15:
            call(sched_yield, 0, 0, 0, 0, 0, 0)
        done += put


@kernel
def _consume(ring, scratch, done, count, burst, sched_yield):  # type: ignore[no-untyped-def]
    """Take the numbers from `done` up to `count`; how many are not in their place."""
    wrong = idle = 0
    while done < count:
        got = ring.dequeue_burst(scratch, min(burst, count - done))
        idle = idle + 1 if got == 0 else 0
        if idle & 15 == 15:
            call(sched_yield, 0, 0, 0, 0, 0, 0)
        for i in range(got):
            wrong += load64(scratch + 8 * i) != done + i
        done += got
    return wrong


def _producer(ring, first, count, burst):
    command = [sys.executable, "-c", CHILD, *map(str, (ring.fd, first, count, burst))]
    return subprocess.Popen(command, pass_fds=[ring.fd])


@pytest.mark.parametrize(("size", "burst"), [(2, 1), (4, 3), (8, 16)])
def test_two_processes(size, burst):
    ring = SharedSpsc.create(size, side="consumer", start=WRAP - COUNT // 2)
    scratch = Arena(8 * burst)
    _consume(ring.view, scratch.address, 0, 0, burst, SCHED_YIELD)  # compile
    with _producer(ring, 0, COUNT, burst) as child:
        assert _consume(ring.view, scratch.address, 0, COUNT, burst, SCHED_YIELD) == 0
        assert child.wait() == 0
    assert len(ring) == 0
    assert not ring.peer_alive
    ring.close()


def test_producers_killed_while_they_produce():
    """What each has published is all there, in order; and the next goes on behind it."""
    ring = SharedSpsc.create(8, side="consumer", start=WRAP - 1000)
    scratch, done = Arena(8 * 16), 0
    _consume(ring.view, scratch.address, 0, 0, 3, SCHED_YIELD)  # compile
    for turn in range(3):
        with _producer(ring, done, 1 << 60, 3 + turn) as child:
            more = done + 200 + COUNT // 100 + turn
            assert _consume(ring.view, scratch.address, done, more, 3, SCHED_YIELD) == 0
            child.kill()
        left = ring.dequeue_burst(8).tolist()
        assert left == list(range(more, more + len(left)))
        assert len(ring) == 0
        with pytest.raises(PeerGone):
            ring.check()
        done = more + len(left)
    ring.close()


@kernel
def _lie(line, stop, seed):  # type: ignore[no-untyped-def]
    """Store indexes at random, until told to stop; how many."""
    lies = 0
    while load_acquire64(stop) == 0:
        seed = mul64(seed, 0x5851F42D4C957F2D) + 1
        store_release32(line, shr64(seed, 33) if lies & 1 else shr64(seed, 60))  # anything, and next to right
        pause()
        lies += 1
    return lies


@kernel
def _believe(ring, scratch, turns, produce):  # type: ignore[no-untyped-def]
    """Returns how many counts, or addresses in place, are none of this ring."""
    wrong = 0
    first, last = ring.base, ring.base + 512 + 8 * ring.size
    for _ in range(turns):
        count = ring.enqueue_burst(scratch, 2 * ring.size) if produce else ring.dequeue_burst(scratch, 2 * ring.size)
        wrong += not 0 <= count <= ring.size
        count = ring.reserve(1 << 40) if produce else ring.peek(1 << 40)
        wrong += not 0 <= count <= ring.size
        for i in range(count):
            at = ring.slot(i) if produce else ring.item(i)
            wrong += not first <= at < last
        wrong += not 0 <= len(ring) <= ring.size
    return wrong


@pytest.mark.parametrize("side", ["producer", "consumer"])
def test_indexes_that_change_all_the_time_lead_nowhere(side):
    ring = SharedSpsc.create(8, side=side, start=0)
    scratch, stop = Arena(8 * 8, flush_end=True), Arena(8)  # the next byte faults
    produce = int(side == "producer")
    line = ring.view.base + 128 * produce
    for one in (0, 1):
        store_release64(stop.address, 1)
        _lie(line, stop.address, one)  # compile
    _believe(ring.view, scratch.address, 0, produce)
    store_release64(stop.address, 0)
    lies: list[int] = []
    liar = threading.Thread(target=lambda: lies.append(_lie(line, stop.address, 3)), daemon=True)
    liar.start()
    assert _believe(ring.view, scratch.address, min(COUNT, 10**7), produce) == 0
    store_release64(stop.address, 1)
    liar.join()
    assert lies[0] > 0
    ring.close()


def main(fd: int, first: int, count: int, burst: int) -> None:
    ring = SharedSpsc.attach(fd, side="producer")
    scratch = Arena(8 * burst)
    _produce(ring.view, scratch.address, first, count, burst, SCHED_YIELD)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
