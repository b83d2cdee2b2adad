"""Hand-off: who sees a packet, who sends it, whose its frame is. First workers stepped by hand, in one thread."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.engine import Application, context
from libfp.engine.crew import Crew
from libfp.engine.handoff import LENT, MOST
from libfp.engine.slots import RingReader, Verdicts
from libfp.engine.state import WorkerState
from libfp.engine.stats import Counters
from libfp.jit import (
    INTERPRETED,
    Arena,
    load8,
    load16be,
    load32,
    load64,
    load_acquire64,
    native,
    pause,
    store8,
    store16be,
    store_release64,
    word,
)
from libfp.ports.memory import MemoryPort
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE
from libfp.testing import wait_until

pytestmark = pytest.mark.timeout(300)

PORTS, RING = 3, 256  # a burst for each port may come back in one turn
NOBODY = 99  # no such worker
# Bytes of a packet: from 14 on, to whom the first and the second stage hand it off (255: neither), and what becomes of
# it in the end; then who ran the three stages that write it down; then a number.
FIRST_TO, SECOND_TO, FATE, RAN, NUMBER = 14, 15, 16, 17, 20
DROPPED, PUNTED, CONSUMED, UNDECIDED, STALLING = 200, 201, 202, 203, 204  # of fates; others are ports


@stage
def before(packet: Any) -> None:
    store8(packet.data + RAN, 100 + packet.worker)
    packet.mark = load16be(packet.data + NUMBER)
    if load8(packet.data + FIRST_TO) != 255:
        packet.hand_off(load8(packet.data + FIRST_TO))


@stage
def between(packet: Any) -> None:
    store8(packet.data + RAN + 1, 100 + packet.worker)
    if load8(packet.data + FATE) == DROPPED:
        packet.drop("told-so")
    if load8(packet.data + SECOND_TO) != 255:
        packet.hand_off(load8(packet.data + SECOND_TO))


@native
class Gate:
    """A word at which packets wait until it is 0 again."""

    at: word

    def wait(self) -> None:
        while load_acquire64(self.at) != 0:
            pause()


@stage.burst
def after(burst: Any, gate: Gate) -> None:
    for i in range(burst.count):
        data = burst.data(i)
        store8(data + RAN + 2, 100 + burst.worker + 10 * burst.port)
        store16be(data + NUMBER + 2, burst.packet(i).mark)
        fate = load8(data + FATE)
        if fate == PUNTED:
            burst.punt(i, "via-linux")
        elif fate == CONSUMED:
            burst.packet(i).consume()
        elif fate == STALLING:
            gate.wait()
            burst.forward(i, 1)
        elif fate != UNDECIDED:
            burst.forward(i, fate)


def packet(first: int, second: int, fate: int, number: int, length: int = 60) -> bytes:
    return bytes(14) + bytes([first, second, fate, 0, 0, 0]) + number.to_bytes(2, "big") + bytes(length - 22)


class Bed:
    """Some workers of one crew over memory ports, each stepped by hand."""

    def __init__(self, pipeline: Pipeline, workers: int) -> None:
        self.pipeline, self.crew = pipeline, Crew(workers + 2)
        self.ports = [MemoryPort(f"m{n}", ring_size=RING) for n in range(PORTS)]
        self.step_of = pipeline.module().step
        self.states: list[WorkerState] = []
        self.statistics: list[Arena] = []
        for _ in range(workers):
            self.add()
        for state in self.states:
            self.member(state).takes(True)

    def add(self) -> WorkerState:
        self.statistics.append(Arena(1 << 16))
        state = WorkerState(
            self.pipeline,
            MemoryPort.open_all,
            self.ports,
            len(self.states),
            self.statistics[-1].address,
            punt=True,
            workers=2,
            crew=self.crew,
        )
        self.states.append(state)
        self.step(len(self.states) - 1)
        return state

    def member(self, state: WorkerState) -> Any:
        assert state.member is not None
        return state.member

    def step(self, worker: int) -> int:
        return int(self.step_of(*self.states[worker].direct_arguments()))

    def settle(self) -> None:
        """Step everybody until nobody has anything to do."""
        while sum(self.step(worker) for worker in range(len(self.states))):
            pass

    def counters(self, worker: int) -> Counters:
        description = {
            "ports": [port.name for port in self.ports],
            "reasons": self.pipeline.reasons.names,
            "worker_counters": context.WORKER_COUNTERS,
            "port_counters": COUNTER_NAMES,
            "first_port": context.FIRST_PORT,
            "port_stride": COUNTERS_SIZE,
        }
        return Counters(description, [self.statistics[worker].words.tolist()])

    def lent(self, worker: int) -> int:
        return int(self.member(self.states[worker]).lent)

    def frames(self, worker: int) -> int:
        """Those of a worker that are free or wait to be received into, once all that was sent has been collected."""
        filled = sum(
            (load32(wire.fill.producer) - load32(wire.fill.consumer)) & 0xFFFFFFFF
            for wire in (port.wires[worker] for port in self.ports)
        )
        return int(self.states[worker].frames.free.count) + filled

    def close(self) -> None:
        for state in self.states:
            state.close()
        self.crew.close()
        for one in self.statistics:
            one.close()


@pytest.fixture(scope="module")
def gate() -> Arena:
    return Arena(64)


@pytest.fixture(scope="module")
def pipeline(gate: Arena) -> Pipeline:
    return Pipeline(before, between, after(Gate(gate.address)))


@pytest.fixture
def bed(pipeline: Pipeline) -> Iterator[Bed]:
    one = Bed(pipeline, 2)
    yield one
    one.close()


def test_only_stages_that_can_hand_off_cost_something(pipeline: Pipeline) -> None:
    assert pipeline.hands_off == [0, 1]
    assert Pipeline(*pipeline.stages[2:]).hands_off == []


def test_the_borrower_computes_and_the_owner_sends(bed: Bed) -> None:
    sent = [packet(1, 255, 2, k) for k in range(40)]
    assert len(bed.ports[1].inject(sent, 0)) == 40
    bed.step(0)
    assert (bed.lent(0), [port.collect(0) for port in bed.ports]) == (40, [[], [], []])
    bed.step(1)
    assert bed.lent(0) == 40, "they are on their way back"
    bed.step(0)
    assert bed.lent(0) == 0
    assert [port.collect(1) for port in bed.ports] == [[], [], []], "a borrower sends nothing"
    out = bed.ports[2].collect(0)
    assert [one[NUMBER : NUMBER + 2] for one in out] == [one[NUMBER : NUMBER + 2] for one in sent], "in order"
    assert {bytes(one[RAN : RAN + 3]) for one in out} == {bytes([100, 101, 111])}, "and by port 1, which is that"
    assert all(one[NUMBER : NUMBER + 2] == one[NUMBER + 2 : NUMBER + 4] for one in out), "marks go along"
    owner, borrower = bed.counters(0), bed.counters(1)
    assert owner.workers[0]["handed_off"] == owner.workers[0]["returned"] == 40 == borrower.workers[0]["borrowed"]
    assert (owner.received, owner.forwarded, borrower.received, borrower.forwarded) == (40, 40, 0, 0)


def test_handed_to_itself_it_goes_on(bed: Bed) -> None:
    bed.ports[0].inject([packet(1, 1, 0, 7)], 1)
    bed.step(1)
    (out,) = bed.ports[0].collect(1)
    assert out[RAN : RAN + 3] == bytes([101, 101, 101])
    assert bed.counters(1).workers[0]["handed_off"] == 0


def test_every_way_through_with_every_fate(bed: Bed) -> None:
    """Bursts of all lengths and ports at once, some handed on by the borrower, even back to the owner; what becomes of
    each is right, and not a frame is lost or has two owners."""
    dice, number, all_frames = random.Random(5), 0, [bed.frames(0), bed.frames(1)]
    expected: list[dict[Any, int]] = [{}, {}]
    for length in [*range(1, 65, 3), 64, 64]:
        out: list[dict[int, list[bytes]]] = [{p: [] for p in range(PORTS)} for _ in range(2)]
        for worker in (0, 1):
            for port in range(PORTS):
                packets = []
                for _ in range(length):
                    fate = dice.choice([0, 1, 2, DROPPED, PUNTED, CONSUMED, UNDECIDED, 77])
                    first, second = dice.choice([255, 0, 1, NOBODY]), dice.choice([255, 0, 1, NOBODY])
                    packets.append(one := packet(first, second, fate, number & 0xFFFF, 60 + number % 40))
                    number += 1
                    middle = worker if first == 255 else first
                    last = middle if second == 255 else second
                    if first == NOBODY:
                        what: Any = "bad-worker"
                    elif fate == DROPPED:
                        what = "told-so"
                    elif second == NOBODY:
                        what = "bad-worker"
                    elif fate < PORTS:
                        trail, mark = bytes([100 + worker, 100 + middle, 100 + last + 10 * port]), one[NUMBER:][:2]
                        out[worker][fate].append(one[:RAN] + trail + mark + mark + one[NUMBER + 4 :])
                        continue
                    else:
                        what = {PUNTED: "via-linux", CONSUMED: "consumed", UNDECIDED: "undecided", 77: "bad-port"}[fate]
                    expected[worker][what] = expected[worker].get(what, 0) + 1
                assert len(bed.ports[port].inject(packets, worker)) == length
        bed.settle()
        for worker in (0, 1):
            for port in range(PORTS):
                assert sorted(bed.ports[port].collect(worker)) == sorted(out[worker][port])
            while bed.states[worker].punt_ring.take():  # type: ignore[union-attr]
                pass
    for worker in (0, 1):
        bed.step(worker)
        counters = bed.counters(worker)
        assert bed.lent(worker) == 0
        assert bed.frames(worker) == all_frames[worker], "every frame is there again"
        assert counters.consumed == expected[worker].pop("consumed")
        undecided = expected[worker].pop("undecided")
        assert counters["undecided"] + counters["punt-rate"] == undecided
        assert {reason: counters[reason] for reason in expected[worker]} == expected[worker]


def test_a_lane_that_is_full_is_a_drop_by_name_and_recovers(bed: Bed) -> None:
    """The borrower does not move: as many as it may have wait for it, in order."""
    given = 0
    while given < MOST + 300:
        given += len(bed.ports[0].inject([packet(1, 255, 1, given + k) for k in range(50)], 0))
        bed.step(0)
    assert (bed.lent(0), bed.counters(0)["hand-off-full"]) == (MOST, given - MOST)
    bed.ports[2].inject([packet(255, 255, 1, 5)], 0)
    bed.step(0)
    assert len(bed.ports[1].collect(0)) == 1, "its own go on"
    numbers = []
    while bed.step(0) + bed.step(1):
        numbers += [int.from_bytes(one[NUMBER : NUMBER + 2], "big") for one in bed.ports[1].collect(0)]
    assert numbers == list(range(MOST))
    assert bed.lent(0) == 0


def test_who_takes_no_packets_gets_none(bed: Bed) -> None:
    bed.member(bed.states[1]).takes(False)
    bed.ports[0].inject([packet(1, 255, 1, k) for k in range(9)] + [packet(2, 255, 1, 0)], 0)
    bed.step(0)
    assert (bed.counters(0)["bad-worker"], bed.lent(0)) == (10, 0)
    bed.member(bed.states[1]).takes(True)
    bed.ports[0].inject([packet(1, 255, 1, 0)], 0)
    bed.settle()
    assert len(bed.ports[1].collect(0)) == 1


def test_what_a_worker_has_not_looked_at_goes_back_when_it_has_ended(bed: Bed) -> None:
    frames = bed.frames(0)
    bed.ports[0].inject([packet(1, 255, 1, k) for k in range(30)], 0)
    bed.step(0)
    borrower = bed.member(bed.states[1])
    assert not borrower.is_quiet(borrower.beats())
    borrower.takes(False)
    borrower.give_up()
    bed.step(0)
    assert (bed.counters(0)["bad-worker"], bed.lent(0), bed.frames(0)) == (30, 0, frames)


def test_an_owner_that_starts_again_has_its_frames_and_sends_nothing_old(bed: Bed) -> None:
    frames = bed.frames(0)
    bed.ports[0].inject([packet(1, 255, 1, k) for k in range(30)], 0)
    bed.step(0)
    bed.step(1)
    owner = bed.member(bed.states[0])
    assert owner.lent == 30
    owner.recover()
    bed.step(0)
    assert (owner.lent, bed.ports[1].collect(0), bed.frames(0)) == (0, [], frames)
    assert bed.counters(0).workers[0]["returned"] == 30


def test_a_worker_joins(bed: Bed) -> None:
    third = bed.add()
    bed.ports[0].inject([packet(2, 255, 1, 1)], 0)
    bed.settle()
    assert bed.counters(0)["bad-worker"] == 1, "before it runs"
    bed.member(third).takes(True)
    bed.ports[0].inject([packet(2, 255, 1, 1)], 0)
    bed.ports[0].inject([packet(0, 1, 1, 1)], 2)
    bed.settle()
    assert bed.ports[1].collect(0)[0][RAN : RAN + 3] == bytes([100, 102, 102])
    assert bed.ports[1].collect(2)[0][RAN : RAN + 3] == bytes([102, 100, 101])
    assert bed.crew.dismiss(bed.member(third))
    assert load64(bed.member(bed.states[0]).line(third.member) + LENT) == 0


def test_one_worker_alone(pipeline: Pipeline) -> None:
    told = [packet(to, 255, 1, 0) for to in (0, 255, 1, NOBODY)]
    assert pipeline.run_once(told) == ["forward", "forward", "drop bad-worker", "drop bad-worker"]


# Workers in threads.

CORES = sorted(os.sched_getaffinity(0))
threads = pytest.mark.skipif(INTERPRETED or len(CORES) < 2, reason="about compiled loops on two cores")


@pytest.fixture
def app(pipeline: Pipeline, gate: Arena) -> Iterator[Application]:
    ports = [MemoryPort(f"m{n}", ring_size=RING) for n in range(PORTS)]
    with pipeline.start(ports, CORES[:2], name=f"test-handoff-{os.getpid()}") as made:
        yield made
        store_release64(gate.address, 0)


def send(app: Application, packets: list[bytes], queue: int = 0) -> None:
    assert len(app.ports[0].inject(packets, queue)) == len(packets)


def arrive(app: Application, count: int, queue: int = 0) -> list[bytes]:
    """What port 1 sends, until it is so many."""
    sent: list[bytes] = []

    def look() -> bool:
        sent.extend(app.ports[1].collect(queue))
        return len(sent) >= count

    wait_until(look, what=f"{count} packets")
    assert len(sent) == count
    return sent


@threads
def test_two_workers(app: Application) -> None:
    send(app, [packet(1, 0, 1, k) for k in range(50)])
    send(app, [packet(255, 0, 1, k) for k in range(50)], 1)
    assert {one[RAN : RAN + 3] for one in arrive(app, 50)} == {bytes([100, 101, 100])}
    assert {one[RAN : RAN + 3] for one in arrive(app, 50, 1)} == {bytes([101, 101, 100])}

    def counters() -> list[tuple[int, int, int]]:
        return [(one["handed_off"], one["borrowed"], one["returned"]) for one in app.counters.workers]

    # to worker 0 from itself, too: by way of the other
    wait_until(lambda: counters() == [(100, 100, 100), (50, 50, 50)])


@threads
def test_a_borrower_stops_and_starts(app: Application) -> None:
    owner, borrower = app.workers
    send(app, [packet(1, 255, 1, k) for k in range(100)])
    assert borrower.stop()
    wait_until(lambda: app.counters.forwarded + app.counters["bad-worker"] == 100, what="each packet's end")
    arrived = app.counters.forwarded
    assert len(arrive(app, arrived)) == arrived
    send(app, [packet(1, 255, 1, k) for k in range(20)])
    wait_until(lambda: app.counters["bad-worker"] == 120 - arrived, what="drops by name")
    send(app, [packet(0, 255, 1, k) for k in range(20)])
    arrive(app, 20)
    borrower.start()
    send(app, [packet(1, 255, 1, k) for k in range(100)])
    arrive(app, 100)
    wait_until(lambda: owner.state.member.lent == 0)


@threads
def test_an_owner_stops_when_its_frames_are_back(app: Application) -> None:
    send(app, [packet(1, 255, 1, k) for k in range(100)])
    assert app.workers[0].stop()
    assert app.workers[0].state.member.lent == 0  # type: ignore[union-attr]
    arrive(app, 100)


@threads
def test_a_borrower_that_does_not_come_back(app: Application, gate: Arena) -> None:
    """The owner goes on; what the borrower has is lent until it comes back, and then sent after all."""
    owner, borrower = app.workers
    store_release64(gate.address, 1)
    send(app, [packet(1, 255, STALLING, 0)] * 10)
    wait_until(lambda: app.counters.workers[1]["borrowed"] > 0)
    wait_until(lambda: owner.state.member.lent == 10)  # type: ignore[union-attr]
    assert not borrower.stop(timeout=0.05)
    assert borrower.dead
    send(app, [packet(1, 255, 1, 0)] * 5 + [packet(0, 255, 1, 1)] * 5)
    arrive(app, 5)
    wait_until(lambda: app.counters["bad-worker"] == 5)
    assert owner.state.member.lent == 10  # type: ignore[union-attr]
    store_release64(gate.address, 0)
    wait_until(lambda: not borrower.running)
    assert borrower.stop()
    wait_until(lambda: app.counters.forwarded + app.counters["bad-worker"] == 20, what="each packet's end")
    arrive(app, app.counters.forwarded - 5)
    borrower.start()
    send(app, [packet(1, 255, 1, 0)] * 5)
    arrive(app, 5)


@threads
def test_frames_that_a_dead_worker_has_outlive_the_application(pipeline: Pipeline, gate: Arena) -> None:
    ports = [MemoryPort(f"m{n}", ring_size=RING) for n in range(PORTS)]
    app = pipeline.start(ports, CORES[:2], name=f"test-handoff-{os.getpid()}")
    borrower = app.workers[1]
    store_release64(gate.address, 1)
    send(app, [packet(1, 255, STALLING, 0)] * 10)
    wait_until(lambda: app.counters.workers[1]["borrowed"] > 0)
    app.stop()
    assert borrower.running
    store_release64(gate.address, 0)
    wait_until(lambda: not borrower.running)  # it has read and written those frames
    assert borrower.error is None


@threads
def test_a_worker_is_added(pipeline: Pipeline) -> None:
    ports = [MemoryPort(f"m{n}", ring_size=RING) for n in range(PORTS)]
    with pipeline.start(ports, CORES[:1], name=f"test-handoff-{os.getpid()}") as app:
        send(app, [packet(1, 255, 1, 0)] * 5)
        wait_until(lambda: app.counters["bad-worker"] == 5)
        app.add_worker(CORES[1])
        send(app, [packet(1, 255, 1, 0)] * 5)
        assert {one[RAN : RAN + 3] for one in arrive(app, 5)} == {bytes([100, 101, 101])}


@threads
def test_a_tap_shows_a_packet_where_it_arrived_and_where_it_went_on(app: Application) -> None:
    rings = app.taps.open(count=64, snap=60)
    wait_until(lambda: all(worker.state.memory.tapped == worker.state.memory.wanted for worker in app.workers))
    send(app, [packet(1, 255, 1, 1), packet(1, 255, DROPPED, 2), packet(0, 255, 1, 3), packet(1, 255, UNDECIDED, 4)])
    arrive(app, 2)
    wait_until(lambda: app.counters["undecided"] == 1)
    readers = [
        RingReader(one.map.buffer, slots=64, stages=3, snap=60, verdicts=Verdicts(app.pipeline.reasons.verdicts))
        for one in rings.memory
    ]
    first, second = ([*reader.read()] for reader in readers)
    shown = [(one.first, str(one.verdict), len(one.stages), one.data[NUMBER + 1]) for one in first]
    assert shown == [
        *((0, "hand-off to worker 1", 1, 1), (0, "hand-off to worker 1", 1, 2)),
        *((0, "forward", 3, 3), (0, "hand-off to worker 1", 1, 4)),
    ]
    shown = [(one.first, str(one.verdict), len(one.stages), one.data[NUMBER + 1]) for one in second]
    assert shown == [(1, "forward", 2, 1), (1, "drop told-so", 1, 2), (1, "pass", 2, 4)]
    assert [one.mark for one in second] == [1, 2, 4]
    app.taps.close(rings)
