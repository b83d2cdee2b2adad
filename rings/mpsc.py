"""A ring between many producers, which claim slots by compare-and-swap, and one consumer, which locks nothing.

    producers' line      the next index to claim | the consumer index as last seen
    consumer's line      consumer index, published
    consumer's own       consumer index | how far slots are known to be written
    marks                a word a slot, that of a claim's first says how far it is written
    slots                `size` elements

A producer that has claimed its slots writes them, and then leaves a mark (`libfp.rings.marks`): producers never wait
for one another, and one that is put aside in between holds up the consumer alone, when it gets there. What one
producer puts in comes out in its order.

Indexes are 64 bits, so that a compare-and-swap never takes an index for one of long ago.

The claim by compare-and-swap of a whole burst is DPDK's rte_ring's; a state for each slot is Vyukov's "Bounded MPMC
queue" (2010), here for each claim.
"""

from __future__ import annotations

from libfp.jit import (
    Arena,
    compare_and_swap64,
    constant,
    inline,
    load64,
    load_acquire64,
    native,
    store64,
    store_release64,
    word,
)
from libfp.jit.primitive import signed64
from libfp.rings.marks import aim, follow, mark
from libfp.rings.ring import Ring
from libfp.rings.slots import ahead, put, rest, take

_HEAD, _SEEN, _LOOKED = 0, 8, 64
_CONSUMER = 128
_OWN, _KNOWN, _LAST = 256, 264, 272
_MARKS = 384


@native
class MpscView:
    """A `Mpsc` as compiled code sees it. Counts are of elements, addresses of memory that holds them one by one.

    Producers may call `enqueue_burst`, `enqueue_bulk`, `reserve`, `slot` and `commit`; the consumer `dequeue_burst`,
    `dequeue_bulk`, `peek`, `item` and `release`.
    """

    base: word
    slots: word
    size: word
    element: constant

    @inline
    def reserve(self, count, least):  # type: ignore[no-untyped-def]
        """Claim up to `count` slots, or none if there are not `least`: (how many, the first one's index).

        They are to be written at ``slot(index)`` and so on, and all of them committed, before long.
        """
        head = load_acquire64(self.base + _HEAD)
        if head - load_acquire64(self.base + _SEEN) >= self.size:
            rest(self.base + _LOOKED)
        while True:
            free = self.size - (head - load_acquire64(self.base + _SEEN))
            if free < count:
                consumer = load_acquire64(self.base + _CONSUMER)
                store_release64(self.base + _SEEN, consumer)
                free = self.size - (head - consumer)
            granted = min(free, count)
            if granted < max(least, 1):
                return 0, head
            was = compare_and_swap64(self.base + _HEAD, head, head + granted)
            if was == head:
                return granted, head
            head = was

    @inline
    def slot(self, index):  # type: ignore[no-untyped-def]
        """The address of the slot with this index."""
        return self.slots + (index & (self.size - 1)) * self.element

    @inline
    def commit(self, index, count):  # type: ignore[no-untyped-def]
        """Publish the `count` slots that `reserve` gave from `index` on: these, and no fewer."""
        mark(self.base + _MARKS, self.size, index, count)
        end = ((index + count) & (self.size - 1)) * self.element
        ahead(self.slots, self.size * self.element, end, count * self.element)

    @inline
    def peek(self, count):  # type: ignore[no-untyped-def]
        """How many of `count` elements are there to be read, from ``item(0)`` on. Nothing is given back."""
        own = load64(self.base + _OWN)
        there = load64(self.base + _KNOWN) - own
        if there < count:
            known = follow(self.base + _MARKS, self.size, own + there, count - there)
            store64(self.base + _KNOWN, known)
            there = known - own
        return min(there, count)

    @inline
    def item(self, index):  # type: ignore[no-untyped-def]
        """The address of the `index`-th element peeked at."""
        return self.slot(load64(self.base + _OWN) + index)

    @inline
    def release(self, count):  # type: ignore[no-untyped-def]
        """Give the first `count` elements' slots back to the producers."""
        own = load64(self.base + _OWN) + count
        store64(self.base + _OWN, own)
        store_release64(self.base + _CONSUMER, own)

    @inline
    def _enqueue(self, source, count, least):  # type: ignore[no-untyped-def]
        count, index = self.reserve(count, least)
        if count > 0:
            aim(self.base + _MARKS, self.size, index)
            at = (index & (self.size - 1)) * self.element
            put(self.slots, self.size * self.element, at, source, count * self.element)
            self.commit(index, count)
        return count

    @inline
    def enqueue_burst(self, source, count):  # type: ignore[no-untyped-def]
        """Copy in as many of the `count` elements at `source` as fit; return how many."""
        return self._enqueue(source, count, 1)

    @inline
    def enqueue_bulk(self, source, count):  # type: ignore[no-untyped-def]
        """Copy in all `count` elements at `source`, or none: returns `count` or 0."""
        return self._enqueue(source, count, count)

    @inline
    def dequeue_burst(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out up to `count` elements to `target`; return how many there were."""
        if load64(self.base + _KNOWN) == load64(self.base + _OWN):
            rest(self.base + _LAST)
        count = self.peek(count)
        if count > 0:
            at = (load64(self.base + _OWN) & (self.size - 1)) * self.element
            take(self.slots, self.size * self.element, at, target, count * self.element)
            self.release(count)
        return count

    @inline
    def dequeue_bulk(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out exactly `count` elements to `target`, or none: returns `count` or 0."""
        if self.peek(count) < count:
            return 0
        return self.dequeue_burst(target, count)

    def __len__(self):  # type: ignore[no-untyped-def]
        consumer = load_acquire64(self.base + _CONSUMER)
        return min(load_acquire64(self.base + _HEAD) - consumer, self.size)


class Mpsc(Ring):
    """A ring of `size` elements (a power of two) of `element` bytes (8 or 16), for many producers and one consumer.

    Any number of threads may produce and one may consume, from Python or compiled code alike. Its length counts what
    producers have claimed and not yet written. Memory: 384 bytes, and 8 bytes more than an element for each slot.
    """

    def __init__(self, size: int, *, element: int = 8, start: int = 0) -> None:
        """`start` is the first index; tests begin just below 2**64. Raises BadInput for other sizes."""
        super().__init__(size, element)
        slots = _MARKS + max(8 * size, 128)
        self.arena = Arena(slots + size * element)
        base = self.arena.address
        self.view = MpscView(base, base + slots, size, element)
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Empty the ring, all indexes at `start`. Only while no side runs."""
        for at in (_HEAD, _SEEN, _CONSUMER, _OWN, _KNOWN):
            store64(self.view.base + at, start)
        self.arena.words[_MARKS // 8 :][: self.size] = signed64(start)
