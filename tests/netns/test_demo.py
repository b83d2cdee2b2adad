"""`fp demo` end to end: its numbers, and that nothing of it remains, however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from libfp.testing.netns import MARK, namespace_of, wait_until

COMMAND = [sys.executable, "-m", "libfp", "demo"]


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def marked_by(pid: int) -> list[int]:
    """Processes that the demo with this pid started and that still run."""
    mark = f"{MARK}={pid}:".encode()
    found = []
    for other in pids():
        try:
            with open(f"/proc/{other}/environ", "rb") as environ:
                data = environ.read()
        except OSError:
            continue
        if mark in data:
            found.append(other)
    return found


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@pytest.fixture
def nothing_left():
    """The links of this namespace are as before afterwards; the demo's own namespaces are checked by `is_gone`."""
    before = links()
    yield
    assert links() == before


def is_gone(demo: int, inodes: set[int | None] = frozenset()) -> bool:
    """No process of that demo runs, and none at all is in its namespaces (which have no other hold)."""
    return not marked_by(demo) and not {namespace_of(pid) for pid in pids()} & (inodes - {None})


@pytest.mark.timeout(180)
def test_demo_prints_one_json_object_with_what_was_measured(nothing_left):
    with subprocess.Popen(
        [*COMMAND, "--json", "--seconds", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        out, err = demo.communicate(timeout=150)
        assert demo.returncode == 0, err
        assert is_gone(demo.pid)
    result = json.loads(out.splitlines()[-1])
    assert result["ports"] == "veth", err
    assert result["ping_received"] == result["ping_sent"] == 5
    assert result["tcp_mbit_s"] > 0
    assert result["offered"] > 1000
    assert result["lost"] == result["offered"] - result["received"]
    assert result["lost"] < result["offered"] / 1000, result
    assert result["forwarded"] >= result["received"]
    assert result["punted"] > 0, "the ping with TTL 1 at least"
    assert result["drops"]["blackhole"] == 100
    assert 0 < result["mpps"] < 10
    assert result["zero_copy"] is False
    assert result["kick"] in ("inline", "helper")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_removes_everything(nothing_left, number):
    command = [*COMMAND, "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as demo:
        os.set_blocking(demo.stdout.fileno(), False)
        said = b""

        def measuring():
            nonlocal said
            said += demo.stdout.read() or b""
            return b"TCP:" in said or demo.poll() is not None

        wait_until(measuring, 60, "the demo to be in the middle of its traffic")
        assert demo.poll() is None, (said, demo.stderr.read())
        inodes = {namespace_of(pid) for pid in marked_by(demo.pid)}
        assert inodes - {namespace_of(os.getpid())}
        os.killpg(demo.pid, number)  # as a terminal does
        _, err = demo.communicate(timeout=30)
        assert demo.returncode == 130
        assert b"Traceback" not in err, err.decode()
        assert is_gone(demo.pid, inodes)


@pytest.mark.timeout(120)
def test_demo_without_its_capabilities_runs_over_memory_ports_and_says_why(nothing_left):
    """Root in name only, as in a container."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *COMMAND]
    done = subprocess.run([*powerless, "--json", "--seconds", "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ports"] == "memory"
    assert "CAP_NET_RAW" in result["reason"]
    assert result["reason"] in done.stderr
    assert result["lost"] == 0
