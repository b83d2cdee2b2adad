"""Workers as processes with nothing but their own and the declared pages: they forward, and who shares dies of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from libfp import Pipeline, stage
from libfp.errors import BadInput, Error
from libfp.jit import BOUNDSCHECK, INTERPRETED, Arena, load16be, load64, native, store64, word
from libfp.ports.memory import MemoryPort
from libfp.stages import by_flow
from libfp.tables import Hash
from libfp.testing import udp, wait_until
from libfp.testing.isolation import IsolatedApplication, without

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(INTERPRETED or BOUNDSCHECK, reason="about compiled code as it is"),
]

CORES = sorted(os.sched_getaffinity(0))[:2]
HONEST, WRITES_UNDECLARED, READS_PYTHONS, READS_DECLARED, WRITES_DECLARED = range(5)


@native
class Places:
    undeclared: word
    pythons: word
    declared: word


@stage
def read(packet, blocked):  # type: ignore[no-untyped-def]
    packet.mark = load16be(packet.data + 36)  # the destination port
    if packet.mark in blocked:
        packet.drop("denied")


@stage
def do(packet, places):  # type: ignore[no-untyped-def]
    what = packet.mark
    if what == WRITES_UNDECLARED:
        store64(places.undeclared, load64(places.undeclared) + 1)
    if what == READS_PYTHONS:
        packet.mark = load64(places.pythons)
    if what == READS_DECLARED:
        packet.mark = load64(places.declared)
    if what == WRITES_DECLARED:
        store64(places.declared, 1)
    packet.forward(1 - packet.port)


class Bed:
    """What workers could share: a counter as careless code would have it, an array of Python's, a declared page."""

    def __init__(self) -> None:
        self.undeclared, self.declared, self.array = Arena(64), Arena(64), np.zeros(1 << 16, np.int64)
        self.blocked = Hash(key="u64", capacity=64)
        places = Places(self.undeclared.address, self.array.ctypes.data, self.declared.address)
        self.pipeline = Pipeline(read(self.blocked), do(places))


@pytest.fixture(scope="module")
def bed() -> Bed:
    return Bed()


@pytest.fixture
def start(bed: Bed) -> Iterator[Callable[[], IsolatedApplication]]:
    with ExitStack() as undo:
        ports = [MemoryPort("a", ring_size=64), MemoryPort("b", ring_size=64)]
        yield lambda: undo.enter_context(
            IsolatedApplication(bed.pipeline, ports, CORES, declared=[bed.declared]).start()
        )


def send(app: IsolatedApplication, what: int, worker: int) -> None:
    assert app.ports[0].inject([udp(dport=what, payload=b"x" * 32)], worker)


def test_each_forwards_by_its_own_and_follows_the_control_plane(
    bed: Bed, start: Callable[[], IsolatedApplication]
) -> None:
    app = start()
    pids = {worker.process for worker in app.workers}  # type: ignore[attr-defined]
    assert len(pids | {os.getpid()}) == len(CORES) + 1, "each is a process of its own"
    for worker in range(len(CORES)):
        send(app, HONEST, worker)
        send(app, READS_DECLARED, worker)
    wait_until(lambda: app.counters.forwarded == 2 * len(CORES), what="forwarded")
    bed.blocked[HONEST] = 1
    try:
        wait_until(lambda: all(one.state.replicas.acknowledged() for one in app.workers), what="the change everywhere")
        for worker in range(len(CORES)):
            send(app, HONEST, worker)
        wait_until(lambda: app.counters["denied"] == len(CORES), what="denied")
    finally:
        bed.blocked.clear()
    app.workers[0].restart()
    send(app, HONEST, 0)
    wait_until(lambda: app.counters.forwarded == 2 * len(CORES) + 1, what="forwarded after a restart")
    app.stop()
    assert [worker.error for worker in app.workers] == [None] * len(CORES), "their loops have ended, no more"


@pytest.mark.skipif(len(CORES) < 2, reason="two workers")
@pytest.mark.parametrize("what", [WRITES_UNDECLARED, READS_PYTHONS, WRITES_DECLARED])
def test_what_is_not_declared_ends_the_worker_that_touches_it_and_no_other(
    start: Callable[[], IsolatedApplication], what: int
) -> None:
    app = start()
    send(app, what, 1)
    with pytest.raises(Error, match=r"worker 1 failed: worker 1 \(process \d+\) touched memory .* \(SIGSEGV\)"):
        app.wait(20)
    send(app, HONEST, 0)
    wait_until(lambda: app.counters.forwarded == 1, what="the other forwards")


def test_hand_off_is_sharing() -> None:
    with pytest.raises(BadInput, match="no hand-off"):
        IsolatedApplication(Pipeline(by_flow), [MemoryPort()], CORES[:1])


def test_spans() -> None:
    assert list(without([(0, 10), (20, 30)], [(2, 3), (5, 22), (29, 40)])) == [(0, 2), (3, 5), (22, 29)]
    assert list(without([(0, 10)], [])) == [(0, 10)]
    assert list(without([(0, 10)], [(0, 10)])) == []
