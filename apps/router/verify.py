"""`fp router verify`: does a running router have what Linux has? It compares, and this command shows what it found."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

TIMEOUT = 120.0  # seconds; a full table takes a few


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(name: str | None, as_json: bool) -> None:
    """Compare everything that the running router NAME (or the only one) has mirrored with the kernel, entry by entry.

    Links, settings, addresses, neighbours and routes with a fresh dump; the forwarding tables with what follows from
    it. Forwarding is not disturbed. Exit status 1 if anything differs.
    """
    from libfp.engine.control import connect

    with connect(name, TIMEOUT) as instance:
        answer = instance.ask("verify")
    found = {key: value for key, value in answer.items() if key in FIELDS}
    if as_json:
        click.echo(json.dumps(found))
    else:
        for line in report(found):
            click.echo(line)
    if found["differences"]:
        sys.exit(1)


FIELDS = ("links", "neighbours", "ipv4_routes", "ipv6_routes", "table_entries", "differences", "examples")


def report(found: dict[str, Any]) -> list[str]:
    """The answer in lines for people."""
    counts = [f"{found[key]:,} {key.replace('_', ' ').replace('ipv', 'IPv')}" for key in FIELDS[:5]]
    lines = ["compared " + ", ".join(counts)]
    if not found["differences"]:
        return [*lines, "no difference"]
    lines += [f"  {example}" for example in found["examples"]]
    more = found["differences"] - len(found["examples"])
    count = f"{found['differences']:,} difference{'s' * (found['differences'] != 1)}"
    return [*lines, *([f"  and {more:,} more"] if more > 0 else []), count]
