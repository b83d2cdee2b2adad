"""The table of next hops: by index, what is done with a packet whose route leads to that one.

An entry is four words: action, port << 8, MTU << 24 and flags << 48; the first eight bytes of the Ethernet header; its
next four, with the verdict << 32; the longest frame that surely fits, 0 where nothing is sent. Entry 0 is where packets
without a route end. A multipath entry holds in its second word the number of the entry where its buckets begin,
`BUCKETS` indexes of 32 bits; in its third the ports it leaves by. Before entry 0 are words for others, the head.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from libfp.errors import BadInput, TableFull
from libfp.jit import Arena, entry, load64, native, store64, word
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import DROP, FORWARD, KIND_SHIFT, PUNT, reason_code
from libfp.stages import notes
from libfp.tables.table import Table
from libfp.tables.words import Words, get, put, seal

ACTION_NONE, ACTION_FORWARD, ACTION_SETTLE, ACTION_MULTIPATH = range(4)
LOCAL = 1 << 48  # in the first word of an entry that punts: this host's own address
UNKNOWN = 1 << 49  # in that of entry 0: the tables are not complete
HOP_SIZE = 32
HEAD = 1536  # words; `libfp.stages.routes` says what is where
MAX_PORTS = 256

BUCKETS = 256  # so a path's share is right to 0.4 %
_RUN = 4 * BUCKETS // HOP_SIZE  # entries that hold a group's buckets
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Forward:
    """Send by the port of that index, with these MAC addresses (6 bytes, wire order), up to `mtu` bytes of IP."""

    port: int
    dst: bytes
    src: bytes
    mtu: int


@dataclass(frozen=True)
class Punt:
    """Hand to Linux, counted as `reason` (one of `REASONS`, or one that a stage names)."""

    reason: str


@dataclass(frozen=True)
class Drop:
    """Drop, counted as `reason`."""

    reason: str


@dataclass(frozen=True)
class Multipath:
    """Spread flows over other next hops, (index, weight) each; RFC 2992 calls it hash-based ECMP.

    When the paths change, only flows move that must: those of a path that went away, or as many as a new one is due.
    """

    paths: tuple[tuple[int, int], ...]


Action = Forward | Punt | Drop | Multipath
_NO_ROUTE = Punt("no-route")


@entry
def _write(block, offset, a, b, c, d):  # type: ignore[no-untyped-def]
    put(block, offset, a)
    put(block, offset + 1, b)
    put(block, offset + 2, c)
    put(block, offset + 3, d)
    seal(block)


@entry
def _write_buckets(block, offset, buckets):  # type: ignore[no-untyped-def]
    for i in range(BUCKETS // 2):
        both = load64(buckets + 8 * i)
        if get(block, offset + i) != both:
            put(block, offset + i, both)
            seal(block)  # each word is right by itself


@entry
def _write_word(block, offset, value):  # type: ignore[no-untyped-def]
    put(block, offset, value)
    seal(block)


class NextHops(Table):
    """Next hops by index, 1 to `capacity` - 1. TableFull when there is no index left."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        self.capacity = capacity
        size = HEAD + HOP_SIZE // 8 * capacity
        super().__init__(Words(size, size))
        _write(self._words.block, HEAD, *_encode(_NO_ROUTE))
        self.actions: dict[int, Action] = {}
        self._next, self._free = 1, list[int]()
        self._runs, self._free_runs = dict[int, int](), list[int]()  # where groups have their buckets
        self._buckets = dict[int, np.ndarray]()
        self._scratch = Arena(4 * BUCKETS)
        self.epoch = Arena(64)
        store64(self.epoch.address, 2)
        self.shares = (self.epoch,)
        self._hits: weakref.WeakSet[Arena] = weakref.WeakSet()
        self._notes: weakref.WeakKeyDictionary[Arena, int] = weakref.WeakKeyDictionary()  # how many have been read

    def view_for(self, cell: int) -> NextHopsView:
        """See `Table.view_for`."""
        hits = Arena(4 * self.capacity)
        own = Arena(notes.SIZE)
        notes.begin(own.address)
        view = NextHopsView(cell, hits.address, self.epoch.address, self.capacity, own.address)
        view.owned = hits, own  # type: ignore[attr-defined]  # live as long as the view
        with self.lock:
            self._hits.add(hits)
            self._notes[own] = 0
        return view

    def wanted(self) -> set[tuple[int, bytes]]:
        """See `Routes.wanted`."""
        found = set[tuple[int, bytes]]()
        with self.lock:
            for own, since in list(self._notes.items()):
                noted, self._notes[own] = notes.noted(own.address, since)
                for hop, high, low in noted:
                    words = struct.pack("!QQ", high & _64_BITS, low & _64_BITS)
                    found.add((hop, words if high else words[12:]))
        return found

    def add(self, action: Action) -> int:
        """Store `action` under a free index and return it."""
        with self.lock:
            index = self._free.pop() if self._free else self._next
            if index >= self.capacity:
                raise TableFull(f"no room for more than {self.capacity - 1} next hops", "make NextHops larger")
            self._next = max(self._next, index + 1)
            try:
                self._set(index, action)
            except BaseException:
                self._free.append(index)
                raise
            return index

    def __setitem__(self, index: int, action: Action) -> None:
        with self.lock:
            if index not in self.actions:
                raise BadInput(f"no next hop {index}", "use add")
            self._set(index, action)
            for group in self._runs:  # a new next hop is in none
                if any(path == index for path, _ in self._paths(group)):
                    self._write_ports(group)
            self.commit()

    def _set(self, index: int, action: Action) -> None:
        words = self._encode_paths(index, action) if isinstance(action, Multipath) else _encode(action)
        _write(self._words.block, HEAD + HOP_SIZE // 8 * index, *words)
        self.actions[index] = action
        if not isinstance(action, Multipath):
            self._forget_paths(index)
        self.commit()

    def _encode_paths(self, index: int, group: Multipath) -> tuple[int, int, int, int]:
        """Write the buckets of a group; the words of its entry."""
        for path, weight in group.paths:
            if not isinstance(self.actions.get(path), Forward | Punt | Drop) or not 0 < weight <= 1 << 16:
                raise BadInput(f"path {path} of weight {weight}", "paths are single next hops, weights 1 to 65536")
        if not 0 < len(group.paths) <= BUCKETS:
            raise BadInput(f"a multipath route over {len(group.paths)} paths", f"1 to {BUCKETS} of them")
        if index not in self._runs:
            if not self._free_runs and self._next + _RUN > self.capacity:
                raise TableFull(f"no room for more than {self.capacity - 1} next hops", "make NextHops larger")
            self._runs[index] = self._free_runs.pop() if self._free_runs else self._next
            self._next = max(self._next, self._runs[index] + _RUN)
        run = self._runs[index]
        self._buckets[index] = share(group.paths, self._buckets.get(index))
        np.frombuffer(self._scratch.buffer, np.uint32)[:BUCKETS] = self._buckets[index]
        _write_buckets(self._words.block, HEAD + HOP_SIZE // 8 * run, self._scratch.address)
        return ACTION_MULTIPATH, run, self._ports_of(group.paths), 0

    def inherit(self, index: int, old: int) -> None:
        """A group that no packet has met yet is to take over from the next hop `old`: flows stay where they can."""
        with self.lock:
            group = self.actions[index]
            before = self._buckets.get(old, np.full(BUCKETS, old, np.uint32))
            if isinstance(group, Multipath):
                self._buckets[index] = before
                self._set(index, group)

    def _paths(self, index: int) -> tuple[tuple[int, int], ...]:
        group = self.actions[index]
        assert isinstance(group, Multipath)
        return group.paths

    def _ports_of(self, paths: Sequence[tuple[int, int]]) -> int:
        """The ports, below 64, that these paths leave by, a bit each: ways back for the reverse path filter."""
        actions = [self.actions[path] for path, _ in paths]
        ports = {action.port for action in actions if isinstance(action, Forward) and action.port < 64}
        return signed(sum(1 << port for port in ports).to_bytes(8, "little"))

    def _write_ports(self, index: int) -> None:
        _write_word(self._words.block, HEAD + HOP_SIZE // 8 * index + 2, self._ports_of(self._paths(index)))

    def _forget_paths(self, index: int) -> None:
        """Of a next hop that is no group any more. Its buckets stay what they are until another group has them."""
        if index in self._runs:
            self._free_runs.append(self._runs.pop(index))
            del self._buckets[index]

    def __getitem__(self, index: int) -> Action:
        return self.actions[index]

    def __len__(self) -> int:
        return len(self.actions)

    def remove(self, index: int) -> None:
        """Forget a next hop that no route uses any more. KeyError if there is none of that index."""
        with self.lock:
            del self.actions[index]
            _write(self._words.block, HEAD + HOP_SIZE // 8 * index, 0, 0, 0, 0)
            self._forget_paths(index)
            self._free.append(index)
            self.commit()

    def used(self) -> set[int]:
        """The indexes that any worker has forwarded by since the last call or the one before."""
        with self.lock:
            epoch, found = load64(self.epoch.address), set[int]()
            for hits in self._hits:
                marks = np.frombuffer(hits.buffer, np.uint32)[: self._next]
                found.update(np.flatnonzero(marks >= epoch - 1).tolist())
            store64(self.epoch.address, epoch + 1)
            return found

    def set_complete(self, complete: bool) -> None:
        """See `Routes.set_complete`."""
        what, header, verdict, longest = _encode(_NO_ROUTE if complete else Punt("via-linux"))
        with self.lock:
            _write(self._words.block, HEAD, what if complete else what | UNKNOWN, header, verdict, longest)
            self.commit()

    def set_head(self, words: Mapping[int, int]) -> None:
        """Change words of the head, by offset."""
        with self.lock:
            for offset, value in words.items():
                _write_word(self._words.block, offset, value)
            self.commit()


def share(paths: Sequence[tuple[int, int]], before: np.ndarray | None = None) -> np.ndarray:
    """`BUCKETS` paths (u32) in proportion to their weights, as far as may be where they were in `before`."""
    weights = np.array([weight for _, weight in paths], np.int64)
    exact = weights * BUCKETS / weights.sum()
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: BUCKETS - quota.sum()]] += 1  # largest remainders
    due = {path: int(count) for (path, _), count in zip(paths, quota, strict=True)}
    buckets = np.zeros(BUCKETS, np.uint32) if before is None else before.copy()
    vacant = []
    for i, path in enumerate(buckets.tolist()):
        if due.get(path, 0) > 0:
            due[path] -= 1
        else:
            vacant.append(i)
    buckets[vacant] = [path for path, count in due.items() for _ in range(count)]
    return buckets


def _encode(action: Forward | Punt | Drop) -> tuple[int, int, int, int]:
    if isinstance(action, Forward):
        if len(action.dst) != 6 or len(action.src) != 6:
            raise BadInput(f"{action}: a MAC address has 6 bytes")
        if not 0 <= action.port < MAX_PORTS or not 68 <= action.mtu <= 65535:  # RFC 791: 68 is the least MTU
            raise BadInput(f"{action}: ports are 0 to {MAX_PORTS - 1}, MTUs 68 to 65535")
        header = action.dst + action.src
        what = ACTION_FORWARD | action.port << 8 | action.mtu << 24
        last = int.from_bytes(header[8:], "little") | ((FORWARD << KIND_SHIFT) + action.port) << 32
        return what, signed(header[:8]), last, action.mtu + ETHERNET_SIZE
    kind = PUNT if isinstance(action, Punt) else DROP
    local = LOCAL if action == Punt("local") else 0
    verdict = (kind << KIND_SHIFT) + reason_code(action.reason)
    return ACTION_SETTLE | local, 0, verdict << 32, 0


def signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


@native
class NextHopsView:
    """The next hops as one worker sees them: `cell` holds the base address, `hits` is its own array of hit marks,
    `notes` what it writes down beside."""

    cell: word
    hits: word
    epoch_at: word
    capacity: word
    notes: word
