"""Longest prefix match for IPv6: six bits a step, each a bitmap and, mostly in the same cache line, one entry.

    roots (2**18 of them, 4 bytes)    one for each /18: a value, or where the block for it is
      block                           a bitmap of 64 bits, then entries (4 bytes each), one for each run of the 64
        block ...                     prefixes below that lead to the same place; a set bit begins a run

The entry for the i-th prefix of a block is number ``popcount(bitmap & (2 << i) - 1)``. Addresses for which no route
but the default holds find 0, and the default route's value is one word for them all; so an empty table is all zeros.
The routes of the Internet end after one to five blocks (/24, /30, /36, /42, /48).

How many steps a key takes cannot be foretold, so a branch on it would be wrong every other time. `lookup_burst` goes
through the keys of 64 at a time a step at a time, and keeps who goes on in a word of 64 bits, without a branch.

The runs and their counting are Poptrie's leaf vector (Asai and Ohara, "Poptrie", SIGCOMM 2015); a block pointer is an
entry like others in place of its internal nodes. 160,000 routes of the Internet take 2 MB.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit import ctz64, load32, load64, load64be, native, popcount64, shl64, shr64, store32, without_lowest64, word
from libfp.tables import lpm6_update
from libfp.tables.lpm import Lpm
from libfp.tables.lpm6_block import BLOCKS, CHILD, OFFSET, ROOT_BITS, SCRATCH, SCRATCH_BYTES, STEP, six
from libfp.tables.words import Words

_ROOTS = 64  # byte offset of the roots
_ROOT_SHIFT = 64 - ROOT_BITS
_FIRST_SHIFT = _ROOT_SHIFT - STEP  # brings the six bits after the root's to the end of `high`
_LAST = 64 - _ROOT_SHIFT % STEP  # where the last block begins whose bits are all in `high`, and one step


@native
class Lpm6View:
    """An `Lpm6` as compiled code sees it: `cell` is the address of a word that holds the arena's address."""

    cell: word

    def lookup(self, high, low):  # type: ignore[no-untyped-def]
        """The value of the longest prefix that holds an address (two words in host order), 0 if there is none."""
        base = load64(self.cell)
        entry = load32(base + _ROOTS + 4 * shr64(high, _ROOT_SHIFT))
        return self._finish(base, entry, ROOT_BITS, high, low)

    def _finish(self, base, entry, depth, high, low):  # type: ignore[no-untyped-def]
        """The value that `entry` leads to, whose block begins at `depth`."""
        while entry >> 30 == 2:
            at = base + 8 * (entry & OFFSET)
            entry = load32(at + 4 + 4 * popcount64(shl64(load64(at), ~six(high, low, depth))))
            depth += STEP
        if entry >= CHILD:
            return load32(base + 8 * (entry & OFFSET))
        return entry if entry else load32(base)

    def lookup_burst(self, keys, results, count):  # type: ignore[no-untyped-def]
        """`lookup` of `count` addresses at `keys`, 16 bytes each as on the wire; the values (u32) go to `results`."""
        for start in range(0, count, 64):
            self._lookup64(keys + 16 * start, results + 4 * start, min(count - start, 64))

    def _lookup64(self, keys, results, count):  # type: ignore[no-untyped-def]
        base = load64(self.cell)
        going = 0  # bit i: key i has not arrived
        for i in range(count):
            entry = load32(base + _ROOTS + 4 * shr64(load64be(keys + 16 * i), _ROOT_SHIFT))
            store32(results + 4 * i, entry)
            going |= shl64(entry >> 30 == 2, i)
        shift = _FIRST_SHIFT
        while going != 0 and shift >= 0:
            left, going = going, 0
            while left != 0:
                i = ctz64(left)
                left = without_lowest64(left)
                at = base + 8 * (load32(results + 4 * i) & OFFSET)
                place = shr64(load64be(keys + 16 * i), shift)
                entry = load32(at + 4 + 4 * popcount64(shl64(load64(at), ~place)))
                store32(results + 4 * i, entry)
                going |= shl64(entry >> 30 == 2, i)
            shift -= STEP
        default, more = load32(base), 0
        for i in range(count):
            entry = load32(results + 4 * i)
            more |= shl64(entry >> 31, i)
            store32(results + 4 * i, entry if entry else default)
        while more != 0:  # longer prefixes, and values that have a word
            i = ctz64(more)
            more = without_lowest64(more)
            high, low = load64be(keys + 16 * i), load64be(keys + 16 * i + 8)
            store32(results + 4 * i, self._finish(base, load32(results + 4 * i), _LAST, high, low))


class Lpm6(Lpm):
    """A forwarding table for IPv6: prefixes to numbers, of which 0 means "no route" and cannot be stored.

    Prefixes are text ("2001:db8::/32") or `ipaddress.IPv6Network`, values 1 to 2**32 - 1. `capacity` is the most
    routes; memory is reserved for that many (about 2.5 KB each at worst) and populated by use (some 30 bytes each for
    the Internet's). In arrays (`load`, `apply`, `routes`) an address is a row of two u64 in host order: high, low.

    A change takes microseconds, but for prefixes shorter than /18: one that covers n /18s takes up to n steps. Looking
    up from Python is for the control plane; compiled code uses `view`. Raises TableFull beyond `capacity`, BadInput
    for what is no prefix, KeyError as a dict does.
    """

    VERSION, BITS, MOST, EXAMPLE = 6, 128, 1 << 22, "2001:db8::/32"
    Network, Address, _update = ipaddress.IPv6Network, ipaddress.IPv6Address, lpm6_update

    def __init__(self, capacity: int = 1 << 19) -> None:
        super().__init__(capacity)

    def _make(self) -> Words:
        # At worst a route is alone and a /128: 19 blocks of a bitmap and 3 entries, and a word for its value.
        # The rest is for what waits to be reused.
        return self._with_rib(Words(BLOCKS + 64 * self.capacity + 65536, BLOCKS), SCRATCH, SCRATCH_BYTES)

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
