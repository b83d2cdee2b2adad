"""Exact match: keys of 1 to 8 words to values of one word; a lookup reads a cache line of tags and one of entries.

See `libfp.tables.buckets` for the layout.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from libfp.errors import BadInput, Error, TableFull
from libfp.jit import BOUNDSCHECK, constant, load64, native, store64, word
from libfp.jit.primitive import MASK64, signed64
from libfp.tables import hash_update as update
from libfp.tables.buckets import (
    SECRETS,
    SLOTS,
    SPAN,
    TAGS,
    entry_words,
    find_word,
    find_words,
    first_entry,
    table_size,
    value_at,
)
from libfp.tables.hash_vector import lookup8, lookup64
from libfp.tables.keys import codec
from libfp.tables.table import Table, staged
from libfp.tables.words import Words

_MOST = 1 << 28
_LOAD = 0.9
_LEAST = 64  # buckets to begin with, and up to twice as many


def _lookup_burst(self, keys, results, count):  # type: ignore[no-untyped-def]
    """`lookup` of `count` keys in memory: see `get_burst`."""
    self.get_burst(keys, results, count, -1)


def _get_burst(self, keys, results, count, default):  # type: ignore[no-untyped-def]
    """`get` of `count` keys at `keys`, `words` int64 each, one key after another; the int64 values go to `results`.

    64 at a time, so that they wait for memory side by side: for the tags of their buckets, and then for the entries
    those name. Keys that are in their second bucket come last. The two must not overlap.
    """
    base, buckets, size = load64(self.cell), self.buckets, 8 * self.words
    whole = 0 if BOUNDSCHECK else count & ~7  # vectors are not checked
    many = whole & ~63
    for i in range(0, many, 64):
        lookup64(base, buckets, self.words, keys + size * i, results + 8 * i, default)
    for i in range(many, whole, 8):
        lookup8(base, buckets, self.words, keys + size * i, results + 8 * i, default)
    for i in range(whole, count):
        store64(results + 8 * i, value_at(base, buckets, self.words, keys + size * i, default))


@native
class HashView:
    """A `Hash` whose keys are one word (so `words` is 1), as compiled code sees it: a key is an int64.

    `cell` is the address of a word that holds the arena's address; `buckets` is how many there is room for.
    """

    cell: word
    buckets: word
    words: constant

    def __contains__(self, key):  # type: ignore[no-untyped-def]
        return find_word(load64(self.cell), self.buckets, key) != 0

    def get(self, key, default):  # type: ignore[no-untyped-def]
        """The key's value, or `default`."""
        entry = find_word(load64(self.cell), self.buckets, key)
        return load64(entry + 8) if entry != 0 else default

    def lookup(self, key):  # type: ignore[no-untyped-def]
        """The key's value, or -1."""
        return self.get(key, -1)

    lookup_burst, get_burst = _lookup_burst, _get_burst


@native
class WideHashView:
    """A `Hash` whose keys are several words, as compiled code sees it: a key is a tuple of `words` int64."""

    cell: word
    buckets: word
    words: constant

    def __contains__(self, key):  # type: ignore[no-untyped-def]
        return find_words(load64(self.cell), self.buckets, self.words, key) != 0

    def get(self, key, default):  # type: ignore[no-untyped-def]
        """The key's value, or `default`."""
        entry = find_words(load64(self.cell), self.buckets, self.words, key)
        return load64(entry + 8 * self.words) if entry != 0 else default

    def lookup(self, key):  # type: ignore[no-untyped-def]
        """The key's value, or -1."""
        return self.get(key, -1)

    lookup_burst, get_burst = _lookup_burst, _get_burst


class Hash(Table, MutableMapping[Any, Any]):
    """A table of exact keys: a dict for at most `capacity` entries, whose copies every worker looks things up in.

    `key` and `value` name types: "ipv4", "ipv6", "mac", "u8" to "u64", "i8" to "i64",
    "bool", numpy dtypes, and for keys tuples of those, up to 64 bytes. Keys go in as text, `ipaddress` objects, ints
    or bytes in wire order, and come out as text (addresses) or ints. Compiled code uses `view`, whose keys are host
    order: an int64, or for keys of several words a tuple of int64.

    Memory is reserved for `capacity` at 0.9 full and populated by use: 19 bytes an entry for keys of one word, 37 for
    two or three, 46 for four, 73 for five to seven, 82 for eight; the master takes 5 bytes an entry more. A table
    begins small. When it is 0.9 full it doubles, up to `capacity`, two buckets with each new entry: never more than
    200 words in a transaction, and nobody waits.
    Raises TableFull beyond `capacity`, BadInput for a key or value not of its type, KeyError as a dict does.
    """

    def __init__(self, key: Any = "u64", value: Any = "u64", capacity: int = 4096) -> None:
        if not 0 < capacity <= _MOST:
            raise BadInput(f"a capacity of {capacity} entries", f"it is 1 to {_MOST}")
        self.capacity = capacity
        self._key, self._value = codec(key), codec(value)
        if self._value.words != 1 or isinstance(value, tuple):
            raise BadInput(f"values of type {self._value.name}", "a value is one word: an integer, bool, ipv4 or mac")
        wanted = int(capacity / (SLOTS * _LOAD)) + 1
        doublings = max(0, (wanted // _LEAST).bit_length() - 1)
        self._least = max(2, -(-wanted >> doublings))
        self._buckets = self._least << doublings
        super().__init__(self._make(0))

    def _make(self, entries: int) -> Words:
        """An empty table that has room for so many entries without growing."""
        size = table_size(self._buckets, self._key.words) // 8
        words, span = Words(size, size), self._least
        while entries > span * SLOTS * _LOAD and span < self._buckets:
            span *= 2
        fields = words.fields
        fields[update.BUCKETS // 8] = self._buckets
        fields[update.WORDS // 8] = self._key.words
        fields[update.SCRATCH // 8] = words.extra(update.SCRATCH_BYTES)
        fields[update.LINKS // 8] = words.extra(update.LINK_BYTES * self._buckets)
        store64(words.arena.address + SPAN, span)
        for i in range(self._key.words):
            store64(words.arena.address + SECRETS + 8 * i, signed64(secrets.randbits(64)))
        return words

    def _extents(self) -> list[tuple[int, int]]:
        span, entries = load64(self._words.arena.address + SPAN), first_entry(self._buckets) // 8
        return [(0, TAGS // 8 + span), (entries, entries + span * SLOTS * entry_words(self._key.words))]

    def view_for(self, cell: int) -> HashView | WideHashView:
        """See `Table.view_for`."""
        if self._key.words == 1:
            return HashView(cell, self._buckets, 1)
        return WideHashView(cell, self._buckets, self._key.words)

    def load(self, keys: Any, values: Any) -> None:
        """Let the table hold exactly these entries: int64 words, shape (n,) or (n, words a key), and values (n,).

        Built aside and then swapped in. The last of equal keys counts. Raises BadInput or TableFull, and changes
        nothing then.
        """
        rows, column = np.asarray(keys), np.asarray(values)
        if rows.size == column.size == 0:
            return self.clear()
        rows = rows.reshape(len(rows), -1)
        if rows.dtype.kind not in "iu" or column.dtype.kind not in "iub":
            raise BadInput(f"arrays of {rows.dtype} and {column.dtype}", "keys and values are integers")
        if rows.shape[1:] != (self._key.words,) or column.shape != (len(rows),):
            what = f"keys of shape {rows.shape} for values of shape {column.shape}"
            raise BadInput(what, f"pass n keys of {self._key.words} words each, and n values")
        entries = np.column_stack([rows.astype(np.int64), column.astype(np.int64)])
        for extreme in (int(entries[:, -1].min()), int(entries[:, -1].max())):
            self._value.encode(extreme & MASK64 if self._value.name == "u64" else extreme)
        with self.lock:
            self._load(entries)

    def _load(self, entries: np.ndarray) -> None:
        _, last = np.unique(entries[::-1, :-1], axis=0, return_index=True)
        entries = entries[::-1][np.sort(last)]
        if len(entries) > self.capacity:
            raise TableFull(f"{len(entries)} entries for a table of {self.capacity}", "make it with a larger capacity")
        with staged(entries) as arena:
            for _ in range(64):  # a seed that leads to no table is rare
                words = self._make(len(entries))
                if update.fill(words.block, arena.address, len(entries)) == len(entries):
                    self.replace(words)
                    return
                words.close()
        raise Error("no hash function spreads these keys", "make the table larger")

    def clear(self) -> None:
        """Remove all entries."""
        with self.lock:
            self._load(np.zeros((0, self._key.words + 1), np.int64))

    def _entries(self) -> np.ndarray:
        """All entries: a row of int64 words each, the key's and the value."""
        with self.lock:
            shape = len(self), self._key.words + 1
            with staged(np.zeros(shape, np.int64)) as arena:
                update.dump(self._words.block, arena.address)
                return arena.words[: shape[0] * shape[1]].reshape(shape).copy()

    def _place(self, key: tuple[int, ...]) -> None:
        at = self._words.fields[update.SCRATCH // 8]
        for i, one in enumerate(key):
            store64(at + 8 * i, one)

    def __setitem__(self, key: Any, value: Any) -> None:
        words, (stored,) = self._key.encode(key), self._value.encode(value)
        with self.lock:
            self._place(words)
            if len(self) == self.capacity and not update.find(self._words.block):
                raise TableFull(f"a table of {self.capacity} entries is full", "make it with a larger capacity")
            if update.store(self._words.block, stored) == update.NO_PLACE:
                self._load(np.vstack([self._entries(), [[*words, stored]]]))
            self.commit()

    def __getitem__(self, key: Any) -> Any:
        words = self._key.encode(key)
        with self.lock:
            self._place(words)
            found = update.find(self._words.block)
            if not found:
                raise KeyError(key)
            return self._value.decode((load64(found),))

    def __delitem__(self, key: Any) -> None:
        words = self._key.encode(key)
        with self.lock:
            self._place(words)
            if not update.remove(self._words.block):
                raise KeyError(key)
            self.commit()

    def __len__(self) -> int:
        return self._words.fields[update.ENTRIES // 8]

    def __iter__(self) -> Iterator[Any]:
        return (self._key.decode(tuple(row[:-1])) for row in self._entries().tolist())

    def __repr__(self) -> str:
        return f"<Hash of {self._key.name} to {self._value.name}: {len(self)} entries, at most {self.capacity}>"
