"""What every application does between its command line and its end: open Linux, compile, start, say so, wait, end.

settings = running.Settings(context, config, options)
running.run("router", settings, lambda linux: Pipeline(parse, forward(linux)))
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import click

from libfp.cli import config as files
from libfp.cli import journal
from libfp.cli.service import Service
from libfp.errors import BadInput, Error

if TYPE_CHECKING:
    from libfp import Linux, Pipeline
    from libfp.engine.application import Application
    from libfp.engine.listen import Stopwatch

__all__ = ["Settings", "run"]

SHOW_EVERY = 0.1  # seconds between progress reports on a terminal
SAY_EVERY = 100_000  # routes between those in a log, where it is not a quarter of all


class Settings:
    """The options of a command as attributes; those that the command line does not give, the file at `config` may.

    Raises BadInput.
    """

    def __init__(self, context: click.Context, config: str | None, options: Mapping[str, Any]) -> None:
        self._context, self._options = context, dict(options)
        #: The configuration file, or None.
        self.file = config
        self.__dict__.update(self.reread())
        self.follow_log()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no option {name!r}")

    def reread(self) -> dict[str, Any]:
        """What the command line and the file say now, by parameter name."""
        if self.file is None:
            return self._options
        context, default = self._context, click.core.ParameterSource.DEFAULT
        told = files.read(self.file, context.command, context)
        given = {name for name in told if self._options[name] and context.get_parameter_source(name) != default}
        return {**self._options, **{name: value for name, value in told.items() if name not in given}}

    def follow_log(self) -> None:
        """Let the option `log` take effect."""
        logging.getLogger("libfp").setLevel(self.log.upper() if self.log else logging.NOTSET)

    def require_interfaces(self, instead: str = "") -> None:
        """Raise BadInput unless there are some, each once. `instead`: what else could be given."""
        if not self.interfaces:
            raise BadInput("no interface named", f"name the interfaces to route between{instead}")
        if len(set(self.interfaces)) != len(self.interfaces):
            raise BadInput(f"an interface is named twice in {' '.join(self.interfaces)}", "name each once")

    def without_linux(self, *more: str) -> bool:
        """Whether the options ask for a capture instead of interfaces: --pcap, --routes and those called `more`, all
        of them, and perhaps --out. Raises BadInput if only some are there.
        """
        wanted = ("pcap", "routes", *more)
        given = [name for name in (*wanted, "out") if getattr(self, name) is not None]
        if given and (self.interfaces or not set(wanted) <= set(given)):
            every = ", ".join(f"--{name}" for name in wanted)
            what = f"{every} and --out go together, without interfaces"
            raise BadInput(what, f"give {' and '.join(f'--{name}' for name in wanted)}")
        if given and self.profile:
            raise BadInput("--profile measures a loop, and a capture goes through none", "leave it out")
        return bool(given)


def run(
    command: str,
    settings: Settings,
    pipeline: Callable[[Linux], Pipeline],
    *,
    opening: Callable[[ExitStack], Mapping[str, Any]] = lambda undo: {},
    started: Callable[[Application, Linux], None] = lambda app, linux: None,
    reload: Callable[[], None] | None = None,
) -> None:
    """Run an application until it is told to end. `command` is its name on the command line.

    opening: called first; what it returns are more keywords of `Linux`, and what it puts on the stack is closed after
    everything else. started: called when the application has started: the place for commands of `app.control`.
    reload: called on SIGHUP, after the configuration file, if there is one, has been read again.
    """
    hup = settings.file is not None or reload is not None
    with Interrupts() as interrupts, Service(interrupts.asked, hup=hup) as service, ExitStack() as undo:
        say = Said(command, settings.as_json)
        more = opening(undo)
        interrupts.check()
        from libfp.linux.host import Linux  # numba and pyroute2 come with it

        def progress(what: str, done: int, total: int) -> None:
            service.progress(what, done, total)
            say.progress(what, done, total)

        say("reading Linux's links, addresses, neighbours and routes")
        chosen = {name: getattr(settings, name) for name in ("only", "mode", "bypass", "capacity")}
        with Linux(*settings.interfaces, progress=progress, wait=False, **chosen, **more) as linux:
            interrupts.check()
            made = pipeline(linux)
            say("compiling the pipeline (seconds at first, then from the cache)")
            options = {"kick": settings.kick, "idle": settings.idle, "sealed": settings.sealed}
            name = settings.name or f"{command}-{os.getpid()}"
            with made.start(linux.ports, settings.cores, name=name, frame_size=linux.frame_size, **options) as app:
                interrupts.check()
                service.reload = lambda: _reload(command, settings, linux, reload)
                started(app, linux)
                linux.wait_forwarding()
                with ExitStack() as watching:
                    watch = stopwatch(app, watching) if settings.profile else None
                    service.run(app, say.forwarding(app, linux), lambda: linux.synced, lambda: say.ready(app, linux))
                    if watch is not None:
                        say.profile(app, watch.total())
                    say.end(app)


def stopwatch(app: Application, undo: ExitStack) -> Stopwatch:
    """The clock of the workers' loops, as any other process may ask for it."""
    from libfp.engine.control import connect
    from libfp.engine.listen import Stopwatch

    watch = Stopwatch(undo.enter_context(connect(app.name)))
    undo.callback(watch.close)
    return watch


def _reload(command: str, settings: Settings, linux: Linux, more: Callable[[], None] | None) -> None:
    """Take over what the configuration file says now, as far as that goes while packets pass."""
    log = logging.getLogger(f"libfp.{command}")
    if settings.file is not None:
        try:
            _take_over(log, settings, settings.reread(), linux)
        except Error as error:
            log.error("the configuration stays as it was: %s", error)
            return
    if more is not None:
        more()


def _take_over(log: logging.Logger, settings: Settings, told: dict[str, Any], linux: Linux) -> None:
    actions = {"log": settings.follow_log, "bypass": lambda: linux.set_bypass(settings.bypass)}
    changed = [name for name, value in told.items() if value != getattr(settings, name)]
    done = [name for name in actions if name in changed]
    for name in done:
        setattr(settings, name, told[name])
        actions[name]()
    log.warning("configuration read again; changed: %s", ", ".join(done) or "nothing")
    later = sorted({"as_json": "json"}.get(name, name) for name in changed if name not in actions)
    if later:
        log.warning("changed in the configuration, but not without a restart: %s", ", ".join(later))


class Interrupts:
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


class Said:
    """What a command tells its user: lines on standard error for people, JSON lines on standard output."""

    def __init__(self, command: str, as_json: bool) -> None:
        self._prefix, self._json = f"fp {command}: ", as_json
        self._live = sys.stderr.isatty()
        self._told, self._shown, self._complete = 0, 0.0, True

    def __call__(self, text: str) -> None:
        if self._shown:  # a line that the progress is on
            click.echo("\r\033[K", err=True, nl=False)
            self._shown = 0.0
        journal.say(self._prefix + text)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far the first synchronisation is: in place on a terminal, else a line for each so many routes."""
        if what != "routes":
            return
        text = f"{done:,} of {total:,} routes are in the tables" if total else f"{done:,} routes read"
        if self._live:
            now = time.monotonic()
            if now > self._shown + SHOW_EVERY or (total and done >= total):
                self._shown = now
                click.echo(f"\r\033[K{self._prefix}{text}", err=True, nl=False)
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

    def profile(self, app: Any, total: dict[str, Any]) -> None:
        """Say what each part of the workers' loops has taken."""
        from libfp.cli.walk import lines

        for line in lines(total):
            self(line)
        self._line("profile", name=app.name, **total)
