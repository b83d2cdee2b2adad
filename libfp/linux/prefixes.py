"""Prefixes to numbers, compactly: 24 bytes each and an index over them, for a million routes without an object each.

    entry (24 bytes)    high word, low word, value (u32), length (u32); entry 0 is none
    index (u32 each)    entry numbers by hash, linear probing, a power of two of them and at most three quarters full

The two words of an IPv4 prefix are its address (host order) and 0, those of an IPv6 prefix the halves of its address
as int64 patterns. Arrays of prefixes have one row of three int64 each: (high, low, length). A value of 0 is none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from libfp.errors import TableFull
from libfp.jit import Arena, entry, kernel, load32, load64, mul64, shr64, store32, store64
from libfp.linux.rtnetlink import Prefix

# The control block: byte offsets of its words.
ENTRIES, INDEX, MASK, USED, SPARE, COUNT, MOST, EXTRA = 0, 8, 16, 24, 32, 40, 48, 56
LENGTHS = 64  # how many prefixes there are of each length
_VALUE, _LENGTH = 16, 20
ENTRY = 24
_GONE = 0xFFFFFFFF  # the length of an entry that is not in use
_FIRST = 1 << 10  # entries of the index of an empty map
_LAYOUT = np.dtype([("high", "<i8"), ("low", "<i8"), ("value", "<u4"), ("length", "<u4")])


@kernel
def _home(block, high, low, length):  # type: ignore[no-untyped-def]
    """Where the prefix's place in the index would be (multiplicative hashing)."""
    mixed = high + mul64(low, -0x61C8864680B583EB) + mul64(length, -0x3D4D51C2D82B14B1)
    return shr64(mul64(mixed, -0x4B47D0C5A1B4D9A3), 36) & load64(block + MASK)


@kernel
def find(block, high, low, length):  # type: ignore[no-untyped-def]
    """The number of the prefix's entry, 0 if there is none."""
    index, mask, entries = load64(block + INDEX), load64(block + MASK), load64(block + ENTRIES)
    at = _home(block, high, low, length)
    while True:
        number = load32(index + 4 * at)
        if number == 0:
            return 0
        one = entries + ENTRY * number
        if load64(one) == high and load64(one + 8) == low and load32(one + _LENGTH) == length:
            return number
        at = (at + 1) & mask


@kernel
def value_at(block, number):  # type: ignore[no-untyped-def]
    """The value in entry `number`; that of entry 0 is 0."""
    return load32(load64(block + ENTRIES) + ENTRY * number + _VALUE)


@kernel
def has_room(block):  # type: ignore[no-untyped-def]
    """Whether one more prefix fits without a larger index."""
    if load64(block + USED) >= load64(block + MOST) and load64(block + SPARE) == 0:
        return False
    return 4 * (load64(block + COUNT) + 1) <= 3 * load64(block + MASK)


@kernel
def _enter(block, number):  # type: ignore[no-untyped-def]
    index, mask = load64(block + INDEX), load64(block + MASK)
    one = load64(block + ENTRIES) + ENTRY * number
    at = _home(block, load64(one), load64(one + 8), load32(one + _LENGTH))
    while load32(index + 4 * at):
        at = (at + 1) & mask
    store32(index + 4 * at, number)


@kernel
def _leave(block, number):  # type: ignore[no-untyped-def]
    """Take the entry out of the index; those behind it that it had pushed away move up."""
    index, mask, entries = load64(block + INDEX), load64(block + MASK), load64(block + ENTRIES)
    one = entries + ENTRY * number
    hole = _home(block, load64(one), load64(one + 8), load32(one + _LENGTH))
    while load32(index + 4 * hole) != number:
        hole = (hole + 1) & mask
    at = hole
    while True:
        at = (at + 1) & mask
        other = load32(index + 4 * at)
        if other == 0:
            break
        one = entries + ENTRY * other
        home = _home(block, load64(one), load64(one + 8), load32(one + _LENGTH))
        if ((at - home) & mask) >= ((at - hole) & mask):
            store32(index + 4 * hole, other)
            hole = at
    store32(index + 4 * hole, 0)


@kernel
def set_value(block, high, low, length, value):  # type: ignore[no-untyped-def]
    """Give the prefix a value, or remove it with 0; return the old one. The caller has seen to the room."""
    number = find(block, high, low, length)
    old = value_at(block, number) if number else 0
    if number == 0 and value:
        number = load64(block + SPARE)
        if number:
            store64(block + SPARE, load64(load64(block + ENTRIES) + ENTRY * number))
        else:
            number = load64(block + USED)
            store64(block + USED, number + 1)
        one = load64(block + ENTRIES) + ENTRY * number
        store64(one, high)
        store64(one + 8, low)
        store32(one + _LENGTH, length)
        _enter(block, number)
        _count(block, length, 1)
    if number:
        one = load64(block + ENTRIES) + ENTRY * number
        store32(one + _VALUE, value)
        if value == 0:
            _leave(block, number)
            _count(block, length, -1)
            store32(one + _LENGTH, _GONE)
            store64(one, load64(block + SPARE))
            store64(block + SPARE, number)
    return old


@kernel
def _count(block, length, by):  # type: ignore[no-untyped-def]
    store64(block + COUNT, load64(block + COUNT) + by)
    store64(block + LENGTHS + 8 * length, load64(block + LENGTHS + 8 * length) + by)


@entry
def get(block, high, low, length):  # type: ignore[no-untyped-def]
    """The prefix's value, 0 if it has none."""
    number = find(block, high, low, length)
    return value_at(block, number) if number else 0


@entry
def put(block, high, low, length, value):  # type: ignore[no-untyped-def]
    """`set_value`, or -1 if there is no room."""
    if value and not has_room(block):
        return -1
    return set_value(block, high, low, length, value)


@entry
def get_all(block, rows, values, count):  # type: ignore[no-untyped-def]
    """The values of `count` prefixes, as int64."""
    for i in range(count):
        at = rows + 24 * i
        number = find(block, load64(at), load64(at + 8), load64(at + 16))
        store64(values + 8 * i, value_at(block, number) if number else 0)


@entry
def put_all(block, rows, values, start, count):  # type: ignore[no-untyped-def]
    """Exchange: the prefixes get the values, `values` the old ones. Returns where it stopped for want of room."""
    for i in range(start, count):
        if load64(values + 8 * i) and not has_room(block):
            return i
        at = rows + 24 * i
        old = set_value(block, load64(at), load64(at + 8), load64(at + 16), load64(values + 8 * i))
        store64(values + 8 * i, old)
    return count


@entry
def rebuild(block):  # type: ignore[no-untyped-def]
    """Fill a new index, all zeros."""
    for number in range(1, load64(block + USED)):
        if load32(load64(block + ENTRIES) + ENTRY * number + _LENGTH) != _GONE:
            _enter(block, number)


@entry
def compare(mine, other, rows):  # type: ignore[no-untyped-def]
    """Write the prefixes that do not have the same value in both maps to `rows`; return how many there are."""
    count = _missing(mine, other, rows, False)
    return count + _missing(other, mine, rows + 24 * count, True)


@kernel
def _missing(mine, other, rows, absent):  # type: ignore[no-untyped-def]
    """Those of `mine` that `other` lacks or, unless `absent`, has with another value."""
    count = 0
    for number in range(1, load64(mine + USED)):
        one = load64(mine + ENTRIES) + ENTRY * number
        length = load32(one + _LENGTH)
        if length == _GONE:
            continue
        there = find(other, load64(one), load64(one + 8), length)
        if there and (absent or value_at(other, there) == load32(one + _VALUE)):
            continue
        at = rows + 24 * count
        store64(at, load64(one))
        store64(at + 8, load64(one + 8))
        store64(at + 16, length)
        count += 1
    return count


class PrefixMap:
    """One family's prefixes (`bits` is 32 or 128) to numbers from 1 to 2**32 - 1; at most `most` of them.

    `block` is what compiled code takes. Of one thread at a time. Raises TableFull.
    """

    def __init__(self, bits: int = 32, most: int = 1 << 23) -> None:
        self.bits = bits
        self._entries = Arena(ENTRY * (most + 1))  # populated by use
        self._control = Arena(4096)
        self._index = Arena(4 * _FIRST)
        self.block = self._control.address
        self.fields = self._control.words
        for field, value in ((ENTRIES, self._entries.address), (USED, 1), (MOST, most + 1)):
            self.fields[field // 8] = value
        self._use_index(_FIRST)

    def _use_index(self, size: int) -> None:
        self.fields[INDEX // 8], self.fields[MASK // 8] = self._index.address, size - 1

    def grow(self) -> None:
        """Make room for more, or raise TableFull."""
        if self.fields[USED // 8] >= self.fields[MOST // 8] and not self.fields[SPARE // 8]:
            raise TableFull(f"more than {self.fields[MOST // 8] - 1} prefixes", "that is more than libfp is made for")
        size = 2 * (int(self.fields[MASK // 8]) + 1)
        old, self._index = self._index, Arena(4 * size, huge=size >= 1 << 20)
        self._use_index(size)
        rebuild(self.block)
        old.close()

    def __len__(self) -> int:
        return int(self.fields[COUNT // 8])

    def count(self, length: int) -> int:
        """How many prefixes there are of one length."""
        return int(self.fields[LENGTHS // 8 + length])

    def get(self, prefix: Prefix) -> int:
        """The prefix's value, 0 if it has none."""
        value: int = get(self.block, *prefix.row())
        return value

    def put(self, prefix: Prefix, value: int) -> int:
        """Give the prefix a value, or remove it with 0; return the old one."""
        while (old := put(self.block, *prefix.row(), value)) < 0:
            self.grow()
        number: int = old
        return number

    def get_all(self, rows: np.ndarray) -> np.ndarray:
        """The values of many prefixes."""
        with _Staged(rows) as staged:
            get_all(self.block, staged.rows, staged.values, len(rows))
            return staged.taken()

    def put_all(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Give each of many prefixes its value; return the old ones."""
        with _Staged(rows, values) as staged:
            done = 0
            while (done := put_all(self.block, staged.rows, staged.values, done, len(rows))) < len(rows):
                self.grow()
            return staged.taken()

    @property
    def entries(self) -> np.ndarray:
        """All entries, those not in use too (their value is 0): fields high, low, value and length. A view."""
        return np.frombuffer(self._entries.buffer[: ENTRY * int(self.fields[USED // 8])], _LAYOUT)[1:]

    def rows(self, where: np.ndarray | None = None) -> np.ndarray:
        """The prefixes, or those of the entries for which `where` is true."""
        entries = self.entries
        return as_rows(entries[entries["value"] != 0 if where is None else where])

    def differences(self, other: PrefixMap) -> np.ndarray:
        """The prefixes that do not have the same value here and there."""
        rows = Arena(max(8, 24 * (len(self) + len(other))))
        try:
            count = compare(self.block, other.block, rows.address)
            return rows.words[: 3 * count].reshape(count, 3).copy()
        finally:
            rows.close()

    def __iter__(self) -> Iterator[Prefix]:
        return iter(prefixes(self.rows(), self.bits))

    def close(self) -> None:
        """Free the memory now."""
        for arena in (self._entries, self._control, self._index):
            arena.close()


class _Staged:
    """Rows, and a value for each, where compiled code can reach them."""

    def __init__(self, rows: np.ndarray, values: np.ndarray | None = None) -> None:
        self._count = len(rows)
        self._arena = Arena(max(8, 32 * self._count))
        self.rows, self.values = self._arena.address, self._arena.address + 24 * self._count
        self._arena.words[: 3 * self._count] = rows.reshape(-1)
        if values is not None:
            self._arena.words[3 * self._count : 4 * self._count] = values

    def taken(self) -> np.ndarray:
        return self._arena.words[3 * self._count : 4 * self._count].copy()

    def __enter__(self) -> _Staged:
        return self

    def __exit__(self, *exception: object) -> None:
        self._arena.close()


def as_rows(entries: np.ndarray) -> np.ndarray:
    """Entries as rows (high, low, length)."""
    return np.stack([entries["high"], entries["low"], entries["length"].astype(np.int64)], axis=1)


def prefixes(rows: np.ndarray, bits: int) -> list[Prefix]:
    """Rows as prefixes."""
    return [Prefix.of_row(high, low, length, bits) for high, low, length in rows.tolist()]


def unique(rows: np.ndarray) -> np.ndarray:
    """The rows without repetitions, in no particular order."""
    if len(rows) < 2:
        return rows
    order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))
    rows = rows[order]
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))]
