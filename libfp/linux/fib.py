"""From the mirrored state to the forwarding tables: looks again at what changed, and at what hangs on it.

Beside the kernel's own prefixes there are host entries. A prefix that is on the link itself (10.0.1.0/24 dev eth0) is
Punt("no-neighbour"): Linux resolves. Each usable neighbour that it covers has a /32 to its MAC address, as long as no
longer prefix of the kernel's covers that neighbour.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping

from libfp.linux.decide import NO_NEIGHBOUR, Direct, Target, Via, action, target
from libfp.linux.publish import Publisher
from libfp.linux.rtnetlink import Prefix
from libfp.linux.state import Changes, State
from libfp.stages.routes import Forward, Punt, Routes


class Fib:
    """Keeps `routes` what `state` says. `ports` maps link indexes to port numbers and does not change."""

    def __init__(self, routes: Routes, ports: Mapping[int, int]) -> None:
        self.ports = ports
        self.state = State()
        self.publisher = Publisher(routes, self._resolve)
        self._targets: dict[Prefix, Target] = {}
        self._lengths = [0] * 33  # how many targets there are of each prefix length
        self._unfinished: set[Prefix] = set()  # what an update that raised left undone
        self._local: set[Prefix] = set()  # the short prefixes of the local table last acted on
        self._links_of: dict[int, set[int]] = {}  # usable neighbours on ports: address to the links it is on
        self._sorted: list[int] = []  # the same addresses in order

    def _resolve(self, via: Via) -> Forward | Punt:
        return action(via, self.state, self.ports)

    def update(self, state: State, changes: Changes, progress: Callable[[int, int], None] | None = None) -> None:
        """Act on `changes`, which led from the state last acted on to `state`.

        `progress` is called with (prefixes done, prefixes to do) every few thousand. Raises TableFull; what is left
        undone then is tried again with the next update.
        """
        self.state = state
        prefixes = self._with_covered(changes.prefixes) | self._unfinished
        self._unfinished |= prefixes
        hosts = self._neighbours(changes)
        self._unfinished.update(Prefix(address, 32) for address in hosts)
        for done, prefix in enumerate(prefixes):
            self._prefix(prefix)
            hosts.update(self._hosts_in(prefix))
            if progress is not None and done % 8192 == 0:
                progress(done, len(prefixes))
        for address in hosts:
            self._host(address)
        self.publisher.flush()
        self._unfinished.clear()
        publisher = self.publisher
        for link in changes.links:
            publisher.refresh(publisher.through(link))
        for link, neighbour in changes.neighbours:
            publisher.refresh(publisher.through(link, neighbour))

    def lookup(self, address: int) -> Target | None:
        """The longest match among the kernel's prefixes (host entries not counted)."""
        for length in range(32, -1, -1):
            if self._lengths[length]:
                found = self._targets.get(Prefix(address >> (32 - length) << (32 - length), length))
                if found is not None:
                    return found
        return None

    def _with_covered(self, prefixes: set[Prefix]) -> set[Prefix]:
        """`prefixes`, and those under a prefix of the local table that came or went: see `decide.target`."""
        changed = self.state.rib.local_prefixes ^ self._local
        if not changed:
            return prefixes
        self._local = set(self.state.rib.local_prefixes)
        return prefixes | {p for p in self.state.rib.routes if any(local.covers(p) for local in changed)}

    def _prefix(self, prefix: Prefix) -> None:
        new = target(prefix, self.state, self.ports)
        old = self._targets.get(prefix)
        if new is not None:
            self._targets[prefix] = new
        elif old is not None:
            del self._targets[prefix]
        self._lengths[prefix.length] += (new is not None) - (old is not None)
        if prefix.length < 32:  # a /32 may have a host entry: `_host` writes those
            self.publisher.set(prefix, NO_NEIGHBOUR if isinstance(new, Direct) else new)
        else:
            self._host(prefix.address)

    def _host(self, address: int) -> None:
        """Write the /32 of an address: the kernel's own if it has one, else the neighbour's if it has one."""
        prefix = Prefix(address, 32)
        key = self._targets.get(prefix)
        if key is None and address in self._links_of:
            direct = self.lookup(address)
            if isinstance(direct, Direct) and direct.link in self._links_of[address]:
                key = Via(direct.link, address.to_bytes(4, "big"), direct.mtu)
        assert not isinstance(key, Direct), "a /32 on the link itself is a Via"
        self.publisher.set(prefix, key)

    def _hosts_in(self, prefix: Prefix) -> list[int]:
        first = bisect_left(self._sorted, prefix.address)
        return self._sorted[first : bisect_right(self._sorted, prefix.address | (0xFFFFFFFF >> prefix.length))]

    def _neighbours(self, changes: Changes) -> set[int]:
        """Take in which neighbours are usable; the IPv4 addresses for which that changed."""
        changed = set()
        for link, packed in changes.neighbours:
            if link not in self.ports or len(packed) != 4:
                continue
            address = int.from_bytes(packed, "big")
            links = self._links_of.get(address, set())
            usable = self.state.usable(link, packed) is not None
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
