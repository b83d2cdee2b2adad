"""The full forwarding loop with 1 to N workers, beside as many processes of one worker each, on the same cores.

Both sides run the same loop on memory ports over the full table, while routes change. Each worker plays the far end of
its ports itself; what that takes, and what other threads of its core do, is in nobody's time. Processes share nothing
that libfp could have made them share: what they lose to each other is the machine's (cache, memory, frequency, sibling
threads). What N workers lose beyond that is libfp's.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.harness import Case
from bench.team import Team
from libfp.errors import BadInput

RATE = 10_000  # route changes a second, in each process
SECONDS = 1.0
L3_LEAST = 4  # cores from which on it makes sense to ask what an L3 domain should share


def steps(most: int) -> list[int]:
    """Numbers of workers to measure: all up to 8, then powers of 2, and `most`."""
    return sorted({count for count in (*range(1, 9), *(1 << k for k in range(4, 12)), most) if count <= most})


def domains(cores: Sequence[int]) -> list[int]:
    """For each core the index of the first of `cores` that has the same L3; of one that says nothing, the first."""
    first: dict[str, int] = {}
    found = []
    for number, core in enumerate(cores):
        path = Path(f"/sys/devices/system/cpu/cpu{core}/cache/index3/shared_cpu_list")
        found.append(first.setdefault(path.read_text() if path.exists() else "", number))
    return found


class Sides:
    """The processes, and what was measured last."""

    def __init__(self, cores: list[int], routes: int | None, undo: ExitStack) -> None:
        self.cores, self.routes, self._undo = cores, routes, undo
        self.apart = self.team([[core] for core in cores], undo)
        self.about = ""
        self.curve: dict[int, tuple[list[float], list[float]]] = {}

    def team(self, cores: list[list[int]], undo: ExitStack, **more: Any) -> Team:
        return undo.enter_context(Team(cores, self.cores, rate=RATE, routes=self.routes, **more))

    def rate(self, team: Team, count: int | None = None) -> float:
        """Mpps of all workers of a side together."""
        answers = team.ask("measure", SECONDS, count)
        changes, control = (sum(answer[key] for answer in answers) for key in ("changes", "control"))
        self.about = f"{changes / 1e3:.1f} k changes/s and {100 * control:.0f} % of a core beside the workers"
        return float(sum(sum(answer["Mpps"]) for answer in answers))


def cases(cores: list[int] | None = None, isolated: bool = False, routes: int | None = None) -> Iterator[Case]:
    """`N workers` beside N processes; where there are cores enough, `N workers, a replica an L3 domain` beside one
    each; and if `isolated`, `N workers, isolated`: as processes that map nothing of one another.
    """
    allowed = sorted(os.sched_getaffinity(0))
    cores = cores or allowed
    if not set(cores) <= set(allowed):
        raise BadInput(f"cores {cores}", f"this process may use {', '.join(map(str, allowed))}")
    with ExitStack() as undo:
        sides = Sides(cores, routes, undo)
        what = f"{sides.apart.about['routes']} routes ({sides.apart.about['origin']}), cores "
        for count in steps(len(cores)):
            some = cores[:count]
            with ExitStack() as own:
                together = sides.team([some], own)
                yield from _beside(sides, together, what + ",".join(map(str, some)))
                if isolated:
                    yield from _isolated(sides, together, some, own)
                if count == len(cores):
                    yield from _shared(sides, together, some, own)
        print(table(sides.curve), file=sys.stderr)


def _workers(count: int) -> str:
    return f"{count} worker" + "s" * (count != 1)


COMMON: dict[str, Any] = {"bench": "scaling", "unit": "Mpps", "better": "higher"}


def _beside(sides: Sides, together: Team, what: str) -> Iterator[Case]:
    count = len(what.rpartition(" ")[2].split(","))
    ours, theirs = sides.curve[count] = [], []
    said = {}

    def one() -> float:
        ours.append(sides.rate(together))
        said["in one process"] = sides.about
        return ours[-1]

    def many() -> float:
        theirs.append(sides.rate(sides.apart, count))
        said[f"in {count}"] = sides.about
        case.about = f"{what}; " + "; ".join(f"{who}: {text}" for who, text in said.items())
        return theirs[-1]

    bar = 0.97 if count > 1 else None
    case = Case(case=_workers(count), ours=one, peer="processes", theirs=many, bar=bar, **COMMON)
    yield case


def _isolated(sides: Sides, together: Team, cores: list[int], undo: ExitStack) -> Iterator[Case]:
    """The same N workers, each in a process that maps its own arenas and the declared shared pages."""
    apart = sides.team([cores], undo, isolated=True)
    about = "each worker is a process; a load or store of what it has not declared would end it"
    ours, theirs = (lambda: sides.rate(apart)), (lambda: sides.rate(together))
    name = f"{_workers(len(cores))}, isolated"
    yield Case(case=name, ours=ours, peer="threads", theirs=theirs, about=about, **COMMON)


def _shared(sides: Sides, together: Team, cores: list[int], undo: ExitStack) -> Iterator[Case]:
    """One replica an L3 domain, written by one of its workers, beside one each."""
    if len(cores) < L3_LEAST:
        print(f"scaling: one replica an L3 domain is measured with {L3_LEAST} cores and more", file=sys.stderr)
        return
    leaders = domains(cores)
    team = sides.team([cores], undo, leaders=leaders)
    size = together.about["replica"] / (1 << 20)
    about = f"a replica has {size:.1f} MiB in use; {len(set(leaders))} L3 domains"
    ours, theirs = (lambda: sides.rate(team)), (lambda: sides.rate(together))
    name = f"{_workers(len(cores))}, a replica an L3 domain"
    yield Case(case=name, ours=ours, peer="one each", theirs=theirs, about=about, **COMMON)


def table(curve: dict[int, tuple[list[float], list[float]]]) -> str:
    """The raw curve: medians by workers; "of one" is how many times what one worker does, and bars show it."""
    medians = {
        count: tuple(statistics.median(side[1:]) for side in sides)  # the first round is not counted
        for count, sides in curve.items()
        if all(side[1:] for side in sides)
    }
    if not medians:
        return ""
    most = max(max(both) for both in medians.values())
    one = medians[1][0] if 1 in medians else math.nan
    rows = ["workers  Mpps together  of one  in processes  ratio"]
    for count, (ours, theirs) in medians.items():
        bar, times = "=" * round(40 * ours / most), ours / one
        rows.append(f"{count:7}  {ours:13.2f}  {times:6.2f}  {theirs:12.2f}  {ours / theirs:5.3f}  {bar}")
    return "\n".join(rows)
