"""`fp router verify` beside a running `fp router`, from another process, and what a router says of its progress."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from bench.sync import fill
from libfp.testing.netns import Lab
from libfp.testing.router import Crossroads, RouterProcess

pytestmark = pytest.mark.timeout(120)

SERVER = Crossroads.SERVER


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Crossroads]:
    with Lab() as lab:
        net = Crossroads(lab, workers)
        net.router.route("198.51.100.0/24", via=SERVER)
        yield net


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "libfp", "router", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_verify_compares_a_running_router_with_the_kernel(net: Crossroads) -> None:
    with RouterProcess(net.router, *net.PORTS, *net.options) as router:
        name = router.ready["name"]
        found = verify(name)
        assert found.returncode == 0, found.stderr
        assert "no difference" in found.stdout
        told = json.loads(verify(name, "--json").stdout)
        assert told["differences"] == 0
        assert told["links"] == len(net.router.interfaces())
        assert told["ipv4_routes"] >= 10
        unknown = verify("nobody")
        assert unknown.returncode == 2
        assert "nobody" in unknown.stderr


DAMAGED = """
import libfp.linux.verify as verify
from libfp.cli import main
real = verify.handler
def handler(mirror):
    mirror.call(lambda: mirror.fib.publisher.families[32].table.__delitem__("198.51.100.0/24"))
    return real(mirror)
verify.handler = handler
raise SystemExit(main())
"""


def test_verify_names_an_entry_that_is_missing(net: Crossroads) -> None:
    """A router that has lost a route from its tables behind its own back."""
    with RouterProcess(net.router, *net.PORTS, *net.options, command=(sys.executable, "-c", DAMAGED)) as router:
        found = verify(router.ready["name"])
        assert found.returncode == 1, found.stderr
        assert "198.51.100.0/24" in found.stdout
        assert "1 differences" in found.stdout
        assert router.process.poll() is None
        assert router.stop(signal.SIGTERM) == 0


def test_help_names_both() -> None:
    for arguments, text in ((["--help"], "fp router verify"), (["verify", "--help"], "Usage: fp router verify")):
        command = [sys.executable, "-m", "libfp", "router", *arguments]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert text in shown


def test_progress_in_a_log_is_a_few_lines(net: Crossroads) -> None:
    rows = np.array([((100 << 24) + (i << 8), 0, 24) for i in range(120_000)])
    net.router.call(fill, rows, 32, [socket.inet_aton(SERVER)], net.router.index("r1"))
    with RouterProcess(net.router, *net.PORTS, *net.options) as router:
        router.wait_said("of 120,0")
        lines = [line for line in router.said().splitlines() if "routes" in line]
        assert any("routes are in the tables" in line for line in lines)
        assert len(lines) < 12
