"""The same cases through pytest-benchmark: ``pytest bench``, with its histories and comparisons.

pytest-benchmark times calls, and a call is one round. What the rounds themselves measured, in the case's own unit and
beside the peer, is in `extra_info`: the case's JSON line. Not part of ``make test``: it takes minutes, and wants root
and a quiet machine.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from bench import acl_rules, memif, walk
from bench.__main__ import BENCHES
from bench.harness import Case, Result
from libfp.errors import MissingCapability, Unsupported

CASES = {
    "acl": tuple(f"{name} {kind}" for name in acl_rules.SETS for kind in ("trace", "uniform", "build")),
    "churn": ("forwarding", "most"),
    "flow": ("64 k found", "1 M found", "4 M found", "1 M made and ended", "1 M packets", "1 M flood"),
    "forward": ("full table", "beside C", "one route"),
    "hash": (
        *(f"{size} {name}" for size in ("1 k", "64 k", "1 M", "4 M") for name in ("hits", "misses")),
        "growth, p99 of an insertion",
    ),
    "idle": ("cpu", "wake"),
    "lpm4": ("random", "in-prefix", "zipf", "build"),
    "lpm6": ("in-prefix", "zipf"),
    "memif": (*memif.CASES, *(f"64 latency p{percent}" for percent in memif.PERCENTILES)),
    "ring": tuple(f"{kind} burst {burst}" for kind in ("spsc", "mpmc") for burst in (1, 8, 32, 128)),
    "scaling": ("1 worker", "2 workers"),
    "start": ("help", "warm", "cold"),
    "sync": ("beyond dump", "complete"),
    "veth": ("inline", "helper", "linux", "inline per cpu-second", "helper per cpu-second"),
    "walk": ("whole loop", *walk.PARTS),
}


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, Any]]:
    """The benches in progress: each is set up by its first case, and taken down at the end."""
    benches: dict[str, Any] = {}
    yield benches
    for cases in benches.values():
        cases.close()


def find(benches: dict[str, Any], name: str, wanted: str) -> Case:
    if name not in benches:
        for other in benches.values():
            other.close()  # one bench at a time: they share the cores
        benches[name] = importlib.import_module(f"bench.{name}").cases()
    try:
        return next(case for case in benches[name] if case.case == wanted)
    except (MissingCapability, Unsupported) as error:
        pytest.skip(str(error))


def test_every_bench_is_here() -> None:
    assert CASES.keys() == BENCHES.keys()


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("name", "wanted"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_case(benchmark: Any, started: dict[str, Any], name: str, wanted: str) -> None:
    case = find(started, name, wanted)
    result = Result(case)

    def setup() -> None:
        if case.theirs is not None:
            case.prepare()
            result.theirs.append(case.theirs())
        case.prepare()

    benchmark.group = name
    benchmark.pedantic(lambda: result.ours.append(case.ours()), setup=setup, rounds=case.rounds, warmup_rounds=1)
    del result.ours[0], result.theirs[:1]  # of the round that only warms up
    benchmark.extra_info.update(json.loads(result.line()))
    print(result.line())
