"""What all tables have in common: a master that the control plane changes, and replicas that follow it.

The control plane owns the master and is the only one to change it. Each worker looks things up in a replica of its
own. A change is stored into the master, logged word by word, and on `commit` the log is handed to every subscriber
(`libfp.engine.replicas.Replicas`), which brings it to its worker. No worker ever waits for the control plane, nor the
control plane for a worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from libfp.jit import Arena, store64
from libfp.tables.words import LOG_ROOM, Words


class Subscriber(Protocol):
    """Who keeps a replica. All methods are called with the table's lock held, and none may wait."""

    def deliver(self, table: Table, log: int, count: int) -> None:
        """Take over the `count` elements of the log at address `log`: whole transactions, in order."""

    def refresh(self, table: Table) -> None:
        """There is no log: the replica needs a fresh copy of the whole table."""

    def mark(self) -> int:
        """A mark behind everything delivered so far."""

    def passed(self, table: Table, mark: int) -> bool:
        """Whether the worker has acknowledged everything of `table` delivered before `mark`."""

    def reached(self, table: Table) -> Callable[[], bool]:
        """A question to be repeated, without the lock: does the worker go by all of `table` delivered until now?"""


class Table:
    """Base of all tables. Methods may be called from any thread; one lock a table makes changes one at a time.

    Every change is committed as it is made, unless a `batch` is open. Views hold addresses only: keep the table while
    a view of it is in use.
    """

    def __init__(self, words: Words) -> None:
        self.lock = threading.RLock()
        self._cell = Arena(8)  # holds the address of the master's arena, which a bulk load replaces
        self._words = words
        self._subscribers: list[Subscriber] = []
        self._held = 0
        self._marks: list[tuple[Subscriber, int]] | None = None
        self._marked = 0
        store64(self._cell.address, words.arena.address)

    def view_for(self, cell: int) -> Any:
        """The table as compiled code sees it, over the arena whose address the word at address `cell` holds."""
        raise NotImplementedError

    def view(self) -> Any:
        """The master as compiled code sees it. Only to be used while nothing changes the table."""
        return self.view_for(self._cell.address)

    def stage_tables(self) -> tuple[Table, ...]:
        """A stage that is given this table needs a replica of it for each worker."""
        return (self,)

    def stage_view(self, replica: Callable[[Table], Any]) -> Any:
        """What the stage then looks things up in."""
        return replica(self)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Hold the lock, and hand over the changes made inside together when it ends (or in parts, if they are many).

        Faster than one at a time. Each change still takes effect by itself: a batch is not a transaction.
        """
        with self.lock:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1
                self.commit()

    def commit(self) -> None:
        """Hand what was logged to all subscribers. Every method that changes the table does so by itself."""
        with self.lock:
            if self._held == 0 or self._words.logged >= LOG_ROOM // 16:
                self._hand_over()

    def wait_applied(self, timeout: float = 10.0) -> None:
        """Return when every worker goes by all changes made before this call. Raises TimeoutError.

        Those that sleep are not woken: they look every 10 ms.
        """
        end = time.monotonic() + timeout
        with self.lock:
            waiting = [one.reached(self) for one in self._subscribers]
        while waiting := [reached for reached in waiting if not reached()]:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(waiting)} workers have not taken in a table's changes within {timeout:g} s")
            time.sleep(0.0005)

    def _hand_over(self) -> None:
        words = self._words
        for one in self._subscribers:
            if words.lost:
                one.refresh(self)
            elif words.logged:
                one.deliver(self, words.log, words.logged)
        words.committed()
        self._reuse()

    def _reuse(self) -> None:
        """Let go what every subscriber has acknowledged, one grace period at a time."""
        words = self._words
        for _ in range(2):
            if self._marks is None:
                self._marks = [(one, one.mark()) for one in self._subscribers]
                self._marked = words.version
            if not all(one.passed(self, mark) for one, mark in self._marks):
                return
            words.acknowledged(self._marked)
            self._marks = None

    def replace(self, words: Words) -> None:
        """Let `words`, built aside, be the table from now on. Replicas get a fresh copy."""
        with self.lock:
            old, self._words = self._words, words
            store64(self._cell.address, words.arena.address)
            self._marks = None
            words.committed()  # what building it logged
            words.log_changes(bool(self._subscribers))
            for one in self._subscribers:
                one.refresh(self)
            self._reuse()
            old.close()

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have every later change delivered to `subscriber`."""
        with self.lock:
            self._hand_over()
            self._subscribers.append(subscriber)
            self._words.log_changes(True)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Deliver nothing more to `subscriber`, and wait for it no longer."""
        with self.lock:
            self._hand_over()
            self._subscribers.remove(subscriber)
            if self._marks is not None:
                self._marks = [(one, mark) for one, mark in self._marks if one is not subscriber]
            self._words.log_changes(bool(self._subscribers))

    def copy_words(self) -> Arena:
        """A fresh arena with the table's words as they are now: a replica. Call with the lock held."""
        return self._words.copy(self._extents())

    def _extents(self) -> list[tuple[int, int]]:
        """The words in use: from, to."""
        return [(0, self._words.used)]

    # A table is a thing and not a value, though it is a mapping: two are equal if they are the same.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def replica_bytes(self) -> int:
        """Bytes of a replica that are in use: what a worker's lookups range over."""
        return 8 * sum(end - begin for begin, end in self._extents())


@contextmanager
def staged(array: np.ndarray) -> Iterator[Arena]:
    """An arena that begins with the bytes of `array`, for compiled code to read."""
    arena = Arena(max(array.nbytes, 8))
    try:
        arena.buffer[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield arena
    finally:
        arena.close()
