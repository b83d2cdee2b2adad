"""What `Lpm4` and `Lpm6` have in common: prefixes to numbers, for Python. The structures are in their own modules."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, ClassVar

import numpy as np

from libfp.errors import BadInput, TableFull
from libfp.jit.primitive import signed64
from libfp.tables import rib
from libfp.tables.table import Table, staged
from libfp.tables.words import Words

_MASK = np.uint64((1 << 64) - 1)
_AT_ONCE = 1 << 16  # changes that `apply` makes before it hands them over, if their words are few
_MANY = 1 << 12  # of so many the words are not: replicas are better off with one fresh copy


class Lpm(Table, MutableMapping[Any, int]):
    """Base of the two. A prefix is text, an `ipaddress` network, or in methods a host-order int and a length."""

    VERSION: ClassVar[int]
    BITS: ClassVar[int]
    EXAMPLE: ClassVar[str]
    MOST: ClassVar[int]
    Network: Any
    Address: Any
    _update: Any  # the module of compiled `change`, `apply` and `load`

    def __init__(self, capacity: int) -> None:
        if not 0 < capacity <= self.MOST:
            raise BadInput(f"a capacity of {capacity} routes", f"it is 1 to {self.MOST}")
        self.capacity = capacity
        super().__init__(self._make())

    def _make(self) -> Words:
        """The words of an empty table, scratch memory and all."""
        raise NotImplementedError

    def _with_rib(self, words: Words, scratch: int, size: int) -> Words:
        """Give `words` the memory for the routes, and in field `scratch` the address of `size` bytes and a stack."""
        fields = words.fields
        fields[rib.NODES // 8] = words.extra(rib.NODE * rib.nodes_for(self.capacity, self.BITS))
        fields[rib.MADE // 8] = rib.ROOT + 1
        fields[rib.CAPACITY // 8] = self.capacity
        fields[rib.STACK // 8] = words.extra(rib.STACK_BYTES)
        fields[scratch // 8] = words.extra(size)
        return words

    def set(self, address: int, length: int, value: int) -> None:
        """Let the prefix lead to `value`. The address is a host-order int without host bits."""
        self._check(address, length)
        if not 0 < value < 1 << 32:
            raise BadInput(f"a route's value of {value}", "it is 1 to 2**32 - 1; remove the route instead of storing 0")
        with self.lock:
            self._change(address, length, value)

    def remove(self, address: int, length: int) -> None:
        """Remove the prefix. Raises KeyError if it is not there."""
        self._check(address, length)
        with self.lock:
            if self._change(address, length, 0) == rib.MISSING:
                raise KeyError(self._text(address, length))

    def _change(self, address: int, length: int, value: int) -> int:
        result: int = self._update.change(self._words.block, *self._key(address), length, value)
        self._settle(result)
        self.commit()
        return result

    def _settle(self, result: int) -> None:
        if result == rib.FULL:
            raise TableFull(f"a table of {self.capacity} routes is full", "make it with a larger capacity")
        if result == rib.NO_ROOM:  # fragmented, or waiting for a worker: make it anew, out of all routes
            self.load(*self.routes())

    def apply(self, addresses: Any, lengths: Any, values: Any) -> None:
        """Many changes in order, as fast as compiled code goes: value 0 removes, and removing nothing is no error.

        Three arrays of one length. On TableFull the changes before the one that did not fit have been made.
        """
        given = self._array(addresses, lengths, values, 0)
        with self.lock, staged(given) as arena:
            done = 0
            try:
                while done < len(given):
                    self._words.log_changes(bool(self._subscribers) and len(given) < _MANY)
                    until = min(len(given), done + _AT_ONCE)
                    done = self._update.apply(self._words.block, arena.address, done, until)
                    stopped = self._words.fields[rib.STOPPED // 8]
                    self._hand_over()
                    self._settle(stopped)
            finally:
                self._words.log_changes(bool(self._subscribers))

    def load(self, addresses: Any, lengths: Any, values: Any) -> None:
        """Let the table hold exactly these routes: arrays of addresses, lengths and values.

        Built aside and then swapped in: about a second for a million. The last of equal prefixes counts. Raises
        BadInput or TableFull, and changes nothing then.
        """
        given = _sorted(self._array(addresses, lengths, values, 1))
        if len(given) > self.capacity:
            raise TableFull(f"{len(given)} routes for a table of {self.capacity}", "make it with a larger capacity")
        with self.lock, staged(given) as arena:
            words = self._make()
            if not self._update.load(words.block, arena.address, len(given)):
                words.close()
                raise TableFull(f"no memory for {len(given)} routes", "make it with a larger capacity")
            self.replace(words)

    def match(self, address: Any) -> tuple[str, int] | None:
        """The longest prefix that holds `address` (text, int or object) and its value; None if there is none."""
        key = int(self.Address(address))
        with self.lock:
            found = rib.longest(self._words.block, *self._key(key))
        keep = self.BITS - (found >> 32)
        return (self._text(key >> keep << keep, found >> 32), found & 0xFFFFFFFF) if found else None

    def routes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All routes, by address and then length: arrays of addresses, lengths and values."""
        with self.lock, staged(np.zeros((len(self), 4), np.int64)) as arena:
            rib.dump(self._words.block, self._words.fields[rib.STACK // 8], arena.address)
            out = arena.words[: 4 * len(self)].reshape(-1, 4).copy()
        return self._addresses(out[:, :2]), out[:, 2], out[:, 3]

    def clear(self) -> None:
        """Remove all routes."""
        self.load([], [], [])

    def __getitem__(self, prefix: Any) -> int:
        address, length = self.parse(prefix)
        with self.lock:
            value: int = rib.exact(self._words.block, *self._key(address), length)
        if value == 0:
            raise KeyError(self._text(address, length))
        return value

    def __setitem__(self, prefix: Any, value: int) -> None:
        self.set(*self.parse(prefix), value)

    def __delitem__(self, prefix: Any) -> None:
        self.remove(*self.parse(prefix))

    def __len__(self) -> int:
        return self._words.fields[rib.ROUTES // 8]

    def __iter__(self) -> Iterator[str]:
        addresses, lengths, _ = self.routes()
        for address, length in zip(addresses.tolist(), lengths.tolist(), strict=True):
            yield self._text(address if self.BITS == 32 else address[0] << 64 | address[1], length)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} routes, at most {self.capacity}>"

    @classmethod
    def parse(cls, prefix: Any) -> tuple[int, int]:
        """The host-order address and the length of a prefix: text or a network. Raises BadInput."""
        try:
            network = prefix if isinstance(prefix, cls.Network) else cls.Network(prefix)
        except (ValueError, TypeError) as error:
            what = f"{prefix!r} is not an IPv{cls.VERSION} prefix ({error})"
            raise BadInput(what, f'write "{cls.EXAMPLE}"') from None
        return int(network.network_address), network.prefixlen

    @classmethod
    def _key(cls, address: int) -> tuple[int, int]:
        whole = address << (128 - cls.BITS)
        return signed64(whole >> 64), signed64(whole)

    @classmethod
    def _text(cls, address: int, length: int) -> str:
        return f"{cls.Address(address)}/{length}"

    @classmethod
    def _check(cls, address: int, length: int) -> None:
        bits = cls.BITS
        if not 0 <= length <= bits or not 0 <= address < 1 << bits or address & ((1 << (bits - length)) - 1):
            what = f"{address:#x}/{length} is not an IPv{cls.VERSION} prefix"
            raise BadInput(what, "a host-order address without host bits")

    @staticmethod
    def _high_low(addresses: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The two words of each address (u64), and which of them are none. Raises BadInput for another shape."""
        raise NotImplementedError

    @staticmethod
    def _addresses(words: np.ndarray) -> np.ndarray:
        """The reverse: int64 pairs of words to addresses as `routes` gives them."""
        raise NotImplementedError

    @classmethod
    def _array(cls, addresses: Any, lengths: Any, values: Any, least: int) -> np.ndarray:
        """The routes as `rib` has them in arrays: rows of four int64. Raises BadInput."""
        high, low, bad = cls._high_low(addresses)
        length, value = (np.asarray(one).astype(np.int64) for one in (lengths, values))
        if not high.shape == length.shape == value.shape:
            raise BadInput("routes as arrays of different shapes", "pass three arrays of one length")
        bad = bad | (length < 0) | (length > cls.BITS) | (value < least) | (value >= 1 << 32)
        kept = length.clip(0, 128).astype(np.uint64)
        bad |= (kept < 64) & (high & _MASK >> np.minimum(kept, 63) != 0)
        host = np.where(kept <= 64, _MASK, _MASK >> (kept.clip(64, 127) - np.uint64(64)))
        bad |= (kept < 128) & (low & host != 0)
        if bad.any():
            at = int(np.argmax(bad))
            what = f"route {at}, {np.asarray(addresses)[at]}/{int(length[at])} -> {int(value[at])}, is not one"
            raise BadInput(what, f"addresses without host bits, lengths to {cls.BITS}, values {least} to 2**32 - 1")
        return np.stack([high.view(np.int64), low.view(np.int64), length, value], axis=1)


def _sorted(routes: np.ndarray) -> np.ndarray:
    """By address and then length, of equal prefixes the last alone."""
    high, low, length = routes[:, 0].view(np.uint64), routes[:, 1].view(np.uint64), routes[:, 2]
    if not low.any() and (length <= 32).all():
        keys: tuple[np.ndarray, ...] = (high | length.view(np.uint64),)  # the low half of `high` is free
        order = np.argsort(keys[0], kind="stable")
    else:
        keys = high, low, length
        order = np.lexsort(keys[::-1])
    last = np.ones(len(routes), bool)
    if len(routes):
        last[:-1] = np.logical_or.reduce([one[order][1:] != one[order][:-1] for one in keys])
    return np.ascontiguousarray(routes[order[last]])
