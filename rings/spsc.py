"""A ring between one producer and one consumer: no lock, no locked instruction.

    producer's line      producer index, published
    consumer's line      consumer index, published
    producer's own       its index | the consumer index as last seen
    consumer's own       its index | the producer index as last seen
    slots                `size` elements

Each index is written by one side. A side looks at the other's line only when what it saw last says full (or empty),
so in a busy ring the two lines cross between the cores once per ring's length and not once per call. An element is
written before the index that covers it is stored with release; the other side loads that index with acquire. The
producer asks for the next line of slots before it needs it (`libfp.rings.slots.ahead`), which halves a burst's cost.

Indexes are 32 bits, run freely and wrap; ``u32(producer - consumer)`` is the number of elements.

The idea of the cached indexes: Lee, Bu, Chandranmenon, "A lock-free, cache-efficient shared ring buffer" (ANCS 2009).
"""

from __future__ import annotations

from libfp.jit import (
    Arena,
    constant,
    inline,
    load32,
    load_acquire32,
    native,
    store32,
    store_release32,
    u32,
    word,
)
from libfp.rings.ring import Ring
from libfp.rings.slots import ahead, put, rest, take

# Two lines apart, because processors fetch lines in pairs.
PRODUCER, CONSUMER, PRODUCERS_OWN, CONSUMERS_OWN, SLOTS = 0, 128, 256, 384, 512
# In a side's own line: its index, the other side's as last seen, and when it was looked for in vain.
OWN, SEEN, LOOKED = 0, 8, 16


@native
class SpscView:
    """A `Spsc` as compiled code sees it. Counts are of elements, addresses of memory that holds them one by one.

    The producer may call `enqueue_burst`, `enqueue_bulk`, `reserve`, `slot`, `commit` and `written`; the consumer
    `dequeue_burst`, `dequeue_bulk`, `peek`, `item` and `release`; who has a mark of `written`, `passed`.
    """

    base: word
    producer: word
    consumer: word
    size: word
    element: constant

    @inline
    def reserve(self, count):  # type: ignore[no-untyped-def]
        """How many of `count` slots are free to be written, from ``slot(0)`` on. Nothing is published."""
        producer = load32(self.producer + OWN)
        free = self.size - u32(producer - load32(self.producer + SEEN))
        if free < count:
            consumer = load_acquire32(self.base + CONSUMER)
            used = u32(producer - consumer)
            if used <= self.size:  # or the other side, another process, lies
                store32(self.producer + SEEN, consumer)
                free = self.size - used
        return min(free, count)

    @inline
    def slot(self, index):  # type: ignore[no-untyped-def]
        """The address of the `index`-th reserved slot."""
        at = (load32(self.producer + OWN) + index) & (self.size - 1)
        return self.base + SLOTS + at * self.element

    @inline
    def commit(self, count):  # type: ignore[no-untyped-def]
        """Publish the first `count` reserved slots."""
        producer = load32(self.producer + OWN) + count
        store32(self.producer + OWN, producer)
        store_release32(self.base + PRODUCER, producer)
        end = (producer & (self.size - 1)) * self.element
        ahead(self.base + SLOTS, self.size * self.element, end, count * self.element)

    @inline
    def peek(self, count):  # type: ignore[no-untyped-def]
        """How many of `count` elements are there to be read, from ``item(0)`` on. Nothing is given back."""
        consumer = load32(self.consumer + OWN)
        there = u32(load32(self.consumer + SEEN) - consumer)
        if there < count:
            producer = load_acquire32(self.base + PRODUCER)
            told = u32(producer - consumer)
            if told <= self.size and told != there:  # polling an empty ring dirties no line
                store32(self.consumer + SEEN, producer)
                there = told
        return min(there, count)

    @inline
    def item(self, index):  # type: ignore[no-untyped-def]
        """The address of the `index`-th element peeked at."""
        at = (load32(self.consumer + OWN) + index) & (self.size - 1)
        return self.base + SLOTS + at * self.element

    @inline
    def release(self, count):  # type: ignore[no-untyped-def]
        """Give the first `count` elements' slots back to the producer."""
        consumer = load32(self.consumer + OWN) + count
        store32(self.consumer + OWN, consumer)
        store_release32(self.base + CONSUMER, consumer)

    @inline
    def enqueue_burst(self, source, count):  # type: ignore[no-untyped-def]
        """Copy in as many of the `count` elements at `source` as fit; return how many."""
        if load32(self.producer + OWN) == u32(load32(self.producer + SEEN) + self.size):
            rest(self.producer + LOOKED)
        count = self.reserve(count)
        if count > 0:
            at = load32(self.producer + OWN) & (self.size - 1)
            put(self.base + SLOTS, self.size * self.element, at * self.element, source, count * self.element)
            self.commit(count)
        return count

    @inline
    def enqueue_bulk(self, source, count):  # type: ignore[no-untyped-def]
        """Copy in all `count` elements at `source`, or none: returns `count` or 0."""
        if self.reserve(count) < count:
            return 0
        return self.enqueue_burst(source, count)

    @inline
    def dequeue_burst(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out up to `count` elements to `target`; return how many there were."""
        if load32(self.consumer + OWN) == load32(self.consumer + SEEN):
            rest(self.consumer + LOOKED)
        count = self.peek(count)
        if count > 0:
            at = load32(self.consumer + OWN) & (self.size - 1)
            take(self.base + SLOTS, self.size * self.element, at * self.element, target, count * self.element)
            self.release(count)
        return count

    @inline
    def dequeue_bulk(self, target, count):  # type: ignore[no-untyped-def]
        """Copy out exactly `count` elements to `target`, or none: returns `count` or 0."""
        if self.peek(count) < count:
            return 0
        return self.dequeue_burst(target, count)

    def written(self):  # type: ignore[no-untyped-def]
        """The producer index: a mark that `passed` compares with."""
        return load_acquire32(self.base + PRODUCER)

    def passed(self, mark):  # type: ignore[no-untyped-def]
        """1 if the consumer has given back everything published before `mark` (of `written`), else 0."""
        return 1 if u32(load_acquire32(self.base + CONSUMER) - mark) < 0x80000000 else 0

    def __len__(self):  # type: ignore[no-untyped-def]
        consumer = load_acquire32(self.base + CONSUMER)
        return min(u32(load_acquire32(self.base + PRODUCER) - consumer), self.size)


class Spsc(Ring):
    """A ring of `size` elements (a power of two) of `element` bytes (8 or 16), for one producer and one consumer.

    One thread may produce and one may consume, from Python or compiled code alike. Memory: 512 bytes and the slots.
    """

    def __init__(self, size: int, *, element: int = 8, start: int = 0) -> None:
        """`start` is the first index; tests begin just below 2**32. Raises BadInput for other sizes."""
        super().__init__(size, element)
        self.arena = Arena(SLOTS + size * element)
        base = self.arena.address
        self.view = SpscView(base, base + PRODUCERS_OWN, base + CONSUMERS_OWN, size, element)
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Empty the ring, both indexes at `start`. Only while neither side runs."""
        for at in (PRODUCER, CONSUMER):
            store32(self.view.base + at, start)
        for line in (self.view.producer, self.view.consumer):
            store32(line + OWN, start)
            store32(line + SEEN, start)
