"""The command line's manners: help, exit statuses, one line per error."""

from __future__ import annotations

import errno
import subprocess
import sys

import click
import pytest

import libfp
from libfp.cli import COMMANDS, fp, main
from libfp.cli.options import Seconds


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, "-m", "libfp", *arguments], capture_output=True, text=True, **kwargs)


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name, (_, line) in COMMANDS.items():
        assert name in done.stdout
        assert line.split()[0] in done.stdout


def test_version():
    assert run("--version").stdout.strip() == f"fp, version {libfp.__version__}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_help(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: fp {name}")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["stats", "--nonsense"]])
def test_usage_errors_exit_with_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("fp: no such ")
    assert done.stderr.count("\n") == 1
    assert "nonsense" in done.stderr
    assert done.stderr.rstrip().endswith("--help")


@pytest.fixture
def failing(monkeypatch):
    """A command that raises what the test tells it to."""
    raised: list[BaseException] = []

    @fp.command("fail")
    def fail():
        raise raised[0]

    monkeypatch.setattr(type(fp), "get_command", lambda self, ctx, name: fail)
    yield raised
    del fp.commands["fail"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            libfp.InterfaceBusy("eth0 has a program", "detach it:\n ip link"),
            2,
            "eth0 has a program; detach it: ip link",
        ),
        (libfp.TableFull("table full"), 2, "table full"),
        (click.ClickException("no"), 2, "no"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 2, "/x: No such file; fp -vv says where"),
    ],
)
def test_errors_are_one_line_and_a_status(failing, capsys, error, status, line):
    failing.append(error)
    assert main(["fail"]) == status
    assert capsys.readouterr().err.strip() == f"fp: {line}"


def test_unexpected_failures_keep_their_traceback(failing):
    failing.append(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m libfp --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("output", ["/dev/full", None])
def test_output_that_cannot_be_written_is_one_line(output):
    redirected = f"> {output}" if output else ">&-"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m libfp --version {redirected}"], stderr=subprocess.PIPE)
    assert done.returncode == (2 if output else 0)
    said = b"fp: cannot write standard output: No space left on device; make room, or write elsewhere\n"
    assert done.stderr == (said if output else b"")


@pytest.mark.parametrize("text", ["nan", "inf", "1e30", "-1", "x"])
def test_seconds_are_numbers(text):
    with pytest.raises(click.BadParameter, match=f"'{text}' is no number from 0 to"):
        Seconds().convert(text, None, None)
