"""Plain words by number: what a stage looks up with an index that it has already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit import entry, load64, native, ult64, word
from libfp.tables.keys import codec
from libfp.tables.table import Table, staged
from libfp.tables.words import Words, get, put, seal

_MOST = 1 << 28


@entry
def _write(block, offset, values, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        value = load64(values + 8 * i)
        if get(block, offset + i) != value:
            put(block, offset + i, value)
            seal(block)  # each word is right by itself


@native
class ArrayView:
    """An `Array` as compiled code sees it: `cell` is the address of a word that holds the arena's address."""

    cell: word
    size: word

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """The word (int64) of that number, 0 where there is none. One load."""
        return load64(load64(self.cell) + 8 * index) if ult64(index, self.size) else 0

    def __len__(self):  # type: ignore[no-untyped-def]
        return self.size


class Array(Table):
    """`size` values by number, 0 to `size` - 1; all are zero at first. Every worker has its own copy.

    `value` names a type of one word, see `libfp.tables.keys`: values go in as text or ints, and come out likewise.
    `array[i] = value` changes one, `load` all of them, of which only those that differ are sent to the workers; each
    takes effect by itself. In stages `array[i]` is an int64 in host order, and 0 beyond the end. Raises BadInput for
    what is no value of that type, IndexError as a list does.
    """

    def __init__(self, size: int, value: Any = "u64") -> None:
        if not 0 < size <= _MOST:
            raise BadInput(f"an array of {size} values", f"it has 1 to {_MOST}")
        self._value = codec(value)
        if self._value.words != 1 or isinstance(value, tuple):
            raise BadInput(f"values of type {self._value.name}", "a value is one word: an integer, bool, ipv4 or mac")
        self.size = size
        super().__init__(Words(size, size))

    def view_for(self, cell: int) -> ArrayView:
        """See `Table.view_for`."""
        return ArrayView(cell, self.size)

    def load(self, values: Iterable[Any]) -> None:
        """Let the array hold exactly these: `size` values. Nothing changes if there are more or fewer (BadInput)."""
        words = [self._value.encode(value)[0] for value in values]
        if len(words) != self.size:
            raise BadInput(f"{len(words)} values for an array of {self.size}", "pass as many as it has")
        self._store(0, words)

    def __setitem__(self, index: int, value: Any) -> None:
        self._store(self._number(index), self._value.encode(value))

    def _store(self, first: int, words: Sequence[int]) -> None:
        with self.lock, staged(np.array(words, np.int64)) as arena:
            _write(self._words.block, first, arena.address, len(words))
            self.commit()

    def __getitem__(self, index: int) -> Any:
        number = self._number(index)
        with self.lock:
            return self._value.decode((load64(self._words.arena.address + 8 * number),))

    def _number(self, index: int) -> int:
        if not -self.size <= index < self.size:
            raise IndexError(f"number {index} of an array of {self.size}")
        return index % self.size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        with self.lock:
            words = self._words.arena.words[: self.size].tolist()
        return (self._value.decode((one,)) for one in words)

    def __repr__(self) -> str:
        return f"<Array of {self.size} {self._value.name}>"
