"""A ring between many producers and many consumers: both sides claim by compare-and-swap, nobody waits for another.

    producers' line      the next index to write | up to where slots are known to have been read
    consumers' line      the next index to read | up to where slots are known to have been written
    marks                a word a slot, that of a claim's first says how far it is written; and as many for read
    slots                `size` elements

A side looks at the marks that the other side leaves (`libfp.rings.marks`) only when what is known does not suffice,
and then at some more. What is known is shared by all of a side, and only grows.

What one producer puts in is taken out in its order. A thread that is put aside between claim and commit holds up the
other side, when it gets there, and nobody else.

Indexes are 64 bits, so that a compare-and-swap never takes an index for one of long ago.

From Vyukov's "Bounded MPMC queue" (2010), which has a state in each slot and takes one element at a time.
"""

from __future__ import annotations

from libfp.jit import (
    Arena,
    compare_and_swap64,
    constant,
    inline,
    load_acquire64,
    native,
    store64,
    word,
)
from libfp.jit.primitive import signed64
from libfp.rings.marks import aim, follow, mark
from libfp.rings.ring import Ring
from libfp.rings.slots import ahead, bring, put, take

_PRODUCERS, _CONSUMERS, _MARKS = 0, 128, 256
# In a side's line: the next index to claim, up to where the other side is known to be.
_NEXT, _KNOWN = 0, 8


@native
class MpmcView:
    """A `Mpmc` as compiled code sees it. Counts are of elements, addresses of memory that holds them one by one.

    Producers may call `enqueue_burst`, `enqueue_bulk`, `reserve`, `slot` and `commit`; consumers `dequeue_burst`,
    `dequeue_bulk`, `peek`, `item` and `release`.
    """

    base: word
    read: word
    slots: word
    size: word
    element: constant

    @inline
    def _claim(self, side, marks, room, count, least):  # type: ignore[no-untyped-def]
        """Claim up to `count` indexes of a side: those up to `room` beyond what the other side's marks lead to."""
        index = load_acquire64(side + _NEXT)
        while True:
            known = load_acquire64(side + _KNOWN)
            if known + room - index < count:
                further = follow(marks, self.size, known, count - (known + room - index))
                if further != known:
                    was = compare_and_swap64(side + _KNOWN, known, further)
                    known = further if was == known else was
            known += room - index
            granted = min(known, count)
            if granted >= max(least, 1):
                was = compare_and_swap64(side + _NEXT, index, index + granted)
                if was == index:
                    return granted, index
            else:
                was = load_acquire64(side + _NEXT)
                if was == index:  # or somebody has claimed these, and was waited for in vain
                    return 0, index
            index = was

    @inline
    def reserve(self, count, least):  # type: ignore[no-untyped-def]
        """Claim up to `count` slots, or none if there are not `least`: (how many, the first one's index).

        They are to be written at ``slot(index)`` and so on, and all of them committed, before long.
        """
        return self._claim(self.base + _PRODUCERS, self.read, self.size, count, least)

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
    def peek(self, count, least):  # type: ignore[no-untyped-def]
        """Claim up to `count` elements, or none if there are not `least`: (how many, the first one's index).

        They are this consumer's, at ``item(index)`` and so on, and all of them to be released, before long.
        """
        return self._claim(self.base + _CONSUMERS, self.base + _MARKS, 0, count, least)

    @inline
    def item(self, index):  # type: ignore[no-untyped-def]
        """The address of the element with this index."""
        return self.slot(index)

    @inline
    def release(self, index, count):  # type: ignore[no-untyped-def]
        """Give the slots of all `count` elements that `peek` gave from `index` on back to the producers."""
        mark(self.read, self.size, index, count)

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
    def _dequeue(self, target, count, least):  # type: ignore[no-untyped-def]
        count, index = self.peek(count, least)
        if count > 0:
            aim(self.read, self.size, index)
            at = (index & (self.size - 1)) * self.element
            there = (load_acquire64(self.base + _CONSUMERS + _KNOWN) - index - count) * self.element
            end = ((index + count) & (self.size - 1)) * self.element
            bring(self.slots, self.size * self.element, end, count * self.element, there)
            take(self.slots, self.size * self.element, at, target, count * self.element)
            self.release(index, count)
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
        return self._dequeue(target, count, 1)

    @inline
    def dequeue_bulk(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out exactly `count` elements to `target`, or none: returns `count` or 0."""
        return self._dequeue(target, count, count)

    def __len__(self):  # type: ignore[no-untyped-def]
        consumers = load_acquire64(self.base + _CONSUMERS)
        return min(load_acquire64(self.base + _PRODUCERS) - consumers, self.size)


class Mpmc(Ring):
    """A ring of `size` elements (a power of two) of `element` bytes (8 or 16), for many producers and many consumers.

    Any number of threads may produce and consume, from Python or compiled code alike. Its length counts what
    producers have claimed and not yet written. Memory: 256 bytes, and 16 bytes more than an element for each slot.
    """

    def __init__(self, size: int, *, element: int = 8, start: int = 0) -> None:
        """`start` is the first index; tests begin just below 2**64. Raises BadInput for other sizes."""
        super().__init__(size, element)
        marks = max(8 * size, 128)
        self.arena = Arena(_MARKS + 2 * marks + size * element)
        base = self.arena.address
        read = base + _MARKS + marks
        self.view = MpmcView(base, read, read + marks, size, element)
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Empty the ring, all indexes at `start`. Only while no side runs."""
        for side in (_PRODUCERS, _CONSUMERS):
            for at in (_NEXT, _KNOWN):
                store64(self.view.base + side + at, start)
        self.arena.words[_MARKS // 8 : (self.view.slots - self.view.base) // 8] = signed64(start)
