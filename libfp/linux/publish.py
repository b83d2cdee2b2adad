"""Decisions into `Routes`: prefixes to next-hop indexes, next-hop indexes to actions.

All routes through one gateway share a next hop, so that a neighbour that changes costs one write. Order matters, as
every write is seen by running workers in the order made: a next hop is written before the first route to it, and
removed after the last. So prefixes are collected, and written together by `flush`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from libfp.errors import TableFull
from libfp.linux.decide import VIA_LINUX, Via
from libfp.linux.rtnetlink import Prefix
from libfp.stages.routes import Drop, Forward, Punt, Routes

Key = Via | Punt | Drop  # what a next hop is known by: a neighbour, whose action changes, or an action itself


@dataclass
class _Entry:
    index: int
    users: int
    action: Forward | Punt | Drop


class Publisher:
    """The only writer of one `Routes`. `resolve` says what a `Via` does at the moment.

    Raises TableFull from the tables. While `suspended`, every next hop is Punt("via-linux"): Linux forwards alone.
    """

    def __init__(self, routes: Routes, resolve: Callable[[Via], Forward | Punt]) -> None:
        self._routes = routes
        self._resolve = resolve
        self._hops: dict[Key, _Entry] = {}
        self._by_link: dict[int, set[Via]] = {}
        self._by_index: dict[int, Via] = {}
        self._prefixes: dict[Prefix, Key] = {}
        self._unwritten: dict[Prefix, int] = {}  # next-hop indexes, 0 to remove
        self._released: list[Key] = []  # no longer led to, once `_unwritten` is written
        self.suspended = False

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, prefix: Prefix) -> Key | None:
        """What was last set for exactly this prefix."""
        return self._prefixes.get(prefix)

    def set(self, prefix: Prefix, key: Key | None) -> None:
        """Route a prefix to a next hop, or, with None, nowhere; done by the next `flush`."""
        old = self._prefixes.get(prefix)
        if old == key:
            return
        if key is None:
            self._unwritten[prefix] = 0
            del self._prefixes[prefix]
        else:
            self._unwritten[prefix] = self._acquire(key)
            self._prefixes[prefix] = key
        if old is not None:
            self._released.append(old)

    def flush(self) -> None:
        """Write what was set. On TableFull, what did not fit is written by a later flush, when there is room."""
        if self._unwritten:
            stored = [(prefix, index) for prefix, index in self._unwritten.items() if index]
            removed = [(prefix, 0) for prefix, index in self._unwritten.items() if not index]
            try:
                self._apply(stored + removed)
            except TableFull:
                self._apply(removed + stored)
            self._unwritten.clear()
        released, self._released = self._released, []
        for key in released:
            self._release(key)

    def _apply(self, changes: list[tuple[Prefix, int]]) -> None:
        self._routes.fib.apply(
            [prefix.address for prefix, _ in changes],
            [prefix.length for prefix, _ in changes],
            [index for _, index in changes],
        )

    def refresh(self, vias: Iterable[Via]) -> None:
        """Look again at what these next hops do; those that nothing uses are skipped."""
        for via in vias:
            entry = self._hops.get(via)
            if entry is not None:
                self._write(via, entry)

    def through(self, link: int, address: bytes | None = None) -> list[Via]:
        """The next hops in use on a link, or those of one neighbour on it."""
        return [via for via in self._by_link.get(link, ()) if address is None or via.gateway == address]

    def used(self) -> list[Via]:
        """The neighbours that workers have sent packets to since the last call."""
        return [self._by_index[index] for index in self._routes.next_hops.used() if index in self._by_index]

    def via(self, index: int) -> Via | None:
        """Which neighbour the next hop of that index is."""
        return self._by_index.get(index)

    def suspend(self, suspended: bool) -> None:
        """Leave every packet to Linux, or stop doing so."""
        self.suspended = suspended
        for key, entry in self._hops.items():
            self._write(key, entry)

    def _action(self, key: Key) -> Forward | Punt | Drop:
        if self.suspended:
            return VIA_LINUX
        return self._resolve(key) if isinstance(key, Via) else key

    def _write(self, key: Key, entry: _Entry) -> None:
        action = self._action(key)
        if action != entry.action:
            self._routes.next_hops[entry.index] = action
            entry.action = action

    def _acquire(self, key: Key) -> int:
        entry = self._hops.get(key)
        if entry is None:
            action = self._action(key)
            entry = self._hops[key] = _Entry(self._routes.next_hops.add(action), 0, action)
            if isinstance(key, Via):
                self._by_link.setdefault(key.link, set()).add(key)
                self._by_index[entry.index] = key
        entry.users += 1
        return entry.index

    def _release(self, key: Key) -> None:
        entry = self._hops[key]
        entry.users -= 1
        if entry.users:
            return
        del self._hops[key]
        if isinstance(key, Via):
            self._by_link[key.link].discard(key)
            del self._by_index[entry.index]
        self._routes.next_hops.remove(entry.index)
