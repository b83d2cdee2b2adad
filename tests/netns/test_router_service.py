"""`fp router` as a service: a real NOTIFY_SOCKET, the watchdog, and SIGHUP while packets pass."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from libfp.testing.netns import Lab, wait_until
from libfp.testing.router import Crossroads, RouterProcess

pytestmark = pytest.mark.timeout(120)


class Manager:
    """What systemd does for a service of Type=notify: listen."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.heard: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "600000"}

    def _listen(self) -> None:
        while data := self._socket.recv(4096):
            self.heard += data.decode().split("\n")

    def wait_for(self, line: str, times: int = 1) -> None:
        wait_until(lambda: sum(one.startswith(line) for one in self.heard) >= times, 60, f"{line} {times} times")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Crossroads]:
    with Lab() as lab:
        yield Crossroads(lab, workers)


def config(net: Crossroads, name: str) -> str:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[-net.workers :]))
    return f'interfaces = ["r0", "r1", "r2"]\nname = "{name}"\nkick = "inline"\ncores = "{cores}"\n'


def test_a_service_from_its_start_to_its_end(net: Crossroads, manager: Manager, tmp_path: Path) -> None:
    path, name = tmp_path / "router.toml", f"service-{os.getpid()}"
    path.write_text(config(net, name))
    with RouterProcess(net.router, "--config", str(path), environment=manager.environment) as process:
        manager.wait_for("READY=1")
        assert (process.ready["name"], process.ready["kick"]) == (name, "inline")
        assert f"MAINPID={process.process.pid}" in manager.heard
        assert any(one.startswith("STATUS=forwarding between r0, r1, r2 on core") for one in manager.heard)
        manager.wait_for("WATCHDOG=1", 3)
        assert net.client.ping(net.SERVER).received == 3

        path.write_text(config(net, "other") + 'log = "debug"\nbypass = true\nidle = "spin"\n')
        process.process.send_signal(signal.SIGHUP)
        process.wait_said("configuration read again; changed: log, bypass")
        process.wait_said("changed in the configuration, but not without a restart: idle, name")
        manager.wait_for("RELOADING=1")
        manager.wait_for("MONOTONIC_USEC=")
        manager.wait_for("READY=1", 2)

        path.write_text("nonsense = 1\n")
        process.process.send_signal(signal.SIGHUP)
        process.wait_said(f"the configuration stays as it was: {path}, line 1: there is no 'nonsense'")
        manager.wait_for("READY=1", 3)
        assert net.client.ping(net.SERVER).received == 3

        assert process.stop() == 0
        wait_until(lambda: manager.heard[-1] == "STOPPING=1", what="the last word")


def test_the_command_line_goes_over_the_file(net: Crossroads, tmp_path: Path) -> None:
    path = tmp_path / "router.toml"
    path.write_text(config(net, "in-the-file"))
    name = f"given-{os.getpid()}"
    with RouterProcess(net.router, "r0", "r2", "--config", str(path), "--name", name) as process:
        assert process.ready["name"] == name
        assert process.ready["ports"] == ["r0", "r2"]


def test_policies_that_a_reload_lets_be_obeyed_again(net: Crossroads, tmp_path: Path) -> None:
    """`bypass` is on, off and on again while a policy rule is there."""
    path = tmp_path / "router.toml"
    text = config(net, f"bypass-{os.getpid()}")
    path.write_text(text + "bypass = true\n")
    net.router.netlink("rule", "add", iifname="r0", table=100, priority=100)
    try:
        with RouterProcess(net.router, "--config", str(path)) as process:
            assert net.client.ping(net.SERVER).received == 3
            forwarded = process.counters().forwarded
            assert forwarded > 0
            path.write_text(text)
            process.process.send_signal(signal.SIGHUP)
            process.wait_said("changed: bypass")
            before = process.counters().forwarded
            assert net.client.ping(net.SERVER).received == 3
            assert process.counters().forwarded == before, "Linux forwards alone"
            path.write_text(text + "bypass = true\n")
            process.process.send_signal(signal.SIGHUP)
            wait_until(lambda: process.said().count("changed: bypass") == 2, 20)
            assert net.client.ping(net.SERVER).received == 3
            assert process.counters().forwarded > before
    finally:
        net.router.netlink("rule", "del", iifname="r0", table=100, priority=100)
