"""`fp stats` against a page that this process holds: found from outside, shown as a table and as JSON."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading

import pytest

from libfp.engine.stats import StatsPage, attach, instances

NAME = f"test-{os.getpid()}"
DESCRIPTION = {
    "ports": ["left", "right"],
    "reasons": [("drop", "blackhole"), ("drop", "never"), ("punt", "ttl-expired")],
    "workers": 2,
    "worker_counters": ["heartbeat", "bursts", "syscalls", "parks", "updates", "parked", "consumed", "thread"],
    "port_counters": ["rx_packets", "rx_bytes", "tx_packets", "tx_bytes", "tx_full", "rx_starved"],
    "first_port": 64,
    "port_stride": 64,
}


@pytest.fixture
def page():
    made = StatsPage(NAME, DESCRIPTION)
    for worker in range(2):
        words = [7, 6, 5, 4, 3, 2, 1, 0]
        words += [1000, 60000, 1, 2, 3, 4, 0, 0, 10, 20, 900, 54000, 0, 0, 0, 0]
        words += [90, 0, 5]
        struct.pack_into(f"<{len(words)}Q", made.page, made.block_offset(worker), *words)
    yield made
    made.close()
    made.page.close()


def fp(*arguments):
    return subprocess.run([sys.executable, "-m", "libfp", "stats", *arguments], capture_output=True, text=True)


def test_json_is_one_object(page):
    done = fp(NAME, "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["name"], values["pid"]) == (NAME, os.getpid())
    assert (values["received"], values["forwarded"]) == (2020, 1802)
    assert (values["drops"], values["punts"]) == ({"blackhole": 180}, {"ttl-expired": 10})
    assert (values["dropped"], values["punted"]) == (180, 10)
    assert values["ports"]["left"]["rx_packets"] == 2000
    assert len(values["workers"]) == 2


def test_packets_handed_off_are_shown_where_there_are_some(page):
    assert "handed off" not in fp(NAME, "--once").stdout
    counters = [*DESCRIPTION["worker_counters"], "handed_off", "borrowed", "returned"]
    page.describe(worker_counters=counters, first_port=128)
    for worker in range(2):
        struct.pack_into("<3Q", page.page, page.block_offset(worker) + 64, 54321, 12345, 54320)
    shown = fp(NAME, "--once").stdout
    assert "handed off" in shown
    assert all(number in shown for number in ("54,321", "54,320", "12,345"))


@pytest.mark.parametrize("arguments", [["--once"], []])
def test_a_table_is_printed_once_into_a_pipe(page, arguments):
    done = fp(NAME, *arguments)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}
    assert rows["left"][0] == "2,000"
    assert rows["right"][1] == "1,800"
    assert rows["dropped:"] == ["blackhole", "180"]
    assert "ttl-expired" in done.stdout
    assert "never" not in done.stdout


def test_an_unknown_instance_is_one_line_and_status_2(page):
    done = fp("no-such-instance")
    assert done.returncode == 2
    assert done.stderr.startswith("fp: no instance named 'no-such-instance' is running")
    assert NAME in done.stderr, "those that there are"
    assert done.stderr.count("\n") == 1


def test_the_command_loads_no_compiler(page):
    code = f"import sys, libfp.cli; libfp.cli.main(['stats', '{NAME}', '--once']); assert 'numba' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_sees_the_end_of_the_process():
    code = (
        "import sys; from libfp.engine.stats import StatsPage\n"
        f"page = StatsPage('{NAME}-child', {DESCRIPTION!r}); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        reader = attach(f"{NAME}-child")
        assert reader.alive
        child.kill()
        child.wait()
        assert not reader.alive
        reader.counters()  # the memory outlives the process as long as somebody looks
        reader.close()


def test_who_reads_a_page_is_not_its_instance(page):
    readers = [attach(NAME) for _ in range(3)]
    code = (
        f"import sys; from libfp.engine.stats import attach; r = attach({NAME!r}); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert instances()[NAME][0] == os.getpid()
        page.close()
        page.page.close()
        assert NAME not in instances(), "the name is free although its page is being read"
        child.stdin.close()
    for reader in readers:
        reader.close()


def test_a_description_is_never_read_half_written(page):
    """The writer changes it while a reader in another thread attaches again and again."""
    done = threading.Event()

    def write():
        for turn in range(3000):
            page.describe(turn=turn, text="x" * (turn % 1000))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    looks = 0
    while not done.is_set() or not looks:
        reader = attach(NAME)
        assert len(reader.description.get("text", "")) == reader.description.get("turn", 0) % 1000
        reader.counters()
        reader.close()
        looks += 1
    thread.join()
