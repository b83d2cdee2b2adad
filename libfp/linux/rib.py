"""The kernel's IPv4 routes as we know them: every route of every prefix, in the order in which Linux tries them.

The main and the local table are one here, as they are in the kernel while it has no policy rules: the longest prefix of
both wins, and of one prefix the local table's routes come first. Of one (table, tos, metric) there can be several
routes ("ip route append"): the flags of a notification say where a new one went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from libfp.linux.netlink import NLM_F_APPEND, NLM_F_REPLACE
from libfp.linux.rtnetlink import SCOPE_HOST, TABLE_LOCAL, TABLE_MAIN, Prefix, Route

TABLES = (TABLE_LOCAL, TABLE_MAIN)


def _order(route: Route) -> tuple[int, int, int]:
    """Where a route stands among those of its prefix: local before main, then the larger tos, then the metric."""
    return -route.table, -route.tos, route.metric


class Rib:
    """Prefixes to their routes. Every method that changes something returns or reports the prefixes that changed."""

    def __init__(self) -> None:
        self.routes: dict[Prefix, tuple[Route, ...]] = {}
        self.local_prefixes: set[Prefix] = set()  # of the local table, those shorter than 32: few, usually 127.0.0.0/8
        self.nexthop_objects = 0  # routes that use one

    def __len__(self) -> int:
        return len(self.routes)

    def add(self, prefix: Prefix, route: Route, flags: int = NLM_F_APPEND) -> bool:
        """Take in a route as a notification with these flags (or, appending, a dump) reports it; True if it is new."""
        old = self.routes.get(prefix, ())
        key = _order(route)
        before = [other for other in old if _order(other) < key]
        after = [other for other in old if _order(other) > key]
        same = list(old[len(before) : len(old) - len(after)])
        plain = route.alive()
        position = next((i for i, other in enumerate(same) if other.alive() == plain), None)
        if flags & NLM_F_REPLACE:
            same = [route, *(other for other in same[1:] if other.alive() != plain)]
        elif position is not None:
            same[position] = route
        elif flags & NLM_F_APPEND:
            same.append(route)
        else:
            same.insert(0, route)
        return self._store(prefix, (*before, *same, *after))

    def remove(self, prefix: Prefix, route: Route) -> bool:
        """Forget a route; False when there is none like it (a notification from before the last dump)."""
        old = self.routes.get(prefix, ())
        plain = route.alive()
        for position, other in enumerate(old):
            if other.alive() == plain:
                return self._store(prefix, old[:position] + old[position + 1 :])
        return False

    def _store(self, prefix: Prefix, routes: tuple[Route, ...]) -> bool:
        old = self.routes.get(prefix, ())
        if routes == old:
            return False
        if routes:
            self.routes[prefix] = routes
        else:
            del self.routes[prefix]
        self.nexthop_objects += sum(r.nhid > 0 for r in routes) - sum(r.nhid > 0 for r in old)
        if prefix.length < 32:
            if routes and routes[0].table == TABLE_LOCAL:
                self.local_prefixes.add(prefix)
            else:
                self.local_prefixes.discard(prefix)
        return True

    def _rewrite(self, change: Callable[[Route], Route | None]) -> Iterator[Prefix]:
        """Put every route through `change` (None removes it) and yield the prefixes that differ afterwards."""
        differ = []
        for prefix, routes in self.routes.items():
            new = tuple(route for route in map(change, routes) if route is not None)
            if new != routes:
                differ.append((prefix, new))
        for prefix, new in differ:
            self._store(prefix, new)
            yield prefix

    def using(self, link: int) -> list[Prefix]:
        """The prefixes that have a route with a next hop on the link."""
        return [p for p, routes in self.routes.items() if any(hop.link == link for r in routes for hop in r.hops)]

    # -- what the kernel does to IPv4 routes without a word (fib_sync_down_dev, fib_sync_up, fib_sync_down_addr)

    def link_down(self, link: int, host_scope: bool = False) -> list[Prefix]:
        """The link went down: its hops die, and so do the routes that have no other.

        Routes of host scope (local addresses) survive, unless `host_scope`: the link lost its last address.
        """

        def change(route: Route) -> Route | None:
            if not any(hop.link == link for hop in route.hops) or (route.scope == SCOPE_HOST and not host_scope):
                return route
            hops = tuple(hop._replace(dead=True) if hop.link == link else hop for hop in route.hops)
            return None if all(hop.dead for hop in hops) else route._replace(hops=hops)

        return list(self._rewrite(change))

    def link_up(self, link: int) -> list[Prefix]:
        """The link came up, or got an address: hops of multipath routes that had died with it live again."""

        def change(route: Route) -> Route | None:
            if not any(hop.dead and hop.link == link for hop in route.hops):
                return route
            hops = tuple(hop._replace(dead=False) if hop.link == link else hop for hop in route.hops)
            return route._replace(hops=hops)

        return list(self._rewrite(change))

    def link_gone(self, link: int) -> list[Prefix]:
        """The link was removed: no route with a hop on it remains, whatever other hops it has."""
        return list(self._rewrite(lambda route: None if any(hop.link == link for hop in route.hops) else route))

    def address_gone(self, local: bytes) -> list[Prefix]:
        """A local address was removed: so were the main table's routes that prefer it as their source."""
        address = Prefix(int.from_bytes(local, "big"), 32)
        if any(prefix.covers(address) for prefix in self.local_prefixes):
            return []  # still local
        return list(self._rewrite(lambda route: None if route.source == local and route.table == TABLE_MAIN else route))

    def nexthop_gone(self, nhid: int) -> list[Prefix]:
        """A nexthop object was removed: so were the routes that use it."""
        return list(self._rewrite(lambda route: None if route.nhid == nhid else route)) if self.nexthop_objects else []
