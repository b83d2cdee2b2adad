"""`libfp.rings.Spsc` between two threads: nothing lost, doubled or out of order, at the smallest sizes."""

from __future__ import annotations

import threading

import pytest

from libfp.jit import INTERPRETED, Arena, call, kernel, load64, pause, store64
from libfp.jit.libc import address_of
from libfp.rings import Spsc

pytestmark = [pytest.mark.stress, pytest.mark.timeout(180)]
COUNT = 200 if INTERPRETED else 1_000_000
WRAP = 1 << 32
SCHED_YIELD = address_of("sched_yield")


@kernel
def _wait(idle, sched_yield):  # type: ignore[no-untyped-def]
    """Spin; the other side may have the same core."""
    pause()
    if idle & 255 == 255:
        call(sched_yield, 0, 0, 0, 0, 0, 0)
    return idle + 1


@kernel
def _produce(ring, scratch, count, burst, bulk, sched_yield):  # type: ignore[no-untyped-def]
    done = idle = 0
    while done < count:
        wanted = min(burst, count - done)
        for i in range(wanted):
            store64(scratch + i * ring.element, done + i)
            if ring.element == 16:
                store64(scratch + 16 * i + 8, -done - i)
        put = ring.enqueue_bulk(scratch, wanted) if bulk else ring.enqueue_burst(scratch, wanted)
        idle = _wait(idle, sched_yield) if put == 0 else 0
        done += put


@kernel
def _consume(ring, scratch, count, burst, bulk, sched_yield):  # type: ignore[no-untyped-def]
    """Returns how many elements were not the ones expected."""
    done = wrong = idle = 0
    while done < count:
        wanted = min(burst, count - done)
        got = ring.dequeue_bulk(scratch, wanted) if bulk else ring.dequeue_burst(scratch, wanted)
        idle = _wait(idle, sched_yield) if got == 0 else 0
        for i in range(got):
            wrong += load64(scratch + i * ring.element) != done + i
            if ring.element == 16:
                wrong += load64(scratch + 16 * i + 8) != -done - i
        done += got
    return wrong


@pytest.mark.parametrize("element", [8, 16])
@pytest.mark.parametrize(
    ("size", "burst", "bulk"), [(2, 1, False), (2, 2, True), (4, 3, False), (8, 8, True), (8, 16, False)]
)
def test_two_threads(size, element, burst, bulk):
    ring = Spsc(size, element=element, start=WRAP - COUNT // 2)
    scratch = [Arena(16 * burst) for _ in range(2)]
    for side in (_produce, _consume):
        side(ring.view, scratch[0].address, 0, burst, bulk, SCHED_YIELD)  # compile
    producer = threading.Thread(
        target=_produce, args=(ring.view, scratch[0].address, COUNT, burst, bulk, SCHED_YIELD), daemon=True
    )
    producer.start()
    assert _consume(ring.view, scratch[1].address, COUNT, burst, bulk, SCHED_YIELD) == 0
    producer.join()
    assert len(ring) == 0
