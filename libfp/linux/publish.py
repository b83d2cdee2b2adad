"""Decisions into `Routes`: prefixes to next-hop indexes, next-hop indexes to actions.

All routes through one gateway share a next hop, so that a neighbour that changes costs one write. Order matters, as
every write is seen by running workers in the order made: a next hop is written before the first route to it, and
removed after the last. So prefixes are collected, and written together by `flush`: longer ones before shorter ones, so
that a packet never meets a shorter one because a longer one is still to come. It meets none then, and goes to Linux.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from libfp.errors import TableFull
from libfp.linux.decide import NO_NEIGHBOUR, VIA_LINUX, Paths, Via
from libfp.linux.prefixes import PrefixMap, unique
from libfp.linux.rtnetlink import Prefix
from libfp.stages.next_hops import Action, Drop, Forward, Multipath, Punt
from libfp.stages.routes import Routes

Key = Via | Paths | Punt | Drop  # what a next hop is known by: a neighbour or several, or an action itself


@dataclass
class _Entry:
    key: Key
    index: int
    users: int
    action: Action


class _Family:
    """One table of prefixes, and the next-hop indexes that it has, or should have."""

    def __init__(self, table: Any, bits: int) -> None:
        self.table, self.wanted = table, PrefixMap(bits)
        self.unwritten: list[np.ndarray] = []  # rows of prefixes whose index in the table may be another

    def flush(self) -> None:
        if not self.unwritten:
            return
        rows = self.unwritten[0] if len(self.unwritten) == 1 else unique(np.concatenate(self.unwritten))
        rows = rows[np.argsort(-rows[:, 2], kind="stable")]
        self.unwritten = [rows]
        indexes = self.wanted.get_all(rows)
        stored = indexes != 0
        order = np.concatenate([np.flatnonzero(stored), np.flatnonzero(~stored)[::-1]])
        try:
            self._apply(rows[order], indexes[order])
        except TableFull:  # perhaps there is room when the others are gone
            order = np.roll(order, len(order) - int(stored.sum()))
            self._apply(rows[order], indexes[order])
        self.unwritten = []

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """What the table holds: rows and indexes."""
        addresses, lengths, indexes = self.table.routes()
        halves = addresses if self.wanted.bits == 128 else np.column_stack([addresses, np.zeros_like(addresses)])
        return np.column_stack([halves.astype(np.int64), lengths]), np.asarray(indexes)

    def _apply(self, rows: np.ndarray, indexes: np.ndarray) -> None:
        addresses = rows[:, 0] if self.wanted.bits == 32 else rows[:, :2].view(np.uint64)
        self.table.apply(addresses, rows[:, 2], indexes)


class Publisher:
    """The only writer of one `Routes`. `resolve` says what a `Via` does at the moment.

    Raises TableFull from the tables. While `suspended`, every next hop is Punt("via-linux"): Linux forwards alone.
    Until `complete`, so is what no prefix in the tables holds.
    """

    def __init__(self, routes: Routes, resolve: Callable[[Via], Forward | Punt]) -> None:
        self._routes, self._next_hops = routes, routes.next_hops
        self._resolve = resolve
        self._hops: dict[Key, _Entry] = {}
        self._by_index: dict[int, _Entry] = {}
        self._by_link: dict[int, set[Via]] = {}
        self._fresh: set[int] = set()  # groups to which nothing leads yet
        self._idle: set[int] = set()  # indexes to which nothing may lead any more once all is written
        self.families = {32: _Family(routes.fib, 32), 128: _Family(routes.fib6, 128)}
        self.suspended = False
        routes.set_complete(False)

    def __len__(self) -> int:
        return sum(len(family.wanted) for family in self.families.values())

    def get(self, prefix: Prefix) -> Key | None:
        """What was last set for exactly this prefix."""
        index = self.families[prefix.bits].wanted.get(prefix)
        return self._by_index[index].key if index else None

    def said(self, index: int) -> Key | None:
        """The next hop of that index."""
        return self._by_index[index].key if index in self._by_index else None

    def set(self, prefix: Prefix, key: Key | None) -> None:
        """Route a prefix to a next hop, or, with None, nowhere; done by the next `flush`."""
        family, index = self.families[prefix.bits], self.index(key)
        old = family.wanted.put(prefix, index)
        if old != index:
            self._inherit(index, old)
            family.unwritten.append(np.array([prefix.row()], np.int64))
            self._count(index, 1)
            self._count(old, -1)

    def set_all(self, bits: int, rows: np.ndarray, indexes: np.ndarray) -> None:
        """`set` many prefixes of one family to what `index` gave, 0 for nowhere."""
        family = self.families[bits]
        old = family.wanted.put_all(rows, indexes)
        differ = old != indexes
        if differ.any():
            for index in self._fresh & set(indexes[differ].tolist()):
                before = old[differ & (indexes == index) & (old != 0)]
                self._inherit(index, int(before[0]) if len(before) else 0)
            family.unwritten.append(rows[differ])
            for counted, by in ((indexes, 1), (old, -1)):
                counts = np.bincount(counted[differ])
                for index in np.flatnonzero(counts).tolist():
                    self._count(index, by * int(counts[index]))

    def index(self, key: Key | None) -> int:
        """The index of a next hop, which is made if need be, and goes with the next `flush` if nothing leads to it."""
        if key is None:
            return 0
        entry = self._hops.get(key)
        if entry is None:
            action = self._action(key)
            entry = self._hops[key] = _Entry(key, self._next_hops.add(action), 0, action)
            self._by_index[entry.index] = entry
            self._idle.add(entry.index)
            if isinstance(key, Via):
                self._by_link.setdefault(key.link, set()).add(key)
            if isinstance(key, Paths):
                self._fresh.add(entry.index)
                for path, _ in key.paths:
                    self._count(self._hops[path].index, 1)
        return entry.index

    def _inherit(self, index: int, old: int) -> None:
        """A group that takes the place of `old` leaves flows where they are, as far as it can."""
        if index in self._fresh:
            self._fresh.discard(index)
            if old and not self.suspended:
                self._next_hops.inherit(index, old)

    def _count(self, index: int, by: int) -> None:
        if index:
            entry = self._by_index[index]
            entry.users += by
            if entry.users == 0:
                self._idle.add(index)

    def flush(self) -> None:
        """Write what was set. On TableFull, what did not fit is written by a later flush, when there is room."""
        for family in self.families.values():
            family.flush()
        while self._idle:  # with a group its paths may become idle
            entry = self._by_index[self._idle.pop()]
            if entry.users == 0:
                self._remove(entry)

    def _remove(self, entry: _Entry) -> None:
        del self._hops[entry.key], self._by_index[entry.index]
        self._fresh.discard(entry.index)
        if isinstance(entry.key, Paths):
            for path, _ in entry.key.paths:
                self._count(self._hops[path].index, -1)
        if isinstance(entry.key, Via):
            self._by_link[entry.key.link].discard(entry.key)
        self._next_hops.remove(entry.index)

    def refresh(self, vias: Iterable[Via]) -> None:
        """Look again at what these next hops do; those that nothing uses are skipped."""
        for via in vias:
            entry = self._hops.get(via)
            if entry is not None:
                self._write(entry)

    def through(self, link: int, address: bytes | None = None) -> list[Via]:
        """The next hops in use on a link, or those of one neighbour on it."""
        return [via for via in self._by_link.get(link, ()) if address is None or via.gateway == address]

    def used(self) -> list[Via]:
        """The neighbours that workers have sent packets to since the last call."""
        found = (self._by_index[index].key for index in self._next_hops.used() if index in self._by_index)
        return [key for key in found if isinstance(key, Via)]

    def via(self, index: int) -> Via | None:
        """Which neighbour the next hop of that index is, if it is one."""
        key = self.said(index)
        return key if isinstance(key, Via) else None

    def suspend(self, suspended: bool) -> None:
        """Leave every packet to Linux, or stop doing so."""
        self.suspended = suspended
        for entry in self._hops.values():
            self._write(entry)

    def complete(self) -> None:
        """All prefixes are in the tables: what they do not hold has no route."""
        if not self._routes.complete:
            self._routes.set_complete(True)

    def check(self) -> Iterator[tuple[Key, Action, Action]]:
        """Next hops that do not do what they are due to, with what they do and what is due."""
        for entry in self._hops.values():
            held, due = self._next_hops[entry.index], self._action(entry.key)
            if held != due:
                yield entry.key, held, due

    def unresolved(self) -> list[Via]:
        """Paths of groups without a neighbour. Linux would resolve the path that *it* takes for a packet we hand it."""
        paths = {path for key in self._hops if isinstance(key, Paths) for path, _ in key.paths if isinstance(path, Via)}
        return [path for path in paths if self._hops[path].action == NO_NEIGHBOUR]

    def _action(self, key: Key) -> Action:
        if self.suspended:
            return VIA_LINUX
        if isinstance(key, Paths):
            return Multipath(tuple((self.index(path), weight) for path, weight in key.paths))
        return self._resolve(key) if isinstance(key, Via) else key

    def _write(self, entry: _Entry) -> None:
        action = self._action(entry.key)
        if action != entry.action:
            self._next_hops[entry.index] = action
            entry.action = action
