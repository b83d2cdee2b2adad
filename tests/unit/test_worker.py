"""Workers on memory ports: the loop that drives real interfaces, with Python at the other end of its rings."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from libfp import BadInput, Error
from libfp.engine import Application
from libfp.engine.stats import instances
from libfp.engine.worker import Worker
from libfp.jit import INTERPRETED, load_acquire64, store_release64
from libfp.ports.memory import MemoryPort
from libfp.testing import udp, wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(INTERPRETED, reason="about compiled loops"),
]  # compiling takes long on a busy machine

CORES = sorted(os.sched_getaffinity(0))
NAME = f"test-worker-{os.getpid()}"
CHILD = NAME + "-child"


class Watched(MemoryPort):
    """A memory port that remembers what it was told."""

    owner: Any = None

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.told: list[tuple[str, int]] = []

    def take(self, queue: int) -> None:
        self.told.append(("take", queue))

    def leave(self, queue: int) -> None:
        self.told.append(("leave", queue))

    def close(self) -> None:
        self.told.append(("close", -1))


class SlowPath:
    """An owner of ports: has the punt rings while the application runs."""

    def __init__(self) -> None:
        self.rings: list[Any] = []

    def started(self, rings: list[Any]) -> None:
        self.rings += rings

    def stopped(self) -> None:
        self.rings = []


def two(**options: Any) -> list[Watched]:
    return [Watched("a", **options), Watched("b", **options)]


@pytest.fixture
def start(probe: SimpleNamespace) -> Iterator[Callable[..., Application]]:
    """Start the pipeline of `probe` on some ports; it is stopped after the test."""
    started: list[Application] = []

    def begin(ports: list[Any], cores: list[int] | None = None, **options: Any) -> Application:
        app = probe.pipeline.start(ports, cores, **{"name": NAME, **options})
        started.append(app)
        return app

    yield begin
    store_release64(probe.gate.address, 0)
    for app in started:
        app.stop()


def pass_through(app: Application, port: Any, packets: list[bytes], queue: int = 0) -> None:
    """Inject all packets, as fast as the worker makes room, and wait until it has received them."""
    before, rest = app.counters.received, packets
    while rest:
        rest = rest[len(port.inject(rest, queue)) :]
    wait_until(lambda: app.counters.received == before + len(packets), what="all packets received")


def take_turns(app: Application) -> None:
    """Wait until the workers have looked at every ring again."""
    beats = [worker.heartbeat for worker in app.workers]
    wait_until(lambda: all(w.heartbeat > b + 2 for w, b in zip(app.workers, beats, strict=True)))


def collect(app: Application, port: Any, queue: int = 0) -> list[bytes]:
    """What a port has sent; the worker has its frames back."""
    sent = port.collect(queue)
    take_turns(app)
    return sent


def test_it_carries_traffic(start: Any, actions: SimpleNamespace) -> None:
    ports = two()
    app = start(ports)
    forwarded = [udp(k.to_bytes(2, "big"), dport=actions.TO_FORWARD) for k in range(500)]
    others = [udp(dport=n) for n in (actions.TO_DROP, actions.TO_CONSUME, actions.BY_HELPER, actions.UNNAMED)]
    pass_through(app, ports[0], forwarded + others)
    wait_until(lambda: app.counters.forwarded == 500)
    assert ports[1].collect() == forwarded
    counters = app.counters
    assert (counters["denied"], counters["by-a-helper"], counters["other"], counters.consumed) == (1, 1, 1, 1)
    assert counters.drops == {"denied": 1, "by-a-helper": 1, "other": 1}
    assert (counters.received, counters.dropped, counters.punted) == (504, 3, 0)
    received = sum(map(len, forwarded + others))
    assert (counters.ports["a"]["rx_packets"], counters.ports["a"]["rx_bytes"]) == (504, received)
    assert (counters.ports["b"]["tx_packets"], counters.ports["b"]["tx_bytes"]) == (500, sum(map(len, forwarded)))
    assert sum(one["syscalls"] for one in counters.workers) == 0
    with pytest.raises(KeyError):
        counters["no such reason"]
    assert counters["blocked"] == 0


def test_every_mixture_of_verdicts_in_a_burst(start: Any, actions: SimpleNamespace) -> None:
    """Bursts that leave whole by one port or by two, or partly, or by a port that does not exist: each takes another
    way through the loop, and in all of them every packet goes where it should, in order, and every frame comes back."""
    ports = two(ring_size=256)
    app = start(ports)
    kinds = [actions.TO_FORWARD, actions.TO_FIRST, actions.TO_NO_PORT, actions.TO_DROP, actions.MARKED]
    sent = Counter[int]()
    for used in range(1, 1 << len(kinds)):
        chosen = [kind for bit, kind in enumerate(kinds) if used >> bit & 1]
        packets = [udp(k.to_bytes(2, "big"), dport=chosen[k * 7 % 5 % len(chosen)]) for k in range(130)]
        pass_through(app, ports[0], packets)
        sent.update(chosen[k * 7 % 5 % len(chosen)] for k in range(130))
        wait_until(lambda: app.counters.forwarded == sent[actions.TO_FORWARD] + sent[actions.TO_FIRST])
        for port, action in ((ports[1], actions.TO_FORWARD), (ports[0], actions.TO_FIRST)):
            expected = [packet for packet in packets if packet[36:38] == action.to_bytes(2, "big")]
            assert collect(app, port) == expected
    counters = app.counters
    assert counters["bad-port"] == sent[actions.TO_NO_PORT]
    assert counters["denied"] == sent[actions.TO_DROP]
    assert counters["undecided"] + counters["punt-rate"] == sent[actions.MARKED]
    assert counters.received == sent.total()


@pytest.mark.parametrize("first_index", [0, (1 << 32) - 3, (1 << 31) - 5])
@pytest.mark.parametrize("ring_size", [64, 1024])
def test_ring_indexes_wrap(start: Any, actions: SimpleNamespace, first_index: int, ring_size: int) -> None:
    ports = two(ring_size=ring_size, first_index=first_index)
    app = start(ports)
    for batch in range(12):
        packets = [udp(bytes([batch, k]), dport=actions.TO_FORWARD) for k in range(50)]
        pass_through(app, ports[0], packets)
        wait_until(lambda batch=batch: app.counters.forwarded == 50 * (batch + 1))  # type: ignore[misc]
        assert collect(app, ports[1]) == packets
    assert app.counters.dropped == 0


@pytest.mark.parametrize("ring_size", [16, 64, 256])
def test_a_full_port_drops_and_recovers(start: Any, actions: SimpleNamespace, ring_size: int) -> None:
    """Nobody takes what is sent: as much as the ring holds waits there, the rest is counted, no frame is lost."""
    ports = two(ring_size=ring_size)
    app = start(ports)
    for _ in range(3):
        packets = [udp(k.to_bytes(2, "big"), dport=actions.TO_FORWARD) for k in range(2 * ring_size + 70)]
        before = app.counters["tx-full"]
        pass_through(app, ports[0], packets)
        wait_until(lambda: app.counters["tx-full"] - before >= ring_size + 70)  # noqa: B023
        sent = collect(app, ports[1])
        assert sent == packets[: len(sent)]
        assert len(sent) + app.counters["tx-full"] - before == len(packets)
        assert len(sent) >= ring_size - 1, "all of the ring is used"
    assert app.counters.ports["b"]["tx_full"] == app.counters["tx-full"]
    pass_through(app, ports[0], [udp(dport=actions.TO_DROP)] * (8 * ring_size))


def test_frames_are_enough_for_rings_that_are_all_full(start: Any, actions: SimpleNamespace) -> None:
    """While both ports' tx rings are full and nobody collects, both still receive."""
    ports = two(ring_size=64)
    app = start(ports)
    for port in ports:
        for action in (actions.TO_FORWARD, actions.TO_FIRST):
            pass_through(app, port, [udp(dport=action)] * 200)
    for port in ports:
        pass_through(app, port, [udp(dport=actions.TO_DROP)] * 200)
    assert app.counters["denied"] == 400


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_two_workers(start: Any, probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    ports = two()
    app = start(ports, CORES[:2])
    for queue in (0, 1):
        packets = [udp(bytes([queue, k]), dport=actions.TO_FORWARD) for k in range(100)]
        pass_through(app, ports[0], packets, queue)
        wait_until(lambda queue=queue: app.counters.forwarded == 100 * (queue + 1))  # type: ignore[misc]
        assert ports[1].collect(queue) == packets, "queue i belongs to worker i"
        assert ports[1].collect(1 - queue) == []
    assert [worker.core for worker in app.workers] == CORES[:2]
    threads = [one["thread"] for one in app.counters.workers]
    assert [os.sched_getaffinity(thread) for thread in threads] == [{CORES[0]}, {CORES[1]}]
    probe.blocked["10.9.8.7"] = True
    try:
        for worker in app.workers:
            worker.state.replicas.flush()
        take_turns(app)
        for queue in (0, 1):
            pass_through(app, ports[0], [udp(src="10.9.8.7")] * 5, queue)
        assert app.counters["blocked"] == 10, "each worker has its own copy of the change"
    finally:
        del probe.blocked["10.9.8.7"]


def test_start_stop_restart(start: Any, probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    ports = two()
    app = start(ports)
    worker = app.workers[0]
    assert ports[0].told == [("take", 0)]
    worker.start()
    assert ports[0].told == [("take", 0)], "starting a running worker does nothing"
    worker.stop()
    worker.stop()
    assert not worker.running
    assert ports[0].told == ports[1].told == [("take", 0), ("leave", 0)]
    probe.blocked["10.9.8.6"] = True
    try:
        worker.start()
        assert worker.running
        pass_through(app, ports[0], [udp(src="10.9.8.6"), udp(dport=actions.TO_FORWARD)])
        assert app.counters["blocked"] == 1, "what changed while it stood is known when it starts"
        first = app.counters.workers[0]["thread"]
        worker.restart()
        assert app.counters.workers[0]["thread"] != first
    finally:
        del probe.blocked["10.9.8.6"]
    app.stop()
    app.stop()
    assert ports[0].told == [("take", 0), ("leave", 0)] * 3 + [("close", -1)] * ports[0].told.count(("close", -1))
    assert ("close", -1) in ports[0].told
    assert NAME not in instances()


def test_what_has_arrived_is_finished_before_the_end(start: Any, actions: SimpleNamespace) -> None:
    ports = two()
    app = start(ports)
    ports[0].inject([udp(dport=actions.TO_FORWARD)] * 900)
    app.workers[0].stop()
    assert app.counters.forwarded == 900
    assert len(ports[1].collect()) == 900


def test_a_stalled_worker_loses_its_traffic_until_it_moves(
    start: Any, probe: SimpleNamespace, actions: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    ports = two()
    app = start(ports)
    with caplog.at_level(logging.WARNING, "libfp"):
        store_release64(probe.gate.address, 1)
        ports[0].inject([udp(dport=actions.STALL)])
        wait_until(lambda: ("leave", 0) in ports[0].told)
        beat = app.workers[0].heartbeat
        assert ports[1].told == [("take", 0), ("leave", 0)]
        assert app.workers[0].running
        store_release64(probe.gate.address, 0)
        wait_until(lambda: ports[1].told == [("take", 0), ("leave", 0), ("take", 0)])
        assert app.workers[0].heartbeat > beat
    said = [record.getMessage() for record in caplog.records]
    assert any("has stood still for" in one and "Linux takes its traffic" in one for one in said)
    assert any("moves again" in one for one in said)
    pass_through(app, ports[0], [udp(dport=actions.TO_DROP)])
    assert app.counters["waited"] == 1


def stall(app: Application, probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    """Have worker 0 stand in a stage."""
    stood = load_acquire64(probe.gate.address + 64)
    store_release64(probe.gate.address, 1)
    app.ports[0].inject([udp(dport=actions.STALL)])
    wait_until(lambda: load_acquire64(probe.gate.address + 64) > stood)


def test_a_worker_that_does_not_come_back(
    start: Any, probe: SimpleNamespace, actions: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    app = start(two())
    worker = app.workers[0]
    stall(app, probe, actions)
    assert not worker.stop(timeout=0.05)
    assert worker.dead
    assert ("leave", 0) in app.ports[0].told
    for again in (worker.start, worker.restart):
        with pytest.raises(Error, match="worker 0 has not come back from a stage"):
            again()
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR] == [
        "worker 0 has not come back from a stage; look for the loop in it that never ends: its traffic stays with Linux"
    ]
    store_release64(probe.gate.address, 0)
    wait_until(lambda: not worker.running)
    assert not worker.dead
    worker.start()
    pass_through(app, app.ports[0], [udp(dport=actions.TO_DROP)])
    assert worker.stop()
    assert worker.parked, "nobody stays awake for it"


def test_what_a_dead_worker_may_use_outlives_the_application(
    start: Any, probe: SimpleNamespace, actions: SimpleNamespace
) -> None:
    ports = two()
    app = start(ports)
    worker = app.workers[0]
    reader = app.taps.open(count=64, snap=0)
    wait_until(lambda: worker.state.memory.tapped == worker.state.memory.wanted)
    stall(app, probe, actions)
    app.stop()
    assert worker.running
    assert NAME not in instances()
    assert ("close", -1) in ports[0].told
    store_release64(probe.gate.address, 0)
    wait_until(lambda: not worker.running)  # through all that it writes to after a stage
    assert worker.error is None
    assert reader.memory[0].fd >= 0


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_worker_is_added(start: Any, actions: SimpleNamespace) -> None:
    ports = two()
    ports[0].owner = SlowPath()
    app = start(ports, CORES[:1])
    for core, message in ((CORES[0], "has a worker already"), (4095, "no core 4095 for a worker")):
        with pytest.raises(BadInput, match=message):
            app.add_worker(core)
    beat = app.workers[0].heartbeat
    added = app.add_worker(CORES[1])
    assert app.workers[1:] == [added]
    assert (added.number, added.core, app.cores) == (1, CORES[1], CORES[:2])
    assert ports[0].told == [("take", 0), ("take", 1)]
    for queue in (0, 1):
        packets = [udp(bytes([queue, k]), dport=actions.TO_FORWARD) for k in range(100)]
        pass_through(app, ports[0], packets, queue)
        wait_until(lambda queue=queue: app.counters.forwarded == 100 * (queue + 1))  # type: ignore[misc]
        assert collect(app, ports[1], queue) == packets
    assert app.workers[0].heartbeat > beat
    assert [one["received"] for one in app.counters.workers] == [100, 100]
    pass_through(app, ports[0], [udp(dport=actions.TO_PUNT)], 1)
    wait_until(lambda: app.counters.punted == 1)
    assert len(taken(ports[0].owner.rings[1])) == 1
    app.stop()
    with pytest.raises(Error, match="does not run"):
        app.add_worker(CORES[1])


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_worker_that_cannot_be_added(start: Any, actions: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that does not open, and a thread that does not start: as if nobody had asked."""
    app = start(two(), CORES[:1])
    monkeypatch.setattr(Watched, "open_all", staticmethod(Unopenable.open_all))
    with pytest.raises(Error, match="the second queue cannot be opened"):
        app.add_worker(CORES[1])
    monkeypatch.undo()
    monkeypatch.setattr(Worker, "start", lambda self: (_ for _ in ()).throw(Error("it does not start")))
    with pytest.raises(Error, match="it does not start"):
        app.add_worker(CORES[1])
    monkeypatch.undo()
    assert (len(app.workers), app.cores, len(app.counters.workers)) == (1, CORES[:1], 1)
    pass_through(app, app.ports[0], [udp(dport=actions.TO_DROP)])
    assert app.add_worker(CORES[1]).running


def test_a_stopped_worker_does_not_come_back_by_itself(start: Any) -> None:
    ports = two()
    app = start(ports)
    app.workers[0].stop()
    told = list(ports[0].told)
    for _ in range(3):
        app.workers[0].watch()
    assert ports[0].told == told


def punts(start: Any, packets: list[bytes], **options: Any) -> tuple[Application, Any]:
    ports = two(**options)
    ports[0].owner = SlowPath()
    app = start(ports)
    pass_through(app, ports[0], packets)
    return app, ports[0].owner.rings[0]


def taken(ring: Any) -> list[tuple[int, bytes]]:
    found = []
    while (one := ring.take()) is not None:
        found.append(one)
    return found


def test_punts_reach_the_slow_path_unchanged(start: Any, actions: SimpleNamespace) -> None:
    sent = [udp(bytes(k), dport=actions.TO_PUNT) for k in range(50)]
    app, ring = punts(start, sent)
    wait_until(lambda: app.counters.punted == 50)
    assert taken(ring) == [(0, packet) for packet in sent]
    app_port_1 = [udp(b"other", dport=actions.TO_PUNT)]
    pass_through(app, app.ports[1], app_port_1)
    wait_until(lambda: app.counters.punts == {"ask-linux": 51})
    assert taken(ring) == [(1, app_port_1[0])], "with the port it came by"


def test_what_no_stage_decides_goes_to_linux(start: Any) -> None:
    app, ring = punts(start, [udp()])
    wait_until(lambda: app.counters.punts == {"undecided": 1})
    assert len(taken(ring)) == 1


def test_punts_are_limited_by_reason(start: Any, actions: SimpleNamespace) -> None:
    """A burst of a tenth of a second's worth goes through, then 1000 a second; the rest is counted, and dropped."""
    app, ring = punts(start, [udp(dport=actions.TO_PUNT)] * 2000)
    wait_until(lambda: app.counters.punted + app.counters.dropped == 2000)
    counters = app.counters
    assert counters["punt-rate"] == counters.dropped > 0
    assert counters.punts["ask-linux"] >= 100
    assert len(taken(ring)) == counters.punted
    pass_through(app, app.ports[0], [udp()] * 50)
    wait_until(lambda: app.counters.punts.get("undecided") == 50), "another reason has its own limit"


def test_a_full_punt_ring_drops_and_counts(start: Any, actions: SimpleNamespace) -> None:
    app, ring = punts(start, [udp(k.to_bytes(2, "big"), dport=actions.UNLIMITED) for k in range(900)])
    wait_until(lambda: app.counters.punted + app.counters.dropped == 900)
    assert app.counters.punts == {"via-linux": 512}, "no limit but the ring"
    assert app.counters["punt-ring-full"] == 388
    assert [frame[42:44] for _, frame in taken(ring)] == [k.to_bytes(2, "big") for k in range(512)]
    pass_through(app, app.ports[0], [udp(dport=actions.UNLIMITED)])
    wait_until(lambda: len(taken(ring)) == 1)


def test_wait_ends_with_stop(start: Any) -> None:
    app = start(two())
    waiter = threading.Thread(target=app.wait)
    waiter.start()
    app.stop()
    waiter.join(5)
    assert not waiter.is_alive()


def test_wait_for_a_while(start: Any) -> None:
    app = start(two())
    assert app.wait(0.01), "it runs on"
    assert app.workers[0].running
    app.stop()
    assert not app.wait(5)


def test_wait_tells_of_a_failed_worker(start: Any) -> None:
    app = start(two())
    app.workers[0].error = ValueError("broken")
    with pytest.raises(Error, match="worker 0 failed: broken"):
        app.wait(5)


def test_a_worker_that_cannot_begin(start: Any) -> None:
    app = start(two())
    worker = app.workers[0]
    worker.stop()
    outside = Worker(0, 4095, worker.state, app.ports, worker._loop)
    with pytest.raises(Error, match="worker 0 on core 4095 failed"):
        outside.start()
    outside.stop()


class Unopenable(Watched):
    @staticmethod
    def open_all(ports: Any, queue: int, frames: Any) -> Any:
        MemoryPort.open_all(ports, queue, frames)
        raise Error("the second queue cannot be opened") if queue else BadInput("the first queue cannot be opened")


def test_nothing_is_left_when_ports_cannot_be_opened(probe: SimpleNamespace) -> None:
    ports = [Unopenable("a")]
    threads = threading.active_count()
    with pytest.raises(BadInput, match="the first queue"):
        probe.pipeline.start(ports, name=NAME)
    assert NAME not in instances()
    assert ports[0].told == [("close", -1)]
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("ports", "options", "message"),
    [
        ([], {}, "no ports"),
        ([MemoryPort("a"), Watched("b")], {}, r"several kinds in one pipeline \(MemoryPort, Watched\)"),
        ([MemoryPort("a")], {"cores": [4095]}, "no core 4095 for a worker; this process may use"),
        ([MemoryPort("a")], {"cores": [CORES[0], CORES[0]]}, "name a core twice"),
        ([MemoryPort("a")], {"cores": [-1]}, "no core -1"),
    ],
)
def test_arguments_are_checked(probe: SimpleNamespace, ports: Any, options: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        probe.pipeline.start(ports, name=NAME, **options)
    assert NAME not in instances()


CTRL_C = """
import sys, threading
from libfp import Pipeline
from libfp.ports.memory import MemoryPort
from libfp.stages import parse
from libfp.testing import wait_until

def tell():
    wait_until(lambda: len(app._ended._cond._waiters) == 2)  # the keeper, and this program
    print("running", flush=True)

with Pipeline(parse).start([MemoryPort("a")], name=sys.argv[1]) as app:
    threading.Thread(target=tell).start()
    while app.wait(60):
        pass
    print("waited", app.workers[0].running, flush=True)
print("left", app.workers[0].running, flush=True)
"""


def test_ctrl_c_ends_wait_and_everything() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n", child.stderr and child.stderr.read()
        assert CHILD in instances()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=90)
    finally:
        child.kill()
    assert (out, err, child.returncode) == ("waited True\nleft False\n", "", 0)
    assert CHILD not in instances()
