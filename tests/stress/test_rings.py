"""All rings between threads: nothing lost, doubled or out of order, at the smallest sizes, where indexes wrap.

An element is its producer's number and a count; each consumer checks that the counts of each producer rise, and all of
them together that each count came once: their number, their sum, and the sum of their mixed bits.
"""

from __future__ import annotations

import os
import threading

import pytest

from libfp.jit import (
    INTERPRETED,
    Arena,
    call,
    fetch_add64,
    kernel,
    load64,
    load_acquire64,
    mul64,
    pause,
    shr64,
    store64,
)
from libfp.jit.libc import address_of
from libfp.rings import Mpmc, Mpsc, Spsc

#: `make stress` has 10**8.
COUNT = 200 if INTERPRETED else int(os.environ.get("LIBFP_STRESS", 1_000_000))
pytestmark = [pytest.mark.stress, pytest.mark.timeout(120 + COUNT // 100_000)]
WRAP, WRAP64 = 1 << 32, 1 << 64
SCHED_YIELD = address_of("sched_yield")
LIMIT = 4  # producers
ROW = 32  # bytes a consumer keeps of each producer: count, last, sum, sum of mixed bits
GOLDEN = 0x1E3779B97F4A7C15


@kernel
def _wait(idle, sched_yield):  # type: ignore[no-untyped-def]
    """Spin; another side may have the same core."""
    pause()
    if idle & 15 == 15:
        call(sched_yield, 0, 0, 0, 0, 0, 0)
    return idle + 1


@kernel
def _mixed(number):  # type: ignore[no-untyped-def]
    number = mul64(number + 1, GOLDEN)
    return mul64(number ^ shr64(number, 31), GOLDEN)


@kernel
def _produce(ring, scratch, who, count, burst, bulk, sched_yield):  # type: ignore[no-untyped-def]
    done = idle = 0
    while done < count:
        wanted = min(burst, count - done)
        for i in range(wanted):
            value = who << 48 | (done + i)
            store64(scratch + i * ring.element, value)
            if ring.element == 16:
                store64(scratch + 16 * i + 8, ~value)
        put = ring.enqueue_bulk(scratch, wanted) if bulk else ring.enqueue_burst(scratch, wanted)
        idle = _wait(idle, sched_yield) if put == 0 else 0
        done += put


@kernel
def _consume(ring, scratch, rows, taken, count, burst, bulk, sched_yield):  # type: ignore[no-untyped-def]
    """Take until all consumers together have `count`. Returns how many elements were not what they should be."""
    idle = wrong = 0
    while load_acquire64(taken) < count:
        got = ring.dequeue_bulk(scratch, burst) if bulk and idle & 7 < 7 else ring.dequeue_burst(scratch, burst)
        if got == 0:
            idle = _wait(idle, sched_yield)
            continue
        idle = 0
        for i in range(got):
            value = load64(scratch + i * ring.element)
            who, number = shr64(value, 48), value & ((1 << 48) - 1)
            if who >= LIMIT or (ring.element == 16 and load64(scratch + 16 * i + 8) != ~value):
                wrong += 1
                continue
            row = rows + ROW * who
            wrong += number <= load64(row + 8)
            store64(row, load64(row) + 1)
            store64(row + 8, number)
            store64(row + 16, load64(row + 16) + number)
            store64(row + 24, load64(row + 24) + _mixed(number))
        fetch_add64(taken, got)
    return wrong


@kernel
def _expected(count):  # type: ignore[no-untyped-def]
    total = 0
    for number in range(count):
        total += _mixed(number)
    return total


def check(ring, producers, consumers, burst, bulk):
    each = COUNT // producers
    scratch = [Arena(16 * burst) for _ in range(producers + consumers)]
    rows = [Arena(ROW * LIMIT) for _ in range(consumers)]
    taken = Arena(8)
    for one in rows:
        one.words[1::4] = -1
    wrong = [-1] * consumers

    def produce(who, count):
        _produce(ring.view, scratch[who].address, who, count, burst, bulk, SCHED_YIELD)

    def consume(who, count):
        at, own = scratch[producers + who].address, rows[who].address
        wrong[who] = _consume(ring.view, at, own, taken.address, count, burst, bulk, SCHED_YIELD)

    produce(0, 0)  # compile
    consume(0, 0)
    threads = [threading.Thread(target=produce, args=(who, each), daemon=True) for who in range(producers)]
    threads += [threading.Thread(target=consume, args=(who, each * producers), daemon=True) for who in range(consumers)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == [0] * consumers
    assert len(ring) == 0
    for who in range(producers):
        seen = [sum(int(one.words[4 * who + word]) for one in rows) for word in (0, 2, 3)]
        assert seen[0] == each
        assert seen[1] == each * (each - 1) // 2
        assert (seen[2] - _expected(each)) % WRAP64 == 0


SHAPES = [(2, 1, False), (2, 2, True), (4, 3, False), (8, 8, True), (8, 16, False)]
shapes = pytest.mark.parametrize(("size", "burst", "bulk"), SHAPES)


@pytest.mark.parametrize("element", [8, 16])
@shapes
def test_spsc(size, burst, bulk, element):
    check(Spsc(size, element=element, start=WRAP - COUNT // 2), 1, 1, burst, bulk)


FEW = [SHAPES[0], SHAPES[2], SHAPES[3]]


@pytest.mark.parametrize(("producers", "element", "wrap"), [(1, 16, WRAP), (2, 8, WRAP64), (3, 8, WRAP64)])
@pytest.mark.parametrize(("size", "burst", "bulk"), FEW)
def test_mpsc(size, burst, bulk, element, wrap, producers):
    check(Mpsc(size, element=element, start=wrap - COUNT // 2), producers, 1, burst, bulk)


SIDES = [(1, 1, 8, WRAP64), (2, 2, 8, WRAP64), (1, 3, 16, WRAP), (3, 1, 16, WRAP64)]


@pytest.mark.parametrize(("producers", "consumers", "element", "wrap"), SIDES)
@pytest.mark.parametrize(("size", "burst", "bulk"), FEW)
def test_mpmc(size, burst, bulk, element, wrap, producers, consumers):
    check(Mpmc(size, element=element, start=wrap - COUNT // 2), producers, consumers, burst, bulk)
