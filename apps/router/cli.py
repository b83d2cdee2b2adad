"""`fp router`: the control of the router. Its stages are the shared ones: parse and forward."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, Self

import click

from libfp.errors import BadInput


def _cores(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """A list of cores: ``2``, ``2,3`` or ``2-5``."""
    if value is None:
        return None
    found: list[int] = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise BadInput(f"--cores {value!r} does not parse at {part!r}", "write 2 or 2,3 or 2-5")
        found += range(int(first), int(last or first) + 1)
    return found


@click.command()
@click.argument("interfaces", nargs=-1, metavar="[IF]...")
@click.option("--cores", callback=_cores, metavar="LIST", help="Cores for workers, one each: 2 or 2,3 or 2-5. [one]")
@click.option(
    "--kick",
    type=click.Choice(["auto", "inline", "helper"]),
    default="auto",
    help="Who makes AF_XDP's system calls: the worker itself, or a helper thread on a core of its own.",
)
@click.option("--idle", type=click.Choice(["park", "spin"]), default="park", help="What a worker without packets does.")
@click.option("--only", multiple=True, metavar="PREFIX", help="Take only packets to PREFIX; may be repeated.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "native", "skb"]),
    default="auto",
    help="How XDP is attached: in the driver, or generically (slow, works everywhere).",
)
@click.option(
    "--capacity",
    type=click.IntRange(1, 1 << 24),
    default=1 << 20,
    metavar="N",
    help="Room for N routes and neighbours.  [1048576]",
)
@click.option("--bypass", is_flag=True, help="Forward although Linux would decide otherwise (filters, policy rules).")
@click.option("--name", metavar="NAME", help="What `fp stats` calls this instance.  [router-PID]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines: one when ready, one at the end.")
@click.option("--pcap", metavar="FILE", help="Instead of interfaces: forward what this capture holds.")
@click.option("--routes", metavar="FILE", help="With --pcap: the routes, one a line, as `ip route` writes them.")
@click.option("--out", metavar="FILE", help="With --pcap: write what leaves, as pcap, or pcapng by that name.")
def router(
    interfaces: tuple[str, ...],
    cores: list[int] | None,
    kick: str,
    idle: str,
    only: tuple[str, ...],
    mode: Any,
    capacity: int,
    bypass: bool,
    name: str | None,
    as_json: bool,
    pcap: str | None,
    routes: str | None,
    out: str | None,
) -> None:
    """Route IPv4 between the interfaces IF..., with Linux's routes and neighbours.

    Linux keeps its say: addresses, routes, neighbours and forwarding settings are followed as they change, and what
    the fast path cannot finish (ICMP errors, fragments, options, unresolved neighbours) is handed to it. Ctrl-C and
    SIGTERM leave the traffic to Linux.

    With --pcap it needs neither root nor Linux's tables: the same pipeline forwards a capture by the routes in a file.
    """
    if pcap is not None or routes is not None or out is not None:
        if pcap is None or routes is None or interfaces:
            raise BadInput("--pcap, --routes and --out go together, without interfaces", "give --pcap and --routes")
        from libfp.apps.router import offline

        offline.run(pcap, routes, out, as_json)
        return
    if not interfaces:
        raise BadInput("no interface named", "name the interfaces to route between, or a --pcap")
    if len(set(interfaces)) != len(interfaces):
        raise BadInput(f"an interface is named twice in {' '.join(interfaces)}", "name each once")
    say = _Said(as_json)
    with _Interrupts() as interrupts:
        from libfp import Linux, Pipeline  # numba and pyroute2 come with them
        from libfp.stages import forward, parse

        say("reading Linux's links, addresses, neighbours and routes")
        with Linux(*interfaces, only=only, mode=mode, bypass=bypass, capacity=capacity) as linux:
            interrupts.check()
            pipeline = Pipeline(parse, forward(linux))
            say("compiling the pipeline (seconds at first, then from the cache)")
            options = {"kick": kick, "idle": idle, "frame_size": linux.frame_size}
            with pipeline.start(linux.ports, cores, name=name or f"router-{os.getpid()}", **options) as app:
                interrupts.check()
                say.ready(app, linux)
                app.wait()
                say.end(app)


class _Interrupts:
    """While the block runs, SIGTERM ends the command as Ctrl-C does, once; what comes during the clean-up is ignored.

    `check` raises KeyboardInterrupt where the one that a signal raised has been lost: in a callback from C, of which a
    compilation makes many, Python can only print it.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: Any) -> None:
        if not self._asked:
            self._asked = True
            raise KeyboardInterrupt

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


class _Said:
    """What the command tells its user: lines on standard error for people, JSON lines on standard output."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def __call__(self, text: str) -> None:
        click.echo(f"fp router: {text}", err=True)

    def _line(self, event: str, **fields: Any) -> None:
        if self._json:
            click.echo(json.dumps({"event": event, **fields}))
            sys.stdout.flush()

    def ready(self, app: Any, linux: Any) -> None:
        ports, routes = ", ".join(port.name for port in app.ports), len(linux.routes.fib)
        where = f"{ports} on core{'s' if len(app.cores) > 1 else ''} {', '.join(map(str, app.cores))}"
        how = f"{'zero-copy' if app.zero_copy else 'copy mode'}, kick: {app.kick}"
        self(f"forwarding between {where} ({how}, {routes} routes); fp stats {app.name}")
        fields = {"cores": app.cores, "kick": app.kick, "zero_copy": app.zero_copy, "routes": routes}
        self._line("ready", name=app.name, ports=[port.name for port in app.ports], **fields)

    def end(self, app: Any) -> None:
        counters = app.counters
        self(f"{counters.forwarded} forwarded, {counters.dropped} dropped, {counters.punted} punted")
        self._line("end", name=app.name, **counters.as_dict())
