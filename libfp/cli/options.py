"""The options that every application has on the command line, and commands in the place of the first interface."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import click

from libfp.errors import BadInput

__all__ = ["Command", "Seconds", "common", "offline"]

F = TypeVar("F", bound=Callable[..., Any])

LONGEST = 1e8  # seconds, three years
LEVELS = ("error", "warning", "info", "debug")


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


class Seconds(click.ParamType):
    """A number of seconds from `least` to `most`; "nan" and "inf" are none."""

    name = "seconds"

    def __init__(self, least: float = 0.0, most: float = LONGEST) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not self.least <= found <= self.most:
            self.fail(f"{value!r} is no number from {self.least:g} to {self.most:,.0f}", parameter, context)
        return found


def common(application: str, config: str = "Read options from a TOML file; SIGHUP reads it again.") -> Callable[[F], F]:
    """A decorator of click commands: the interfaces, and the options that all applications have."""
    return _all(
        click.argument("interfaces", nargs=-1, metavar="[IF]..."),
        click.option(
            "--cores", callback=_cores, metavar="LIST", help="Cores for workers, one each: 2 or 2,3 or 2-5. [one]"
        ),
        click.option(
            "--kick",
            type=click.Choice(["auto", "inline", "helper"]),
            default="auto",
            help="Who makes AF_XDP's system calls: the worker itself, or a helper thread on a core of its own.",
        ),
        click.option(
            "--idle", type=click.Choice(["park", "spin"]), default="park", help="What a worker without packets does."
        ),
        # A proof: seccomp kills a worker that makes a system call, even to end. With --kick helper --idle spin.
        click.option("--sealed", is_flag=True, hidden=True),
        click.option("--only", multiple=True, metavar="PREFIX", help="Take only packets to PREFIX; may be repeated."),
        click.option(
            "--mode",
            type=click.Choice(["auto", "native", "skb"]),
            default="auto",
            help="How XDP is attached: in the driver, or generically (slow, works everywhere).",
        ),
        click.option(
            "--capacity",
            type=click.IntRange(1, 1 << 24),
            default=1 << 20,
            metavar="N",
            help="Room for N routes and neighbours.  [1048576]",
        ),
        click.option(
            "--bypass", is_flag=True, help="Forward although Linux would decide otherwise (filters, policy rules)."
        ),
        click.option("--name", metavar="NAME", help=f"What `fp stats` calls this instance.  [{application}-PID]"),
        click.option(
            "--profile", is_flag=True, help="Measure what each part of the loop takes, and print it at the end."
        ),
        click.option("--log", type=click.Choice(LEVELS), help="What is logged.  [what fp -v says]"),
        click.option("--config", metavar="FILE", help=config),
        click.option("--json", "as_json", is_flag=True, help="Print JSON lines: forwarding, ready (all routes), end."),
    )


def offline(others: str = "") -> Callable[[F], F]:
    """The options of an application that also runs over a capture, see `libfp.cli.offline`. `others`: what else has its
    routes from a file."""
    return _all(
        click.option("--pcap", metavar="FILE", help="Instead of interfaces: forward what this capture holds."),
        click.option(
            "--routes",
            metavar="FILE",
            help=f"With --pcap{others}: the routes, one a line, as `ip route` has them.",
        ),
        click.option("--out", metavar="FILE", help="With --pcap: write what leaves, as pcap, or pcapng by that name."),
    )


def _all(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for one in reversed(decorators):
            function = one(function)
        return function

    return decorate


class Command(click.Command):
    """A command that takes interfaces, and has commands of its own in the place of the first: `commands` says of each
    name where it is, as "module:attribute". `tables` is what its configuration file says beside options.
    """

    def __init__(
        self, *arguments: Any, commands: dict[str, str] | None = None, tables: Collection[str] = (), **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self.commands, self.tables = commands or {}, tables

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if not args or args[0] not in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        module, _, attribute = self.commands[args[0]].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
