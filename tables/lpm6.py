"""Longest prefix match for IPv6: five bits a step, one load each.

    roots (2**23 words)     one for each /23: a value, or a bitmap of 32 bits and where its block is
      block                 words of the same kind, one for each run of the 32 prefixes below that lead to the same
        block ...           place; a set bit begins a run

The word for the i-th prefix of a block is number ``popcount(bitmap & (2 << i) - 1)``. Where none of a block's words
leads on, they are values of 32 bits: half the memory, and most blocks are such. Addresses for which no route
but the default holds find 0, and the default route's value is one word for them all; so an empty table is all zeros.
The routes of the Internet end after one to five blocks (/28, /33, /38, /43, /48).

How many steps a key takes cannot be foretold, so a branch on it would be wrong every other time: `lookup_burst` takes
64 keys through the four that may lead on, one step of all after the other, and those that have arrived wait: gathers
of eight words, of which many are on their way at once. Then all read their values. What is longer than /48 goes on
alone. The next 64 keys are asked for meanwhile, as if they came next in memory.

The runs and their counting are Poptrie's leaf vector (Asai and Ohara, "Poptrie", SIGCOMM 2015); words that lead on
stand among the values, in place of its internal nodes. 160,000 routes of the Internet take 2.3 MB of blocks, about what
a core's own cache holds, and of the roots, 64 MB of address space, 610 cache lines in 8 MB (2000::/3).
"""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit import (
    BOUNDSCHECK,
    ctz64,
    load64,
    load64be,
    native,
    shr64,
    store32,
    unlikely,
    without_lowest64,
    word,
)
from libfp.tables import lpm6_update
from libfp.tables.lpm import Lpm
from libfp.tables.lpm6_block import BLOCKS, ROOT_BITS, SCRATCH, SCRATCH_BYTES, STEP, entry_at, five, is_child
from libfp.tables.lpm6_vector import lookup8, lookup64
from libfp.tables.words import Words

_ROOTS = 64  # byte offset of the roots


@native
class Lpm6View:
    """An `Lpm6` as compiled code sees it: `cell` is the address of a word that holds the arena's address."""

    cell: word

    def lookup(self, high, low):  # type: ignore[no-untyped-def]
        """The value of the longest prefix that holds an address (two words in host order), 0 if there is none."""
        base, depth = load64(self.cell), ROOT_BITS
        word = load64(base + _ROOTS + 8 * shr64(high, 64 - ROOT_BITS))
        while is_child(word):
            word = entry_at(base, word, five(high, low, depth))
            depth += STEP
        return word if word else load64(base)

    def lookup_burst(self, keys, results, count):  # type: ignore[no-untyped-def]
        """`lookup` of `count` addresses at `keys`, 16 bytes each as on the wire; the values (u32) go to `results`."""
        base = load64(self.cell)
        whole = 0 if BOUNDSCHECK else count & ~7  # vectors are not checked
        many = whole & ~63
        for i in range(0, many, 64):
            self._go_on(lookup64(base, keys + 16 * i, results + 4 * i), keys + 16 * i, results + 4 * i)
        for i in range(many, whole, 8):
            self._go_on(lookup8(base, keys + 16 * i, results + 4 * i), keys + 16 * i, results + 4 * i)
        for i in range(whole, count):
            store32(results + 4 * i, self.lookup(load64be(keys + 16 * i), load64be(keys + 16 * i + 8)))

    def _go_on(self, more, keys, results):  # type: ignore[no-untyped-def]
        """Look up those keys whose bits are set in `more`."""
        while unlikely(more != 0):
            i = ctz64(more)
            more = without_lowest64(more)
            store32(results + 4 * i, self.lookup(load64be(keys + 16 * i), load64be(keys + 16 * i + 8)))


class Lpm6(Lpm):
    """A forwarding table for IPv6: prefixes to numbers, of which 0 means "no route" and cannot be stored.

    Prefixes are text ("2001:db8::/32") or `ipaddress.IPv6Network`, values 1 to 2**32 - 1. `capacity` is the most
    routes; memory is reserved for that many (about 2.5 KB each at worst) and populated by use (some 15 bytes each for
    the Internet's). In arrays (`load`, `apply`, `routes`) an address is a row of two u64 in host order: high, low.

    A change takes microseconds, but for prefixes shorter than /23: one that covers n /23s takes up to n steps
    (2000::/3: milliseconds). Looking
    up from Python is for the control plane; compiled code uses `view`. Raises TableFull beyond `capacity`, BadInput
    for what is no prefix, KeyError as a dict does.
    """

    VERSION, BITS, MOST, EXAMPLE = 6, 128, 1 << 22, "2001:db8::/32"
    Network, Address = ipaddress.IPv6Network, ipaddress.IPv6Address
    _update = lpm6_update

    def __init__(self, capacity: int = 1 << 19) -> None:
        super().__init__(capacity)

    def _make(self) -> Words:
        # At worst a route is alone and a /128: 21 blocks of 3 words. The rest is for what waits to be reused.
        return self._with_rib(Words(BLOCKS + 72 * self.capacity + 65536, BLOCKS), SCRATCH, SCRATCH_BYTES)

    def view_for(self, cell: int) -> Lpm6View:
        return Lpm6View(cell)

    def lookup(self, address: int) -> int:
        """The value for an address (host-order int), 0 if no route holds it."""
        with self.lock:
            return self.view().lookup(*self._key(address))

    @staticmethod
    def _high_low(addresses: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        given = np.asarray(addresses)
        if given.size == 0:
            given = np.zeros((0, 2), np.uint64)
        if given.ndim != 2 or given.shape[1] != 2 or given.dtype.kind not in "ui":
            raise BadInput("addresses that are no array of shape (n, 2)", "a row is the high and the low 64 bits")
        high, low = (np.ascontiguousarray(given[:, i]).astype(np.uint64) for i in range(2))
        return high, low, np.zeros(len(given), bool)

    @staticmethod
    def _addresses(words: np.ndarray) -> np.ndarray:
        return words.astype(np.uint64)
