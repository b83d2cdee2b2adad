"""Cases, and how they are measured: ours and the peer's in turn, round by round in one run, medians compared."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TextIO


@dataclass
class Case:
    """One number. `ours` and `theirs` run one round and return its measurement in `unit`.

    `prepare` runs before each of them, untimed by them. `peer` is None where there is nobody to compare with. The claim
    is a ratio of `bar` or more, or a figure of ours no worse than `limit`.
    """

    bench: str
    case: str
    unit: str
    better: Literal["higher", "lower"]
    ours: Callable[[], float]
    peer: str | None = None
    theirs: Callable[[], float] | None = None
    prepare: Callable[[], None] = lambda: None
    rounds: int = 7
    about: str = ""
    bar: float | None = None
    limit: float | None = None

    @property
    def claim(self) -> str:
        """As text: "0.85 of flat", "6 s", or nothing."""
        if self.limit is not None:
            return f"{self.limit:g} {self.unit}"
        return "" if self.bar is None else f"{self.bar:g} of {self.peer}"

    def met(self, ours: float, ratio: float | None) -> bool | None:
        """Whether the claim holds; None where none is made, or nobody was there to compare with."""
        if self.limit is not None:
            return ours <= self.limit if self.better == "lower" else ours >= self.limit
        return None if self.bar is None or ratio is None else ratio >= self.bar


@dataclass
class Result:
    """Medians of a case's rounds; `ratio` is how many times better ours is."""

    case: Case
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        if not self.theirs:
            return None
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return ours / theirs if self.case.better == "higher" else theirs / ours

    @property
    def met(self) -> bool | None:
        """Whether the case's claim holds."""
        return self.case.met(statistics.median(self.ours), self.ratio)

    def line(self) -> str:
        """The JSON line."""
        case = self.case
        theirs = _round(statistics.median(self.theirs)) if self.theirs else None
        ratio = None if self.ratio is None else round(self.ratio, 3)
        fields = {
            "bench": case.bench,
            "case": case.case,
            "ours": _round(statistics.median(self.ours)),
            "peer": case.peer,
            "theirs": theirs,
            "unit": case.unit,
            "better": case.better,
            "ratio": ratio,
        }
        return json.dumps(fields)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def measure(case: Case, rounds: int | None = None, progress: TextIO | None = None) -> Result:
    """Run the rounds of a case, ours and theirs in turn, after one round of each that is not counted."""
    result, count = Result(case), rounds or case.rounds
    sides = [(case.ours, result.ours)] + ([(case.theirs, result.theirs)] if case.theirs else [])
    gc.collect()
    gc.disable()
    try:
        for number in range(count + 1):
            for side, values in sides:  # strictly in turn: a side that follows itself finds its tables in the caches
                case.prepare()
                value = side()
                if number:
                    values.append(value)
            _show(progress, result, number, count)
    finally:
        gc.enable()
    return result


def _show(progress: TextIO | None, result: Result, number: int, count: int) -> None:
    if progress is None:
        return
    case = result.case
    text = f"{case.bench} {case.case}: round {number} of {count}"
    if result.ours:
        text += f", {case.unit}: ours {_round(result.ours[-1])}"
    if result.theirs:
        text += f", {case.peer} {_round(result.theirs[-1])}"
    print(
        f"\r\033[K{text}" if progress.isatty() else text,
        end="" if progress.isatty() else "\n",
        file=progress,
        flush=True,
    )


def run(cases: Iterable[Case], rounds: int | None = None) -> Iterator[Result]:
    """Measure each case, print its line, and yield its result."""
    for case in cases:
        result = measure(case, rounds, sys.stderr)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        if case.about:
            print(f"{case.bench} {case.case}: {case.about}{case.claim and '; claim: ' + case.claim}", file=sys.stderr)
        print(result.line(), flush=True)
        yield result
