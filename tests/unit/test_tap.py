"""Taps on running workers: what is seen, what it costs nobody, and what is left when the reader goes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from libfp.engine import Application
from libfp.engine.control import connect
from libfp.engine.listen import Listener, Stopwatch
from libfp.engine.slots import Record
from libfp.errors import BadInput, TableFull
from libfp.jit import INTERPRETED, load_acquire64, store_release64
from libfp.ports.memory import MemoryPort
from libfp.testing import udp, wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(INTERPRETED, reason="about compiled loops"),
]

NAME = f"test-tap-{os.getpid()}"


@pytest.fixture
def app(probe: SimpleNamespace) -> Iterator[Application]:
    store_release64(probe.gate.address, 0)
    with probe.pipeline.start([MemoryPort("a"), MemoryPort("b")], name=NAME) as app:
        yield app
        store_release64(probe.gate.address, 0)


@pytest.fixture
def listen(app: Application) -> Iterator[Callable[..., Listener]]:
    opened: list[Listener] = []

    def begin(snap: int = 128, slots: int = 256) -> Listener:
        opened.append(Listener(connect(NAME), snap=snap, slots=slots))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


def send(app: Application, packets: list[bytes], port: int = 0) -> None:
    before, rest = app.counters.received, packets
    while rest:
        rest = rest[len(app.ports[port].inject(rest)) :]
        for one in app.ports:
            one.collect()
    wait_until(lambda: app.counters.received == before + len(packets), what="all packets received")


def take(listener: Listener, count: int) -> list[Record]:
    found: list[Record] = []
    wait_until(lambda: len(found.extend(r for ring in listener.rings for r in ring.read()) or found) >= count)
    return found


def tapped(app: Application) -> bool:
    return any(worker.state.memory.tapped for worker in app.workers)


def test_each_packet_with_what_every_stage_did_and_what_became_of_it(
    app: Application, listen: Any, actions: SimpleNamespace
) -> None:
    listener = listen()
    packets = [
        udp(dport=actions.TO_DROP, payload=b"first"),
        udp(dport=actions.TO_FORWARD, payload=b"second"),
        udp(dport=actions.LATER, payload=b"third"),
        udp(dport=actions.TO_PUNT),
        udp(dport=actions.TO_CONSUME),
        udp(dport=actions.MARKED, sport=77),
        udp(dport=actions.TO_NO_PORT),
        b"short",
    ]
    send(app, packets)
    found = take(listener, len(packets))
    assert [record.data for record in found] == packets, "as they came, in order"
    assert [str(record.verdict) for record in found] == [
        "drop denied", "forward", "forward", "punt ask-linux", "consume", "pass", "drop bad-port",
        "drop ethernet-truncated",
    ]  # fmt: skip
    assert listener.stages == ["parse", "act", "tell", "last"]
    first, second, third, *_, marked, no_port, short = found
    assert [str(verdict) for _, verdict in first.stages] == ["pass", "drop denied"]
    assert [str(verdict) for _, verdict in third.stages] == ["pass", "pass", "pass", "forward"]
    assert [str(verdict) for _, verdict in no_port.stages] == ["pass", "forward"], "then there was no such port"
    assert [kind for kind, _ in second.stages] == [4, 4]
    assert [str(verdict) for _, verdict in short.stages] == ["drop ethernet-truncated"]
    assert (second.out, second.verdict.port) == (packets[1], 1)
    assert third.out[12:] == packets[2][12:], "the stage `tell` has changed the MAC address"
    assert third.out[6:12] != packets[2][6:12]
    assert marked.mark == 77
    assert {record.port for record in found} == {0}
    assert listener.dropped == 0


def test_a_burst_that_is_forwarded_whole_is_seen_too(app: Application, listen: Any, actions: SimpleNamespace) -> None:
    listener = listen(snap=60)
    packets = [udp(dport=actions.TO_FORWARD, payload=b"x" * 100 + bytes([i])) for i in range(64)]
    send(app, packets, port=1)
    found = take(listener, 64)
    assert [record.data for record in found] == [packet[:60] for packet in packets], "cut"
    assert {(record.length, record.length_out, record.port) for record in found} == {(len(packets[0]),) * 2 + (1,)}
    assert len({listener.time_ns(record) for record in found}) <= 64


def test_a_reader_that_is_too_slow_loses_whole_bursts_and_nobody_else_does(
    app: Application, listen: Any, actions: SimpleNamespace
) -> None:
    slow, other = listen(slots=64), listen(slots=1024)
    packets = [udp(dport=actions.TO_DROP, payload=bytes([i])) for i in range(200)]
    send(app, packets)
    assert [r.data for r in take(other, 200)] == packets
    seen = take(slow, 1)
    assert len(seen) + slow.dropped == 200
    assert [record.data for record in seen] == packets[: len(seen)]
    assert slow.dropped > 0
    assert app.counters["denied"] == 200


def test_readers_come_and_go_while_packets_pass(app: Application, actions: SimpleNamespace) -> None:
    """No packet is lost to it, and no reader sees a packet that is not one."""
    done, seen = threading.Event(), Counter[str]()
    sent = [udp(dport=actions.TO_FORWARD if i % 3 else actions.TO_DROP, payload=bytes([i])) for i in range(60)]
    known = set(sent)

    def come_and_go() -> None:
        while not done.is_set():
            with Listener(connect(NAME), snap=256, slots=64) as listener:
                for _, record in listener.records(0.01):
                    seen["right" if record.data in known else "wrong"] += 1
                    assert str(record.verdict) in ("forward", "drop denied")

    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        send(app, sent)
    done.set()
    for thread in threads:
        thread.join()
    assert seen["right"] > 0
    assert seen["wrong"] == 0
    assert app.counters.received == 6000
    assert app.counters["denied"] + app.counters.forwarded == 6000
    wait_until(lambda: not tapped(app), what="the tap closed")


def test_a_reader_that_is_killed_closes_the_tap(app: Application) -> None:
    code = (
        "import time; from libfp.engine.control import connect; from libfp.engine.listen import Listener\n"
        f"tap = Listener(connect({NAME!r}), snap=64, slots=64); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert tapped(app)
        child.kill()
    wait_until(lambda: not tapped(app), what="the tap closed")


def test_the_tap_of_a_worker_that_stands_still_is_kept_until_it_moves(
    app: Application, listen: Any, probe: SimpleNamespace, actions: SimpleNamespace
) -> None:
    listener = listen()
    store_release64(probe.gate.address, 1)
    stood = load_acquire64(probe.gate.address + 64)
    app.ports[0].inject([udp(dport=actions.STALL)])
    wait_until(lambda: load_acquire64(probe.gate.address + 64) > stood, what="the worker to stand")
    listener.close()
    wait_until(lambda: app.workers[0].state.memory.wanted == 0, what="the tap to be closed")
    assert tapped(app), "it is in the middle of a burst"
    store_release64(probe.gate.address, 0)
    wait_until(lambda: app.counters["waited"] == 1)
    wait_until(lambda: not tapped(app))
    again = listen()
    send(app, [udp(dport=actions.TO_DROP)])
    assert str(take(again, 1)[0].verdict) == "drop denied"


def test_a_punt_that_is_over_its_rate_is_told(app: Application, listen: Any, actions: SimpleNamespace) -> None:
    listener = listen(slots=1024)
    send(app, [udp(dport=actions.TO_PUNT)] * 300)
    found = take(listener, 300)
    assert {str(record.verdict) for record in found} == {"punt ask-linux"}
    assert sum(record.lost == "punt-rate" for record in found) == app.counters["punt-rate"] > 0


def test_the_time_of_every_stage_while_somebody_asks(app: Application, actions: SimpleNamespace) -> None:
    with connect(NAME) as one, connect(NAME) as two:
        watch, other = Stopwatch(one), Stopwatch(two)
        send(app, [udp(dport=actions.TO_DROP)] * 100 + [udp(dport=actions.LATER)] * 50)
        wait_until(lambda: not app.ports[0].wires[0].frames.free.count < 0)
        lap = watch.lap()
        other.close()
        watch.close()
    packets = {row["stage"]: row["packets"] for row in lap["stages"]}
    assert packets == {"parse": 150, "act": 150, "tell": 50, "last": 50, "carry out": 150}
    assert all(row["ns"] > 0 for row in lap["stages"])
    assert 0 < lap["bursts"] <= 150
    wait_until(lambda: not tapped(app), what="the clock stopped")
    parts = {row["part"]: row["ns"] for row in lap["parts"]}
    around = ["counters", "mailbox", "receive", "parse", "act", "tell", "last", "carry out", "transmit", "recycle"]
    assert list(parts) == around, "in the order of the walk; nothing is handed off, and memory ports need no calls"
    assert lap["packets"] == 150
    assert lap["idle_ns"] > 0
    whole = lap["burst_ns"] * lap["bursts"]
    inside = 150 * sum(parts[name] for name in ("parse", "act", "tell", "last", "carry out"))
    assert inside == pytest.approx(whole, rel=0.01), "no time is counted twice, and none is lost"


@pytest.mark.parametrize("asked", [{"slots": 63}, {"slots": 100}, {"slots": "x"}, {"snap": -1}, {"snap": 1 << 20}])
def test_what_cannot_be_opened_is_refused(app: Application, asked: dict[str, Any]) -> None:
    with connect(NAME) as instance, pytest.raises(BadInput):
        instance.ask("tap", **asked)
    assert not tapped(app)


def test_too_many_readers_are_refused(app: Application, listen: Any) -> None:
    for _ in range(8):
        listen(slots=64)
    with connect(NAME) as instance, pytest.raises(TableFull, match="8 traces and captures are open already"):
        instance.ask("tap")


def test_the_end_of_the_instance_ends_the_reader(app: Application, listen: Any) -> None:
    listener = listen()
    app.stop()
    assert list(listener.records(60)) == []
