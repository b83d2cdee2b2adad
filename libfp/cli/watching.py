"""What `fp trace` and `fp capture` share: the tap on an instance, and which of its packets are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import click

from libfp.engine.control import connect
from libfp.engine.dissect import Headers, dissect
from libfp.engine.expression import compile_filter
from libfp.engine.listen import Listener
from libfp.engine.slots import Record


class Watch:
    """Those packets of the instance `name` that match the words of `expression`: a context manager.

    The filter is read before the instance is asked. Iterating gives (number from 0, worker, packet, its headers),
    until `count` have come, the instance ends, or `seconds` have passed.
    """

    def __init__(
        self, name: str | None, expression: tuple[str, ...], *, snap: int, slots: int, count: int, seconds: float | None
    ) -> None:
        self._wanted = compile_filter(" ".join(expression))
        self._snap, self._slots, self.count, self._seconds = snap, slots, count, seconds
        self._name = name
        self._resources = ExitStack()

    def __enter__(self) -> Watch:
        connection = connect(self._name)
        with ExitStack() as undo:
            undo.callback(connection.close)
            self.listener = undo.enter_context(Listener(connection, snap=self._snap, slots=self._slots))
            self._resources = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def __iter__(self) -> Iterator[tuple[int, int, Record, Headers]]:
        number = 0
        for worker, record in self.listener.records(self._seconds):
            headers = dissect(record.data, record.length)
            if self._wanted(headers):
                yield number, worker, record, headers
                number += 1
                if number == self.count:
                    return

    def report_loss(self) -> None:
        """Say how many packets were missed because this process was too slow."""
        if lost := self.listener.dropped:
            click.echo(f"fp: {lost} packet{'s' * (lost != 1)} came faster than they could be looked at", err=True)
