"""The life of an `fp router`: it starts and stops under load, is interrupted, and leaves the host as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.engine.stats import instances
from libfp.testing.netns import Lab, wait_until
from libfp.testing.router import Crossroads, RouterProcess, footprint
from libfp.testing.traffic import UdpStream

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, OTHER = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.OTHER
RATE = 3000  # datagrams a second


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Crossroads]:
    with Lab() as lab:
        net = Crossroads(lab, workers)
        assert net.client.ping(SERVER).received == 3
        assert net.client.ping(OTHER).received == 3
        yield net


@pytest.fixture
def untouched(net: Crossroads) -> Iterator[None]:
    """After the test the host is as it was before: no program, no TAP, no feature changed; and Linux forwards."""
    before = footprint(net.router)
    yield
    assert footprint(net.router) == before
    assert net.client.ping(SERVER).received == 3


@pytest.mark.parametrize(("number", "options"), [(signal.SIGTERM, ()), (signal.SIGINT, ("--profile",))])
def test_started_and_ended_under_load(net: Crossroads, untouched: None, number: int, options: tuple[str, ...]) -> None:
    """Linux, then the fast path, then Linux: what is lost on the way is what a ring may hold, and then nothing."""
    with UdpStream(net.client, net.server, SERVER, rate=RATE) as stream:
        wait_until(lambda: stream.received > 100, timeout=20)
        with RouterProcess(net.router, *net.PORTS, *net.options, *options) as process:
            name = process.ready["name"]
            assert instances()[name][0] == process.process.pid
            wait_until(lambda: process.counters().forwarded > RATE // 2)
            assert process.stop(number) == 0
            assert process.end["forwarded"] > RATE // 2
            if options:
                check_profile(process)
        assert name not in instances()
        received = stream.received
        wait_until(lambda: stream.received > received + RATE // 2)
    assert stream.result.lost <= 32, "starting and ending, both"
    assert stream.result.duplicates == 0


def check_profile(process: RouterProcess) -> None:
    """What --profile has said: of every packet, for all parts that live traffic comes through."""
    told = process.profile
    assert RATE // 4 < told["packets"] <= process.end["forwarded"] + 32, "packets that Linux got are in it, too"
    parts = {row["part"]: row["ns"] for row in told["parts"]}
    assert set(parts) >= {"receive", "parse", "forward", "carry out", "transmit", "recycle", "system calls", "counters"}
    assert parts["system calls"] > parts["parse"] > 0, "on veth these are nearly all"
    assert told["idle_ns"] > 0
    assert "ns a packet, of" in process.said()
    assert "  system calls" in process.said()


STAGES = [
    "",  # whatever Python does first
    "reading Linux's",
    "compiling the pipeline",
    "kick: inline",
    "switched off",
    "copy mode",
    "forwarding between",
]


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_at_any_stage(net: Crossroads, untouched: None, stage: str) -> None:
    with RouterProcess(net.router, *net.PORTS, *net.options, "--kick", "inline", wait=False) as process:
        process.wait_said(stage)
        process.stop(signal.SIGINT, timeout=10)
        if stage:
            assert process.process.returncode in ((0, 130) if process.forwarding else (130,))
            assert process.end or "fp: interrupted" in process.said()
        assert process.process.pid not in {pid for pid, _ in instances().values()}


def test_interrupted_twice(net: Crossroads, untouched: None) -> None:
    """The impatient second Ctrl-C does not cut the clean-up short."""
    with RouterProcess(net.router, *net.PORTS, *net.options) as process:
        process.process.send_signal(signal.SIGINT)
        process.process.send_signal(signal.SIGINT)
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert process.end
        assert "Traceback" not in process.said()


def test_killed(net: Crossroads, untouched: None) -> None:
    """The kernel takes back everything but the ports' features, which the next start and end put right."""
    before = {name: programs for name, (programs, _) in footprint(net.router).items()}
    with RouterProcess(net.router, *net.PORTS, *net.options) as process:
        process.stop(signal.SIGKILL)
    wait_until(lambda: {name: programs for name, (programs, _) in footprint(net.router).items()} == before)
    assert process.process.pid not in {pid for pid, _ in instances().values()}
    for port in net.PORTS:
        for feature in ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"):
            net.router.call(switch_on, port, feature)


def switch_on(interface: str, feature: str) -> None:
    from libfp.pyxdp.ethtool import Ethtool

    with Ethtool(interface) as ethtool:
        if feature in ethtool.features():
            ethtool.set({feature: True})


def test_only_a_canary(net: Crossroads, untouched: None) -> None:
    only = ("--only", "10.0.3.0/24", "--only", "198.51.100.0/24")
    with RouterProcess(net.router, *net.PORTS, *net.options, *only) as process:
        assert net.client.ping(SERVER).received == 3
        assert process.counters().received == 0
        assert net.client.ping(OTHER).received == 3
        assert process.counters().received == 3, "requests only: the replies' destination is not in it"
        assert process.counters().forwarded >= 2, "the first may have been punted"


def test_options_and_events(net: Crossroads, untouched: None) -> None:
    """One worker has a helper; two that spin would leave none of two cores to it, and nobody else any."""
    cores = sorted(os.sched_getaffinity(0))[-net.workers :]
    kick, idle = ("helper", "spin") if net.workers == 1 else ("inline", "park")
    options = ["--cores", ",".join(map(str, cores)), "--kick", kick, "--idle", idle, "--name", f"test-{os.getpid()}"]
    with RouterProcess(net.router, "r0", "r1", *options) as process:
        expected: dict[str, Any] = {"name": f"test-{os.getpid()}", "ports": ["r0", "r1"], "cores": cores}
        assert expected.items() <= process.ready.items()
        assert process.ready["kick"] == kick
        assert net.client.ping(SERVER, count=10).received == 10
        counters = process.counters()
        assert counters.forwarded >= 18
        assert (sum(worker["syscalls"] for worker in counters.workers) == 0) == (kick == "helper"), "it makes them"
        assert process.stop() == 0
        assert process.end["forwarded"] >= counters.forwarded


def test_two_instances_on_ports_of_their_own(net: Crossroads, untouched: None) -> None:
    """Each forwards between its ports; what leaves by the other's goes via Linux."""
    with (
        RouterProcess(net.router, "r0", "r1", *net.options) as first,
        RouterProcess(net.router, "r2", *net.options) as second,
    ):
        for address in (SERVER, OTHER):
            assert net.client.ping(address, count=5).received == 5
        assert first.counters().forwarded >= 8
        assert first.counters()["via-linux"] >= 5
        assert second.counters()["via-linux"] >= 5
        told = {name: pid for name, (pid, _) in instances().items()}
        assert told[first.ready["name"]] == first.process.pid
        assert told[second.ready["name"]] == second.process.pid
