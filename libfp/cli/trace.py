"""`fp trace`: packets of a running instance through every stage, and the table entry that decided."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from libfp.cli.options import Seconds
from libfp.cli.watching import Watch
from libfp.engine.dissect import Headers
from libfp.engine.listen import Listener
from libfp.engine.slots import Record

SNAP, SLOTS = 192, 1024


@click.command()
@click.argument("expression", nargs=-1, metavar="[FILTER]...")
@click.option("-c", "--count", type=click.IntRange(1), default=10, metavar="N", help="How many packets.  [10]")
@click.option("-n", "--name", metavar="NAME", help="The instance.  [the only one]")
@click.option("--seconds", type=Seconds(), metavar="S", help="Look for so long at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a packet.")
def trace(expression: tuple[str, ...], count: int, name: str | None, seconds: float | None, as_json: bool) -> None:
    """Print the next packets of a running instance that match FILTER: what each stage did, the verdict and its reason,
    and the route that decided.

    \b
    FILTER is a part of pcap-filter(7):
      fp trace                                  the next 10 packets
      fp trace -c 1 icmp and host 192.0.2.1
      fp trace udp dport 4789 and not src net 10.0.0.0/8

    It costs the instance a copy of each packet's first bytes while it is open, and nothing otherwise.
    """
    with Watch(name, expression, snap=SNAP, slots=SLOTS, count=count, seconds=seconds) as watch:
        for number, worker, record, headers in watch:
            told = _told(watch.listener, number + 1, worker, record, headers)
            click.echo(json.dumps(told) if as_json else _text(told))
        watch.report_loss()


def _told(listener: Listener, number: int, worker: int, record: Record, headers: Headers) -> dict[str, Any]:
    ports = dict(enumerate(listener.ports))
    before, stages = 0, []
    for name, (kind, verdict) in zip(listener.stages[record.first :], record.stages, strict=False):
        did = str(verdict)
        if verdict.port is not None:
            did += f" {ports.get(verdict.port, verdict.port)}"
        elif verdict.kind == "pass":
            did = _kind(kind) if kind != before else "passed on"
        stages.append({"stage": name, "did": did})
        before = kind
    rest = "later, in the other worker" if record.verdict.kind == "hand-off" else "never came there"
    stages += [{"stage": name, "did": rest} for name in listener.stages[record.first + len(record.stages) :]]
    end = str(record.verdict)
    if record.verdict.port is not None:
        end += f" {ports.get(record.verdict.port, record.verdict.port)}"
    elif record.verdict.kind == "pass":
        end = "punt undecided"
    return {
        "number": number,
        "time_ns": listener.time_ns(record),
        "worker": worker,
        "port": ports.get(record.port, str(record.port)),
        "length": record.length,
        "summary": headers.summary(),
        "stages": stages,
        "verdict": end,
        "lost": record.lost,
        "entry": listener.explain(record),
    }


def _kind(kind: int) -> str:
    """What `parse` found: see `libfp.packet.burst`."""
    name = {4: "IPv4", 6: "IPv6"}.get(kind & 0xF, f"kind {kind:#x}")
    return f"a sound {name} header" + (" with options" if kind & 0x10 else "")


def _text(told: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(told["time_ns"] // 1_000_000_000))
    head = f"{told['number']}  {when}.{told['time_ns'] % 1_000_000_000:09}  in {told['port']}"
    lines = [f"{head}, worker {told['worker']}, {told['length']} bytes", f"   {told['summary']}"]
    width = max(len(stage["stage"]) for stage in told["stages"])
    lines += [f"   {stage['stage']:<{width}}  {stage['did']}" for stage in told["stages"]]
    end = told["verdict"] + (f", lost: {told['lost']}" if told["lost"] else "")
    lines.append(f"   => {end}" + (f"  ({told['entry']})" if told["entry"] else ""))
    return "\n".join(lines)
