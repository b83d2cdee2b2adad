"""The search for the highest rate: by arithmetic, and over a device in memory that carries so much and no more."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from libfp import BadInput
from libfp.cli import gen_show, main
from libfp.gen import Cable, Generator, Histogram, Report, Stream, Traffic, Virtual
from libfp.gen.histogram import BUCKETS
from libfp.gen.rfc2544 import Trial, search, throughput, traffics
from libfp.jit import BOUNDSCHECK, INTERPRETED
from libfp.ports import MemoryPort

SLOW = INTERPRETED or BOUNDSCHECK


def report(sent: int, received: int, seconds: float = 1.0) -> Report:
    latency = Histogram(np.zeros(BUCKETS, np.int64), 1.0)
    return Report([Stream("p", sent, 60 * sent, seconds, received, 60 * received, 0, 0, 0, 0, latency)])


@pytest.mark.parametrize("capacity", [1.0, 37.0, 1e3, 123_456.0, 9_999_999.0])
@pytest.mark.parametrize("loss", [0.0, 0.001, 0.1])
def test_a_search_ends_within_its_resolution_of_what_is_there(capacity: float, loss: float) -> None:
    trials: list[Trial] = []

    def trial(pps: float) -> Report:
        sent = pps or 10e6
        return report(round(100 * sent), round(100 * min(sent, capacity)), 100.0)

    found = search(trial, loss=loss, told=trials.append)
    assert found.best is not None
    assert found.best.report.loss <= loss
    highest = min(capacity / (1 - loss), 10e6)
    assert highest * 0.985 - 0.1 <= found.best.report.pps <= highest * 1.0001 + 0.1
    assert found.trials == len(trials) <= 24
    assert found.by_generator == (highest == 10e6)
    assert found.best.report.pps == max(one.report.pps for one in trials if one.passed)


def test_a_search_that_cannot_find_says_so() -> None:
    always = search(lambda pps: report(1000, 1000))
    assert (always.by_generator, always.trials, always.best is not None) == (True, 1, True)
    never = search(lambda pps: report(1000, 0))
    assert (never.best, never.by_generator, never.as_dict()["pps"]) == (None, False, 0)
    silent = search(lambda pps: report(round(2 * (pps or 1e6)), 0))
    assert (silent.best, silent.received) == (None, 0)
    assert silent.trials <= 7
    nothing = search(lambda pps: report(0, 0))
    assert nothing.best is None
    source = random.Random(1)
    assert search(lambda pps: report(1000, source.choice((999, 1000)))).trials <= 30
    for wrong in ({"loss": 1.0}, {"loss": -0.1}, {"resolution": 0}, {"most": -1}):
        with pytest.raises(BadInput):
            search(lambda pps: report(1, 1), **wrong)


def test_sizes_are_those_of_the_rfc_and_those_that_ipv6_has_room_for() -> None:
    assert [name for name, _ in traffics(Traffic())] == ["64", "128", "256", "512", "1024", "1280", "1518"]
    assert [name for name, _ in traffics(Traffic(families=(6,)))][:2] == ["84", "128"]
    assert [one.sizes() for _, one in traffics(Traffic(), [70, 80])] == [{70: 1}, {80: 1}]


@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_a_device_in_memory_is_found_to_carry_what_it_carries(loss: float) -> None:
    """The same on any machine: by a clock that goes on with the loop's turns."""
    capacity, seconds = 2_000_000, 0.0005 if SLOW else 0.005
    there, back = MemoryPort("there"), MemoryPort("back")
    cables = [Cable(there, back, capacity=capacity)]
    sizes = [(name, [traffic]) for name, traffic in traffics(Traffic(flows=4), [64, 1518])]
    with Generator([there], sizes[1][1], to=[back], cables=cables, clock=Virtual()) as generator:
        found = list(throughput(generator, sizes, seconds=seconds, loss=loss, resolution=0.01))
        for one in found:
            assert one.best is not None
            assert not one.by_generator
            assert one.best.report.loss <= loss
            # the device lets a burst of 64 pass at first
            assert capacity * 0.985 <= one.best.report.pps <= (capacity / (1 - loss) + 64 / seconds) * 1.005
        assert generator.report().received == generator.report().packets


def fp(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["gen", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.skipif(SLOW, reason="runs by the real clock")
def test_the_command_searches_sends_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    status, out, _ = fp(capsys, "memory", "--rfc2544", "--seconds", "0.01", "--size", "64,128", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {line["size"] for line in lines if line["event"] == "throughput"} == {"64", "128"}
    assert all(line["pps"] > 0 for line in lines if line["event"] == "trial" and line["passed"])
    status, out, _ = fp(capsys, "memory", "--rfc2544", "--seconds", "0.01", "--size", "imix", "--pps", "1k")
    assert status == 0
    assert "mix" in out
    file = tmp_path / "some.pcap"
    status, out, _ = fp(capsys, f"pcap:{file}", "--packets", "100", "--size", "64:1,90:1", "-6", "-4", "--pps", "1M")
    assert (status, "IPv6" in _) == (2, True)
    status, out, _ = fp(capsys, f"pcap:{file}", "--packets", "100", "--size", "84:1,90:1", "-6", "-4", "--pps", "1M")
    assert (status, "100" in out) == (0, True)
    status, out, _ = fp(capsys, f"pcap:{file}", "--receive", "--json")
    told = json.loads(out)
    assert (status, told["received"], told["lost"], told["foreign"]) == (0, 100, 0, 0)
    status, out, _ = fp(capsys, "memory", "--pcap", str(file), "--json")
    assert (status, json.loads(out)["received"]) == (0, 100)
    status, out, _ = fp(capsys, "memory", "--packets", "1000", "--flows", "10", "--dst", "10.0.0.0/8", "--bps", "1G")
    assert status == 0
    assert "1,000" in out
    assert "time on the way" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "no port"), ("memory memory", "twice"), ("foo:1", "no port 'foo:1'"), ("memory --size 10", "64 to"),
        ("memory --size 64:x", "--size"), ("memory --pps nope", "--pps"), ("nosuch0", "nosuch0"),
        ("memory --pps 1k --bps 1k", "two rates"), ("memory --prefixes /nope", "/nope"), ("memory --zipf 1", "Zipf"),
        ("memory --dst foo", "--dst"), ("memory --source 1.2.3.4 --source 1.2.3.5", "second"),
        ("memory --core 99", "core 99"), ("memory --rfc2544 --bps 1G", "--bps"),
        ("memory --rfc2544 --loss 2", "share"), ("memory --loss 0.1", "--rfc2544"), ("memory --seed -1", "seed"),
        ("memory --seconds nan", "--seconds"), ("pcap:/dev/full --packets 5000", "No space"),
        ("memory --source 10.0.0.1 --dst ::1", "two families"), ("memory -4 --dst ::1", "not sent"),
        ("memory --pcap x -6", "-6"), ("memory --prefixes x --dst 10.0.0.1", "--dst"),
        ("memory --dst-mac 02:00:00:00:00:01 --dst-mac 02:00:00:00:00:02", "2 times"),
        ("memory --pcap /etc/passwd", "pcap"), ("pcap:/nonexistent/x --packets 1", "cannot write"),
        ("pcap:/etc/passwd --receive", "pcap"), ("memory --receive --flows 3", "--flows"),
        ("memory pcap:/tmp/x --dst 10.0.0.0/8", "both ways"), ("memory -6 --size 64", "84"),
        ("memory --dst-mac nonsense --packets 1", "MAC"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    status, _, errors = fp(capsys, *arguments.split())
    assert status == 2
    assert said in errors
    assert len(errors.splitlines()) == 1


def test_tables_are_whole_where_the_terminal_is_narrow() -> None:
    """On 40 columns every figure is there, a line each; on 80 they are a table."""
    counts = np.zeros(BUCKETS, np.int64)
    counts[100] = 1_000_000
    stream = Stream("eth0", 1_234_567_890, 0, 10.0, 1_234_567_889, 0, 0, 7, 0, 0, Histogram(counts, 1e9))
    one = Report([stream], packets=1_234_567_889)
    for width, lines in ((40, 14), (100, 4)):
        to = io.StringIO()
        Console(file=to, width=width).print(gen_show.table(width, one))
        told = to.getvalue()
        assert all(text in told for text in ("1,234,567,890", "1,234,567,889", "123,456,789", "reordered"))
        assert "\u2026" not in told
        assert (len(told.splitlines()), max(map(len, told.splitlines())) <= width) == (lines, True)
