"""The rings over ordinary memory, with this test as the kernel's side, and indexes that start just below 2**32."""

from __future__ import annotations

import pytest

from libfp.errors import BadInput
from libfp.pyxdp.rings import WORD, CompletionRing, FillRing, RingSizes, RxRing, TxRing
from libfp.pyxdp.system import ffi

STARTS = [0, 5, WORD - 5, WORD]
SIZES = [1, 2, 4, 8]


class Memory:
    """A ring's words and entries: producer at 0, consumer at 64, flags at 128, entries from 192."""

    def __init__(self, size, start):
        self.bytes = ffi.new("char[]", 192 + size * 16)
        self.base = int(ffi.cast("uintptr_t", self.bytes))
        self.producer, self.consumer, self.flags = (ffi.cast("uint32_t *", self.base + at) for at in (0, 64, 128))
        self.producer[0] = self.consumer[0] = start
        self.words = ffi.cast("uint64_t *", self.base + 192)
        self.descs = ffi.cast("struct xdp_desc *", self.base + 192)
        self.place = (self.base, self.base + 64, self.base + 128, self.base + 192, size)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", SIZES)
def test_a_producer_never_overruns_and_keeps_order_across_the_wrap(size, start):
    memory = Memory(size, start)
    ring = FillRing(*memory.place)
    seen, sent = [], 0
    for turn in range(40):
        offered = list(range(sent, sent + turn % (size + 3)))
        count = ring.put(offered)
        assert count == min(len(offered), size - (sent - len(seen)))
        sent += count
        assert len(ring) == sent - len(seen) <= size
        for _ in range((turn * 7) % (size + 1)):  # the kernel takes some
            if memory.producer[0] != memory.consumer[0]:
                seen.append(memory.words[memory.consumer[0] & (size - 1)])
                memory.consumer[0] = memory.consumer[0] + 1 & WORD
    assert seen == list(range(len(seen)))
    assert len(seen) > 10
    assert memory.producer[0] == start + sent & WORD


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", SIZES)
def test_a_consumer_takes_everything_once_across_the_wrap(size, start):
    memory = Memory(size, start)
    ring = CompletionRing(*memory.place)
    seen, sent = [], 0
    for turn in range(40):
        for _ in range(turn % (size + 1)):
            if memory.producer[0] - memory.consumer[0] & WORD < size:
                memory.words[memory.producer[0] & (size - 1)] = sent
                memory.producer[0] = memory.producer[0] + 1 & WORD
                sent += 1
        seen += ring.take(limit=3)
    while more := ring.take():
        seen += more
    assert seen == list(range(sent))
    assert memory.consumer[0] == start + sent & WORD


@pytest.mark.parametrize("start", STARTS)
def test_descriptors_carry_address_and_length(start):
    memory = Memory(2, start)
    ring = TxRing(*memory.place)
    assert ring.put(4096, 60)
    assert ring.put(8192, 61)
    assert not ring.put(0, 62)
    rx = RxRing(*memory.place)
    memory.producer[0] = start + 2 & WORD
    assert (rx.take(), rx.take(), rx.take()) == ((4096, 60), (8192, 61), None)


def test_a_producer_index_that_lies_yields_no_more_than_the_ring_holds():
    memory = Memory(4, 0)
    ring = CompletionRing(*memory.place)
    memory.producer[0] = 1_000_000
    assert len(ring.take(limit=100)) == 4


def test_need_wakeup_is_the_first_flag():
    memory = Memory(4, 0)
    ring = TxRing(*memory.place)
    assert not ring.need_wakeup
    memory.flags[0] = 1
    assert ring.need_wakeup


def test_a_first_filling_is_bounded_by_the_ring():
    memory = Memory(4, 0)
    ring = FillRing(*memory.place)
    with pytest.raises(BadInput):
        ring.put_first(range(5))
    ring.put_first([2048 * i for i in range(4)])
    assert [memory.words[i] for i in range(4)] == [0, 2048, 4096, 6144]
    assert memory.producer[0] == 4


@pytest.mark.parametrize("sizes", [RingSizes(rx=3), RingSizes(tx=0), RingSizes(fill=-2), RingSizes(completion=100)])
def test_ring_sizes_are_powers_of_two(sizes):
    with pytest.raises(BadInput):
        sizes.check()
