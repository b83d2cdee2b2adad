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
from libfp.stages import Forward, Routes, by_flow, forward, parse
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
def do(packet, places):  # type: ignore[no-untyped-def]
    what = load16be(packet.data + 36)  # the destination port
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
        places = Places(self.undeclared.address, self.array.ctypes.data, self.declared.address)
        self.pipeline = Pipeline(do(places))


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


def test_the_routers_workers_need_what_is_their_own_and_declared_and_nothing_else() -> None:
    """Routes change meanwhile; and one worker starts anew. With a full table at full rate: bench scaling --isolated."""
    routes = Routes(routes=1000, next_hops=16)
    hop = routes.next_hops.add(Forward(1, b"\x02\0\0\0\0\2", b"\x02\0\0\0\0\1", 1500))
    routes.fib["198.51.100.0/24"] = hop
    ports = [MemoryPort("a", ring_size=64), MemoryPort("b", ring_size=64)]

    def each_forwards(app: IsolatedApplication, destination: str) -> None:
        before = app.counters.forwarded
        for worker in range(len(CORES)):
            assert ports[0].inject([udp(dst=destination)] * 3, worker)
        wait_until(lambda: app.counters.forwarded == before + 3 * len(CORES), what=f"packets to {destination}")
        assert {len(ports[1].collect(worker)) for worker in range(len(CORES))} == {3}

    with IsolatedApplication(Pipeline(parse, forward(routes)), ports, CORES).start() as app:
        pids = {worker.process for worker in app.workers}  # type: ignore[attr-defined]
        assert len(pids | {os.getpid()}) == len(CORES) + 1, "each is a process of its own"
        each_forwards(app, "198.51.100.7")
        assert hop in routes.next_hops.used()
        while routes.next_hops.used():  # the control plane's own word, which each of them reads
            pass
        routes.fib["203.0.113.0/24"] = hop
        wait_until(lambda: all(one.state.replicas.acknowledged() for one in app.workers), what="the route everywhere")
        each_forwards(app, "203.0.113.7")
        app.workers[0].restart()
        each_forwards(app, "203.0.113.8")
        assert hop in routes.next_hops.used()
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
