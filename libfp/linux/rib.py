"""The kernel's routes as we know them: every route of every prefix, in the order in which Linux tries them.

The main and the local table are one here, as they are in the kernel while it has no policy rules: the longest prefix of
both wins, and of one prefix the local table's routes come first. Of one (table, tos, metric) there can be several
routes ("ip route append"): the flags of a notification say where a new one went.

A million prefixes have few different routes, and few different lists of routes. So both are numbered (`Numbering`), a
prefix is kept with the number of its list alone, and what touches many prefixes is decided once for each list.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from libfp.errors import TableFull
from libfp.jit import Arena
from libfp.linux.netlink import NLM_F_APPEND, NLM_F_REPLACE
from libfp.linux.prefixes import EXTRA, PrefixMap, as_rows
from libfp.linux.rtnetlink import SCOPE_HOST, TABLE_LOCAL, TABLE_MAIN, UNICAST, Prefix, Route

TABLES = (TABLE_LOCAL, TABLE_MAIN)
MOST_LISTS = 1 << 22  # different lists of routes
_SPARE_LISTS = 1 << 14  # how many lists may be out of use before they are forgotten

Lists = tuple[Route, ...]


def _order(route: Route) -> tuple[int, int, int]:
    """Where a route stands among those of its prefix: local before main, then the larger tos, then the metric."""
    return -route.table, -route.tos, route.metric


def added(old: Lists, route: Route, flags: int, bits: int = 32) -> Lists:
    """The routes of a prefix after a notification with these flags (or, appending, a dump) has told of one."""
    key = _order(route)
    before = [other for other in old if _order(other) < key]
    after = [other for other in old if _order(other) > key]
    same = list(old[len(before) : len(old) - len(after)])
    plain = route.alive()
    position = next((i for i, other in enumerate(same) if other.alive() == plain), None)
    if bits == 128:
        _add6(same, route, flags, position)
    elif flags & NLM_F_REPLACE:
        same = [route, *(other for other in same[1:] if other.alive() != plain)]
    elif position is not None:
        same[position] = route
    elif flags & NLM_F_APPEND:
        same.append(route)
    else:
        same.insert(0, route)
    return (*before, *same, *after)


def _add6(same: list[Route], route: Route, flags: int, position: int | None) -> None:
    """IPv6 has one multipath route of a metric, told whole at each change, and others beside it (fib6_add_rt2node)."""
    if position is None and _joins(route):
        position = next((i for i, other in enumerate(same) if _joins(other)), None)
    if position is None and flags & NLM_F_REPLACE and same:
        position = next((i for i, other in enumerate(same) if _joins(other) == _joins(route)), 0)
    if position is None:
        same.append(route)
    else:
        same[position] = route


def _joins(route: Route) -> bool:
    """Whether an IPv6 route becomes one with others of its metric (rt6_qualify_for_ecmp)."""
    return route.type == UNICAST and not route.nhid and bool(route.hops) and all(hop.gateway for hop in route.hops)


def removed(old: Lists, route: Route, bits: int = 32) -> Lists:
    """The routes of a prefix after a notification that one has gone; `old` itself if there is none like it."""
    plain = route.alive()
    for position, other in enumerate(old):
        if other.alive() == plain:
            return old[:position] + old[position + 1 :]
    if bits == 128 and _joins(route):  # some hops of a multipath route; one alone is told without its weight
        gone, rest = {(hop.link, hop.gateway) for hop in route.hops}, plain._replace(hops=())
        for position, other in enumerate(old):
            left = tuple(hop for hop in other.hops if (hop.link, hop.gateway) not in gone)
            if left != other.hops and other._replace(hops=()) == rest:
                if len(left) == 1:
                    left = (left[0]._replace(weight=1),)
                kept = (other._replace(hops=left),) if left else ()
                return (*old[:position], *kept, *old[position + 1 :])
    return old


class Numbering:
    """Numbers for routes, and for lists of routes (0 is the empty list). Shared by all `Rib`s of one mirror.

    What is out of use is forgotten now and then; `age` counts that, and what is derived from numbers goes with it.
    """

    def __init__(self) -> None:
        self.age = 0
        self.ribs: weakref.WeakSet[Rib] = weakref.WeakSet()
        self._kept = 0
        self.weights = Arena(4 * MOST_LISTS)  # for each list, how many of its routes use a nexthop object
        self._weights = np.frombuffer(self.weights.buffer, np.uint32)
        self.lists: list[Lists | None] = [()]
        self._list_numbers: dict[Lists, int] = {(): 0}
        self._free: list[int] = []
        self.routes: list[Route] = []
        self._route_numbers: dict[Route, int] = {}

    def __len__(self) -> int:
        return len(self._list_numbers)

    def route(self, route: Route) -> int:
        """The route's number."""
        number = self._route_numbers.setdefault(route, len(self.routes))
        if number == len(self.routes):
            self.routes.append(route)
        return number

    def list(self, routes: Lists) -> int:
        """The list's number."""
        number = self._list_numbers.get(routes)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.lists[number] = routes
            else:
                number = len(self.lists)
                if number >= MOST_LISTS:
                    raise TableFull(f"more than {MOST_LISTS} different routes", "that is more than libfp is made for")
                self.lists.append(routes)
            self._list_numbers[routes] = number
            self._weights[number] = sum(route.nhid > 0 for route in routes)
        return number

    def of(self, number: int) -> Lists:
        """The list of that number."""
        found = self.lists[number]
        assert found is not None
        return found

    def weight(self, number: int) -> int:
        """How many of the list's routes use a nexthop object."""
        return int(self._weights[number])

    def tidy(self) -> bool:
        """Forget what no prefix has any more, if it is much; True if anything was."""
        if len(self) < 2 * self._kept + _SPARE_LISTS:
            return False
        used = np.zeros(len(self.lists), bool)
        used[0] = True
        for rib in self.ribs:
            used[rib.map.entries["value"]] = True
        for number in np.flatnonzero(~used).tolist():
            routes = self.lists[number]
            if routes is not None:
                del self._list_numbers[routes]
                self.lists[number] = None
                self._free.append(number)
        self.routes, self._route_numbers = [], {}
        self._kept, self.age = len(self), self.age + 1
        return True


class _Routes(Mapping[Prefix, Lists]):
    """What a `Rib` holds, to be looked at: prefixes to their routes."""

    def __init__(self, rib: Rib) -> None:
        self._map, self._numbering = rib.map, rib.numbering

    def __getitem__(self, prefix: Prefix) -> Lists:
        number = self._map.get(prefix)
        if not number:
            raise KeyError(prefix)
        return self._numbering.of(number)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)


class Rib:
    """The prefixes of one family (`bits` is 32 or 128) and their routes; methods that change many return those."""

    def __init__(self, numbering: Numbering | None = None, bits: int = 32) -> None:
        self.numbering, self.bits = numbering or Numbering(), bits
        self.map = PrefixMap(bits)
        self.routes = _Routes(self)
        self.local: dict[Prefix, int] = {}  # prefixes whose first route is the local table's, with its type: few
        self.local_prefixes: set[Prefix] = set()  # those of them that are not of full length: fewer, as 127.0.0.0/8
        self.numbering.ribs.add(self)

    def __len__(self) -> int:
        return len(self.map)

    @property
    def nexthop_objects(self) -> int:
        """How many routes use one."""
        return int(self.map.fields[EXTRA // 8])

    def add(self, prefix: Prefix, route: Route, flags: int = NLM_F_APPEND) -> bool:
        """Take in a route as `added` has it; True if that changes anything."""
        return self._store(prefix, added(self.routes.get(prefix, ()), route, flags, self.bits))

    def remove(self, prefix: Prefix, route: Route) -> bool:
        """Forget a route; False when there is none like it (a notification from before the last dump)."""
        return self._store(prefix, removed(self.routes.get(prefix, ()), route, self.bits))

    def _store(self, prefix: Prefix, routes: Lists) -> bool:
        number = self.numbering.list(routes)
        old = self.map.put(prefix, number)
        self.map.fields[EXTRA // 8] += self.numbering.weight(number) - self.numbering.weight(old)
        self._note_local(prefix, routes)
        return number != old

    def _note_local(self, prefix: Prefix, routes: Lists) -> None:
        if routes and routes[0].table == TABLE_LOCAL:
            self.local[prefix] = routes[0].type
            if prefix.length < self.bits:
                self.local_prefixes.add(prefix)
        elif self.local.pop(prefix, None) is not None:
            self.local_prefixes.discard(prefix)

    def counts(self) -> dict[Lists, int]:
        """Each list of routes, and how many prefixes have it."""
        counts = np.bincount(self.map.entries["value"])
        lists = ((self.numbering.lists[number], int(counts[number])) for number in np.flatnonzero(counts).tolist())
        return {routes: count for routes, count in lists if routes}

    def _rewrite(self, change: Callable[[Route], Route | None]) -> np.ndarray:
        """Put every route through `change` (None removes it) and return the rows of the prefixes that differ then."""
        entries = self.map.entries
        numbers = entries["value"].astype(np.int64)
        new_of: dict[int, int] = {}
        for number in np.flatnonzero(np.bincount(numbers)).tolist():
            if number:
                routes = self.numbering.of(number)
                new = self.numbering.list(tuple(route for route in map(change, routes) if route is not None))
                if new != number:
                    new_of[number] = new
        if not new_of:
            return np.zeros((0, 3), np.int64)
        renumbered = np.arange(len(self.numbering.lists))
        renumbered[list(new_of)] = list(new_of.values())
        news = renumbered[numbers]
        where = news != numbers
        rows, news = as_rows(entries[where]), news[where]
        weights = self.numbering._weights
        self.map.fields[EXTRA // 8] += int(weights[news].sum(dtype=np.int64)) - int(
            weights[numbers[where]].sum(dtype=np.int64)
        )
        self.map.put_all(rows, news)
        for prefix in list(self.local):
            self._note_local(prefix, self.routes.get(prefix, ()))
        return rows

    def using(self, link: int) -> np.ndarray:
        """Rows of the prefixes that have a route with a next hop on the link."""
        lists = [any(hop.link == link for one in routes or () for hop in one.hops) for routes in self.numbering.lists]
        return self.map.rows(np.array(lists)[self.map.entries["value"]])

    def under(self, covering: Prefix) -> np.ndarray:
        """Rows of the prefixes that `covering` covers."""
        entries = self.map.entries
        where = (entries["value"] != 0) & (entries["length"] >= covering.length)
        high, low, length = covering.row()
        width = 32 if self.bits == 32 else 64
        for word, column, bits in ((high, "high", min(length, width)), (low, "low", max(0, length - width))):
            if bits:
                where &= (entries[column] ^ word) >> (width - bits) == 0
        return self.map.rows(where)

    # -- what the kernel does to routes without a word (fib_sync_down_dev, fib_sync_up, fib_sync_down_addr, fib6_ifdown)

    def link_down(self, link: int, host_scope: bool = False) -> np.ndarray:
        """The link went down: its hops die, and so do the routes that have no other.

        Routes of host scope (IPv4's local addresses) survive, unless `host_scope`: the link lost its last address.
        """

        def change(route: Route) -> Route | None:
            if not any(hop.link == link for hop in route.hops) or (route.scope == SCOPE_HOST and not host_scope):
                return route
            hops = tuple(hop._replace(dead=True) if hop.link == link else hop for hop in route.hops)
            return None if all(hop.dead for hop in hops) else route._replace(hops=hops)

        return self._rewrite(change)

    def link_up(self, link: int) -> np.ndarray:
        """The link came up, or got an address: hops of multipath routes that had died with it live again."""

        def change(route: Route) -> Route | None:
            if not any(hop.dead and hop.link == link for hop in route.hops):
                return route
            hops = tuple(hop._replace(dead=False) if hop.link == link else hop for hop in route.hops)
            return route._replace(hops=hops)

        return self._rewrite(change)

    def link_gone(self, link: int) -> np.ndarray:
        """The link was removed: no hop on it remains, and of IPv4 no route that had one, whatever its other hops."""

        def change(route: Route) -> Route | None:
            hops = tuple(hop for hop in route.hops if hop.link != link)
            if len(hops) == len(route.hops):
                return route
            return route._replace(hops=hops) if hops and self.bits == 128 else None

        return self._rewrite(change)

    def address_gone(self, local: bytes) -> np.ndarray:
        """A local address was removed: so were IPv4's routes in the main table that prefer it as their source.

        IPv6's routes stay, without that preference.
        """

        def change(route: Route) -> Route | None:
            if route.source != local or route.table != TABLE_MAIN:
                return route
            return None if self.bits == 32 else route._replace(source=b"")

        address = Prefix(int.from_bytes(local, "big"), self.bits, self.bits)
        if any(prefix.covers(address) for prefix in self.local_prefixes):
            return np.zeros((0, 3), np.int64)  # still local
        return self._rewrite(change)

    def nexthop_gone(self, nhid: int) -> np.ndarray:
        """A nexthop object was removed: so were the routes that use it."""
        if not self.nexthop_objects:
            return np.zeros((0, 3), np.int64)
        return self._rewrite(lambda route: None if route.nhid == nhid else route)
