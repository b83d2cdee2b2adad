"""`fp ipsec`: the command line of the gateway, and `fp ipsec sas`, `fp ipsec release`."""

from __future__ import annotations

import json
from typing import Any

import click

from libfp.apps.ipsec import TABLES
from libfp.cli import options

NEEDS = "The SAs and policies (and options) as TOML; SIGHUP reads it again."


@click.command(
    cls=options.Command,
    commands={name: f"libfp.apps.ipsec.cli:{name}" for name in ("sas", "block", "release")},
    tables=TABLES,
    epilog="`fp ipsec sas [NAME]` shows the SAs of a running gateway. `fp ipsec release --config FILE` removes the "
    "XFRM policies that it leaves in the kernel so that nothing is ever sent in clear; `fp ipsec block --config FILE` "
    "installs them without it.",
)
@options.common("ipsec", config=NEEDS)
@click.pass_context
def ipsec(context: click.Context, config: str | None, **given: Any) -> None:
    """Route IPv4 and IPv6 between the interfaces IF..., as `fp router` does, but what the policies in FILE protect goes
    through ESP tunnels (RFC 4303, AES-GCM), both ways.

    The policies are also put into the kernel, as XFRM policies, before the first packet is taken, and stay there at
    the end: whatever gets past the fast path is dropped rather than sent in clear.
    """
    from libfp.apps.ipsec.gateway import Gateway, Settings

    settings = Settings(context, config, given)
    settings.require_interfaces()
    Gateway(settings).run("ipsec")


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sas(name: str | None, as_json: bool) -> None:
    """Show the SAs of the running gateway NAME, or of the only one: sequence numbers, windows, packets, drops."""
    from libfp.engine.control import connect

    with connect(name) as instance:
        found = instance.ask("sas")["sas"]
    if as_json:
        click.echo(json.dumps({"sas": found}))
        return
    for line in table(found):
        click.echo(line)


COLUMNS = ("tunnel", "direction", "spi", "local", "remote", "sequence", "window", "packets", "bytes", "dropped")


def table(found: list[dict[str, Any]]) -> list[str]:
    """The answer in lines for people: a table, and for each SA that dropped packets a line with the reasons."""
    rows = [list(COLUMNS)]
    for sa in found:
        counts = {**sa["counters"], "spi": f"{sa['spi']:#x}", "window": sa["window"] or "-", "dropped": dropped(sa)}
        rows.append([str(counts.get(name, sa.get(name))) for name in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for sa in found:
        if sa["exhausted"]:
            lines.append(
                f"{sa['spi']:#x} has used all its sequence numbers: it sends nothing more; give it a successor"
            )
        elif dropped(sa):
            reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in drops(sa).items() if count)
            lines.append(f"{sa['spi']:#x} dropped {reasons}")
    return lines


def drops(sa: dict[str, Any]) -> dict[str, int]:
    """By reason."""
    return {name: count for name, count in sa["counters"].items() if name not in ("packets", "bytes")}


def dropped(sa: dict[str, Any]) -> int:
    """How many packets of an SA were dropped."""
    return sum(drops(sa).values())


@click.command()
@click.option("--config", metavar="FILE", required=True, help="The gateway's file.")
def block(config: str) -> None:
    """Install the XFRM policies of a gateway that does not run (yet): what it would protect is blocked until it does.
    For the time between the start of the network and that of the gateway."""
    from libfp.apps.ipsec import xfrm
    from libfp.apps.ipsec.config import read

    count = xfrm.block(read(config))
    click.echo(f"fp ipsec: {count} XFRM policies are in the kernel", err=True)


@click.command()
@click.option("--config", metavar="FILE", required=True, help="The file that the gateway was started with.")
def release(config: str) -> None:
    """Remove the XFRM policies that a gateway with this file has left in the kernel: no others. What they protected is
    then sent in clear, where Linux has a route."""
    from libfp.apps.ipsec import xfrm
    from libfp.apps.ipsec.config import read

    count = xfrm.release(read(config))
    click.echo(f"fp ipsec: {count} XFRM polic{'y' if count == 1 else 'ies'} removed", err=True)
