"""`fp stats`: the counters of a running instance, read from its shared page; the instance does not notice."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from libfp.engine.stats import Counters, StatsReader

INTERVAL = 0.5  # seconds between two looks of the live table


@click.command()
@click.argument("name", required=False)
@click.option("--once", is_flag=True, help="Print the table once, without rates.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stats(name: str | None, once: bool, as_json: bool) -> None:
    """Show the counters of the running instance NAME, or of the only one there is.

    The table is live until Ctrl-C or until the instance ends; into a pipe it is printed once.
    """
    from libfp.engine.stats import attach

    reader = attach(name)
    try:
        if as_json:
            counters = reader.counters()
            click.echo(json.dumps({"name": reader.name, "pid": reader.pid, **counters.as_dict()}))
        else:
            _show(reader, once)
    finally:
        reader.close()


def _show(reader: StatsReader, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    before, then = reader.counters(), time.monotonic()
    if once or not console.is_terminal:
        console.print(tables(reader, before))
        return
    with Live(tables(reader, before), console=console, auto_refresh=False) as live:
        while reader.alive:
            time.sleep(INTERVAL)
            now, counters = time.monotonic(), reader.counters()
            live.update(tables(reader, counters, before, now - then), refresh=True)
            before, then = counters, now
    console.print(f"{reader.name} has ended")


def tables(
    reader: StatsReader, counters: Counters, before: Counters | None = None, seconds: float = 1.0
) -> RenderableType:
    """Ports, then drops and punts by reason; with `before`, rates over the `seconds` between the two."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def rate(now: int, then: int) -> str:
        return "" if before is None else f"{(now - then) / seconds:,.0f}"

    ports = Table(box=None, pad_edge=True)
    for title in ("port", "received", "a second", "sent", "a second", "bytes received", "bytes sent"):
        ports.add_column(title, justify="left" if title == "port" else "right")
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
    reasons = Table(box=None, pad_edge=True)
    for title in ("reason", "packets", "a second"):
        reasons.add_column(title, justify="left" if title == "reason" else "right")
    for label, kind in (("dropped", "drops"), ("punted to Linux", "punts")):
        earlier: dict[str, int] = {} if before is None else getattr(before, kind)
        for reason, packets in sorted(getattr(counters, kind).items()):
            reasons.add_row(f"{label}: {reason}", f"{packets:,}", rate(packets, earlier.get(reason, 0)))
    heading = Text(f"{reader.name}, process {reader.pid}, {len(counters.workers)} worker(s)", style="bold")
    parts: list[RenderableType] = [heading, ports]
    if reasons.row_count:
        parts += [Text(""), reasons]
    return Group(*parts)
