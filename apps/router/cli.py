"""`fp router`: the control of the router. Its stages are the shared ones: parse and forward."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self

import click

from libfp.apps.router.service import Service
from libfp.cli import journal
from libfp.errors import BadInput, Error

log = logging.getLogger("libfp.router")


SHOW_EVERY = 0.1  # seconds between progress reports on a terminal
SAY_EVERY = 100_000  # routes between those in a log, where it is not a quarter of all

LEVELS = ("error", "warning", "info", "debug")

#: What a SIGHUP changes; anything else takes a restart.
LIVE = ("log", "bypass")


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


class _Router(click.Command):
    """`verify` in the place of the first interface is a command of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] != ["verify"]:
            return super().make_context(info_name, args, parent, **extra)
        from libfp.apps.router.verify import verify

        return verify.make_context(f"{info_name} verify", args[1:], parent, **extra)


@click.command(cls=_Router, epilog="`fp router verify [NAME]` compares a running router's tables with the kernel.")
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
@click.option("--log", type=click.Choice(LEVELS), help="What is logged.  [what fp -v says]")
@click.option("--config", metavar="FILE", help="Read options from a TOML file; SIGHUP reads it again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines: forwarding, ready (all routes), end.")
@click.option("--pcap", metavar="FILE", help="Instead of interfaces: forward what this capture holds.")
@click.option("--routes", metavar="FILE", help="With --pcap: the routes, one a line, as `ip route` writes them.")
@click.option("--out", metavar="FILE", help="With --pcap: write what leaves, as pcap, or pcapng by that name.")
@click.pass_context
def router(context: click.Context, config: str | None, **options: Any) -> None:
    """Route IPv4 and IPv6 between the interfaces IF..., with Linux's routes and neighbours.

    Linux keeps its say: addresses, routes, neighbours and forwarding settings are followed as they change, and what
    the fast path cannot finish (ICMP errors, fragments, options, unresolved neighbours) is handed to it. Ctrl-C and
    SIGTERM leave the traffic to Linux.

    With --pcap it needs neither root nor Linux's tables: the same pipeline forwards a capture by the routes in a file.
    """
    settings = SimpleNamespace(**(options if config is None else _configured(context, config, options)))
    logging.getLogger("libfp").setLevel(settings.log.upper() if settings.log else logging.NOTSET)
    if settings.pcap is not None or settings.routes is not None or settings.out is not None:
        if settings.pcap is None or settings.routes is None or settings.interfaces:
            raise BadInput("--pcap, --routes and --out go together, without interfaces", "give --pcap and --routes")
        from libfp.apps.router import offline

        offline.run(settings.pcap, settings.routes, settings.out, settings.as_json)
        return
    if not settings.interfaces:
        raise BadInput("no interface named", "name the interfaces to route between, or a --pcap")
    if len(set(settings.interfaces)) != len(settings.interfaces):
        raise BadInput(f"an interface is named twice in {' '.join(settings.interfaces)}", "name each once")
    with _Interrupts() as interrupts, Service(interrupts.asked, hup=config is not None) as service:
        if config is not None:
            service.reload = lambda: _reload(lambda: _configured(context, config, options), settings)
        _route(settings, interrupts, service)


def _configured(context: click.Context, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, of which the file says those that the command line does not."""
    from libfp.apps.router import config

    told = config.read(path, context.command, context)
    default = click.core.ParameterSource.DEFAULT
    given = {name for name in told if options[name] and context.get_parameter_source(name) != default}
    return {**options, **{name: value for name, value in told.items() if name not in given}}


def _route(settings: SimpleNamespace, interrupts: _Interrupts, service: Service) -> None:
    say = _Said(settings.as_json)
    from libfp import Linux, Pipeline  # numba and pyroute2 come with them
    from libfp.linux.verify import handler

    def progress(what: str, done: int, total: int) -> None:
        service.progress(what, done, total)
        say.progress(what, done, total)

    from libfp.stages import forward, parse

    say("reading Linux's links, addresses, neighbours and routes")
    chosen = {name: getattr(settings, name) for name in ("only", "mode", "bypass", "capacity")}
    with Linux(*settings.interfaces, progress=progress, wait=False, **chosen) as linux:
        interrupts.check()
        settings.linux = linux
        pipeline = Pipeline(parse, forward(linux))
        say("compiling the pipeline (seconds at first, then from the cache)")
        options = {"kick": settings.kick, "idle": settings.idle, "frame_size": linux.frame_size}
        name = settings.name or f"router-{os.getpid()}"
        with pipeline.start(linux.ports, settings.cores, name=name, **options) as app:
            interrupts.check()
            app.control.add("verify", handler(linux.mirror))
            linux.wait_forwarding()
            service.run(app, say.forwarding(app, linux), lambda: linux.synced, lambda: say.ready(app, linux))
            say.end(app)


def _reload(read: Callable[[], dict[str, Any]], settings: SimpleNamespace) -> None:
    """Take over what the configuration file says now, as far as that goes while packets pass."""
    try:
        told = read()
    except Error as error:
        log.error("the configuration stays as it was: %s", error)
        return
    changed = [name for name, value in told.items() if value != getattr(settings, name)]
    if "log" in changed:
        settings.log = told["log"]
        logging.getLogger("libfp").setLevel(settings.log.upper() if settings.log else logging.NOTSET)
    if "bypass" in changed:
        settings.bypass = told["bypass"]
        settings.linux.set_bypass(settings.bypass)
    later = sorted({"as_json": "json"}.get(name, name) for name in changed if name not in LIVE)
    done = [name for name in LIVE if name in changed]
    log.warning("configuration read again; changed: %s", ", ".join(done) or "nothing")
    if later:
        log.warning("changed in the configuration, but not without a restart: %s", ", ".join(later))


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

    def asked(self) -> bool:
        """Whether there was one."""
        return self._asked

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


def _routes(linux: Any) -> int:
    return len(linux.routes.fib) + len(linux.routes.fib6)


class _Said:
    """What the command tells its user: lines on standard error for people, JSON lines on standard output."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._live = sys.stderr.isatty()
        self._told, self._shown, self._complete = 0, 0.0, True

    def __call__(self, text: str) -> None:
        if self._shown:  # a line that the progress is on
            click.echo("\r\033[K", err=True, nl=False)
            self._shown = 0.0
        journal.say(f"fp router: {text}")

    def progress(self, what: str, done: int, total: int) -> None:
        """How far the first synchronisation is: in place on a terminal, else a line for each so many routes."""
        if what != "routes":
            return
        text = f"{done:,} of {total:,} routes are in the tables" if total else f"{done:,} routes read"
        if self._live:
            now = time.monotonic()
            if now > self._shown + SHOW_EVERY or (total and done >= total):
                self._shown = now
                click.echo(f"\r\033[Kfp router: {text}", err=True, nl=False)
            if total and done >= total:
                click.echo("\r\033[K", err=True, nl=False)
                self._shown = 0.0
            return
        if done < self._told:  # read, and now written
            self._told = 0
        if done - self._told >= max(SAY_EVERY, total // 4) and done != total:
            self._told = done
            self(text)

    def _line(self, event: str, **fields: Any) -> None:
        if self._json:
            click.echo(json.dumps({"event": event, **fields}))
            sys.stdout.flush()

    def forwarding(self, app: Any, linux: Any) -> str:
        """Say what is forwarded, from the first route on, and return it in short."""
        self._complete, routes = linux.synced, _routes(linux)
        where = ", ".join(port.name for port in app.ports)
        where += f" on core{'s' if len(app.cores) > 1 else ''} {', '.join(map(str, app.cores))}"
        how = f"{'zero-copy' if app.zero_copy else 'copy mode'}, kick: {app.kick}"
        yet = "" if self._complete else " yet, the rest via Linux"
        self(f"forwarding between {where} ({how}, {routes:,} routes{yet}); fp stats {app.name}")
        self._line("forwarding", name=app.name, routes=routes)
        return f"forwarding between {where}"

    def ready(self, app: Any, linux: Any) -> None:
        """Say that the tables are complete."""
        routes = _routes(linux)
        if not self._complete:
            self(f"all {routes:,} routes are in the tables")
        fields = {"cores": app.cores, "kick": app.kick, "zero_copy": app.zero_copy, "routes": routes}
        self._line("ready", name=app.name, ports=[port.name for port in app.ports], **fields)

    def end(self, app: Any) -> None:
        counters = app.counters
        self(f"{counters.forwarded} forwarded, {counters.dropped} dropped, {counters.punted} punted")
        self._line("end", name=app.name, **counters.as_dict())
