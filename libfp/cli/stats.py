"""`fp stats`: the counters of a running instance, read from its shared page, which the instance does not notice; and
the time of each stage, which its workers measure only while somebody asks."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from libfp.cli.walk import rows

if TYPE_CHECKING:
    from rich.console import RenderableType

    from libfp.engine.listen import Stopwatch
    from libfp.engine.stats import Counters, StatsReader

INTERVAL = 0.5  # seconds between two looks of the live table
LAP = 0.5  # seconds for which `--stages` measures


@click.command()
@click.argument("name", required=False)
@click.option("--once", is_flag=True, help="Print the table once, without rates.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--stages", is_flag=True, help="With --once or --json: measure for half a second what each part takes.")
def stats(name: str | None, once: bool, as_json: bool, stages: bool) -> None:
    """Show the counters of the running instance NAME, or of the only one there is.

    The table is live until Ctrl-C or until the instance ends; into a pipe it is printed once. While it is live, or
    with --stages, the workers measure what each part of their loop takes: a dozen looks at the clock a burst.
    """
    from libfp.engine.stats import attach

    reader = attach(name)
    with ExitStack() as undo:
        undo.callback(reader.close)
        if as_json:
            lap = _lap(reader, undo) if stages else {}
            told = {"name": reader.name, "pid": reader.pid, **reader.counters().as_dict(), **lap}
            click.echo(json.dumps(told))
        else:
            _show(reader, undo, once, stages)


def _watch(reader: StatsReader, undo: ExitStack) -> Stopwatch:
    from libfp.engine.control import connect
    from libfp.engine.listen import Stopwatch

    connection = undo.enter_context(connect(reader.name))
    watch = Stopwatch(connection)
    undo.callback(watch.close)
    return watch


def _lap(reader: StatsReader, undo: ExitStack) -> dict[str, Any]:
    watch = _watch(reader, undo)
    time.sleep(LAP)
    return watch.lap()


def _show(reader: StatsReader, undo: ExitStack, once: bool, stages: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from libfp.errors import Error

    console = Console()
    before, then = reader.counters(), time.monotonic()
    if once or not console.is_terminal:
        console.print(tables(reader, before, lap=_lap(reader, undo) if stages else None))
        return
    watch = None
    try:
        watch = _watch(reader, undo)
    except Error as error:  # the counters can be read all the same
        if stages:
            raise
        console.print(f"no times of stages: {error.what}")
    with Live(tables(reader, before), console=console, auto_refresh=False) as live:
        while reader.alive:
            time.sleep(INTERVAL)
            now, counters = time.monotonic(), reader.counters()
            lap = watch.lap() if watch is not None else None
            live.update(tables(reader, counters, before, now - then, lap), refresh=True)
            before, then = counters, now
    console.print(f"{reader.name} has ended")


def tables(
    reader: StatsReader,
    counters: Counters,
    before: Counters | None = None,
    seconds: float = 1.0,
    lap: dict[str, Any] | None = None,
) -> RenderableType:
    """Ports, workers, drops and punts by reason, times of stages; with `before`, rates over the `seconds` between."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*titles: str) -> Table:
        made = Table(box=None, pad_edge=True)
        for number, title in enumerate(titles):
            made.add_column(title, justify="right" if number else "left")
        return made

    def rate(now: int, then: int) -> str:
        return "" if before is None else f"{(now - then) / seconds:,.0f}"

    ports = table("port", "received", "a second", "sent", "a second", "bytes received", "bytes sent")
    for port, now in counters.ports.items():
        then = now if before is None else before.ports[port]
        rx, tx = now["rx_packets"], now["tx_packets"]
        ports.add_row(
            port,
            f"{rx:,}",
            rate(rx, then["rx_packets"]),
            f"{tx:,}",
            rate(tx, then["tx_packets"]),
            f"{now['rx_bytes']:,}",
            f"{now['tx_bytes']:,}",
        )
    workers = table("worker", "core", "received", "a second", "packets a burst", "system calls", "a second", "parks")
    lent = table("worker", "handed off", "a second", "of these back", "done for others", "a second")
    cores = reader.description.get("cores", [])
    for number, mine in enumerate(counters.workers):
        past = mine if before is None or number >= len(before.workers) else before.workers[number]
        packets, bursts = mine["received"] - past["received"], mine.get("bursts", 0) - past.get("bursts", 0)
        if before is None:
            packets, bursts = mine["received"], mine.get("bursts", 0)
        calls = mine.get("syscalls", 0)
        workers.add_row(
            f"worker {number}",
            str(cores[number]) if number < len(cores) else "",
            f"{mine['received']:,}",
            rate(mine["received"], past["received"]),
            f"{packets / bursts:.1f}" if bursts else "",
            f"{calls:,}",
            rate(calls, past.get("syscalls", 0)),
            f"{mine.get('parks', 0):,}",
        )
        if any(one.get("handed_off", 0) for one in counters.workers):  # in pipelines whose stages do
            off, back, done = (mine.get(name, 0) for name in ("handed_off", "returned", "borrowed"))
            rates = rate(off, past.get("handed_off", 0)), rate(done, past.get("borrowed", 0))
            lent.add_row(f"worker {number}", f"{off:,}", rates[0], f"{back:,}", f"{done:,}", rates[1])
    reasons = table("reason", "packets", "a second")
    for label, kind in (("dropped", "drops"), ("punted to Linux", "punts")):
        earlier: dict[str, int] = {} if before is None else getattr(before, kind)
        for reason, packets in sorted(getattr(counters, kind).items()):
            reasons.add_row(f"{label}: {reason}", f"{packets:,}", rate(packets, earlier.get(reason, 0)))
    heading = Text(f"{reader.name}, process {reader.pid}, {len(counters.workers)} worker(s)", style="bold")
    parts: list[RenderableType] = [heading, ports, Text(""), workers]
    if lent.row_count:
        parts += [Text(""), lent]
    if lap is not None:
        stages = table("stage", "packets", "ns a packet")
        for row in lap["stages"]:
            stages.add_row(row["stage"], f"{row['packets']:,}", f"{row['ns']:.1f}" if row["packets"] else "")
        walk = table("part of the loop", "ns a packet")
        for part, ns in rows(lap):
            walk.add_row(part, f"{ns:.1f}")
        parts += [Text(""), stages, Text(""), walk]
    if reasons.row_count:
        parts += [Text(""), reasons]
    return Group(*parts)
