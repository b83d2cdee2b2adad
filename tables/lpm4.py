"""Longest prefix match for IPv4: two dependent loads and no branch, but for prefixes longer than /24.

    slot (2**19 of them, 8 bytes)      one for each /19: a bitmap of 32 bits and where its leaves are
      leaves (4 bytes each)            one for each run of /24s that lead to the same place; a set bit begins a run
        deep block                     the same again for the 256 addresses of a /24 that has longer prefixes

The leaf of the i-th /24 of a slot is number ``popcount(bitmap & (2 << i) - 1)``. A slot that one route covers has no
bitmap and leads straight to that route's cell. Addresses for which no route but the default holds find 0, and the
default route's value is one word for them all; so an empty table is all zeros.

The runs and their counting are Poptrie's leaf vector (Asai and Ohara, "Poptrie", SIGCOMM 2015); the fixed depth in
place of its internal nodes is so that lookups of routes of different length do not differ in their branches.
The full Internet table (900,000 routes) takes 8 MB.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit import (
    BOUNDSCHECK,
    ctz64,
    inline,
    load32,
    load64,
    native,
    popcount64,
    prefetch,
    shl64,
    shr64,
    store32,
    unlikely,
    without_lowest64,
    word,
)
from libfp.tables import lpm4_update
from libfp.tables.lpm import Lpm
from libfp.tables.lpm4_slot import BLOCKS, DEEPER, SCRATCH, SCRATCH_BYTES, WHERE
from libfp.tables.lpm4_vector import lookup8, lookup64
from libfp.tables.words import Words

_SLOTS = 64  # byte offset of the slots


@native
class Lpm4View:
    """An `Lpm4` as compiled code sees it: `cell` is the address of a word that holds the arena's address."""

    cell: word

    def lookup(self, key):  # type: ignore[no-untyped-def]
        """The value of the longest prefix that holds the address `key` (host order), 0 if there is none."""
        base = load64(self.cell)
        word = load64(base + _SLOTS + 8 * ((key >> 13) & 0x7FFFF))
        leaf = shr64(word, WHERE)
        at = 4 * (leaf + popcount64(shl64(word, ~(key >> 8) | 32)))
        if word & DEEPER and shr64(load64(base + 4 * leaf - 4), (key >> 8) & 31) & 1:
            at = self.deep(base, load32(base + at), key & 0xFF)
        value = load32(base + at)
        return value if value else load32(base)

    def deep(self, base, block, last):  # type: ignore[no-untyped-def]
        """Where the leaf is, in the deep block at word offset `block`, of the address that ends in byte `last`."""
        rank = 0
        for i in range(4):
            left = last - 64 * i
            upto = shr64(-1, 63 - min(left, 63)) & ~(left >> 63)
            rank += popcount64(load64(base + 8 * (block + i)) & upto)
        return 8 * block + 28 + 4 * rank

    @inline
    def _perhaps_deep(self, base, key):  # type: ignore[no-untyped-def]
        """`lookup` of an address in a slot with deep blocks: without a branch, for it would be wrong too often."""
        word, default = load64(base + _SLOTS + 8 * (key >> 13)), load32(base)
        leaf = shr64(word, WHERE)
        at = 4 * (leaf + popcount64(shl64(word, ~(key >> 8) | 32)))
        mark = -(shr64(load64(base + 4 * leaf - 4), (key >> 8) & 31) & 1)
        below = self.deep(base, load32(base + at) & mark, key & 0xFF)
        value = load32(base + (at ^ (at ^ below) & mark))
        return value if value else default

    def prefetch(self, key):  # type: ignore[no-untyped-def]
        """Ask for the memory that the first step of `lookup` reads."""
        prefetch(load64(self.cell) + _SLOTS + (key >> 13) * 8)

    @inline  # a call, with what it saves and sets up, is a tenth of a burst of 64
    def lookup_burst(self, keys, results, count):  # type: ignore[no-untyped-def]
        """`lookup` of `count` addresses (u32, host order) at `keys`; the values (u32) go to `results`."""
        base = load64(self.cell)
        whole = 0 if BOUNDSCHECK else count & ~7  # vectors are not checked
        many = whole & ~63
        for i in range(0, many, 64):
            self._go_deep(base, lookup64(base, keys + 4 * i, results + 4 * i), keys + 4 * i, results + 4 * i)
        for i in range(many, whole, 8):
            self._go_deep(base, lookup8(base, keys + 4 * i, results + 4 * i), keys + 4 * i, results + 4 * i)
        for i in range(whole, count):
            store32(results + 4 * i, self.lookup(load32(keys + 4 * i)))

    def _go_deep(self, base, more, keys, results):  # type: ignore[no-untyped-def]
        """Look up those keys whose bits are set in `more`."""
        while unlikely(more != 0):
            i = ctz64(more)
            more = without_lowest64(more)
            store32(results + 4 * i, self._perhaps_deep(base, load32(keys + 4 * i)))


class Lpm4(Lpm):
    """A forwarding table for IPv4: prefixes to numbers, of which 0 means "no route" and cannot be stored.

    Prefixes are text ("192.0.2.0/24") or `ipaddress.IPv4Network`, values 1 to 2**32 - 1. `capacity` is the most
    routes; memory is reserved for that many (about 300 bytes each) and populated by use. In arrays (`load`, `apply`,
    `routes`) an address is an int in host order.

    A change takes microseconds, but for short prefixes without routes of their length beside them: one that covers
    n slots (n / 2**19 of all addresses) takes up to n steps. Looking up from Python is for the control plane; compiled
    code uses `view`. Raises TableFull beyond `capacity`, BadInput for what is no prefix, KeyError as a dict does.
    """

    VERSION, BITS, MOST, EXAMPLE = 4, 32, 1 << 24, "192.0.2.0/24"
    Network, Address = ipaddress.IPv4Network, ipaddress.IPv4Address
    _update = lpm4_update

    def __init__(self, capacity: int = 1 << 20) -> None:
        super().__init__(capacity)

    def _make(self) -> Words:
        # At worst a route is alone in its slot and longer than /24: its leaves (2 words), a mark and a deep block (6).
        # The rest is for what waits to be reused.
        return self._with_rib(Words(BLOCKS + 24 * self.capacity + 65536, BLOCKS), SCRATCH, SCRATCH_BYTES)

    def view_for(self, cell: int) -> Lpm4View:
        return Lpm4View(cell)

    def lookup(self, address: int) -> int:
        """The value for an address (host-order int), 0 if no route holds it."""
        with self.lock:
            return self.view().lookup(address & 0xFFFFFFFF)

    @staticmethod
    def _high_low(addresses: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        given = np.asarray(addresses).astype(np.int64)
        if given.ndim != 1:
            raise BadInput("routes as arrays of different shapes", "pass three arrays of one length")
        return (given << 32).view(np.uint64), np.zeros(len(given), np.uint64), (given < 0) | (given >= 1 << 32)

    @staticmethod
    def _addresses(words: np.ndarray) -> np.ndarray:
        return words[:, 0] >> 32 & 0xFFFFFFFF
