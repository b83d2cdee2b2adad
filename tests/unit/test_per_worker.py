"""What each worker has of its own: kept over its stops and restarts, called once a turn, gone at the end."""

from __future__ import annotations

import os
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.engine.replicas import Replicas
from libfp.jit import INTERPRETED, Arena, load64, native, store64, word
from libfp.ports.memory import MemoryPort
from libfp.stages import parse
from libfp.tables import Flow, PerWorker
from libfp.testing import udp, wait_until

CORES = sorted(os.sched_getaffinity(0))


@native
class Tally:
    """A word that counts packets, and one that counts turns."""

    at: word

    def add(self) -> None:
        store64(self.at, load64(self.at) + 1)

    def each_turn(self) -> int:
        store64(self.at + 8, load64(self.at + 8) + 1)
        return 0


class TallyPart:
    def __init__(self, worker: int) -> None:
        self.worker, self.arena = worker, Arena(16)
        self.view = Tally(self.arena.address)
        self.closed = False

    @property
    def packets(self) -> int:
        return load64(self.arena.address)

    @property
    def turns(self) -> int:
        return load64(self.arena.address + 8)

    def close(self) -> None:
        self.closed = True
        self.arena.close()


class Tallies(PerWorker[TallyPart]):
    def make(self, worker: int) -> TallyPart:
        return TallyPart(worker)


class Broken(PerWorker[Any]):
    def make(self, worker: int) -> Any:
        raise MemoryError("no room")


@stage
def tally(packet: Any, tallies: Any, flows: Any) -> None:
    tallies.add()
    flow = flows.enter(packet)
    if flow.new:
        packet.drop("new")
    else:
        packet.drop("known")


@pytest.mark.skipif(INTERPRETED, reason="about compiled loops")
@pytest.mark.skipif(len(CORES) < 2, reason="two workers")
def test_state_belongs_to_the_worker() -> None:
    tallies, flows = Tallies(), Flow(capacity=64, value=None, timeouts=[3600], capacity6=0)
    port = MemoryPort("a")
    with Pipeline(parse, tally(tallies, flows)).start([port], CORES[:1]) as app:
        [one] = tallies.parts
        wait_until(lambda: one.turns > 10)  # without any packet
        port.inject([udp(), udp(sport=7)])
        wait_until(lambda: app.counters["new"] == 2)
        assert (one.worker, one.packets, len(flows.parts[0])) == (0, 2, 2)
        app.workers[0].restart()
        port.inject([udp(), udp(sport=7)])
        wait_until(lambda: app.counters["known"] == 2)
        assert tallies.parts == [one]
        assert (one.packets, len(flows)) == (4, 2)
        app.add_worker(CORES[1])
        assert [part.worker for part in tallies.parts] == [part.worker for part in flows.parts] == [0, 1]
        port.inject([udp()], 1)
        wait_until(lambda: app.counters["new"] == 3)
        two = tallies.parts[1]
        assert (one.packets, two.packets, [len(part) for part in flows.parts]) == (4, 1, [2, 1])
        flows.parts[1].pass_time(3601)  # races with its worker, which reads the word: late by a turn at most
        wait_until(lambda: len(flows.parts[1]) == 0)  # ages without packets
        assert [len(part) for part in flows.parts] == [2, 0]
    assert tallies.parts == flows.parts == []
    assert one.closed
    assert two.closed
    assert (flows.counts.created, flows.counts.expired) == (3, 1)


def test_each_pipeline_has_its_own() -> None:
    tallies = Tallies()
    one, two = Replicas([tallies]), Replicas([tallies, tallies], worker=1)
    assert [part.worker for part in tallies.parts] == [0, 1]
    assert one.view(tallies) is tallies.parts[0].view
    assert two.view(tallies) is tallies.parts[1].view
    one.close()
    assert [part.worker for part in tallies.parts] == [1]
    two.close()
    assert tallies.parts == []


def test_what_was_made_goes_when_the_next_fails() -> None:
    tallies = Tallies()
    with pytest.raises(MemoryError):
        Replicas([tallies, Broken()])
    assert tallies.parts == []
