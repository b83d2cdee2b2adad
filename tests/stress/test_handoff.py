"""Two workers in threads hand each other packets as fast as they can: none is lost, doubled or out of its flow's order.

A packet is its flow's number and a count. Half of the flows are the other worker's; of these, half are handed back by
it for the last stage. The flow's worker checks that its counts rise by one, in memory that nobody else writes; what is
sent is checked again. No more packets are on their way than fit, so each must arrive.
"""

from __future__ import annotations

import os
import time

import pytest

from libfp import Pipeline, stage
from libfp.jit import (
    INTERPRETED,
    Arena,
    kernel,
    load8,
    load32,
    load64,
    load_acquire32,
    native,
    store8,
    store64,
    store_release32,
    u32,
    word,
)
from libfp.ports.memory import MemoryPort
from libfp.testing import wait_until

#: `make stress` has 10**8.
COUNT = int(os.environ.get("LIBFP_STRESS", 1_000_000))
CORES = sorted(os.sched_getaffinity(0))
pytestmark = [
    pytest.mark.stress,
    pytest.mark.timeout(180 + COUNT // 50_000),
    pytest.mark.skipif(INTERPRETED, reason="about compiled loops"),
    pytest.mark.skipif(len(CORES) < 2, reason="needs two cores"),
]

FLOWS, RING, AWAY = 16, 1024, 900  # AWAY: packets on their way, of each worker
FLOW, SEEN_BY, SEQUENCE = 14, 15, 16  # bytes of a packet


@native
class Flows:
    """For each flow of each worker's queue a line: its next count, how many were wrong."""

    at: word

    def see(self, data, worker):  # type: ignore[no-untyped-def]
        line = self.at + 64 * load8(data + FLOW)
        store64(line + 8, load64(line + 8) + int(load64(data + SEQUENCE) != load64(line)))
        store64(line, load64(data + SEQUENCE) + 1)
        store64(line + 16, load64(line + 16) | 1 << worker)


@stage
def meet(packet):  # type: ignore[no-untyped-def]
    packet.mark = load64(packet.data + SEQUENCE)
    packet.hand_off(load8(packet.data + FLOW) & 1)


@stage
def look(packet, flows):  # type: ignore[no-untyped-def]
    flows.see(packet.data, packet.worker)
    if load8(packet.data + FLOW) & 2 != 0:
        packet.hand_off(1 - packet.worker)


@stage
def end(packet):  # type: ignore[no-untyped-def]
    store8(packet.data + SEEN_BY, packet.worker)
    if packet.mark == load64(packet.data + SEQUENCE):
        packet.forward(0)


@kernel
def _pour(rx, fill, umem, state, queue, count):  # type: ignore[no-untyped-def]
    """Receive `count` packets of flows chosen at random; `rx` and `fill` are the addresses of producer, consumer,
    entries, `state` that of the dice and the flows' counts. How many there was room for."""
    for i in range(count):
        taken, put = load32(load64(fill + 8)), load32(load64(rx))
        if taken == load_acquire32(load64(fill)) or u32(put - load_acquire32(load64(rx + 8))) >= RING:
            return i
        frame = load64(load64(fill + 16) + 8 * (taken & (RING - 1)))
        dice = (load64(state) * 1103515245 + 12345) & 0x7FFFFFFF
        store64(state, dice)
        flow = (dice >> 16) % FLOWS + FLOWS * queue
        count_at = state + 8 + 8 * flow
        store8(umem + frame + FLOW, flow)
        store64(umem + frame + SEQUENCE, load64(count_at))
        store64(count_at, load64(count_at) + 1)
        desc = load64(rx + 16) + 16 * (put & (RING - 1))
        store64(desc, frame)
        store64(desc + 8, 60)
        store_release32(load64(fill + 8), u32(taken + 1))
        store_release32(load64(rx), u32(put + 1))
    return count


@kernel
def _collect(tx, completion, umem, state):  # type: ignore[no-untyped-def]
    """Take what was sent, give the frames back; how many. The word before the flows' counts counts what is wrong."""
    sent, put = load32(load64(tx + 8)), load32(load64(completion))
    n = 0
    while sent != load_acquire32(load64(tx)):
        frame = load64(load64(tx + 16) + 16 * (sent & (RING - 1)))
        flow, number = load8(umem + frame + FLOW), load64(umem + frame + SEQUENCE)
        last = (flow & 1) ^ int(flow & 2 != 0)
        count_at = state + 8 + 8 * flow
        store64(state, load64(state) + int(load64(count_at) != number or load8(umem + frame + SEEN_BY) != last))
        store64(count_at, number + 1)
        store64(load64(completion + 16) + 8 * (put & (RING - 1)), frame)
        sent, put, n = u32(sent + 1), u32(put + 1), n + 1
    store_release32(load64(tx + 8), sent)
    store_release32(load64(completion), put)
    return n


def test_two_workers_hand_each_other_packets():
    seen = Arena(64 * 2 * FLOWS)
    states = [[Arena(8 + 16 * FLOWS) for _ in range(2)] for _ in range(2)]  # poured, collected
    port = MemoryPort("wire", ring_size=RING)
    with Pipeline(meet, look(Flows(seen.address)), end).start([port], CORES[:2]) as app:
        ends = []
        for queue in (0, 1):
            arena = Arena(4 * 24)
            for k, ring in enumerate(port.wires[queue].rings):  # rx, tx, fill, completion
                for j, value in enumerate((ring.producer, ring.consumer, ring.descs)):
                    store64(arena.address + 24 * k + 8 * j, value)
            ends.append(arena)
        frames = [worker.state.frames.address for worker in app.workers]
        poured, collected, moved = [0, 0], [0, 0], time.monotonic()
        while sum(collected) < COUNT:
            before = sum(collected)
            for queue in (0, 1):
                at, (given, taken) = ends[queue].address, states[queue]
                room = min(AWAY - (poured[queue] - collected[queue]), COUNT // 2 - poured[queue])
                poured[queue] += _pour(at, at + 48, frames[queue], given.address, queue, room)
                collected[queue] += _collect(at + 24, at + 72, frames[queue], taken.address)
            if sum(collected) != before:
                moved = time.monotonic()
            else:
                assert time.monotonic() < moved + 20, (poured, collected, app.counters.as_dict())
                os.sched_yield()
        assert [taken.words[0] for _, taken in states] == [0, 0]
        for given, taken in states:
            assert given.words[1:].tolist() == taken.words[1:].tolist(), "each flow arrived whole"
        lines = seen.words.reshape(-1, 8)
        assert lines[:, 1].tolist() == [0] * 2 * FLOWS, "in order where the flow lives"
        assert lines[:, 2].tolist() == [1, 2] * FLOWS, "and nowhere else"
        wait_until(lambda: all(worker.state.member.lent == 0 for worker in app.workers))
        assert app.counters.dropped == app.counters.punted == 0
        assert sum(worker["handed_off"] for worker in app.counters.workers) > COUNT // 2
