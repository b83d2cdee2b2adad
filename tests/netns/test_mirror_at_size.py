"""The mirror with a full table, and under fire: what it takes, and that nobody's packets suffer."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench.sync import Table, fill
from libfp import Linux, Pipeline
from libfp.apps.router.verify import verify as command
from libfp.linux import host as host_module
from libfp.linux import rtnetlink as rt
from libfp.linux.mirror import LIVE, Mirror
from libfp.linux.netlink import Netlink, attribute, request
from libfp.linux.verify import handler, verify
from libfp.stages import forward, parse
from libfp.stages.next_hops import Punt
from libfp.testing.netns import Lab, wait_until
from libfp.testing.plain_routes import PlainRoutes
from libfp.testing.router import Crossroads, RouterProcess
from libfp.testing.traffic import UdpStream

SERVER = Crossroads.SERVER
STEADY = "198.51.100.7"  # an address of the server, behind a route that does not change
RATE = 2000
GIGABYTE = 1e9


class Net(Crossroads):
    def __init__(self, lab: Lab, workers: int = 1) -> None:
        super().__init__(lab, workers)
        self.server.address("lo", f"{STEADY}/32")
        self.router.route("198.51.100.0/24", via=SERVER)
        self.link = self.router.index(self.PORTS[1])

    def flap(self, first: int, count: int) -> None:
        """Add and remove `count` routes as fast as the kernel goes."""
        rows = np.array([((100 << 24) + ((first + i) << 8), 0, 24) for i in range(count)])
        self.router.call(fill, rows, 32, [socket.inet_aton(SERVER)], self.link)
        self.router.call(self._withdraw, rows)

    @staticmethod
    def _withdraw(rows: np.ndarray) -> None:
        with Netlink() as netlink:
            for at in range(0, len(rows), 500):
                batch = b""
                for high, _, length in rows[at : at + 500].tolist():
                    body = struct.pack("=BBBBBBBBI", 2, length, 0, 0, 254, 0, 255, 0, 0) + attribute(
                        1, high.to_bytes(4, "big")
                    )
                    batch += request(rt.RTM_DELROUTE, 0, 0, body)
                netlink.socket.send(batch)


@pytest.fixture
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab, getattr(request, "param", 1))


@pytest.mark.parametrize("net", [1, 2], ids=["one", "two"], indirect=True)
@pytest.mark.timeout(120)
def test_overruns_under_load_lose_no_packet(
    net: Net, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A receive buffer of a few messages, and thousands of them: dump after dump, while a flow goes on untouched."""
    monkeypatch.setattr(host_module, "Mirror", functools.partial(Mirror, buffer=16384))
    with (
        net.router.enter(),
        Linux(*net.PORTS) as linux,
        Pipeline(parse, forward(linux)).start(linux.ports, net.cores, idle="park") as app,
    ):
        assert net.client.ping(STEADY, count=3).received == 3
        with UdpStream(net.client, net.server, STEADY, rate=RATE) as steady:
            wait_until(lambda: steady.received > 100, timeout=20)
            punted = app.counters.punted
            for turn in range(5):
                done, go = linux.mirror.resyncs, threading.Event()
                held = linux.mirror.submit(lambda: go.wait(20))  # noqa: B023 -- it hears nothing meanwhile
                net.flap(1000 * turn, 500)
                net.router.route(f"203.0.{turn}.0/24", via=SERVER)
                go.set()
                assert held.result(20)
                wait_until(lambda: linux.mirror.resyncs > done and linux.mirror.phase == LIVE, timeout=20)  # noqa: B023
            wait_until(lambda: steady.sent > 2 * RATE, timeout=20)
            steady.stop()
            assert steady.result.lost == 0
            assert app.counters.forwarded >= steady.result.offered, "by the fast path, not by Linux"
            assert app.counters.punted - punted < 20
        assert "Linux forwards alone" not in caplog.text
        linux.wait_synced()
        wait_until(lambda: linux.mirror.phase == LIVE)
        found = verify(linux.mirror)
        assert not found.differences, found.examples
        assert found.table_entries == len(linux.routes.fib)


def test_verify_names_what_differs(net: Net) -> None:
    with net.router.enter(), Linux(*net.PORTS) as linux:
        found = verify(linux.mirror)
        assert not found.differences, found.examples
        assert found.links == len(net.router.interfaces())
        assert found.ipv4_routes == len(linux.mirror.state.rib)

        def damage() -> None:
            state = linux.mirror.state
            prefix = rt.Prefix(int(ipaddress.IPv4Address("198.51.100.0")), 24)
            state.rib.remove(prefix, state.rib.routes[prefix][0])
            linux.routes.fib["203.0.113.0/24"] = linux.routes.next_hops.add(Punt("local"))
            del linux.routes.fib["10.0.1.0/24"]

        linux.mirror.call(damage)
        found = verify(linux.mirror)
        text = "\n".join(found.examples)
        for name in ("route 198.51.100.0/24", "entry 203.0.113.0/24", "entry 10.0.1.0/24", "entry 198.51.100.0/24"):
            assert name in text
        assert found.differences == 4, text


def test_verify_as_a_command(net: Net) -> None:
    """From another process's point of view: a question to the running instance, and its answer shown."""
    name = f"verified-{os.getpid()}"
    with (
        net.router.enter(),
        Linux(*net.PORTS) as linux,
        Pipeline(parse, forward(linux)).start(linux.ports, idle="park", name=name) as app,
    ):
        app.control.add("verify", handler(linux.mirror))
        shown = CliRunner().invoke(command, [name])
        assert shown.exit_code == 0, shown.output
        assert "no difference" in shown.output
        assert f" {len(linux.mirror.state.rib)} IPv4 routes" in shown.output
        linux.mirror.call(lambda: linux.routes.fib.__delitem__("10.0.1.0/24"))
        shown = CliRunner().invoke(command, [name, "--json"])
        assert shown.exit_code == 1
        found = json.loads(shown.output)
        assert found["differences"] == 1
        assert "10.0.1.0/24" in found["examples"][0]


def test_what_fails_in_the_mirror_s_thread_is_raised_at_the_caller(net: Net) -> None:
    with net.router.enter(), Linux(*net.PORTS) as linux:
        with pytest.raises(ZeroDivisionError):
            linux.mirror.call(lambda: 1 // 0)
        assert not verify(linux.mirror).differences


def test_longer_prefixes_come_first(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a large table is being written, a packet meets its own route or none: never a shorter one."""
    monkeypatch.setattr("libfp.linux.fib.CHUNK", 64)
    rows = np.array([((100 << 24) + (i << 12), 0, 20 + i % 5) for i in range(0, 1000, 2)])
    net.router.call(fill, rows, 32, [socket.inet_aton(SERVER)], net.link)
    rows = np.array([((100 << 24), 0, 8), (100 << 24, 0, 16), ((100 << 24) + (1 << 16), 0, 16)])
    net.router.call(fill, rows, 32, [socket.inet_aton(Crossroads.OTHER)], net.router.index(net.PORTS[2]))
    routes, lengths = PlainRoutes(), list[int]()
    real = routes.fib.apply

    def apply(addresses: Any, given: Any, values: Any) -> None:
        lengths.extend(given)
        real(addresses, given, values)

    monkeypatch.setattr(routes.fib, "apply", apply)
    mirror = net.router.call(Mirror, routes, {net.router.index(name): i for i, name in enumerate(net.PORTS)})
    try:
        net.router.call(mirror.start)
        mirror.wait_synced(20)
        assert len(lengths) > 500
        assert lengths == sorted(lengths, reverse=True)
    finally:
        mirror.close()


class Gate:
    """Holds the mirror between two steps of its first synchronisation; `step` lets it take one."""

    def __init__(self) -> None:
        self.held, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def progress(self, what: str, done: int, total: int) -> None:
        if 0 < done < total:
            self.held.release()
            assert self._go.acquire(timeout=30)

    def step(self) -> None:
        self._go.release()
        assert self.held.acquire(timeout=30)

    def close(self) -> None:
        """Hold it no longer."""
        self._go.release(1000)


LATER, SHORT = "203.0.113.7", "192.0.0.0/3"  # an address of the server, and a prefix that holds STEADY, too


@pytest.mark.parametrize("net", [1, 2], ids=["one", "two"], indirect=True)
def test_packets_are_forwarded_from_the_first_route_on(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two steps: by the fast path where the tables have the route, else by Linux, and none is lost."""
    monkeypatch.setattr("libfp.linux.fib.CHUNK", 8)
    monkeypatch.setattr("libfp.linux.fib.LARGEST", 1)
    net.server.address("lo", f"{LATER}/32")
    net.router.route(SHORT, via=SERVER)
    for number in range(20):
        net.router.route(f"100.64.{number}.0/26", via=Crossroads.OTHER)
        net.router.route(f"101.{number}.0.0/16", via=Crossroads.OTHER)
    gate = Gate()
    with (
        net.router.enter(),
        Linux(*net.PORTS, progress=gate.progress, wait=False) as linux,
        Pipeline(parse, forward(linux)).start(linux.ports, net.cores, idle="park") as app,
        contextlib.closing(gate),
    ):
        linux.wait_forwarding(30)
        assert gate.held.acquire(timeout=30)
        while "198.51.100.0/24" not in linux.routes.fib:
            assert net.client.ping(LATER, count=2, interval=0.001).received == 2
            gate.step()
        assert not linux.synced
        assert SHORT not in linux.routes.fib
        with pytest.raises(TimeoutError):
            linux.wait_synced(0.01)

        def sent(address: str) -> tuple[int, int]:
            """What became of ten requests, and their answers: forwarded, via Linux."""
            before = app.counters
            assert net.client.ping(address, count=10, interval=0.001).received == 10
            after = app.counters
            return after.forwarded - before.forwarded, after.punts["via-linux"] - before.punts["via-linux"]

        assert sent(STEADY) == (20, 0)
        assert sent(LATER) == (10, 10)
        net.router.netlink("rule", "add", iifname="r0", table=100, priority=100)
        gate.step()
        assert not linux.synced
        assert linux.mirror.suspended, "a policy that appears has the last word"
        assert sent(STEADY) == (0, 0)
        net.router.netlink("rule", "del", iifname="r0", table=100, priority=100)
        gate.close()
        linux.wait_synced(30)
        assert sent(STEADY) == sent(LATER) == (20, 0)
        assert not verify(linux.mirror).differences


@pytest.mark.timeout(240)
def test_full_table(data: Path) -> None:
    """Every route of a full table, IPv4 and IPv6, forwarded by one worker in a process of less than a gigabyte.

    A second worker would have a replica of all tables: the promise is made for one.
    """
    with Lab() as lab:
        table = Table(lab)
        high, _, _ = table.rows[32][0].tolist()
        behind = str(ipaddress.IPv4Address(high + 1))  # by the first gateway, which is the server
        table.server.address("lo", f"{behind}/32")
        with (
            UdpStream(table.client, table.server, behind, rate=500) as steady,
            RouterProcess(table.host, "r0", "r1", wait=False) as router,
        ):
            wait_until(lambda: router.forwarding or router.process.poll() is not None, 60)
            early = 0
            while not router.ready and router.process.poll() is None:
                early = router.counters().forwarded
            router.wait_ready()
            assert router.ready["routes"] >= table.count()
            assert 0 < router.forwarding["routes"] < router.ready["routes"]
            assert early > 100, "the fast path forwards before it has all routes"
            with open(f"/proc/{router.process.pid}/status") as status:
                resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024
            assert resident < GIGABYTE
            forwarded, sent = router.counters().forwarded, steady.sent
            wait_until(lambda: steady.sent > sent + 500, timeout=10)
            assert router.counters().forwarded - forwarded > 400
            steady.stop()
            assert steady.result.lost <= steady.result.offered * 0.01, "Linux forwards until the table is whole"
