"""All rings from one thread: what each call does, at every edge, also where the indexes wrap."""

from __future__ import annotations

import numpy as np
import pytest

from libfp.errors import BadInput
from libfp.jit import Arena, kernel, load64, store64
from libfp.rings import Mpmc, Mpsc, Spsc
from libfp.testing.tables import check_ring

WRAP = 1 << 32
WRAP64 = 1 << 64
KINDS = [Spsc, Mpsc, Mpmc]
STARTS = [(Spsc, 0), (Spsc, WRAP - 3)] + [(kind, start) for kind in (Mpsc, Mpmc) for start in (0, WRAP - 3, WRAP64 - 3)]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("element", [8, 16])
@pytest.mark.parametrize("size", [2, 4, 8, 64, 128])
@pytest.mark.parametrize(("kind", "start"), STARTS)
def test_against_a_deque(kind, start, size, element):
    check_ring(kind(size, element=element, start=start), seed=size + element, steps=150)


@kinds
@pytest.mark.parametrize("size", [0, 1, 3, 6, -4, 1 << 32])
def test_refuses_sizes(kind, size):
    with pytest.raises(BadInput, match="power of two"):
        kind(size)


@kinds
def test_refuses_elements(kind):
    with pytest.raises(BadInput, match="8 or 16"):
        kind(4, element=4)
    ring = kind(4, element=16)
    with pytest.raises(BadInput, match="shape"):
        ring.enqueue_burst(np.arange(3))
    with pytest.raises(BadInput, match="shape"):
        kind(4).enqueue_burst(np.ones((2, 2), np.int64))
    assert len(ring) == 0


@kinds
def test_bulk_is_all_or_none_and_burst_what_fits(kind):
    ring = kind(4)
    assert ring.enqueue_bulk(range(5)) == 0
    assert ring.enqueue_burst([]) == ring.enqueue_bulk([]) == 0
    assert ring.enqueue_burst(range(5)) == 4
    assert ring.enqueue(9) is False
    assert ring.dequeue_bulk(5).tolist() == []
    assert ring.dequeue_burst(0).tolist() == ring.dequeue_burst(-1).tolist() == []
    assert ring.dequeue_burst(5).tolist() == [0, 1, 2, 3]
    assert ring.dequeue() is None
    ring.enqueue_bulk([1, 2])
    assert ring.enqueue_bulk([3, 4, 5]) == 0
    assert ring.dequeue_bulk(3).tolist() == []
    assert ring.dequeue_bulk(2).tolist() == [1, 2]


@kinds
def test_values_of_64_bits(kind):
    ring = kind(4)
    ring.enqueue(-1)
    ring.enqueue((1 << 64) - 1)
    ring.enqueue_burst(np.array([1 << 63], np.uint64))
    assert ring.dequeue_burst(4).tolist() == [-1, -1, -(1 << 63)]


@kinds
def test_reset_empties(kind):
    ring = kind(4)
    ring.enqueue_burst([1, 2, 3])
    ring.reset(WRAP - 1)
    assert len(ring) == 0
    assert ring.enqueue_burst(range(9)) == 4
    assert ring.dequeue_burst(9).tolist() == [0, 1, 2, 3]


@kinds
def test_a_closed_one_says_so(kind):
    ring = kind(4)
    ring.close()
    for call in (lambda: ring.enqueue(1), ring.dequeue, lambda: len(ring), ring.reset, lambda: ring.view):
        with pytest.raises(BadInput, match="is closed"):
            call()
    ring.close()


@kinds
def test_many_laps(kind):
    ring = kind(2)
    for turn in range(600):
        assert ring.enqueue(turn)
        assert ring.dequeue() == turn
        assert ring.dequeue() is None


@kernel
def _fill(ring, rounds):  # type: ignore[no-untyped-def]
    """Write in place, read by copy; return the sum of what came out."""
    total = 0
    for turn in range(rounds):
        granted, index = ring.reserve(3, 1)
        for i in range(granted):
            store64(ring.slot(index + i), 10 * turn + i)
        ring.commit(index, granted)
        for _ in range(granted):
            total += _one(ring)
    return total


@kernel
def _one(ring):  # type: ignore[no-untyped-def]
    there, index = ring.peek(1, 1)
    value = load64(ring.item(index))
    ring.release(index, there)
    return value


@kernel
def _fill_mpsc(ring, rounds):  # type: ignore[no-untyped-def]
    total = 0
    for turn in range(rounds):
        granted, index = ring.reserve(3, 1)
        for i in range(granted):
            store64(ring.slot(index + i), 10 * turn + i)
        ring.commit(index, granted)
        there = ring.peek(ring.size)
        for i in range(there):
            total += load64(ring.item(i))
        ring.release(there)
    return total


@pytest.mark.parametrize("start", [0, WRAP - 5, WRAP64 - 5])
@pytest.mark.parametrize(("kind", "fill"), [(Mpsc, _fill_mpsc), (Mpmc, _fill)])
def test_in_place(kind, fill, start):
    ring = kind(8, start=start)
    assert fill(ring.view, 20) == sum(10 * turn + i for turn in range(20) for i in range(3))
    assert len(ring) == 0


@pytest.mark.parametrize("kind", [Mpsc, Mpmc])
def test_one_that_has_not_committed_holds_up_what_comes_after_and_no_other_producer(kind):
    ring = kind(4)
    granted, index = ring.view.reserve(2, 2)
    assert (granted, len(ring)) == (2, 2)
    assert ring.enqueue_burst([3, 4, 5]) == 2
    assert ring.dequeue_burst(4).tolist() == []
    for i in range(granted):
        store64(ring.view.slot(index + i), 1 + i)
    ring.view.commit(index, granted)
    assert ring.dequeue_burst(4).tolist() == [1, 2, 3, 4]


def test_one_that_has_not_released_holds_up_producers_and_no_other_consumer():
    ring = Mpmc(4)
    ring.enqueue_burst([1, 2, 3, 4])
    there, index = ring.view.peek(2, 2)
    assert there == 2
    assert ring.dequeue_burst(4).tolist() == [3, 4]
    assert ring.enqueue(5) is False
    assert [load64(ring.view.item(index + i)) for i in range(2)] == [1, 2]
    ring.view.release(index, 2)
    assert ring.enqueue_burst([5, 6, 7, 8, 9]) == 4


@pytest.mark.parametrize("kind", [Mpsc, Mpmc])
def test_fewer_than_the_least_are_not_claimed(kind):
    ring = kind(4)
    ring.enqueue_burst([1, 2])
    assert ring.view.reserve(4, 3)[0] == 0
    assert len(ring) == 2
    assert ring.view.reserve(4, 2)[0] == 2


@kinds
@pytest.mark.parametrize("element", [8, 16])
def test_copies_stay_within_their_arrays(kind, element):
    """Source and target end at a guard page, for every count and place in the ring."""
    ring = kind(16, element=element)
    for count in range(1, 17):
        source, target = (Arena(count * element, flush_end=True) for _ in range(2))
        source.words[:] = np.arange(len(source.words)) + 100 * count
        assert ring.view.enqueue_burst(source.address, count) == count
        assert ring.view.dequeue_burst(target.address, count) == count
        assert (target.words == source.words).all()


@kinds
def test_any_thread_may_use_it_from_python(kind):
    """Each has a staging array of its own."""
    import threading

    ring = kind(64)
    thread = threading.Thread(target=lambda: ring.enqueue_burst(range(10)))
    thread.start()
    thread.join()
    assert ring.dequeue_burst(64).tolist() == list(range(10))
