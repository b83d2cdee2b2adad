"""What `fp gen` shows: streams while packets pass, the trials of a search as they end, and what came of it all."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from libfp.cli import journal
from libfp.errors import PeerGone
from libfp.gen import Generator, Receiver, Report, Traffic
from libfp.gen.histogram import microseconds
from libfp.gen.rfc2544 import Throughput, Trial, throughput

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERVAL = 0.5  # seconds between two looks of the live table
PATIENCE = 1.0  # seconds of silence before what takes so long is named
WIDE, BAR = 100, 30  # columns: of a file that is written to; of a bar at most
BARS = " ▏▎▍▌▋▊▉"


@contextmanager
def named(text: str) -> Iterator[None]:
    """Say what is being done, on a terminal and if it takes long."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(PATIENCE, journal.say, (f"fp gen: {text}",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def console(as_json: bool) -> Console:
    """Where tables go: beside JSON to standard error."""
    made = Console(stderr=as_json, highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, WIDE)
    return made


def grid(width: int, titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = True) -> RenderableType:
    """A table; where it has no room in `width`, lines for each row. The first column is `left` or right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    if sum(widths) + 2 * len(widths) > width:
        names = max(map(len, titles))
        blocks = (zip(titles, row, strict=True) for row in rows)
        return Text("\n\n".join("\n".join(f" {title:<{names}}  {cell}" for title, cell in one) for one in blocks))
    table = Table(box=None, pad_edge=True)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if left and not number else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


# -- a test


def show(options: dict[str, Any], station: Generator | Receiver, start: Callable[[], None]) -> None:
    """Run a test until its end or Ctrl-C; a live table on a terminal, a last one in any case."""
    screen = console(options["as_json"])
    start()
    deadline = time.monotonic() + options["seconds"] if options["receive"] and options["seconds"] else None
    try:
        if screen.is_terminal:
            before, then = station.report(), time.monotonic()
            with Live(console=screen, auto_refresh=False, transient=True) as live:
                while _goes_on(station, deadline):
                    _pause(station, deadline)
                    now, report = time.monotonic(), station.report()
                    live.update(table(screen.width, report, before, now - then), refresh=True)
                    before, then = report, now
        else:
            while _goes_on(station, deadline):
                _pause(station, deadline)
    except KeyboardInterrupt:
        station.cease()
    report = station.finish(wait=2.0 if station.traffics else 0.1)
    if options["as_json"]:
        click.echo(json.dumps(report.as_dict()))
        return
    modes = {getattr(port, "mode", "") for port in station.ports}
    screen.print(table(screen.width, report, answered=modes != {"w"}, timed="r" not in modes))
    if not report.packets and modes != {"w"} and not report.sent:
        screen.print(" nothing has come" if options["receive"] else " nothing was sent")
    elif not report.packets and modes != {"w"}:
        screen.print(" nothing has come back; another port receives with --to, another process with --receive")
    if report.latency.total and "r" not in modes:
        screen.print("time on the way")
        for line in report.latency.draw(max(min(screen.width, WIDE) - 40, 4)):
            screen.print(f"  {line}")


def _goes_on(station: Generator | Receiver, deadline: float | None) -> bool:
    station.check()
    if deadline is not None and time.monotonic() >= deadline:
        return False
    return station.busy


def _pause(station: Generator | Receiver, deadline: float | None) -> None:
    """Until the next look, or the end if that is earlier."""
    end = min(time.monotonic() + INTERVAL, deadline or float("inf"))
    while time.monotonic() < end and station.busy:
        time.sleep(0.005)


def table(
    width: int,
    report: Report,
    before: Report | None = None,
    seconds: float = 0.0,
    *,
    answered: bool = True,
    timed: bool = True,
) -> RenderableType:
    """Streams with rates (over the `seconds` since `before`, else over all), and what came that is none of theirs.

    Not answered: nothing can come, and not timed: from a capture the times on the way mean nothing.
    """
    counts, times = [], []
    past = {one.port: one for one in before.streams} if before else {}
    for one in report.streams:
        then = past.get(one.port)
        pps, bps = one.pps, one.bps
        if then is not None and seconds:
            pps = (one.sent - then.sent) / seconds
            bps = 8 * (one.sent_bytes - then.sent_bytes + 4 * (one.sent - then.sent)) / seconds
        lost = one.lost if report.signed else report.lost
        received = one.received if report.signed else report.received
        rates = [f"{pps:,.0f}", f"{bps / 1e6:,.1f}"] if one.seconds else ["", ""]
        missing = [f"{received:,}", f"{lost:,}", f"{100 * lost / one.sent:.4g}" if one.sent else ""]
        counts.append([one.port, f"{one.sent:,}", *rates, *(missing if answered else ())])
        if one.latency.total:
            found = [one.latency.percentile(percent) for percent in (50, 99, 99.9)]
            texts = map(microseconds, (*found, one.latency.maximum)) if timed else [""] * 4
            times.append([one.port, *texts, f"{one.duplicates:,}", f"{one.reordered:,}"])
    titles = ["stream", "sent", "a second", "Mbit/s", *(["received", "lost", "%"] if answered else ())]
    parts: list[RenderableType] = [grid(width, titles, counts)] if counts else []
    if times:
        parts.append(grid(width, ["time on the way", "p50", "p99", "p99.9", "max", "twice", "reordered"], times))
    others = {"corrupted": report.corrupted, "late": report.late, "not of this test": report.stale}
    others["not ours"] = report.foreign if report.signed else 0
    full = sum(one.ring_full for one in report.streams)
    line = ", ".join(f"{count:,} {name}" for name, count in others.items() if count)
    if line:
        parts.append(Text(f" {line}"))
    if full and before is None:
        parts.append(Text(f" the port had no room {full:,} times: it took what is shown, no more"))
    return Group(*parts)


# -- RFC 2544


def search(
    options: dict[str, Any], generator: Generator, searched: Sequence[tuple[str, Sequence[Traffic]]], seconds: float
) -> None:
    """Each size, with its trials as they begin and end, then a table. Raises PeerGone if not one packet comes back."""
    as_json = options["as_json"]
    screen = console(as_json)
    found: list[Throughput] = []
    trials: list[Trial] = []  # of the size that is searched for
    with Live(console=screen, auto_refresh=False, transient=True) as live:

        def trying(size: str, pps: float) -> None:
            if screen.is_terminal:
                rate = f"at {pps:,.0f} a second" if pps else "as fast as can be"
                text = f"{_frames(size)}, trial {len(trials) + 1} for {seconds:g} s {rate}"
                if trials:
                    text += (
                        f"; before: {100 * trials[-1].report.loss:.4g} % lost of {trials[-1].report.pps:,.0f} a second"
                    )
                live.update(_throughputs(screen.width, found, text), refresh=True)

        def told(size: str, trial: Trial) -> None:
            report = trial.report
            trials.append(trial)
            if as_json:
                fields = {"pps": round(report.pps), "sent": report.sent, "lost": report.lost, "passed": trial.passed}
                click.echo(json.dumps({"event": "trial", "size": size, **fields}))
            elif not screen.is_terminal:
                lost = f"{report.lost:,} of {report.sent:,} lost: {'enough' if trial.passed else 'too much'}"
                screen.print(f"{_frames(size)}: {report.pps:>13,.0f} a second, {lost}", soft_wrap=True)

        chosen = {"seconds": seconds, "loss": options["loss"] or 0.0, "most": options["pps"]}
        chosen["resolution"] = options["resolution"] or 0.01
        try:
            for one in throughput(generator, searched, **chosen, told=told, trying=trying):
                found.append(one)
                trials.clear()
                if as_json:
                    click.echo(json.dumps({"event": "throughput", **one.as_dict()}))
                if one.best is None and not one.received and one.trials > 1:
                    what = f"not one packet came back, of frames of {one.size} bytes at any rate"
                    raise PeerGone(what, "look at --to, --dst and --dst-mac, or try without --rfc2544")
        finally:  # also of a search that was interrupted
            live.stop()
            if not as_json and any(one.best for one in found):
                screen.print(_throughputs(screen.width, found))
            if not as_json and trials:
                passed = max((one.report.pps for one in trials if one.passed), default=0.0)
                named = f"{passed:,.0f} a second" if passed else "no rate"
                screen.print(f" {searched[len(found)][0]}: not finished; after {len(trials)} trials {named} had passed")


def _frames(size: str) -> str:
    return f"{size:>5} bytes" if size.isdecimal() else f"{size:>5}"


def _throughputs(width: int, found: Sequence[Throughput], now: str = "") -> RenderableType:
    rows = []
    most = max((one.best.report.pps for one in found if one.best), default=1.0)
    for one in found:
        if one.best is None:
            rows.append([one.size, "none", "", "", "", "", "", f"{one.trials}", ""])
            continue
        report = one.best.report
        times = [report.latency.percentile(50), report.latency.percentile(99), report.latency.maximum]
        eighths = -(-report.pps * BAR * 8 // most)
        row = [f"{one.size}{'*' * one.by_generator}", f"{report.pps:,.0f}", f"{report.bps / 1e6:,.1f}"]
        row += [f"{100 * report.loss:.4g}", *map(microseconds, times), f"{one.trials}"]
        rows.append([*row, "█" * int(eighths // 8) + BARS[int(eighths % 8)].strip()])
    titles = ["frame", "packets a second", "Mbit/s", "loss %", "p50", "p99", "max", "trials"]
    parts: list[RenderableType] = [grid(width, titles, [row[:-1] for row in rows], left=False)] if found else []
    if len(found) > 1 and not now:
        parts.append(Text("packets a second"))
        parts += [Text(f" {row[0]:>6} {row[-1]} {row[1]}") for row in rows]
    if any(one.by_generator for one in found):
        parts.append(Text(" * as fast as it could be offered: the device may be faster"))
    return Group(*parts, *([Text(f" {now}")] if now else []))
