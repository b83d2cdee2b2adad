"""Route changes without an end: routes of a full table, drawn at random, withdrawn and a little later announced again
with another next hop, by `Lpm4.apply`."""

from __future__ import annotations

import numpy as np

from libfp.tables.lpm4 import Lpm4

AT_ONCE = 512  # changes in one call of `apply`
AWAY = 16  # calls until a route that was withdrawn comes back


class Changes:
    """Of the routes `addresses`, `lengths` in `fib`; `made` counts them."""

    def __init__(self, fib: Lpm4, addresses: np.ndarray, lengths: np.ndarray) -> None:
        random = np.random.default_rng(7)
        order, half = random.permutation(len(addresses)), AT_ONCE // 2
        self._fib, self._routes = fib, [addresses[order], lengths[order]]
        self._hops = np.unique(fib.routes()[2])[random.integers(0, 64, len(addresses))]
        self._groups = len(addresses) // half
        self._turn = self.made = 0

    def make(self) -> None:
        """Withdraw a group of routes, and announce that of some calls before."""
        half = AT_ONCE // 2
        gone, back = self._turn % self._groups, (self._turn - AWAY) % self._groups
        parts = [slice(half * one, half * (one + 1)) for one in (gone, back)]
        columns = [np.concatenate([column[part] for part in parts]) for column in self._routes]
        values = np.concatenate([np.zeros(half, np.int64), self._hops[parts[1]]])
        mixed = np.arange(AT_ONCE).reshape(2, half).T.reshape(-1)  # one and one
        self._fib.apply(*(column[mixed] for column in (*columns, values)))
        self._turn += 1
        self.made += AT_ONCE
