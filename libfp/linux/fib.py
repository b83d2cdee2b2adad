"""From the mirrored state to the forwarding tables: looks again at what changed, and at what hangs on it.

Beside the kernel's own prefixes there are host entries. A prefix that is on the link itself (10.0.1.0/24 dev eth0) is
Punt("no-neighbour"): Linux resolves. Each usable neighbour that it covers has an entry of full length (/32, /128) to
its MAC address, as long as no longer prefix of the kernel's covers that neighbour.

What is decided is decided once for each list of routes that prefixes have, of which there are few.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from libfp.errors import TableFull
from libfp.linux.decide import NO_NEIGHBOUR, Direct, Target, action, is_covered, on_link, target
from libfp.linux.prefixes import PrefixMap, prefixes, unique
from libfp.linux.publish import Key, Publisher
from libfp.linux.rtnetlink import Prefix
from libfp.linux.state import Changes, State
from libfp.stages.routes import Routes

CHUNK = 1 << 14  # prefixes written together
Progress = Callable[[int, int], None]
Wrong = tuple[Prefix, Key | None, Key | None]


class Fib:
    """Keeps `routes` what `state` says. `ports` maps link indexes to port numbers and does not change."""

    def __init__(self, routes: Routes, ports: Mapping[int, int]) -> None:
        self.ports = ports
        self.state = State()
        this = weakref.proxy(self)  # no cycle: the parts hold large maps, which go when this goes
        self.publisher = Publisher(routes, lambda via: action(via, this.state, ports))
        self._families = [_Family(this, bits) for bits in self.publisher.families]

    def update(self, state: State, changes: Changes, progress: Progress | None = None) -> None:
        """Act on `changes`, which led from the state last acted on to `state`.

        `progress` is called with (prefixes done, prefixes to do) every few thousand. Raises TableFull; what is left
        undone then is tried again with the next update.
        """
        self.state = state
        full = None
        for family in self._families:
            try:
                family.update(changes, progress)
            except TableFull as error:
                full = error
        if full is not None:
            raise full
        publisher = self.publisher
        for link in changes.links:
            publisher.refresh(publisher.through(link))
        for link, neighbour in changes.neighbours:
            publisher.refresh(publisher.through(link, neighbour))

    def check(self) -> list[tuple[list[Wrong], int]]:
        """For each family what the tables hold wrongly (prefix, what it leads to, what is due), and of how many."""
        return [family.check() for family in self._families]

    def lookup(self, address: int, bits: int = 32) -> Target | None:
        """The longest match among the kernel's prefixes (host entries not counted)."""
        return next((family.lookup(address) for family in self._families if family.bits == bits), None)


class _Family:
    """One address family's part of a `Fib`."""

    def __init__(self, fib: Fib, bits: int) -> None:
        self.bits = bits
        self._fib, self._publisher = fib, fib.publisher
        self._unfinished = np.zeros((0, 3), np.int64)  # what an update that raised left undone
        self._local: set[Prefix] = set()  # the short prefixes of the local table last acted on
        self._links_of: dict[int, set[int]] = {}  # usable neighbours on ports: address to the links it is on
        self._sorted: list[int] = []  # the same addresses in order

    @property
    def _state(self) -> State:
        return self._fib.state

    def update(self, changes: Changes, progress: Progress | None) -> None:
        rows = self._with_covered(changes.of(self.bits))
        hosts = self._neighbours(changes)
        rows = unique(np.concatenate([rows, self._unfinished, self._host_rows(hosts)]))
        self._unfinished = rows
        rows = rows[np.argsort(-rows[:, 2], kind="stable")]  # see `publish`
        short = rows[rows[:, 2] < self.bits]
        for prefix in prefixes(rows[: len(rows) - len(short)], self.bits):
            hosts.add(prefix.address)
        hosts |= self._hosts_in(short)
        self._hosts(hosts)
        for at in range(0, len(short), CHUNK):  # part by part, so that what is known is used
            part = short[at : at + CHUNK]
            self._publisher.set_all(self.bits, part, self._decide(part))
            if at + CHUNK < len(short):
                with suppress(TableFull):  # what does not fit yet may fit after what is to go
                    self._publisher.flush()
            if progress is not None:
                progress(min(len(rows) - len(short) + at + CHUNK, len(rows)), len(rows))
        self._publisher.flush()
        self._unfinished = rows[:0]

    def lookup(self, address: int) -> Target | None:
        """The longest match among the kernel's prefixes."""
        rib = self._state.ribs[self.bits]
        for length in range(self.bits, -1, -1):
            if rib.map.count(length):
                shift = self.bits - length
                found = self._target(Prefix(address >> shift << shift, length, self.bits))
                if found is not None:
                    return found
        return None

    def _target(self, prefix: Prefix) -> Target | None:
        state = self._state
        number = state.ribs[self.bits].map.get(prefix)
        if not number:
            return None
        covered = is_covered(prefix, state)
        found = target(state.numbering.of(number), self.bits, covered, state, self._fib.ports)
        if isinstance(found, Direct) and prefix.length == self.bits:
            return on_link(found, prefix.address, self.bits)
        return found

    def _with_covered(self, rows: np.ndarray) -> np.ndarray:
        """`rows`, and those under a prefix of the local table that came or went: see `decide.target`."""
        rib = self._state.ribs[self.bits]
        changed = rib.local_prefixes ^ self._local
        if not changed:
            return rows
        self._local = set(rib.local_prefixes)
        return np.concatenate([rows, *(rib.under(local) for local in changed)])

    def _decide(self, rows: np.ndarray) -> np.ndarray:
        """The next-hop indexes of prefixes shorter than an address."""
        state = self._state
        rib = state.ribs[self.bits]
        covered = _covered(rows, rib.local_prefixes, self.bits)
        numbers = 2 * rib.map.get_all(rows) + covered
        kinds, where = np.unique(numbers, return_inverse=True)
        indexes = np.zeros(len(kinds), np.int64)
        for at, kind in enumerate(kinds.tolist()):
            routes = state.numbering.of(kind >> 1)
            found = target(routes, self.bits, bool(kind & 1), state, self._fib.ports)
            indexes[at] = self._publisher.index(NO_NEIGHBOUR if isinstance(found, Direct) else found)
        return indexes[where]

    def _hosts(self, addresses: set[int]) -> None:
        """Write the entries of full length."""
        for address in addresses:
            prefix = Prefix(address, self.bits, self.bits)
            self._publisher.set(prefix, self._host(prefix))

    def _host(self, prefix: Prefix) -> Key | None:
        """What an address leads to: the kernel's own entry if there is one, else the neighbour's if there is one."""
        address, key = prefix.address, self._target(prefix)
        if key is None and address in self._links_of:
            direct = self.lookup(address)
            if isinstance(direct, Direct) and direct.link in self._links_of[address]:
                key = on_link(direct, address, self.bits)
        assert not isinstance(key, Direct), "an address on the link itself is a Via"
        return key

    def check(self) -> tuple[list[Wrong], int]:
        """See `Fib.check`."""
        family = self._publisher.families[self.bits]
        held_rows, held = family.held()
        rows = self._state.ribs[self.bits].map.rows()
        due_rows = rows[rows[:, 2] < self.bits]
        table = PrefixMap(self.bits)  # what is due, less what is there
        table.put_all(due_rows, self._decide(due_rows))
        hosts = {
            p.address for p in prefixes(self._state.ribs[self.bits].map.rows(), self.bits) if p.length == self.bits
        }
        for address in hosts | self._links_of.keys():
            prefix = Prefix(address, self.bits, self.bits)
            table.put(prefix, self._publisher.index(self._host(prefix)))
        there = PrefixMap(self.bits)
        there.put_all(held_rows, held)
        wrong = prefixes(table.differences(there), self.bits)
        said = self._publisher.said
        found = [(prefix, said(there.get(prefix)), said(table.get(prefix))) for prefix in wrong]
        self._publisher.flush()  # next hops that were made for the comparison only
        return found, len(held)

    def _host_rows(self, addresses: set[int]) -> np.ndarray:
        rows = [Prefix(address, self.bits, self.bits).row() for address in addresses]
        return np.array(rows, np.int64).reshape(-1, 3)

    def _hosts_in(self, rows: np.ndarray) -> set[int]:
        """The usable neighbours that these prefixes cover; of many prefixes, all that there are."""
        if not self._sorted or len(rows) > CHUNK:
            return set(self._sorted)
        found = set[int]()
        for prefix in prefixes(rows, self.bits):
            first = bisect_left(self._sorted, prefix.address)
            last = bisect_right(self._sorted, prefix.address | (1 << (self.bits - prefix.length)) - 1)
            found.update(self._sorted[first:last])
        return found

    def _neighbours(self, changes: Changes) -> set[int]:
        """Take in which neighbours are usable; the addresses for which that changed."""
        changed = set()
        for link, packed in changes.neighbours:
            if link not in self._fib.ports or 8 * len(packed) != self.bits:
                continue
            address = int.from_bytes(packed, "big")
            links = self._links_of.get(address, set())
            usable = self._state.usable(link, packed) is not None
            if usable == (link in links):
                continue
            changed.add(address)
            if usable:
                if not links:
                    insort(self._sorted, address)
                    self._links_of[address] = links
                links.add(link)
            else:
                links.discard(link)
                if not links:
                    del self._links_of[address]
                    del self._sorted[bisect_left(self._sorted, address)]
        return changed


def _covered(rows: np.ndarray, locals_: set[Prefix], bits: int) -> np.ndarray:
    """For each prefix whether one of `locals_` covers it."""
    found = np.zeros(len(rows), bool)
    for local in locals_:
        high, low, length = local.row()
        width = 32 if bits == 32 else 64
        under = rows[:, 2] >= length
        for word, column, some in ((high, 0, min(length, width)), (low, 1, max(0, length - width))):
            if some:
                under &= (rows[:, column] ^ word) >> (width - some) == 0
        found |= under
    return found
