"""Forwarding tables made of dicts, with the interface of `libfp.stages.routes.Routes`: for tests of what writes them.

They are stricter than the real ones: a route to a next hop that is not there, and a next hop removed while a
route leads to it, are errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from libfp.errors import TableFull
from libfp.stages.next_hops import Action, Multipath, Punt


class PlainFib:
    """(address, prefix length) to next-hop index, for addresses of 32 or 128 `bits`."""

    def __init__(self, next_hops: PlainNextHops, capacity: int, bits: int = 32) -> None:
        self.entries: dict[tuple[int, int], int] = {}
        self.bits = bits
        self._next_hops, self.capacity = next_hops, capacity

    def apply(self, addresses: Any, lengths: Any, values: Any) -> None:
        """Many changes in order; value 0 removes. An IPv6 address is a row of its high and low half."""
        for given, length, value in zip(addresses, lengths, values, strict=True):
            address = int(given) if self.bits == 32 else int(given[0]) << 64 | int(given[1])
            length, value = int(length), int(value)
            assert address == address >> (self.bits - length) << (self.bits - length), "host bits"
            if value == 0:
                self.entries.pop((address, length), None)
                continue
            assert value in self._next_hops.actions, f"a route to next hop {value}, which is not there"
            if (address, length) not in self.entries and len(self.entries) >= self.capacity:
                raise TableFull("the plain table is full")
            self.entries[address, length] = value

    def routes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Addresses, lengths and values."""
        rest = np.array([(length, value) for (_, length), value in self.entries.items()], np.int64).reshape(-1, 2)
        if self.bits == 32:
            return np.array([address for address, _ in self.entries], np.int64), rest[:, 0], rest[:, 1]
        halves = [(address >> 64, address & (1 << 64) - 1) for address, _ in self.entries]
        return np.array(halves, np.uint64).reshape(-1, 2), rest[:, 0], rest[:, 1]

    def lookup(self, address: int) -> int:
        """The value of the longest prefix that covers the address, 0 where there is none."""
        for length in range(self.bits, -1, -1):
            value = self.entries.get((address >> (self.bits - length) << (self.bits - length), length))
            if value is not None:
                return value
        return 0


class PlainNextHops:
    """Indexes from 1 to actions. `touch` is what a worker does when it uses one."""

    def __init__(self) -> None:
        self.actions: dict[int, Action] = {}
        self._used: set[int] = set()
        self._next = 1
        self._fibs: list[PlainFib] = []

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
        assert all(index not in fib.entries.values() for fib in self._fibs), "a route still leads to this next hop"
        groups = [action for action in self.actions.values() if isinstance(action, Multipath)]
        assert all(index != path for group in groups for path, _ in group.paths), "a group still uses this next hop"
        del self.actions[index]

    def inherit(self, index: int, old: int) -> None:
        assert isinstance(self.actions[index], Multipath)
        assert old in self.actions, "what it takes over from has gone"

    def touch(self, index: int) -> None:
        self._used.add(index)

    def used(self) -> set[int]:
        used, self._used = self._used, set()
        return used


class PlainRoutes:
    """`fib`, `fib6` and `next_hops`, and what a packet to an address would meet."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.next_hops = PlainNextHops()
        self.fib, self.fib6 = PlainFib(self.next_hops, capacity), PlainFib(self.next_hops, capacity, 128)
        self.next_hops._fibs = [self.fib, self.fib6]
        self.complete = True

    def set_complete(self, complete: bool) -> None:
        self.complete = complete

    def action(self, address: int, bits: int = 32) -> Action:
        """The action for a destination address (host order)."""
        index = (self.fib if bits == 32 else self.fib6).lookup(address)
        return self.next_hops[index] if index else Punt("no-route" if self.complete else "via-linux")
