"""Statistics of running instances, read from inside, from outside, and after the process has gone."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys

import pytest

from libfp import AlreadyRunning, NoSuchInstance
from libfp.engine.stats import Counters, StatsPage, attach, instances
from libfp.testing import wait_until

pytestmark = pytest.mark.timeout(300)

NAME = f"test-stats-{os.getpid()}"
DESCRIPTION = {
    "ports": ["eth0", "eth1"],
    "reasons": [("drop", "other"), ("drop", "denied"), ("punt", "denied"), ("punt", "local")],
    "workers": 2,
    "worker_counters": ["heartbeat", "consumed"],
    "port_counters": ["rx_packets", "tx_packets"],
    "first_port": 64,
    "port_stride": 64,
}


@pytest.fixture
def page() -> StatsPage:
    made = StatsPage(NAME, DESCRIPTION)
    yield made  # type: ignore[misc]
    made.close()


def write(page: StatsPage, worker: int, offset: int, value: int) -> None:
    struct.pack_into("<Q", page.page, page.block_offset(worker) + offset, value)


def fill(page: StatsPage) -> None:
    """The same from both workers, the second ten times as much."""
    for worker, factor in ((0, 1), (1, 10)):
        write(page, worker, 8, 3 * factor)  # consumed
        write(page, worker, 64, 100 * factor)  # eth0: received
        write(page, worker, 64 + 64 + 8, 90 * factor)  # eth1: sent
        for number, value in enumerate((1, 2, 3, 0)):
            write(page, worker, 64 + 2 * 64 + 8 * number, value * factor)


def checked(counters: Counters) -> None:
    assert (counters.received, counters.forwarded, counters.consumed) == (1100, 990, 33)
    assert (counters.dropped, counters.punted) == (33, 33)
    assert counters.drops == {"other": 11, "denied": 22}
    assert counters.punts == {"denied": 33}
    assert counters["denied"] == 55, "a drop and a punt of one name, together"
    assert counters["local"] == 0
    assert dict(counters) == {"denied": 55, "other": 11}
    assert len(counters) == 2
    with pytest.raises(KeyError):
        counters["unheard-of"]
    assert counters.ports == {
        "eth0": {"rx_packets": 1100, "tx_packets": 0},
        "eth1": {"rx_packets": 0, "tx_packets": 990},
    }
    assert [worker["consumed"] for worker in counters.workers] == [3, 30]
    assert json.loads(json.dumps(counters.as_dict()))["drops"] == counters.drops


def test_counters_are_summed(page: StatsPage) -> None:
    assert page.counters().as_dict()["received"] == 0
    fill(page)
    checked(page.counters())


def test_read_from_outside(page: StatsPage) -> None:
    fill(page)
    reader = attach(NAME)
    try:
        assert (reader.name, reader.pid, reader.alive) == (NAME, os.getpid(), True)
        checked(reader.counters())
        write(page, 0, 64, 101)
        assert reader.counters().received == 1101
        page.describe(zero_copy=True)
        checked_again = reader.counters()
        assert checked_again.received == 1101
    finally:
        reader.close()
    assert attach(NAME).description["zero_copy"] is True


def test_one_name_once(page: StatsPage) -> None:
    with pytest.raises(AlreadyRunning, match=f"'{NAME}' is running .process {os.getpid()}.; choose another --name"):
        StatsPage(NAME, DESCRIPTION)
    page.close()
    page.close()
    StatsPage(NAME, DESCRIPTION).close()


def test_attach_names_those_there_are(page: StatsPage) -> None:
    with pytest.raises(NoSuchInstance, match=f"no instance named 'nobody' is running .*{NAME}"):
        attach("nobody")
    other = StatsPage(NAME + "-2", DESCRIPTION)
    try:
        with pytest.raises(NoSuchInstance, match=f"several instances are running: .*{NAME}, {NAME}-2"):
            attach()
    finally:
        other.close()


def test_no_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libfp.engine.stats.instances", dict)
    with pytest.raises(NoSuchInstance, match="no libfp instance is running"):
        attach()


def test_pages_of_another_version(page: StatsPage) -> None:
    page.page[:8] = b"libfp 99"
    with pytest.raises(NoSuchInstance, match="another version"):
        attach(NAME)


def test_blocks_share_no_page(page: StatsPage) -> None:
    assert page.block_offset(0) % 4096 == 0
    assert page.block_offset(1) - page.block_offset(0) >= 4096
    assert (page.block_offset(1) - page.block_offset(0)) % 4096 == 0


def test_reading_needs_neither_numba_nor_the_engine() -> None:
    code = "import sys, libfp.engine.stats as s; s.instances(); print({'numba', 'libfp.jit'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


FORWARD = """
import sys
from libfp import Pipeline
from libfp.ports.memory import MemoryPort
from libfp.stages import parse
from libfp.testing import udp

port = MemoryPort("a")
with Pipeline(parse).start([port], name=sys.argv[1]) as app:
    port.inject([udp()] * 5)
    print("running", flush=True)
    app.wait()
"""


def test_nothing_is_left_after_kill_9() -> None:
    name = NAME + "-child"
    child = subprocess.Popen([sys.executable, "-c", FORWARD, name], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        reader = attach(name)
        assert reader.pid == child.pid
        wait_until(lambda: reader.counters().received == 5)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        assert not reader.alive
        assert reader.counters().received == 5, "what was counted can still be read by who was attached"
        assert name not in instances()
        with pytest.raises(NoSuchInstance):
            attach(name)
        StatsPage(name, DESCRIPTION).close()
        reader.close()
    finally:
        child.kill()
        child.communicate()
