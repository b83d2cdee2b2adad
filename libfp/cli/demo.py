"""`fp demo`: the router at work, before the eyes of whoever has just installed it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from libfp.cli.options import Seconds
from libfp.errors import MissingCapability, Unsupported

if TYPE_CHECKING:
    from libfp.demo.report import Report
    from libfp.demo.screen import Screen


@click.command()
@click.option(
    "--seconds", default=5.0, show_default=True, type=Seconds(0.2, 3600), metavar="S", help="Of stream and of flood."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line; the rest to stderr.")
@click.option("--memory", is_flag=True, help="Over memory ports, as without root or AF_XDP.")
def demo(seconds: float, as_json: bool, memory: bool) -> None:
    """Put a router between a client and a server, and real traffic through it.

    Three network namespaces joined by veth pairs, `fp router` in the middle: ping, a TCP transfer each way, a UDP
    stream at half of what the path was first measured to carry, then a flood. Nothing outside the namespaces is
    touched, and everything is removed at the end. Without root or AF_XDP the same router runs over memory ports.
    """
    from rich.console import Console

    from libfp.demo.screen import Screen, summary

    console = Console(stderr=as_json)
    with Screen(console, "libfp demo: an IPv4 router whose tables are Linux's") as screen:
        report = _run(screen, seconds, memory)
    console.print(summary(report))
    if as_json:
        click.echo(json.dumps(report.as_dict()))


def _run(screen: Screen, seconds: float, memory: bool) -> Report:
    from libfp.demo import memory as in_memory
    from libfp.demo import veth

    why = "--memory"
    if not memory:
        try:
            return veth.run(screen, seconds)
        except (MissingCapability, Unsupported) as error:
            why = str(error)
    screen.done(f"over memory ports: {why}")
    return in_memory.run(screen, seconds, why)
