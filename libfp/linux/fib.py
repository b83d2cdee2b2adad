"""From the mirrored state to the forwarding tables: looks again at what changed, and at what hangs on it.

Beside the kernel's own prefixes there are host entries. A prefix that is on the link itself (10.0.1.0/24 dev eth0) is
Punt("no-neighbour"): Linux resolves. Each usable neighbour that it covers has an entry of full length (/32, /128) to
its MAC address, as long as no longer prefix of the kernel's covers that neighbour.

What is decided is decided once for each list of routes that prefixes have, of which there are few.

Many prefixes are written in steps, and packets pass between two of them. Each step takes the longest of those that are
left. So when a prefix is written, every longer one of the kernel's is in the table already, and another of its own
length holds other addresses. Hence in a table that was empty at first, what an address finds is its longest match, as
it is in the complete one. What finds nothing is Linux's until nothing is left (`Publisher.complete`). A prefix that
changes meanwhile goes where its length has it: if it is a short one, behind all longer ones that are still to come. Of
a table that was not empty, an address finds what was right before, or is right after, or an entry between the two.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping

import numpy as np

from libfp.errors import TableFull
from libfp.linux.decide import NO_NEIGHBOUR, Direct, Target, action, is_covered, on_link, target
from libfp.linux.prefixes import PrefixMap, prefixes
from libfp.linux.publish import Key, Publisher
from libfp.linux.rtnetlink import Prefix
from libfp.linux.state import Changes, State
from libfp.stages.routes import Routes

CHUNK = 1 << 14  # prefixes of a family that the first step writes; each may write twice as many as the one before,
LARGEST = 4  # up to so many times as many: a large step is cheaper, but nothing is heard meanwhile
Wrong = tuple[Prefix, Key | None, Key | None]


class Fib:
    """Keeps `routes` what `state` says. `ports` maps link indexes to port numbers and does not change."""

    def __init__(self, routes: Routes, ports: Mapping[int, int]) -> None:
        self.ports = ports
        self.state = State()
        this = weakref.proxy(self)  # no cycle: the parts hold large maps, which go when this goes
        self.publisher = Publisher(routes, lambda via: action(via, this.state, ports))
        self._families = [_Family(this, bits) for bits in self.publisher.families]
        self.done, self._chunk = 0, CHUNK  # prefixes looked at since there was nothing to do; at most in the next step
        self._links, self._neighbours = set[int](), set[tuple[int, bytes]]()  # whose next hops are to be looked at
        self._full = self._stuck = False  # something did not fit; it was a next hop, without which there is no going on

    def begin(self, state: State, changes: Changes) -> None:
        """Look again, in the steps that follow, at what `changes` concern; they led to `state` from the one before."""
        if not self.busy:
            self.done, self._chunk = 0, CHUNK
        self.state, self._stuck = state, False
        for family in self._families:
            family.begin(changes)
        self._links |= changes.links
        self._neighbours |= changes.neighbours

    def step(self) -> None:
        """Write a part of what is left; at least one after each `begin`, and more while `busy`.

        Raises TableFull. It may be followed by more steps: what does not fit yet may fit after what is to go. What
        does not fit at last is tried again after the next `begin`.
        """
        publisher, left = self.publisher, self.left
        try:
            for family in self._families:
                family.step(self._chunk)
        except TableFull:
            self._stuck = True
            raise
        finally:
            self.done += left - self.left
            self._chunk = min(2 * self._chunk, LARGEST * CHUNK)
        if not self._full or not self.left:
            self._full = True
            publisher.flush()
            self._full = False
        for link in self._links:
            publisher.refresh(publisher.through(link))
        for link, neighbour in self._neighbours:
            publisher.refresh(publisher.through(link, neighbour))
        self._links, self._neighbours = set(), set()
        if not self.left:
            publisher.complete()

    def update(self, state: State, changes: Changes) -> None:
        """`begin`, and all the steps. Raises the last TableFull, if what it was about has not found room since."""
        self.begin(state, changes)
        while True:
            try:
                self.step()
            except TableFull:
                if not self.busy:
                    raise
            if not self.busy:
                return

    @property
    def left(self) -> int:
        """How many prefixes are to be looked at."""
        return sum(family.left for family in self._families)

    @property
    def busy(self) -> bool:
        """Whether there is anything for `step` to do."""
        return self.left > 0 and not self._stuck

    @property
    def fits(self) -> bool:
        """Whether all that is left surely finds room in the tables."""
        return all(family.left <= family.room for family in self._families)

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
        self._rows: dict[int, list[np.ndarray]] = {}  # prefixes to look at, by length; one may be there twice
        self._addresses: set[int] = set()  # the same of full length
        self._local: set[Prefix] = set()  # the short prefixes of the local table last acted on
        self._links_of: dict[int, set[int]] = {}  # usable neighbours on ports: address to the links it is on
        self._sorted: list[int] = []  # the same addresses in order

    @property
    def _state(self) -> State:
        return self._fib.state

    @property
    def left(self) -> int:
        """How many prefixes are to be looked at."""
        return len(self._addresses) + sum(len(rows) for parts in self._rows.values() for rows in parts)

    @property
    def room(self) -> int:
        """How many more prefixes the table holds at least."""
        family = self._publisher.families[self.bits]
        return int(family.table.capacity) - len(family.wanted)

    def begin(self, changes: Changes) -> None:
        rows = self._with_covered(changes.of(self.bits))
        self._addresses |= self._neighbours(changes)
        order = np.argsort(rows[:, 2].astype(np.uint8), kind="stable")
        rows = rows[order]
        short = rows[: np.searchsorted(rows[:, 2], self.bits)]
        self._addresses.update(prefix.address for prefix in prefixes(rows[len(short) :], self.bits))
        self._addresses |= self._hosts_in(short)
        for part in np.split(short, np.flatnonzero(np.diff(short[:, 2])) + 1):
            if len(part):
                self._rows.setdefault(int(part[0, 2]), []).append(part)

    def step(self, room: int) -> None:
        """Set the longest of what is left, so many: see the top of this module."""
        addresses, parts = set[int](), list[np.ndarray]()
        while self._addresses and room:
            addresses.add(self._addresses.pop())
            room -= 1
        while self._rows and room:
            longest = max(self._rows)
            rows = self._rows[longest].pop()
            if len(rows) > room:
                self._rows[longest].append(rows[room:])
            if not self._rows[longest]:
                del self._rows[longest]
            parts.append(rows[:room])
            room -= len(parts[-1])
        try:
            self._hosts(addresses)
            if parts:
                rows = np.concatenate(parts)
                self._publisher.set_all(self.bits, rows, self._decide(rows))
        except TableFull:
            self._addresses |= addresses
            for rows in parts:
                self._rows.setdefault(int(rows[0, 2]), []).append(rows)
            raise

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
