"""How a worker's copies of the tables follow their masters.

For each table a worker has an arena of its own and a cell, the word that holds the arena's address. One mailbox, a
ring of (address, value) pairs, brings what all the tables log, in the order in which it was committed: a next hop
before the route that leads to it. Between two bursts the worker stores what the mailbox says, whole transactions up
to a budget; that is all it ever does about an update. What it has consumed it has acknowledged.

When the mailbox is full, the log is dropped and the replica is stale, and so are those of all tables that change from
then on. As soon as there is room, these are copied afresh and handed over together, in one transaction that stores the
new arenas' addresses into the cells; so order between the tables holds there too. Until then the worker uses the tables
as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from libfp.jit import Arena, entry, kernel, load64, store64
from libfp.rings.spsc import Spsc
from libfp.tables.per_worker import PerWorker
from libfp.tables.table import Table
from libfp.tables.words import BUDGET, HEADER

#: Elements of a mailbox: 256 KiB.
MAILBOX = 1 << 14

# A transaction in the mailbox: (_BEGIN, count), then `count` pairs of an address and the value to store there.
_BEGIN = 0


@kernel
def drain(mailbox, budget):  # type: ignore[no-untyped-def]
    """Apply what the mailbox (an `SpscView`) holds: whole transactions, up to `budget` words or one transaction.

    Called by the worker between two bursts. Returns the number of words stored.
    """
    there = mailbox.peek(mailbox.size)
    at = words = 0
    while at < there:
        count = load64(mailbox.item(at) + 8)
        if words > 0 and words + count > budget:
            break
        for i in range(at + 1, at + 1 + count):
            pair = mailbox.item(i)
            store64(load64(pair), load64(pair + 8))
        at += 1 + count
        words += count
    if at > 0:
        mailbox.release(at)
    return words


@entry
def _drain_all(mailbox):  # type: ignore[no-untyped-def]
    return drain(mailbox, mailbox.size)


@entry
def _deliver(mailbox, log, count, base):  # type: ignore[no-untyped-def]
    """Put a log into the mailbox, for the replica at `base`; all of it or nothing. Returns how many elements."""
    if mailbox.reserve(count) < count:
        return 0
    for i in range(count):
        offset, slot = load64(log + 16 * i), mailbox.slot(i)
        store64(slot, _BEGIN if offset == HEADER else base + 8 * offset)
        store64(slot + 8, load64(log + 16 * i + 8))
    mailbox.commit(count)
    return count


class Replicas:
    """One worker's replicas of `tables`, in order of no importance; each table once. Of what is a `PerWorker` among
    them, which has no master to follow, its part of worker number `worker`.

    `mailbox` is what the worker hands to `drain`, ``view(table)`` what its loop looks things up in. Call `reset`
    before the worker's thread starts, `stop` after it has ended, and `flush` every few milliseconds meanwhile. While
    no worker runs, `flush` itself brings the replicas up to date. A worker that does not run has acknowledged
    everything. Thread-safe; nothing here waits for the worker.
    """

    def __init__(self, tables: Iterable[Any], *, mailbox: int = MAILBOX, worker: int = 0) -> None:
        given = {id(table): table for table in tables}.values()
        self.tables: list[Table] = [table for table in given if not isinstance(table, PerWorker)]
        assert len(self.tables) < min(mailbox, BUDGET), "a fresh copy of every table is one transaction"
        self.running = False
        #: How often replicas were copied afresh because the worker could not keep up, or after a bulk load.
        self.copies = 0
        self._ring = Spsc(mailbox, element=16)
        self._cells = Arena(8 * max(len(self.tables), 1))
        self._cell = {id(table): self._cells.address + 8 * i for i, table in enumerate(self.tables)}
        self._views: dict[int, Any] = {}
        self._arenas: dict[int, Arena] = {}
        self._retired: list[Arena] = []
        self._retired_at = 0
        self._stale: set[int] = set()  # the ids of tables
        self._lock = threading.Lock()
        _deliver(self._ring.view, 0, 0, 0)  # compiles now, not when the first change is to be delivered
        with self._all_tables():
            self._fresh()
            for table in self.tables:
                table.subscribe(self)
        self._own: list[tuple[PerWorker[Any], Any]] = []
        try:
            for one in given:
                if isinstance(one, PerWorker):
                    self._own.append((one, one.join(worker)))
                    self._views[id(one)] = self._own[-1][1].view
        except BaseException:
            self.close()
            raise

    @property
    def mailbox(self) -> Any:
        """The mailbox as compiled code sees it."""
        return self._ring.view

    def view(self, table: Any) -> Any:
        """This worker's replica (or part) of `table`, as compiled code sees it: the same object each time."""
        if id(table) not in self._views:
            self._views[id(table)] = table.view_for(self._cell[id(table)])
        return self._views[id(table)]

    def reset(self) -> None:
        """Start with fresh copies and an empty mailbox: the worker runs from now on. It must not run yet."""
        with self._all_tables(), self._lock:
            self._fresh()
            self.running = True

    def stop(self) -> None:
        """The worker has ended."""
        with self._lock:
            self.running = False

    def flush(self) -> bool:
        """Bring stale replicas up to date if there is room by now, and free what the worker no longer uses.

        Returns whether everything committed is in the replicas or on its way there. While the worker runs, a table
        that is being changed is not waited for.
        """
        if self.running:
            with self._lock:
                return self._settle()
        with self._all_tables(), self._lock:
            if not self.running:
                _drain_all(self._ring.view)
                self._settle()
                _drain_all(self._ring.view)
            return self._settle()

    @property
    def waiting(self) -> int:
        """Elements of the mailbox that the worker is still to take: who changes much at once may wait for it here."""
        return len(self._ring)

    def acknowledged(self) -> bool:
        """Whether the worker has applied everything committed so far."""
        with self._lock:
            return not self.running or (not self._stale and len(self._ring) == 0)

    def close(self) -> None:
        """Follow the tables no longer and free everything. The worker must have ended."""
        for table in self.tables:
            with table.lock:
                table.unsubscribe(self)
        while self._own:
            owner, part = self._own.pop()
            owner.leave(part)
        with self._lock:
            for arena in [*self._arenas.values(), *self._retired, self._cells]:
                arena.close()
            self._ring.close()

    # What tables call, with their locks held: see `libfp.tables.table.Subscriber`.

    def deliver(self, table: Table, log: int, count: int) -> None:
        with self._lock:
            if not self._stale and _deliver(self._ring.view, log, count, self._arenas[id(table)].address):
                return
            self._stale.add(id(table))
            self._settle()

    def refresh(self, table: Table) -> None:
        with self._lock:
            self._stale.add(id(table))
            self._settle()

    def mark(self) -> int:
        return self._ring.view.written()

    def passed(self, table: Table, mark: int) -> bool:
        # What is still to be applied to a stale replica goes to an arena that nothing else is stored to; the next is
        # new.
        return not self.running or id(table) in self._stale or bool(self._ring.view.passed(mark))

    def reached(self, table: Table) -> Callable[[], bool]:
        mark: int | None = None

        def ask() -> bool:
            nonlocal mark
            with self._lock:
                if not self.running:
                    return True
                if id(table) in self._stale:
                    mark = None  # what was on its way goes to the old copy; the new one is still to be posted
                    return False
                if mark is None:
                    mark = self._ring.view.written()
                return bool(self._ring.view.passed(mark))

        ask()
        return ask

    def _settle(self) -> bool:
        """`flush`, with the lock held."""
        if self._retired and self._ring.view.passed(self._retired_at):
            for arena in self._retired:
                arena.close()
            self._retired.clear()
        if self._stale and not self._retired:
            with ExitStack() as stack:
                stale = [table for table in self.tables if id(table) in self._stale]
                for table in stale:
                    if not table.lock.acquire(blocking=False):
                        return False
                    stack.callback(table.lock.release)
                self._hand_over(stale)
        return not self._stale

    def _hand_over(self, stale: list[Table]) -> None:
        """Copy these tables, all that are stale, and post the new arenas' addresses. Their locks are held."""
        mailbox, count = self._ring.view, len(stale)
        if mailbox.reserve(count + 1) < count + 1:
            return
        self._retired = [self._arenas[id(table)] for table in stale]
        store64(mailbox.slot(0), _BEGIN)
        store64(mailbox.slot(0) + 8, count)
        for i, table in enumerate(stale):
            arena = self._arenas[id(table)] = table.copy_words()
            store64(mailbox.slot(i + 1), self._cell[id(table)])
            store64(mailbox.slot(i + 1) + 8, arena.address)
        mailbox.commit(count + 1)
        self._retired_at = mailbox.written()
        self._stale.clear()
        self.copies += 1

    def _fresh(self) -> None:
        """Copy all tables while no worker runs."""
        for arena in [*self._arenas.values(), *self._retired]:
            arena.close()
        self._arenas.clear()
        self._retired.clear()
        self._ring.reset(self._ring.view.written())  # marks that tables have taken stay valid
        for table in self.tables:
            arena = self._arenas[id(table)] = table.copy_words()
            store64(self._cell[id(table)], arena.address)
        self._stale.clear()

    def _all_tables(self) -> ExitStack:
        """The locks of all tables, always taken in one order."""
        stack = ExitStack()
        for table in sorted(self.tables, key=id):
            stack.enter_context(table.lock)
        return stack
