"""Lines fit for the journal: sd-daemon(3)'s <N> before each, where standard error is the journal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

import click

ERR, WARNING, INFO, DEBUG = 3, 4, 6, 7
_OF_LEVEL = {logging.WARNING: WARNING, logging.INFO: INFO, logging.DEBUG: DEBUG}


def in_journal() -> bool:
    """Whether JOURNAL_STREAM (systemd.exec(5)) names what standard error is."""
    with contextlib.suppress(OSError, ValueError):
        there = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"
    return False


def say(text: str, priority: int = INFO) -> None:
    """A line on standard error."""
    if sys.stderr is not None:
        click.echo(f"<{priority}>{text}" if in_journal() else text, err=True)


class Formatter(logging.Formatter):
    """Every line of a record with its priority, where that is wanted."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not in_journal():
            return text
        priority = _OF_LEVEL.get(record.levelno, ERR if record.levelno > logging.WARNING else DEBUG)
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())
