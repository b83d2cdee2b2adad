"""What each part of the loop takes, by the worker's own clock: the same bed as `bench.scaling`, one worker, one core.

The clock is the one that `fp router --profile` and `fp stats --stages` read. It is looked at between the parts, a dozen
times a burst, which is in the figures; `whole loop` is their sum beside the same loop while nobody looks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from bench.harness import Case
from bench.scaling import RATE
from bench.team import Team

SECONDS = 1.0
PARTS = ("receive", "parse", "forward", "carry out", "transmit", "recycle", "mailbox", "counters")
ABOUT = {
    "receive": "descriptors into a burst, frames asked for; the first touch of the packet is in parse",
    "carry out": "verdicts: descriptors written to the ports that packets leave by",
    "transmit": "what was written shown to the other side",
    "recycle": "frames that were sent taken back, frames given to the port to receive into",
    "mailbox": "route changes stored into the replicas",
    "counters": "the loop itself: heartbeat, is there to be an end, burst counters",
}


class Laps:
    """Each lap is measured once, whichever part asks for it first."""

    def __init__(self, team: Team) -> None:
        self._team, self._laps = team, list[dict[str, Any]]()

    def __call__(self, number: int) -> dict[str, Any]:
        while number >= len(self._laps):
            self._laps += self._team.ask("profile", SECONDS)
        return self._laps[number]

    def part(self, name: str) -> Any:
        """A function that returns nanoseconds a packet of the part, of the next lap with each call."""
        numbers = iter(range(1 << 30))

        def next_lap() -> float:
            lap = self(next(numbers))
            return float(sum(row["ns"] for row in lap["parts"] if row["part"] == name))

        return next_lap

    def whole(self) -> Any:
        """The same of all of `PARTS`."""
        parts = [self.part(name) for name in PARTS]
        return lambda: sum(part() for part in parts)


def cases(cores: list[int] | None = None, routes: int | None = None) -> Iterator[Case]:
    """`whole loop`, then its `PARTS`, in nanoseconds a packet."""
    core = (cores or sorted(os.sched_getaffinity(0)))[:1]
    common: dict[str, Any] = {"bench": "walk", "unit": "ns/packet", "better": "lower"}
    with Team([core], sorted(os.sched_getaffinity(0)), rate=RATE, routes=routes) as team:
        laps = Laps(team)
        what = f"{team.about['routes']} routes ({team.about['origin']}), {RATE} changes/s, core {core[0]}, bursts of 64"

        def plain() -> float:
            return 1e3 / sum(team.ask("measure", SECONDS)[0]["Mpps"])

        yield Case(case="whole loop", ours=laps.whole(), peer="not looked at", theirs=plain, about=what, **common)
        for name in PARTS:
            yield Case(case=name, ours=laps.part(name), about=ABOUT.get(name, ""), **common)
