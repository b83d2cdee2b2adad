"""`fp router` between memif ports: forwards, and its worker makes no system call; `LIBFP_FULL=1`: it could not."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scapy.all import IP, UDP, Ether

from libfp.testing.instance import Instance
from libfp.testing.memif import MemifPeer
from libfp.testing.syscalls import count_syscalls
from libfp.testing.wait import wait_until

pytestmark = pytest.mark.timeout(300)  # it may compile

ROUTES = """
192.0.2.0/24 dev right
198.51.100.0/24 via 192.0.2.2 dev right mtu 9000
203.0.113.0/24 dev left
neigh 192.0.2.2 lladdr 02:aa:00:00:00:02 dev right
"""
PACKET = Ether(dst="02:00:00:00:00:00", src="02:bb:00:00:00:01") / IP(src="203.0.113.1", dst="198.51.100.7") / UDP()
SENT = bytes(PACKET / bytes(5000))
FORWARDED = bytes(
    Ether(dst="02:aa:00:00:00:02", src="02:00:00:00:00:01")
    / IP(src="203.0.113.1", dst="198.51.100.7", ttl=63)
    / UDP()
    / bytes(5000)
)


def here(undo: ExitStack) -> Any:
    """This host, for an `Instance`."""
    return SimpleNamespace(popen=lambda *command, **more: undo.enter_context(subprocess.Popen(*command, **more)))


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """The router's ports, with peers that come."""
    left, right = tmp_path / "left", f"@libfp-right-{os.getpid()}"
    (tmp_path / "routes").write_text(ROUTES)
    return [f"memif:{left},role=server,name=left", f"memif:{right},id=3,ring-size=512,name=right"]


def traffic(names: list[str], router: Instance, check: Callable[[], None]) -> None:
    """`check`, while packets pass from left to right."""
    sockets = [name.removeprefix("memif:").partition(",")[0] for name in names]
    end = threading.Event()
    with (
        MemifPeer("right", socket=sockets[1], id=3, role="server") as right,
        MemifPeer("left", socket=sockets[0], role="client") as left,
    ):
        left.wait()
        right.wait()

        def go_on() -> None:
            while not end.is_set():
                left.send([SENT] * 32)
                got.extend(right.receive())

        got: list[bytes] = []
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            wait_until(lambda: len(got) > 1000, 20, "packets")
            check()
        finally:
            end.set()
            thread.join()
    assert set(got) == {FORWARDED}


def no_call(router: Instance) -> None:
    counted = count_syscalls(router.worker["thread"], 1.0, lambda: router.counters)
    assert counted.calls == {}
    assert counted.after.forwarded - counted.before.forwarded > 1000
    assert counted.after.workers[0]["syscalls"] == 0


def test_fp_router_forwards_between_memifs_without_a_system_call(names: list[str], tmp_path: Path, core: int) -> None:
    with ExitStack() as undo:
        options = "--routes", str(tmp_path / "routes"), "--cores", str(core), "--profile"
        router = Instance.router(here(undo), undo, *names, *options, prefer="nothing")
        traffic(names, router, lambda: no_call(router))
        router.process.terminate()
        assert router.process.wait(10) == 0
        assert "forwarding between left, right" in router.said
        assert "no peer yet for left, right: it may come at any time" in router.said
        assert re.search(r"ns a packet, of [\d,]+ packets in bursts of .*\n.* counters +\d", router.said)
        assert not (tmp_path / "left").exists()


SEALED = """
import sys
from libfp import Pipeline
from libfp.cli.routes_file import RoutesFile
from libfp.ports.names import memif_ports
from libfp.stages import forward, parse

ports = memif_ports(sys.argv[1:3], queues=1)
routes = RoutesFile(sys.argv[3]).tables([port.name for port in ports])
app = Pipeline(parse, forward(routes)).start(ports, [int(sys.argv[4])], sealed=True, frame_size=16384)
print('{"name": "%s"}' % app.name, flush=True)
app.wait()
"""


@pytest.mark.skipif(not os.environ.get("LIBFP_FULL"), reason="compiles a loop of its own: only if LIBFP_FULL is set")
def test_a_sealed_worker_carries_memif_traffic(names: list[str], tmp_path: Path, core: int) -> None:
    with ExitStack() as undo:
        router = Instance(
            here(undo), undo, "-c", SEALED, *names, str(tmp_path / "routes"), str(core), prefer="nothing"
        )  # the kernel kills the thread at its first call

        def check() -> None:
            assert router.is_sealed()
            no_call(router)

        traffic(names, router, check)
        assert router.is_sealed()
