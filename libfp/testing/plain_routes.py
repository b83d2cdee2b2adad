"""Forwarding tables made of dicts, with the interface of `libfp.stages.routes.Routes`: for tests of what writes them.

They are stricter than the real ones: a route to a next hop that is not there, and a next hop removed while a
route leads to it, are errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from libfp.errors import TableFull
from libfp.stages.routes import Drop, Forward, Punt

Action = Forward | Punt | Drop


class PlainFib:
    """(address, prefix length) to next-hop index."""

    def __init__(self, next_hops: PlainNextHops, capacity: int) -> None:
        self.entries: dict[tuple[int, int], int] = {}
        self._next_hops, self._capacity = next_hops, capacity

    def apply(self, addresses: Sequence[int], lengths: Sequence[int], values: Sequence[int]) -> None:
        """Many changes in order; value 0 removes."""
        for address, length, value in zip(addresses, lengths, values, strict=True):
            assert address == address >> (32 - length) << (32 - length), "host bits"
            if value == 0:
                self.entries.pop((address, length), None)
                continue
            assert value in self._next_hops.actions, f"a route to next hop {value}, which is not there"
            if (address, length) not in self.entries and len(self.entries) >= self._capacity:
                raise TableFull("the plain table is full")
            self.entries[address, length] = value

    def routes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Addresses, lengths and values."""
        rows = [(address, length, value) for (address, length), value in self.entries.items()]
        columns = np.array(rows, np.int64).reshape(-1, 3)
        return columns[:, 0], columns[:, 1], columns[:, 2]

    def lookup(self, address: int) -> int:
        """The value of the longest prefix that covers the address, 0 where there is none."""
        for length in range(32, -1, -1):
            value = self.entries.get((address >> (32 - length) << (32 - length), length))
            if value is not None:
                return value
        return 0


class PlainNextHops:
    """Indexes from 1 to actions. `touch` is what a worker does when it uses one."""

    def __init__(self) -> None:
        self.actions: dict[int, Action] = {}
        self._used: set[int] = set()
        self._next = 1
        self._fib: PlainFib | None = None

    def add(self, action: Action) -> int:
        index, self._next = self._next, self._next + 1
        self.actions[index] = action
        return index

    def __setitem__(self, index: int, action: Action) -> None:
        assert index in self.actions
        self.actions[index] = action

    def __getitem__(self, index: int) -> Action:
        return self.actions[index]

    def remove(self, index: int) -> None:
        assert self._fib is None or index not in self._fib.entries.values(), "a route still leads to this next hop"
        del self.actions[index]

    def touch(self, index: int) -> None:
        self._used.add(index)

    def used(self) -> set[int]:
        used, self._used = self._used, set()
        return used


class PlainRoutes:
    """`fib` and `next_hops`, and what a packet to an address would meet."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.next_hops = PlainNextHops()
        self.fib = self.next_hops._fib = PlainFib(self.next_hops, capacity)

    def action(self, address: int) -> Action:
        """The action for a destination address (host order)."""
        index = self.fib.lookup(address)
        return self.next_hops[index] if index else Punt("no-route")
