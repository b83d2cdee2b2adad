"""`libfp.rings.Spsc` in place and by its marks; what all rings have in common is in `test_rings`."""

from __future__ import annotations

import pytest

from libfp.jit import kernel, load64, store64
from libfp.rings import Spsc

WRAP = 1 << 32


@kernel
def _without_copies(ring, rounds):  # type: ignore[no-untyped-def]
    """Fill and empty the ring in place; return the sum of what came out."""
    total = 0
    for turn in range(rounds):
        granted = ring.reserve(3)
        for i in range(granted):
            store64(ring.slot(i), 10 * turn + i)
        ring.commit(granted)
        there = ring.peek(ring.size)
        for i in range(there):
            total += load64(ring.item(i))
        ring.release(there)
    return total


@pytest.mark.parametrize("start", [0, WRAP - 5])
def test_in_place(start):
    ring = Spsc(8, start=start)
    assert _without_copies(ring.view, 20) == sum(10 * turn + i for turn in range(20) for i in range(3))
    assert len(ring) == 0


def test_reserved_is_not_published():
    ring = Spsc(4)
    assert ring.view.reserve(2) == 2
    assert len(ring) == 0
    ring.view.commit(1)
    assert len(ring) == 1


def test_peeked_is_not_given_back():
    ring = Spsc(2)
    ring.enqueue_burst([1, 2])
    assert ring.view.peek(2) == 2
    assert ring.enqueue(3) is False
    ring.view.release(1)
    assert ring.enqueue(3) is True
    assert ring.dequeue_burst(2).tolist() == [2, 3]


@pytest.mark.parametrize("start", [0, WRAP - 1])
def test_a_mark_is_passed_when_all_before_it_is_consumed(start):
    ring = Spsc(4, start=start)
    assert ring.view.passed(ring.view.written())
    ring.enqueue_burst([1, 2])
    mark = ring.view.written()
    ring.enqueue(3)
    assert not ring.view.passed(mark)
    ring.dequeue()
    assert not ring.view.passed(mark)
    ring.dequeue()
    assert ring.view.passed(mark)


def test_reset_empties():
    ring = Spsc(4)
    ring.enqueue_burst([1, 2, 3])
    ring.reset(WRAP - 1)
    assert len(ring) == 0
    assert ring.enqueue_burst(range(9)) == 4
