"""Workers stopped, started and added while the others forward; and one that a stage does not let go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from libfp.testing.instance import Instance
from libfp.testing.netns import Lab, wait_until
from libfp.testing.router import Crossroads
from libfp.testing.traffic import UdpStream, stream_by

CORES = sorted(os.sched_getaffinity(0))[:2]
pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")]

CLIENT, SERVER = Crossroads.CLIENT, Crossroads.SERVER
RATE = 1000  # datagrams a second
PAUSE = 64  # packets that a change of a queue's owner may cost that queue


@pytest.fixture(scope="module")
def net() -> Iterator[Crossroads]:
    with Lab() as lab:
        net = Crossroads(lab, 2)
        assert net.client.ping(SERVER).received == 3
        yield net


@pytest.fixture
def router(net: Crossroads) -> Iterator[Callable[..., Instance]]:
    """Start the router of `libfp.testing.faulty` on these cores."""
    with contextlib.ExitStack() as undo:

        def begin(*cores: int, kick: str = "inline") -> Instance:
            name, on = f"workers-{os.getpid()}", ",".join(map(str, cores))
            return Instance.faulty(net.router, undo, name, list(net.PORTS), on, {"kick": kick}, prefer="nothing")

        yield begin


def received(router: Instance, worker: int) -> int:
    return router.counters.workers[worker]["received"]


def flow_through(net: Crossroads, router: Instance, worker: int) -> contextlib.AbstractContextManager[UdpStream]:
    """A stream that comes by the queue of this worker, which must have no other."""
    ends = (net.client, net.server, SERVER, RATE, 5100 + 32 * worker)
    return stream_by(lambda: received(router, worker), *ends)


def arrives(stream: UdpStream, datagrams: int = RATE // 2) -> None:
    before = stream.received
    wait_until(lambda: stream.received >= before + datagrams, what=f"{datagrams} datagrams more")


def grows(router: Instance, worker: int) -> None:
    before = received(router, worker)
    wait_until(lambda: received(router, worker) > before + 100, what=f"traffic of worker {worker}")


def test_a_worker_stops_and_starts_and_the_other_loses_nothing(
    net: Crossroads, router: Callable[..., Instance]
) -> None:
    app = router(*CORES)
    with flow_through(net, app, 0) as first, flow_through(net, app, 1) as second:
        for _ in range(3):
            assert app.tell("stop-worker 1") == {"ended": True}
            stopped = received(app, 1)
            arrives(second)  # by Linux
            grows(app, 0)
            assert received(app, 1) == stopped
            assert app.tell("start-worker 1") == {}
            grows(app, 1)
            arrives(first)
    assert first.result.lost == 0
    assert first.result.duplicates == second.result.duplicates == 0
    assert second.result.lost <= 6 * PAUSE


@pytest.mark.parametrize("kick", ["inline", "helper"])
def test_a_worker_is_added_while_another_forwards(net: Crossroads, router: Callable[..., Instance], kick: str) -> None:
    app = router(CORES[0], kick=kick)
    assert len(app.counters.workers) == 1
    with flow_through(net, app, 0) as first:
        for core, said in ((CORES[0], "has a worker already"), (4095, "no core 4095 for a worker")):
            answer = app.tell(f"add-worker {core}")
            assert answer["error"] == "BadInput"
            assert said in answer["said"]
        assert app.tell(f"add-worker {CORES[1]}") == {}
        assert len(app.counters.workers) == 2
        with flow_through(net, app, 1) as second:
            arrives(second)
            assert net.client.ping(SERVER, ttl=1, count=1).errors[0][:3] == (11, 0, "10.0.1.1"), "and punts"
            app.tell("stop")
            arrives(second)
            arrives(first)
    assert first.result.lost <= PAUSE, "when the application stopped"
    assert second.result.lost <= PAUSE


def test_more_workers_than_queues_are_refused(router: Callable[..., Instance]) -> None:
    with Lab() as lab, contextlib.ExitStack() as undo:
        net = Crossroads(lab)
        app = Instance.faulty(net.router, undo, f"one-queue-{os.getpid()}", ["r0", "r1"], CORES[0], {"kick": "inline"})
        answer = app.tell(f"add-worker {CORES[1]}")
        assert answer["error"] == "BadInput"
        assert answer["said"].startswith("r0 has 1 queues, too few for 2 workers; use at most 1 cores")
        wait_until(lambda: net.client.ping(SERVER).received)
        forwarded = app.counters.forwarded
        assert net.client.ping(SERVER).received == 3
        assert app.counters.forwarded == forwarded + 6
        assert app.tell("stop") == {}


def test_a_stage_that_does_not_return(net: Crossroads, router: Callable[..., Instance]) -> None:
    """Its worker is given up, Linux has its traffic, the other worker goes on; when it does return, it may start."""
    app = router(*CORES)
    with flow_through(net, app, 1) as first:
        app.tell("stall")
        wait_until(lambda: "worker 1 has stood still" in app.said)
        app.tell("calm")
        assert app.tell("stop-worker 1") == {"ended": False}
        assert "worker 1 has not come back from a stage" in app.said
        assert app.tell("stop-worker 1") == {"ended": False}
        arrives(first)  # by Linux
        with flow_through(net, app, 0) as second:
            arrives(second)
        assert second.result.lost == 0
        answer = app.tell("start-worker 1")
        assert answer["error"] == "Error"
        assert "worker 1 has not come back from a stage" in answer["said"]
        app.tell("go")
        wait_until(lambda: app.tell("stop-worker 1") == {"ended": True})
        assert app.tell("start-worker 1") == {}
        grows(app, 1)


def test_an_application_with_a_dead_worker_ends(net: Crossroads, router: Callable[..., Instance]) -> None:
    app = router(*CORES)
    with flow_through(net, app, 1) as stream:
        app.tell("stall")
        wait_until(lambda: "worker 1 has stood still" in app.said)
        app.tell("calm")
        assert app.tell("stop") == {}
        arrives(stream)
        assert app.process.stdin is not None
        app.process.stdin.close()
        assert app.process.wait(20) == 0
        arrives(stream)
    assert net.client.ping(SERVER).received == 3
