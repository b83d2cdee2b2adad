"""The benches run: what they measure is for `make bench` on a quiet machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import device, forward, harness, memif, report, rib
from bench.__main__ import BENCHES
from bench.harness import Case
from libfp.errors import Error

KEYS = {"bench", "case", "ours", "peer", "theirs", "unit", "better", "ratio"}
FULL = bool(os.environ.get("LIBFP_FULL"))
ROOT = Path(harness.__file__).parent.parent


def test_a_case_is_one_json_line_and_its_rounds_alternate(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def side(name: str, value: float) -> float:
        order.append(name)
        return value

    case = Case(
        "made-up",
        "a case",
        "ns",
        "lower",
        lambda: side("ours", 2.0),
        "flat",
        lambda: side("theirs", 3.0),
        prepare=lambda: order.append("prepare"),
    )
    (result,) = harness.run([case], rounds=3)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    line = json.loads(out)
    assert line.keys() == KEYS
    named = {"bench": "made-up", "case": "a case", "unit": "ns", "better": "lower", "peer": "flat"}
    assert line == named | {"ours": 2.0, "theirs": 3.0, "ratio": 1.5}
    assert result.ours == [2.0] * 3, "the first round does not count"
    assert order[::2] == ["prepare"] * 8
    assert order[1::2] == ["ours", "theirs"] * 4, "neither side ever follows itself, its tables still in the caches"


def test_higher_is_better_and_a_case_without_peer() -> None:
    case = Case("made-up", "a case", "Mpps", "higher", lambda: 2.0, "flat", lambda: 4.0)
    assert harness.measure(case, 1).ratio == 0.5
    line = json.loads(harness.measure(Case("made-up", "alone", "s", "lower", lambda: 1.0), 1).line())
    assert line.keys() == KEYS
    assert (line["peer"], line["theirs"], line["ratio"]) == (None, None, None)


def test_progress_goes_where_it_is_sent() -> None:
    progress = io.StringIO()
    harness.measure(Case("made-up", "a case", "s", "lower", lambda: 1.5), 2, progress)
    assert progress.getvalue().splitlines()[-1] == "made-up a case: round 2 of 2, s: ours 1.5"


def test_a_report_says_of_each_claim_whether_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in {"PAGE": "bench.md", "PLOTS": "bench", "KEPT": "bench/results.json"}.items():
        monkeypatch.setattr(report, name, tmp_path / path)
    pair = Case("pair", "one", "ns", "lower", lambda: 2.0, "flat", lambda: 3.0, bar=1.2)
    slow = Case("pair", "two", "ns", "lower", lambda: 4.0, "flat", lambda: 3.0, bar=1.0)
    alone = Case("alone", "start", "s", "lower", lambda: 3.0, limit=2)
    unclaimed = Case("alone", "rate", "Mpps", "higher", lambda: 1.0)
    report.keep("pair", [harness.measure(case, 1) for case in (pair, slow)])
    report.keep("alone", [harness.measure(case, 1) for case in (alone, unclaimed)])
    workers = [
        Case("team", f"{n} worker" + "s" * (n > 1), "Mpps", "higher", lambda: 1.0, "processes", lambda: 1.0)
        for n in (1, 2)
    ]
    report.keep("team", [harness.measure(case, 1) for case in workers])
    report.keep("pair", [harness.measure(case, 1) for case in (pair, slow)])  # in the place of the first
    report.write({"pair": "two sides", "alone": "nobody to compare with"})
    page = report.PAGE.read_text()
    assert "Claims missed: alone start, pair two." in page
    assert page.count("| one | 2.0 | flat | 3.0 | ns | 1.5 | 1.2 of flat | met |") == 1
    assert "| two | 4.0 | flat | 3.0 | ns | 0.75 | 1 of flat | **missed** |" in page
    assert "| start | 3.0 |  |  | s |  | 2 s | **missed** |" in page
    assert "| rate | 1.0 |  |  | Mpps |  |  |  |" in page
    assert {path.name for path in report.PLOTS.glob("*.svg")} == {"pair.svg", "alone.svg", "team.svg", "team-curve.svg"}
    assert page.count("-curve.svg") == 1, "of what is measured by numbers of workers"
    report.KEPT.write_text("{")
    with pytest.raises(Error, match="is no list of results"):
        report.write({})


@pytest.mark.timeout(180)  # compiles
def test_both_sides_of_forward_forward_a_small_table() -> None:
    addresses, lengths = np.array([10 << 24, 0, 198 << 24]), np.array([8, 0, 24])
    keys = rib.inside(addresses, lengths, forward.FRAMES * forward.CHUNKS)
    bed = forward.Bed(addresses, lengths, keys)
    case = Case("forward", "small", "ns/packet", "lower", bed.stages, "flat", bed.flat)
    result = harness.measure(case, 1)
    assert json.loads(result.line()).keys() == KEYS
    assert result.ratio is not None
    assert result.ratio > 0


def test_keys_lie_in_their_prefixes_and_are_no_martians() -> None:
    addresses, lengths = np.array([10 << 24, 127 << 24, 224 << 24, 198 << 24 | 18 << 16]), np.array([8, 8, 4, 15])
    keys = rib.inside(addresses, lengths, 1000)
    assert set((keys >> 24).tolist()) == {10, 198}
    assert all(key >> 17 == (198 << 24 | 18 << 16) >> 17 for key in keys.tolist() if key >> 24 == 198)


def test_where_the_generator_is_too_slow_nothing_is_claimed() -> None:
    assert memif.verdict(13.1e6, 10e6) == ("the generator alone 13.1 Mpps, 1.31 of the fastest side", True)
    text, counts = memif.verdict(12.9e6, 10e6)
    assert not counts
    assert "THE GENERATOR IS WHAT WAS MEASURED" in text


@pytest.mark.timeout(180)  # compiles
def test_a_device_swaps_addresses_and_hands_across() -> None:
    packet = bytes(range(196, 256))
    (done,) = device.PIPELINES["macswap"]().run_once([packet])
    assert (done.frame, done.port) == (packet[6:12] + packet[:6] + packet[12:], 1)


@pytest.mark.skipif(not (FULL and {0, 1} <= os.sched_getaffinity(0)), reason="two cores, and if LIBFP_FULL is set")
@pytest.mark.timeout(180)
def test_packets_come_back_from_both_sides_of_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM_UP", "MEASURE", "TRIAL"):
        monkeypatch.setattr(memif, name, 0.05)
    for case in memif.cases():
        if case.case in ("64 macswap", "64 one route", "64 latency p50"):
            result = harness.measure(case, 1)
            assert json.loads(result.line()).keys() == KEYS
            assert min(result.ours + result.theirs) > 0
            assert case.about


def test_an_unknown_bench_is_one_line_and_status_2() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"bench: no bench 'nonsense'; there are: {', '.join(BENCHES)}\n"
