"""The highest rate at which a device loses at most a given share: RFC 2544, 26.1 (throughput), with the latency of
26.2 at that rate; RFC 5180 for IPv6.

A trial sends at one rate for a while. The first is as fast as may be; where that loses too much, the next is at what
came through, and then the range between the best rate that passed and the worst that did not is halved until it is
small. What counts is what was really sent, not what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from libfp.errors import BadInput
from libfp.gen.report import Report
from libfp.gen.station import Generator
from libfp.gen.traffic import LEAST, RFC2544_SIZES, Traffic

TRIALS = 30  # of one size, at most
AGAIN = 3  # times a trial is made that sends nothing: on a busy machine a short one may be over before it begins
FEWEST = 10  # packets of a trial that fails, after which none with fewer is made


@dataclass(frozen=True)
class Trial:
    """One trial: the packets a second asked for (0: as fast as may be), what came of it, whether that is enough."""

    pps: float
    report: Report
    passed: bool


@dataclass(frozen=True)
class Throughput:
    """What a search has found for one size (a name, of a mix): the best trial that passed, None if none did.

    `by_generator`: too little was lost at the generator's own highest rate, so the device may be faster. Where that was
    held up by the port (a full ring), the device, or the wire, has set the rate without losing: that is its rate.
    `received`: packets, in all trials.
    """

    size: str
    best: Trial | None
    trials: int
    by_generator: bool
    received: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"size": self.size, "trials": self.trials, "by_generator": self.by_generator}
        report = self.best.report if self.best else None
        if report is None:
            return {**told, "pps": 0, "bps": 0, "loss": None}
        rates = {"pps": round(report.pps), "bps": round(report.bps), "loss": report.loss}
        return {**told, **rates, "latency_us": report.latency.as_dict()}


def search(
    trial: Callable[[float], Report],
    *,
    size: str = "",
    loss: float = 0.0,
    most: float = 0.0,
    resolution: float = 0.01,
    told: Callable[[Trial], None] = lambda trial: None,
    trying: Callable[[float], None] = lambda pps: None,
) -> Throughput:
    """The highest rate that loses at most the share `loss`, to within `resolution` of it.

    trial: sends at so many packets a second (0: as fast as may be) and says what came of it. most: packets a second to
    begin with, 0: as fast as may be. told: is given each trial when it ends; trying: its rate when it begins. Where not
    a packet comes, the rate is divided by more, and the search ends at `FEWEST` packets. Raises BadInput.
    """
    if not 0 <= loss < 1 or not 0 < resolution < 1 or most < 0:
        raise BadInput(f"a loss of {loss:g}, a resolution of {resolution:g}", "shares: a loss of 0.001 is 0.1 %")

    received = 0

    def attempt(pps: float) -> Trial:
        nonlocal received
        trying(pps)
        report = next((one for one in (trial(pps) for _ in range(AGAIN)) if one.sent), None) or trial(pps)
        received += report.received
        made = Trial(pps, report, report.sent > 0 and report.loss <= loss)
        told(made)
        return made

    first = attempt(most)
    if first.passed:
        held_up = most == 0 and any(stream.ring_full for stream in first.report.streams)
        return Throughput(size, first, 1, not held_up, received)
    best, worst = None, first
    low, high, count = 0.0, first.report.pps, 1
    following = high * (1 - first.report.loss)  # what came through: often it is that
    while high > 0 and high - low > resolution * high and count < TRIALS:
        if best is None and worst.report.sent <= FEWEST:
            break
        if best is None and not worst.report.received:
            following = high / 32
        elif not low < following < high:
            following = (low + high) / 2 if high < 2 * low or not low else (low * high) ** 0.5
        made = attempt(following)
        count += 1
        following = 0.0
        if not made.passed:
            high, worst = made.pps, made
            continue
        low = made.pps
        if best is None:
            following = low * (1 + resolution)  # often that is too much
        if best is None or made.report.pps >= best.report.pps:
            best = made
    return Throughput(size, best, count, False, received)


def throughput(
    generator: Generator,
    traffics: Sequence[tuple[str, Sequence[Traffic]]],
    *,
    seconds: float = 2.0,
    wait: float = 2.0,
    loss: float = 0.0,
    most: float = 0.0,
    resolution: float = 0.01,
    told: Callable[[str, Trial], None] = lambda size, trial: None,
    trying: Callable[[str, float], None] = lambda size, pps: None,
) -> Iterator[Throughput]:
    """`search` for each of (name, traffic of each port), in trials of `seconds` (RFC 2544, 24: 60 for the result)."""
    for size, traffic in traffics:
        generator.load(traffic)

        def trial(pps: float) -> Report:
            return generator.run(pps=pps, seconds=seconds, wait=wait)

        def say(made: Trial, size: str = size) -> None:
            told(size, made)

        def begin(pps: float, size: str = size) -> None:
            trying(size, pps)

        yield search(trial, size=size, loss=loss, most=most, resolution=resolution, told=say, trying=begin)


def traffics(traffic: Traffic, sizes: Sequence[int] = ()) -> list[tuple[str, Traffic]]:
    """The traffic in frames of each size, by default those of RFC 2544 that have room for a signature (with IPv6: 84
    bytes instead of 64, RFC 5180 5.1)."""
    least = max(LEAST[family] for family in traffic.used_families())
    chosen = sizes or sorted({max(size, least) for size in RFC2544_SIZES})
    return [(str(size), replace(traffic, size=size)) for size in chosen]
