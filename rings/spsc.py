"""A ring between one producer and one consumer: no lock, no locked instruction.

    producer's line      producer index | the consumer index as last seen
    consumer's line      consumer index | the producer index as last seen
    slots                `size` elements

Each index is written by one side. A side looks at the other's line only when what it saw last says full (or empty),
so in a busy ring the two lines cross between the cores once per ring's length and not once per call. An element is
written before the index that covers it is stored with release; the other side loads that index with acquire.

Indexes are 32 bits, run freely and wrap; ``u32(producer - consumer)`` is the number of elements.

The idea of the cached indexes: Lee, Bu, Chandranmenon, "A lock-free, cache-efficient shared ring buffer" (ANCS 2009).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit import (
    Arena,
    constant,
    load32,
    load64,
    load_acquire32,
    native,
    store32,
    store64,
    store_release32,
    u32,
    word,
)
from libfp.jit.primitive import signed64

# Two lines apart, because processors fetch lines in pairs.
_PRODUCER, _SEEN_CONSUMER = 0, 8
_CONSUMER, _SEEN_PRODUCER = 128, 136
_SLOTS = 256


@native
class SpscView:
    """A `Spsc` as compiled code sees it. Counts are of elements, addresses of memory that holds them one by one.

    The producer may call `enqueue_burst`, `enqueue_bulk`, `reserve`, `slot`, `commit` and `written`; the consumer
    `dequeue_burst`, `dequeue_bulk`, `peek`, `item`, `release` and `consumed`.
    """

    base: word
    size: word
    element: constant

    def reserve(self, count):  # type: ignore[no-untyped-def]
        """How many of `count` slots are free to be written, from ``slot(0)`` on. Nothing is published."""
        free = self.size - u32(load32(self.base + _PRODUCER) - load32(self.base + _SEEN_CONSUMER))
        if free < count:
            consumer = load_acquire32(self.base + _CONSUMER)
            store32(self.base + _SEEN_CONSUMER, consumer)
            free = self.size - u32(load32(self.base + _PRODUCER) - consumer)
        return min(free, count)

    def slot(self, index):  # type: ignore[no-untyped-def]
        """The address of the `index`-th reserved slot."""
        at = (load32(self.base + _PRODUCER) + index) & (self.size - 1)
        return self.base + _SLOTS + at * self.element

    def commit(self, count):  # type: ignore[no-untyped-def]
        """Publish the first `count` reserved slots."""
        store_release32(self.base + _PRODUCER, load32(self.base + _PRODUCER) + count)

    def peek(self, count):  # type: ignore[no-untyped-def]
        """How many of `count` elements are there to be read, from ``item(0)`` on. Nothing is given back."""
        there = u32(load32(self.base + _SEEN_PRODUCER) - load32(self.base + _CONSUMER))
        if there < count:
            producer = load_acquire32(self.base + _PRODUCER)
            if producer != load32(self.base + _SEEN_PRODUCER):  # polling an empty ring dirties no line
                store32(self.base + _SEEN_PRODUCER, producer)
            there = u32(producer - load32(self.base + _CONSUMER))
        return min(there, count)

    def item(self, index):  # type: ignore[no-untyped-def]
        """The address of the `index`-th element peeked at."""
        at = (load32(self.base + _CONSUMER) + index) & (self.size - 1)
        return self.base + _SLOTS + at * self.element

    def release(self, count):  # type: ignore[no-untyped-def]
        """Give the first `count` elements' slots back to the producer."""
        store_release32(self.base + _CONSUMER, load32(self.base + _CONSUMER) + count)

    def enqueue_burst(self, source, count):  # type: ignore[no-untyped-def]
        """Copy in as many of the `count` elements at `source` as fit; return how many."""
        count = self.reserve(count)
        for i in range(count):
            slot, element = self.slot(i), source + i * self.element
            store64(slot, load64(element))
            if self.element == 16:
                store64(slot + 8, load64(element + 8))
        self.commit(count)
        return count

    def enqueue_bulk(self, source, count):  # type: ignore[no-untyped-def]
        """Copy in all `count` elements at `source`, or none: returns `count` or 0."""
        if self.reserve(count) < count:
            return 0
        return self.enqueue_burst(source, count)

    def dequeue_burst(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out up to `count` elements to `target`; return how many there were."""
        count = self.peek(count)
        for i in range(count):
            item, element = self.item(i), target + i * self.element
            store64(element, load64(item))
            if self.element == 16:
                store64(element + 8, load64(item + 8))
        self.release(count)
        return count

    def dequeue_bulk(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out exactly `count` elements to `target`, or none: returns `count` or 0."""
        if self.peek(count) < count:
            return 0
        return self.dequeue_burst(target, count)

    def written(self):  # type: ignore[no-untyped-def]
        """The producer index: a mark that `passed` compares with."""
        return load_acquire32(self.base + _PRODUCER)

    def passed(self, mark):  # type: ignore[no-untyped-def]
        """1 if the consumer has given back everything published before `mark` (of `written`), else 0."""
        return 1 if u32(load_acquire32(self.base + _CONSUMER) - mark) < 0x80000000 else 0

    def __len__(self):  # type: ignore[no-untyped-def]
        consumer = load_acquire32(self.base + _CONSUMER)
        return u32(load_acquire32(self.base + _PRODUCER) - consumer)


class Spsc:
    """A ring of `size` elements (a power of two) of `element` bytes (8 or 16), for one producer and one consumer.

    Compiled code uses `view`; the methods here are the same ring from Python: elements are 64-bit integers, or pairs
    of them. One thread may produce and one may consume, from Python or compiled code alike; all calls return at once.
    The view holds addresses only: keep the ring while a view is in use.
    """

    def __init__(self, size: int, *, element: int = 8, start: int = 0) -> None:
        """`start` is the first index; tests begin just below 2**32. Raises BadInput for other sizes."""
        if size < 2 or size > 1 << 31 or size & (size - 1):
            raise BadInput(f"a ring of {size} elements", "its size must be a power of two, 2 to 2**31")
        if element not in (8, 16):
            raise BadInput(f"ring elements of {element} bytes", "they have 8 or 16")
        self.arena = Arena(_SLOTS + size * element)
        self.view = SpscView(self.arena.address, size, element)
        self._staging: dict[int, Arena] = {}
        self.reset(start)

    @property
    def size(self) -> int:
        """How many elements fit."""
        return self.view.size

    @property
    def element(self) -> int:
        """Bytes an element."""
        return self.view.element

    def reset(self, start: int = 0) -> None:
        """Empty the ring, both indexes at `start`. Only while neither side runs."""
        for at in (_PRODUCER, _SEEN_CONSUMER, _CONSUMER, _SEEN_PRODUCER):
            store32(self.view.base + at, start)

    def enqueue(self, value: Any) -> bool:
        """Put in one element (an int, or a pair of ints); False if the ring is full."""
        return self.enqueue_bulk([value]) == 1

    def dequeue(self) -> Any:
        """Take out one element (an int, or a pair of ints); None if the ring is empty."""
        taken = self.dequeue_burst(1).tolist()
        return (tuple(taken[0]) if self.element == 16 else taken[0]) if taken else None

    def enqueue_burst(self, values: Any) -> int:
        """Put in as many of `values` as fit, in order; return how many. Shape (n,), or (n, 2) for pairs."""
        return self.view.enqueue_burst(*self._staged(values))

    def enqueue_bulk(self, values: Any) -> int:
        """Put in all of `values`, or none: returns their number or 0."""
        return self.view.enqueue_bulk(*self._staged(values))

    def dequeue_burst(self, count: int) -> np.ndarray:
        """Take out up to `count` elements: int64, shape (n,), or (n, 2) for pairs."""
        room = min(count, self.size)
        target = self._array(_CONSUMER, room)
        taken = self.view.dequeue_burst(self._staging[_CONSUMER].address, room)
        return target[:taken].copy()

    def dequeue_bulk(self, count: int) -> np.ndarray:
        """Take out exactly `count` elements, or none."""
        return self.dequeue_burst(count) if self.view.peek(count) == count else self._array(_CONSUMER, 0).copy()

    def __len__(self) -> int:
        return len(self.view)

    def __repr__(self) -> str:
        return f"Spsc({self.size}, element={self.element})"

    def close(self) -> None:
        """Free the memory. Neither side may use the ring, or a view of it, any more."""
        self.arena.close()

    def _array(self, side: int, count: int) -> np.ndarray:
        """Room for `count` elements, one for each side: the producer and the consumer may be two threads."""
        if side not in self._staging:
            self._staging[side] = Arena(self.size * self.element)
        words = self._staging[side].words[: count * self.element // 8]
        return words if self.element == 8 else words.reshape(-1, 2)

    def _staged(self, values: Any) -> tuple[int, int]:
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            given = values.astype(np.int64)
        elif self.element == 8:  # ints one by one: numpy would make floats of some
            given = np.array([signed64(one) for one in values], np.int64)
        else:
            given = np.array([[signed64(one) for one in pair] for pair in values], np.int64).reshape(-1, 2)
        shape = (len(given),) if self.element == 8 else (len(given), 2)
        if given.shape != shape:
            raise BadInput(f"elements of shape {given.shape}", f"this ring takes {shape}")
        if len(given) > self.size:  # a bulk this large never fits; a burst is cut
            address, _ = self._staged(given[: self.size])
            return address, len(given)
        self._array(_PRODUCER, len(given))[:] = given
        return self._staging[_PRODUCER].address, len(given)
