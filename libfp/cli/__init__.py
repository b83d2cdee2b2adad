"""The `fp` command. Each subcommand's module is imported when it is run or asked for its help, not before.

A `libfp.Error` becomes one line on standard error and exit status 2; Ctrl-C ends with 130, as in a shell.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import click

from libfp import __version__
from libfp.cli import journal
from libfp.errors import Error

__all__ = ["main", "run"]

# name -> (module:attribute of the click command, the help line `fp --help` shows without importing it)
COMMANDS = {
    "capture": ("libfp.cli.capture:capture", "Write packets of a running instance to a pcapng file."),
    "demo": ("libfp.cli.demo:demo", "Run client, router and server in namespaces, with real traffic."),
    "firewall": ("libfp.apps.firewall.cli:firewall", "Route, and filter by the kernel's own nftables rules."),
    "gen": ("libfp.cli.gen:gen", "Generate packets, and say what came of them; RFC 2544."),
    "ipsec": ("libfp.apps.ipsec.cli:ipsec", "Route, through ESP tunnels where policies say so."),
    "router": ("libfp.apps.router.cli:router", "Route IPv4 and IPv6 between interfaces, with Linux's own routes."),
    "stats": ("libfp.cli.stats:stats", "Show the counters of a running instance."),
    "trace": ("libfp.cli.trace:trace", "Show packets of a running instance through every stage."),
}


class LazyGroup(click.Group):
    """A group that knows its subcommands' names and help lines without their modules."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Also: fp router verify, fp firewall rules, fp ipsec sas, block and release.",
)
@click.version_option(__version__, prog_name="fp")
@click.option("-v", "--verbose", count=True, help="Log more: -v what happens, -vv in detail.")
def fp(verbose: int) -> None:
    """libfp: a packet fast path for Linux. Linux decides; the fast path applies it, a few million times a second."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(journal.Formatter("fp: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 for an error that the user can act on."""
    return run(fp, "fp", arguments)


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command, one of your own as well, so that what goes wrong is one line; return its exit status.

    `arguments` are those of the process if None.
    """
    try:
        result = command.main(args=arguments, prog_name=name, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is told here, in a line; Python would do it at exit
    except Error as error:
        journal.say(f"{name}: {' '.join(str(error).split())}", journal.ERR)
        return 2
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
            return 2
        what = " ".join(error.format_message().split()).rstrip(".")
        where = error.ctx.command_path if error.ctx else name
        journal.say(f"{name}: {what[:1].lower()}{what[1:]}; {where} --help", journal.ERR)
        return 2
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{name}: interrupted", err=True)
        return 130
    except OSError as error:
        # Python would try again at exit, and complain. That the reader of our output (head, less) has gone is no error.
        with contextlib.suppress(OSError, AttributeError):  # closed, or not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        logging.getLogger("libfp").debug("where it failed", exc_info=True)
        journal.say(f"{name}: {_said(error)}", journal.ERR)
        return 2
    return result if isinstance(result, int) else 0


def _said(error: OSError) -> str:
    """What the system refuses, where nothing has made it an error of libfp's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {error.filename or 'standard output'}: {error.strerror}; make room, or write elsewhere"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; fp -vv says where"
