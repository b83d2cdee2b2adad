"""What `bench scaling` and `bench walk` run: workers that play their far ends, in one process and in several."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench import scaling, walk
from bench.far_end import Reading
from bench.team import Bed, Running, _rate
from libfp.jit import BOUNDSCHECK, INTERPRETED, clock_hz, load64

pytestmark = pytest.mark.timeout(300)
compiled = pytest.mark.skipif(
    INTERPRETED or BOUNDSCHECK or not os.environ.get("LIBFP_FULL"), reason="compiles for long: if LIBFP_FULL is set"
)

CORES = sorted(os.sched_getaffinity(0))[:2]
SECONDS = 0.2


@pytest.fixture(scope="module")
def bed() -> Bed:
    return Bed(routes=2000)


@contextmanager
def running(bed: Bed, cores: list[int], **options: Any) -> Iterator[Running]:
    made = Running(bed, cores, **{"rate": 10_000, "leaders": None, "isolated": False, **options})
    try:
        yield made
    finally:
        made.close()


def measured(team: Running) -> dict[str, Any]:
    return team.measure(time.monotonic(), SECONDS)


@compiled
@pytest.mark.parametrize("isolated", [False, True])
def test_every_worker_forwards_while_routes_change(bed: Bed, isolated: bool) -> None:
    """As processes, too, each of which has its own pages and the declared ones, and no other."""
    with running(bed, CORES, isolated=isolated) as team:
        told = measured(team)
        assert all(rate > 0.1 for rate in told["Mpps"])
        assert len(told["Mpps"]) == len(CORES)
        assert told["changes"] > 0
        assert told["control"] < 1
        counters = team.app.counters
        assert counters.forwarded > 0
        assert set(counters) <= {"no-route", "punt-rate"}, "what goes to routes that are withdrawn at the time"
        assert len(set(team._ran())) == len(CORES), "each has a clock of its own"
    assert [worker.error for worker in team.app.workers] == [None] * len(CORES)


@compiled
@pytest.mark.skipif(len(CORES) < 2, reason="two workers")
def test_workers_of_an_l3_domain_read_one_replica(bed: Bed) -> None:
    with running(bed, CORES, leaders=[0, 0]) as team:
        told = measured(team)
        assert all(rate > 0.1 for rate in told["Mpps"])
        first, second = (worker.state.replicas for worker in team.app.workers)
        for table in first.tables:
            assert load64(first._cell[id(table)]) == load64(second._cell[id(table)])
        assert first.acknowledged() or first.waiting, "its worker applies what changes"


@compiled
def test_the_walk_has_every_part(bed: Bed) -> None:
    with running(bed, CORES[:1]) as team:
        lap = team.profile(time.monotonic(), SECONDS)
    parts = {row["part"]: row["ns"] for row in lap["parts"]}
    assert set(walk.PARTS) <= set(parts)
    assert all(parts[name] > 0 for name in walk.PARTS)


def test_a_workers_time_is_its_own() -> None:
    hz = clock_hz()
    before, after = Reading(0, 0, 0), Reading(hz, 1_000_000, hz // 2)  # a second, of which half was the far end's
    assert _rate(before, after, 1.0) == pytest.approx(2.0)
    assert _rate(before, after, 0.5) == pytest.approx(4.0), "others had the core for half of it"
    assert _rate(before, after, 1.1) == pytest.approx(2.0), "clocks differ"


def test_numbers_of_workers() -> None:
    assert scaling.steps(1) == [1]
    assert scaling.steps(6) == [1, 2, 3, 4, 5, 6]
    assert scaling.steps(48) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 48]
    found = scaling.domains(CORES)
    assert found[0] == 0
    assert all(leader <= number for number, leader in enumerate(found))


def test_the_raw_curve() -> None:
    rows = scaling.table({1: ([9.0, 10.0], [9.0, 10.0]), 2: ([1.0, 19.0], [1.0, 20.0]), 3: ([], [])}).splitlines()
    assert [row.split()[:5] for row in rows[1:]] == [
        ["1", "10.00", "1.00", "10.00", "1.000"],
        ["2", "19.00", "1.90", "20.00", "0.950"],
    ]
    assert scaling.table({}) == ""
