"""What counts the demo's packets: sequence numbers seen once, twice, late; and how the numbers are shown."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from libfp.demo.report import Report, Totals
from libfp.demo.screen import Screen, counter_table, summary
from libfp.testing.datagrams import Tally


@given(st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=64), max_size=8))
def test_tally_against_a_set(batches):
    tally = Tally()
    seen, highest, reordered = [], -1, 0
    for now, batch in enumerate(batches):
        tally.add(np.array(batch, np.int64), float(now + 1))
        for number in batch:
            reordered += number < highest
            highest = max(highest, number)
        seen += batch
    counts = tally.counts()
    assert counts["received"] == len(set(seen))
    assert counts["duplicates"] == len(seen) - len(set(seen))
    assert counts["reordered"] == reordered


def test_tally_measures_the_longest_pause():
    tally = Tally()
    for number, now in enumerate([5.0, 5.1, 5.6, 5.7]):
        tally.add(np.array([number]), now)
    assert tally.counts()["longest_gap"] == pytest.approx(0.5)
    assert tally.counts()["seconds"] == pytest.approx(0.7)


@pytest.fixture
def report():
    totals = Totals(1000, 900, {"blackhole": 60, "denied": 30}, {"ttl-expired": 10})
    return Report("veth", offered=500, received=499, mpps=0.3456789, totals=totals, kick="inline", cores=[1])


def test_report_has_what_a_script_reads(report):
    values = json.loads(json.dumps(report.as_dict()))
    wanted = {"offered": 500, "received": 499, "lost": 1, "forwarded": 900, "punted": 10, "mpps": 0.346}
    wanted |= {"tcp_mbit_s": None, "zero_copy": False, "kick": "inline", "dropped": 90}
    assert {key: values[key] for key in wanted} == wanted
    assert values["drops"] == {"blackhole": 60, "denied": 30}
    assert values["punts"] == {"ttl-expired": 10}


def text_of(*things):
    console = Console(file=io.StringIO(), width=100)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_the_table_shows_reasons_and_rates(report):
    text = text_of(counter_table(report.totals, {"forwarded": 12345.0}))
    rows = [line.split() for line in text.splitlines()]
    assert ["forwarded", "900", "12,345"] in rows
    assert ["dropped:", "denied", "30", "0"] in rows
    assert ["punted", "to", "Linux:", "ttl-expired", "10", "0"] in rows
    assert "a second" not in text_of(counter_table(report.totals))


def test_the_summary_says_what_was_lost_and_how(report):
    text = text_of(summary(report))
    assert "1 lost (0.200 %)" in text
    assert "0.346 M packets/s" in text
    assert "veth ports, copy mode, kick: inline, core 1" in text


def test_without_a_terminal_each_step_is_a_line_when_it_ends():
    console = Console(file=io.StringIO(), width=100)
    with Screen(console, "title") as screen:
        screen.step("going on")
        screen.done("ping: 5 of 5")
        assert console.file.getvalue().splitlines() == ["title", "  ping: 5 of 5"]


def test_on_a_terminal_the_counters_move():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    samples = iter(range(1, 1000))
    with Screen(console, "title") as screen:
        screen.sample = lambda: Totals(next(samples))
        screen.step("going on")
        screen._live.refresh()
        screen._live.refresh()
    assert "going on ..." in console.file.getvalue()
    assert "received" in console.file.getvalue()
