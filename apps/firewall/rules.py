"""`fp firewall rules`: the rules that a running firewall applies, with the packets and bytes that each has matched."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rules(name: str | None, as_json: bool) -> None:
    """Show the rules of the running firewall NAME (or of the only one), with their hits in the fast path.

    Packets that Linux has filtered are not among them: nft counts those.
    """
    from libfp.engine.control import connect

    with connect(name) as instance:
        found = [one for part in instance.parts("rules") for one in part["rules"]]
    if as_json:
        click.echo(json.dumps({"rules": found}))
        return
    chain = ""
    for one in found:
        if chain != (chain := f"{one['family']} {one['table']} {one['chain']}"):
            click.echo(f"{'packets':>14} {'bytes':>18}  {chain}")
        handle = f"  # handle {one['handle']}" if one["handle"] else ""
        click.echo(f"{one['packets']:>14,} {one['bytes']:>18,}  {one['rule']}{handle}")
