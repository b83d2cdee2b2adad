"""The demo's live table and its summary. Without a terminal each step is one line as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from libfp.demo.report import Report, Totals


class Screen:
    """Steps, and the router's counters with their rates over the last half second.

    `sample` is asked for the counters by the display's own thread; it is None until there is a router to ask.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.picture = ""
        self.sample: Callable[[], Totals] | None = None
        self._done: list[str] = []
        self.now = ""
        self._before: tuple[float, Totals] | None = None
        self._shown: tuple[Totals, dict[str, float]] = (Totals(), {})
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._is_live = console.is_terminal

    def __enter__(self) -> Screen:
        if self._is_live:
            self._live.start()
        else:
            self.console.print(self.title)
        return self

    def __exit__(self, *exception: object) -> None:
        self.sample = None
        if self._is_live:
            self._live.stop()
            for line in self._done:
                self.console.print(Text(line), soft_wrap=True)

    def step(self, what: str) -> None:
        """What is going on now."""
        self.now = what

    def done(self, line: str) -> None:
        """The step is over, with this result."""
        self.now = ""
        self._done.append(f"  {line}")
        if not self._is_live:
            self.console.print(Text(self._done[-1]), soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self.title, style="bold")]
        if self.picture:
            parts.append(Text(self.picture, style="cyan"))
        parts += [Text(line, style="green") for line in self._done]
        if self.now:
            parts.append(Text(f"  {self.now} ...", style="yellow"))
        if self.sample is not None:
            parts.append(self._counters())
        return Group(*parts)

    def _counters(self) -> RenderableType:
        assert self.sample is not None
        now, totals = time.monotonic(), self.sample()
        if self._before is None:
            self._before = (now, totals)
        then, before = self._before
        if now - then >= 0.5:
            rates = {name: (n - before_n) / (now - then) for name, n, before_n in _paired(totals, before)}
            self._before = (now, totals)
            self._shown = (totals, rates)
        return counter_table(totals, self._shown[1])


def _rows(totals: Totals) -> list[tuple[str, int]]:
    rows = [("received", totals.received), ("forwarded", totals.forwarded)]
    rows += [(f"dropped: {reason}", n) for reason, n in sorted(totals.dropped.items())]
    rows += [(f"punted to Linux: {reason}", n) for reason, n in sorted(totals.punted.items())]
    return rows


def _paired(now: Totals, before: Totals) -> list[tuple[str, int, int]]:
    old = dict(_rows(before))
    return [(name, n, old.get(name, 0)) for name, n in _rows(now)]


def counter_table(totals: Totals, rates: dict[str, float] | None = None) -> Table:
    """Packets received, forwarded, dropped and punted by reason; with `rates`, packets a second beside each."""
    table = Table(box=None, pad_edge=True)
    table.add_column("router")
    table.add_column("packets", justify="right")
    if rates is not None:
        table.add_column("a second", justify="right")
    for name, n in _rows(totals):
        cells = [name, f"{n:,}"]
        if rates is not None:
            cells.append(f"{rates.get(name, 0.0):,.0f}")
        table.add_row(*cells)
    return table


def summary(report: Report) -> RenderableType:
    """The end of the demo: what came through, how fast, what was lost."""
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(style="bold")
    table.add_column()
    if report.ping_sent:
        took = "" if report.ping_ms is None else f", {report.ping_ms:.2f} ms"
        table.add_row("ping", f"{report.ping_received} of {report.ping_sent} answered{took}")
    if report.tcp_mbit_s is not None:
        table.add_row("TCP", f"{report.tcp_mbit_s:,.0f} Mbit/s, intact both ways")
    table.add_row("path", f"carried {report.capacity_pps:,.0f} packets/s end to end when first measured")
    share = 100 * report.lost / max(report.offered, 1)
    table.add_row(
        "stream",
        f"{report.offered:,} datagrams at {report.paced_pps:,.0f}/s, {report.lost:,} lost ({share:.3f} %)",
    )
    table.add_row("flood", f"{report.mpps:.3f} M packets/s forwarded, {report.flood_received:,} arrived")
    where = f"{report.ports} ports, {'zero-copy' if report.zero_copy else 'copy'} mode, kick: {report.kick}"
    table.add_row("how", where + (f", core {', '.join(map(str, report.cores))}" if report.cores else ""))
    return Group(Text(""), counter_table(report.totals), Text(""), table)
