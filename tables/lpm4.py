"""Longest prefix match for IPv4: two dependent loads and no branch, but for prefixes longer than /24.

    slot (2**18 of them, 16 bytes)     one for each /18: a bitmap of 64 bits and where its leaves are
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
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from libfp.errors import BadInput, TableFull
from libfp.jit import load32, load64, native, popcount64, prefetch, shl64, store32, unlikely, word
from libfp.tables import lpm4_update as update
from libfp.tables import rib
from libfp.tables.lpm4_slot import BLOCKS, SCRATCH, SCRATCH_BYTES, STACK
from libfp.tables.table import Table, staged
from libfp.tables.words import Words

_SLOTS = 64  # byte offset of the slots
_SPREAD = 16  # how many keys ahead `lookup_burst` asks for memory
_MOST = 1 << 24
_AT_ONCE = 1 << 16  # changes that `apply` makes before it hands them over, if their words are few


@native
class Lpm4View:
    """An `Lpm4` as compiled code sees it: `cell` is the address of a word that holds the arena's address."""

    cell: word

    def lookup(self, key):  # type: ignore[no-untyped-def]
        """The value of the longest prefix that holds the address `key` (host order), 0 if there is none."""
        base = load64(self.cell)
        slot = base + _SLOTS + ((key >> 14) & 0x3FFFF) * 16
        second = load64(slot + 8)
        at = second + 4 * popcount64(shl64(load64(slot), ~(key >> 8)))
        if second & 1:
            at -= 1
            if shl64(load64(base + second - 5), ~(key >> 8)) < 0:
                at = self.deep(base, load32(base + at), key & 0xFF)
        value = load32(base + at)
        return value if value else load32(base)

    def deep(self, base, block, last):  # type: ignore[no-untyped-def]
        """Where the leaf is, in the deep block at word offset `block`, of the address that ends in byte `last`."""
        at = 8 * block
        rank = popcount64(shl64(load64(base + at + 8 * (last >> 6)), ~last))
        for i in range(last >> 6):
            rank += popcount64(load64(base + at + 8 * i))
        return at + 28 + 4 * rank

    def prefetch(self, key):  # type: ignore[no-untyped-def]
        """Ask for the memory that `seek` reads."""
        prefetch(load64(self.cell) + _SLOTS + (key >> 14) * 16)

    def seek(self, key):  # type: ignore[no-untyped-def]
        """The first step of `lookup`: a number for `value_at`, whose memory it asks for. The key has 32 bits."""
        base = load64(self.cell)
        slot = base + _SLOTS + (key >> 14) * 16
        at = load64(slot + 8) + 4 * popcount64(shl64(load64(slot), ~(key >> 8)))
        prefetch(base + at)
        return at

    def value_at(self, at, key):  # type: ignore[no-untyped-def]
        """The second step: what `lookup` of `key` returns, `at` being what `seek` returned."""
        base = load64(self.cell)
        if unlikely(at & 1):
            return self.lookup(key)
        value = load32(base + at)
        return value if value else load32(base)

    def lookup_burst(self, keys, results, count):  # type: ignore[no-untyped-def]
        """`lookup` of `count` addresses (u32, host order) at `keys`; the values (u32) go to `results`."""
        for i in range(min(count, _SPREAD)):
            self.prefetch(load32(keys + 4 * i))
        for i in range(count):
            if i + _SPREAD < count:
                self.prefetch(load32(keys + 4 * (i + _SPREAD)))
            store32(results + 4 * i, self.seek(load32(keys + 4 * i)))
        for i in range(count):
            store32(results + 4 * i, self.value_at(load32(results + 4 * i), load32(keys + 4 * i)))


class Lpm4(Table, MutableMapping[Any, int]):
    """A forwarding table for IPv4: prefixes to numbers, of which 0 means "no route" and cannot be stored.

    Prefixes are text ("192.0.2.0/24") or `ipaddress.IPv4Network`, values 1 to 2**32 - 1. `capacity` is the most
    routes; memory is reserved for that many (about 300 bytes each) and populated by use.

    A change takes microseconds, but for short prefixes without routes of their length beside them: one that covers
    n slots (n / 2**18 of all addresses) takes up to n steps. Looking up from Python is for the control plane; compiled
    code uses `view`. Raises TableFull beyond `capacity`, BadInput for what is no prefix, KeyError as a dict does.
    """

    def __init__(self, capacity: int = 1 << 20) -> None:
        if not 0 < capacity <= _MOST:
            raise BadInput(f"a capacity of {capacity} routes", f"it is 1 to {_MOST}")
        self.capacity = capacity
        super().__init__(self._make())

    def _make(self) -> Words:
        # At worst a route is alone in its slot and longer than /24: its leaves (2 words), a mark and a deep block (6).
        # The rest is for what waits to be reused.
        words = Words(BLOCKS + 24 * self.capacity + 65536, BLOCKS)
        fields = words.fields
        fields[rib.NODES // 8] = words.extra(rib.NODE * rib.nodes_for(self.capacity))
        fields[rib.MADE // 8] = rib.ROOT + 1
        fields[SCRATCH // 8] = words.extra(SCRATCH_BYTES)
        fields[update.CAPACITY // 8] = self.capacity
        return words

    def view_for(self, cell: int) -> Lpm4View:
        return Lpm4View(cell)

    def set(self, address: int, length: int, value: int) -> None:
        """Let the prefix lead to `value`. The address is a host-order int without host bits."""
        _check(address, length)
        if not 0 < value < 1 << 32:
            raise BadInput(f"a route's value of {value}", "it is 1 to 2**32 - 1; remove the route instead of storing 0")
        with self.lock:
            self._change(address, length, value)

    def remove(self, address: int, length: int) -> None:
        """Remove the prefix. Raises KeyError if it is not there."""
        _check(address, length)
        with self.lock:
            if self._change(address, length, 0) == update.MISSING:
                raise KeyError(_text(address, length))

    def _change(self, address: int, length: int, value: int) -> int:
        result = update.change(self._words.block, address, length, value)
        self._settle(result)
        self.commit()
        return result

    def _settle(self, result: int) -> None:
        if result == update.FULL:
            raise TableFull(f"a table of {self.capacity} routes is full", "make it with a larger capacity")
        if result == update.NO_ROOM:  # fragmented, or waiting for a worker: make it anew, out of all routes
            self.load(*self.routes())

    def apply(self, addresses: Any, lengths: Any, values: Any) -> None:
        """Many changes in order, as fast as compiled code goes: value 0 removes, and removing nothing is no error.

        Three arrays of one length. On TableFull the changes before the one that did not fit have been made.
        """
        given = _arrays(addresses, lengths, values, 0)
        count = given.shape[1]
        with self.lock, staged(given) as arena:
            done = 0
            while done < count:
                block = self._words.block
                until = min(count, done + _AT_ONCE)
                done = update.apply(block, *(arena.address + 8 * count * i for i in range(3)), done, until)
                stopped = self._words.fields[update.STOPPED // 8]
                self._hand_over()
                self._settle(stopped)

    def load(self, addresses: Any, lengths: Any, values: Any) -> None:
        """Let the table hold exactly these routes: arrays of host-order addresses, lengths and values.

        Built aside and then swapped in: about a second for a million. The last of equal prefixes counts. Raises
        BadInput or TableFull, and changes nothing then.
        """
        given = _arrays(addresses, lengths, values, 1)
        given = given[:, np.argsort(given[0] << 6 | given[1], kind="stable")]
        place = given[0] << 6 | given[1]
        given = np.ascontiguousarray(given[:, np.append(place[1:] != place[:-1], True)[: len(place)]])
        count = given.shape[1]
        if count > self.capacity:
            raise TableFull(f"{count} routes for a table of {self.capacity}", "make it with a larger capacity")
        with self.lock, staged(given) as arena:
            words = self._make()
            if not update.load(words.block, *(arena.address + 8 * count * i for i in range(3)), count):
                words.close()
                raise TableFull(f"no memory for {count} routes", "make it with a larger capacity")
            self.replace(words)

    def lookup(self, address: int) -> int:
        """The value for an address (host-order int), 0 if no route holds it."""
        with self.lock:
            return self.view().lookup(address & 0xFFFFFFFF)

    def match(self, address: Any) -> tuple[str, int] | None:
        """The longest prefix that holds `address` (text, int or IPv4Address) and its value; None if there is none."""
        key = int(ipaddress.IPv4Address(address))
        with self.lock:
            found = rib.longest(self._words.block, key)
        length = found >> 32
        return (_text(key >> (32 - length) << (32 - length), length), found & 0xFFFFFFFF) if found else None

    def routes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All routes, by address and then length: int64 arrays of addresses (host order), lengths and values."""
        with self.lock:
            count = len(self)
            with staged(np.zeros((3, count), np.int64)) as arena:
                block, stack = self._words.block, self._words.fields[SCRATCH // 8] + STACK
                rib.dump(block, stack, *(arena.address + 8 * count * i for i in range(3)))
                out = arena.words[: 3 * count].reshape(3, count).copy()
        return out[0], out[1], out[2]

    def clear(self) -> None:
        """Remove all routes."""
        self.load([], [], [])

    def __getitem__(self, prefix: Any) -> int:
        address, length = parse(prefix)
        with self.lock:
            value = rib.exact(self._words.block, address, length)
        if value == 0:
            raise KeyError(_text(address, length))
        return value

    def __setitem__(self, prefix: Any, value: int) -> None:
        self.set(*parse(prefix), value)

    def __delitem__(self, prefix: Any) -> None:
        self.remove(*parse(prefix))

    def __len__(self) -> int:
        return self._words.fields[rib.ROUTES // 8]

    def __iter__(self) -> Iterator[str]:
        addresses, lengths, _ = self.routes()
        return (_text(int(address), int(length)) for address, length in zip(addresses, lengths, strict=True))

    def __repr__(self) -> str:
        return f"<Lpm4 of {len(self)} routes, at most {self.capacity}>"


def parse(prefix: Any) -> tuple[int, int]:
    """The host-order address and the length of a prefix: text or IPv4Network. Raises BadInput."""
    try:
        network = prefix if isinstance(prefix, ipaddress.IPv4Network) else ipaddress.IPv4Network(prefix)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{prefix!r} is not an IPv4 prefix ({error})", 'write "192.0.2.0/24"') from None
    return int(network.network_address), network.prefixlen


def _text(address: int, length: int) -> str:
    return f"{ipaddress.IPv4Address(address)}/{length}"


def _check(address: int, length: int) -> None:
    if not 0 <= length <= 32 or not 0 <= address < 1 << 32 or address & ((1 << (32 - length)) - 1):
        raise BadInput(f"{address:#x}/{length} is not an IPv4 prefix", "a host-order address without host bits")


def _arrays(addresses: Any, lengths: Any, values: Any, least: int) -> np.ndarray:
    columns = [np.asarray(one).astype(np.int64) for one in (addresses, lengths, values)]
    if any(one.shape != columns[0].shape or one.ndim != 1 for one in columns):
        raise BadInput("routes as arrays of different shapes", "pass three arrays of one length")
    given = np.stack(columns)
    address, length, value = given
    bad = (length < 0) | (length > 32) | (address < 0) | (address >= 1 << 32) | (value < least) | (value >= 1 << 32)
    bad |= (address & ((1 << (32 - np.clip(length, 0, 32))) - 1)) != 0
    if bad.any():
        at = int(np.argmax(bad))
        what = f"route {at}, {int(address[at]):#x}/{int(length[at])} -> {int(value[at])}, is not one"
        raise BadInput(what, f"addresses without host bits, lengths to 32, values from {least} to 2**32 - 1")
    return given
