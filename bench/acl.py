"""`Acl` beside rte_acl: 4 M headers of 16 bytes, classified in bursts of 64, by the rule sets of ClassBench.

`trace` are headers drawn from the set's own trace (of `acl 10k`, which has none, from the corners of its rules),
`uniform` are random in every field. TCP flags are left out of the rules on both sides, as DPDK's own tester does. The
peer is the fastest of rte_acl's algorithms on this machine, in bursts of 64 and of 256 (all are tried once, the best
three five times); one category, no limit of its memory. `build` is `Acl.load` of `Rule`s, all that Python does for that
too, beside rte_acl_add_rules and rte_acl_build.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from bench import acl_rules, peers
from bench.harness import Case
from bench.tables import KEYS, Keys, Peer
from libfp.jit import clock_hz
from libfp.tables import Acl

ALGORITHMS = {"scalar": 1, "sse": 2, "avx2": 3, "avx512x16": 6, "avx512x32": 7}
BURSTS = 64, 256


def _functions(lib: Any, acl: Any) -> list[Peer]:
    """rte_acl's algorithms that this machine has."""

    def made(algorithm: int, burst: int) -> Any:
        def run(*asked: Any) -> int:
            lib.acl_select(acl, algorithm)
            ticks: int = lib.acl_classify(acl, burst, *asked)
            return ticks

        return run

    return [
        Peer(f"rte_acl {name} (bursts of {burst})", made(number, burst))
        for name, number in ALGORITHMS.items()
        if lib.acl_select(acl, number) == 0
        for burst in BURSTS
    ]


def _make(ffi: Any, lib: Any, rules: np.ndarray) -> tuple[Any, float]:
    """rte_acl with these rules, and the seconds that took."""
    rows, ticks = np.ascontiguousarray(rules.astype(np.uint32)), ffi.new("uint64_t *")
    acl = lib.acl_make(ffi.cast("uint32_t *", rows.ctypes.data), len(rows), ticks)
    assert acl, "DPDK has room for the rules"
    return acl, ticks[0] / clock_hz()


def _build(ffi: Any, lib: Any, rules: np.ndarray) -> float:
    acl, seconds = _make(ffi, lib, rules)
    lib.acl_free(acl)
    return seconds


def _load(table: Acl, given: list[Any]) -> float:
    began = time.perf_counter()
    table.load(given)
    return time.perf_counter() - began


def cases() -> Iterator[Case]:
    """`acl 1k trace`, `acl 1k uniform`, `acl 1k build`, and so on: million headers a second, and seconds."""
    there: Any = peers.found() or (None, None)
    ffi, lib = there
    for name in acl_rules.SETS:
        rules = acl_rules.rules(name)
        table, given = Acl(capacity=len(rules)), list(acl_rules.as_rules(rules))
        table.load(given)
        acl, _ = _make(ffi, lib, rules) if lib else (None, 0.0)
        text = f"{len(rules)} rules, {table.replica_bytes / 1e6:.1f} MB; {peers.about()}"
        for kind, headers in (("trace", acl_rules.trace(name, rules, KEYS)), ("uniform", acl_rules.uniform(KEYS))):
            view, bed = table.view(), Keys(headers, 16, ffi)
            functions = _functions(lib, acl) if lib else []
            functions = sorted(functions, key=partial(bed.theirs, passes=1))[-3:]
            yield bed.case("acl", f"{name} {kind}", view, functions, text, 1.5, unit="M headers/s")
        if lib:
            lib.acl_free(acl)
        yield Case(
            bench="acl",
            case=f"{name} build",
            unit="s",
            better="lower",
            ours=partial(_load, table, given),
            peer="rte_acl" if lib else None,
            theirs=partial(_build, ffi, lib, rules) if lib else None,
            rounds=3,
            about=text,
        )
