"""The tables `forward` reads: prefixes to next hops, next hops to what is done, and what is checked on each port.

Filled by `libfp.linux`, or by hand:

    routes = Routes()
    gateway, own = bytes.fromhex("020000000002"), bytes.fromhex("020000000001")
    hop = routes.next_hops.add(Forward(port=1, dst=gateway, src=own, mtu=1500))
    routes.fib["198.51.100.0/24"] = hop

Every change reaches every worker in the order it was made: add a next hop before the routes that use it, remove it
after them.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from libfp.engine.dissect import dissect
from libfp.errors import BadInput, TableFull
from libfp.jit import Arena, entry, kernel, load8, load64, native, store64, ult64, word
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import DROP, FORWARD, KIND_SHIFT, PUNT, reason_code
from libfp.stages import notes
from libfp.tables.lpm4 import Lpm4, Lpm4View
from libfp.tables.lpm6 import Lpm6, Lpm6View
from libfp.tables.table import Table
from libfp.tables.words import Words, get, put, seal

ACTION_NONE, ACTION_FORWARD, ACTION_SETTLE, ACTION_MULTIPATH = range(4)
LOCAL = 1 << 48  # in the first word of an entry that punts: this host's own address
UNKNOWN = 1 << 49  # in that of entry 0: the tables are not complete

PORT_RPF_STRICT, PORT_RPF_LOOSE, PORT_REDIRECTS, PORT_ACCEPT_LOCAL = 1, 2, 4, 8
CHECK_SOURCES = PORT_RPF_STRICT | PORT_RPF_LOOSE
MAX_PORTS = 256

# Word offsets in the table of next hops. An entry is four words: action, port << 8, MTU << 24 and flags << 48; the
# first eight bytes of the Ethernet header; its next four, with the verdict << 32; the longest frame that surely fits,
# 0 where nothing is sent. Entry 0 is where packets without a route end. A multipath entry holds in its second word the
# number of the entry where its buckets begin, `BUCKETS` indexes of 32 bits; in its third the ports it leaves by.
_PORT_FLAGS, _SOURCES, _HASHING, _ADDRESSES, _HOPS = 8, 264, 560, 576, 1536
HOP_SIZE = 32
_64_BITS = (1 << 64) - 1
BUCKETS = 256  # so a path's share is right to 0.4 %
_RUN = 4 * BUCKETS // HOP_SIZE  # entries that hold a group's buckets

# What a flow is for multipath routes, as the kernel's fib_multipath_hash_fields has it (its L3 and L4 policies, too).
FIELD_SRC, FIELD_DST, FIELD_PROTOCOL, FIELD_LABEL, FIELD_SPORT, FIELD_DPORT = 1, 2, 4, 8, 16, 32

# The filter that tells usual addresses: one byte for each value of an address's first byte, 1 where it is in 0/8, 127/8
# or 224/3; then one byte for each hash of an address, 1 where an address of this host has it.
FIRST_BYTES = 256
_HASHES, HASH, HASH_SHIFT = 2048, 0x9E3779B1, 21
_FILTER_WORDS = (FIRST_BYTES + _HASHES) // 8

#: Reasons that routes give.
REASONS = (
    "no-neighbour", "no-route", "unreachable", "prohibit", "blackhole", "via-linux", "local", "broadcast", "multicast",
)  # fmt: skip


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


def _hash_of(address: int) -> int:
    """Of an address as it lies in a packet, loaded in the machine's order."""
    return (address * HASH & 0xFFFFFFFF) >> HASH_SHIFT


_hash = kernel(_hash_of)


@kernel
def is_unusual(filter_at: int, source: int, destination: int) -> int:
    """0 if both are plain unicast addresses and `source` surely none of this host's. As they lie in the packet."""
    found = load8(filter_at + (source & 0xFF)) | load8(filter_at + (destination & 0xFF))
    return found | load8(filter_at + FIRST_BYTES + _hash(source))


class NextHops(Table):
    """Next hops by index, 1 to `capacity` - 1. TableFull when there is no index left."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        self.capacity = capacity
        size = _HOPS + HOP_SIZE // 8 * capacity
        super().__init__(Words(size, size))
        _write(self._words.block, _HOPS, *_encode(_NO_ROUTE))
        self._filter = np.zeros(_FILTER_WORDS, np.int64)
        self.set_local_hashes(())
        self.actions: dict[int, Action] = {}
        self._next, self._free = 1, list[int]()
        self._runs, self._free_runs = dict[int, int](), list[int]()  # where groups have their buckets
        self._buckets = dict[int, np.ndarray]()
        self._scratch = Arena(4 * BUCKETS)
        self.set_word(_HASHING, _signed(os.urandom(8)))
        self.set_word(_HASHING + 4, FIELD_SRC | FIELD_DST)
        self.set_word(_HASHING + 6, FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_LABEL)
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
        _write(self._words.block, _HOPS + HOP_SIZE // 8 * index, *words)
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
        _write_buckets(self._words.block, _HOPS + HOP_SIZE // 8 * run, self._scratch.address)
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
        return _signed(sum(1 << port for port in ports).to_bytes(8, "little"))

    def _write_ports(self, index: int) -> None:
        _write_word(self._words.block, _HOPS + HOP_SIZE // 8 * index + 2, self._ports_of(self._paths(index)))

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
            _write(self._words.block, _HOPS + HOP_SIZE // 8 * index, 0, 0, 0, 0)
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

    def set_local_hashes(self, hashes: Iterable[int]) -> None:
        """Which hashes of sources may be addresses of this host."""
        marks = np.zeros(FIRST_BYTES + _HASHES, np.uint8)
        marks[[0, 127, *range(224, 256)]] = 1
        marks[[FIRST_BYTES + value for value in hashes]] = 1
        words = marks.view(np.int64)
        with self.lock:
            for offset in np.flatnonzero(words != self._filter).tolist():
                _write_word(self._words.block, _SOURCES + offset, int(words[offset]))
            self._filter = words
            self.commit()

    def set_complete(self, complete: bool) -> None:
        """See `Routes.set_complete`."""
        what, header, verdict, longest = _encode(_NO_ROUTE if complete else Punt("via-linux"))
        with self.lock:
            _write(self._words.block, _HOPS, what if complete else what | UNKNOWN, header, verdict, longest)
            self.commit()

    def set_word(self, offset: int, value: int) -> None:
        """Change one word of the head of the table."""
        with self.lock:
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
        return what, _signed(header[:8]), last, action.mtu + ETHERNET_SIZE
    kind = PUNT if isinstance(action, Punt) else DROP
    local = LOCAL if action == Punt("local") else 0
    verdict = (kind << KIND_SHIFT) + reason_code(action.reason)
    return ACTION_SETTLE | local, 0, verdict << 32, 0


def _signed(data: bytes) -> int:
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


@native
class RoutesView:
    """`Routes` as one worker sees them."""

    fib: Lpm4View
    fib6: Lpm6View
    next_hops: NextHopsView

    @property
    def hops(self) -> int:
        """Address of entry 0."""
        return load64(self.next_hops.cell) + 8 * _HOPS

    @property
    def capacity(self) -> int:
        """Next hops have indexes below this."""
        return self.next_hops.capacity

    @property
    def hits(self) -> int:
        """Address of the hit marks, 32 bits a next hop: the worker stores `epoch` when it forwards by one."""
        return self.next_hops.hits

    @property
    def epoch(self) -> int:
        """The control plane's present epoch, below 2**32."""
        return load64(self.next_hops.epoch_at)

    @property
    def notes(self) -> int:
        """Address of what `libfp.stages.notes` describes."""
        return self.next_hops.notes

    def address(self, port: int) -> int:
        """Where a port's own addresses lie: 4 bytes as in a packet, and 8 on 16 bytes; zeros where it has none."""
        return load64(self.next_hops.cell) + 8 * (_ADDRESSES + 3 * port)

    def checks(self, port: int) -> int:
        """The PORT_ flags of a port."""
        return load64(load64(self.next_hops.cell) + 8 * (_PORT_FLAGS + port))

    @property
    def hashing(self) -> int:
        """Address of the seed of flow hashes; 4 and 6 words on are the FIELD_ flags that make a flow."""
        return load64(self.next_hops.cell) + 8 * _HASHING

    @property
    def sources(self) -> int:
        """Address of the filter for `is_unusual`."""
        return load64(self.next_hops.cell) + 8 * _SOURCES


@kernel
def out_port(routes: RoutesView, hop: int) -> int:
    """Index of the port that a next hop sends by; -1 if that next hop does not send."""
    what = load64(routes.hops + HOP_SIZE * hop) if ult64(hop, routes.capacity) else 0
    return what >> 8 & 0xFFFF if what & 0xFF == ACTION_FORWARD else -1


class Routes:
    """What one `forward` stage reads: `fib` for IPv4, `fib6` for IPv6, `next_hops` for both. Binds as it is."""

    #: Reasons that reach the pipeline through table entries, not through literals in a stage.
    stage_reasons = REASONS

    def __init__(self, *, routes: int = 1 << 20, routes6: int = 1 << 19, next_hops: int = 1 << 16) -> None:
        self.fib, self.fib6 = Lpm4(capacity=routes), Lpm6(capacity=routes6)
        self.next_hops = NextHops(next_hops)
        self.complete = True
        self._compile()

    def _compile(self) -> None:
        """Make a change and take it back: what changes the tables is compiled now, not when a route is in a hurry."""
        hop = self.next_hops.add(Drop("blackhole"))
        self.fib.set(0, 32, hop)  # of fib6 when its first route comes: hosts without IPv6 need not wait for it
        self.fib.remove(0, 32)
        self.next_hops.remove(hop)

    def set_port(self, port: int, rp_filter: int = 0, redirects: bool = False, accept_local: bool = False) -> None:
        """What is asked of packets that arrive on `port`.

        rp_filter as the kernel's sysctl has it (RFC 3704): 0 none, 1 strict (the way back leaves by that port), 2
        loose (there is one). redirects: packets that would leave by the port they came in by go to Linux, which sends
        an ICMP redirect. accept_local: this host's own addresses may be sources.
        """
        if not 0 <= port < MAX_PORTS or rp_filter not in (0, 1, 2):
            raise BadInput(
                f"port {port}, rp_filter {rp_filter}", f"ports are 0 to {MAX_PORTS - 1}, rp_filter 0, 1 or 2"
            )
        flags = (0, PORT_RPF_STRICT, PORT_RPF_LOOSE)[rp_filter]
        flags |= (PORT_REDIRECTS if redirects else 0) | (PORT_ACCEPT_LOCAL if accept_local else 0)
        self.next_hops.set_word(_PORT_FLAGS + port, flags)

    def set_address(self, port: int, address: bytes = b"", address6: bytes = b"") -> None:
        """The addresses (4 and 16 bytes, network order, or none) that ICMP errors about packets of `port` come from."""
        if not 0 <= port < MAX_PORTS or len(address) not in (0, 4) or len(address6) not in (0, 16):
            raise BadInput(f"addresses {address!r} and {address6!r} of port {port}", "4 and 16 bytes, or none")
        data = address.ljust(8, b"\0") + address6.ljust(16, b"\0")
        for k in range(3):
            self.next_hops.set_word(_ADDRESSES + 3 * port + k, _signed(data[8 * k : 8 * k + 8]))

    def wanted(self) -> set[tuple[int, bytes]]:
        """(index of the next hop, destination as 4 or 16 bytes) of packets that were dropped for want of a neighbour,
        because Linux must never get them (`packet.keep`), since the last call: a few of the latest, of each worker.
        """
        return self.next_hops.wanted()

    def set_local(self, prefixes: Iterable[tuple[int, int]]) -> None:
        """This host's own (address, length) prefixes: packets that claim to come from there are dropped.

        Only a filter: the address must also have a route to ``Punt("local")``.
        """
        hashes = set[int]()
        for address, length in prefixes:
            hashes.update(
                [_hash_of(int.from_bytes(address.to_bytes(4, "little"), "big"))] if length == 32 else range(_HASHES)
            )
        self.next_hops.set_local_hashes(hashes)

    def set_complete(self, complete: bool) -> None:
        """Whether what no route holds has none, as at first; otherwise its route may be still to come.

        Until then packets to such addresses, and from them where sources are looked at, are ``Punt("via-linux")``.
        """
        self.complete = complete
        self.next_hops.set_complete(complete)

    def set_hashing(self, fields: int, version: Literal[4, 6] = 4) -> None:
        """Which FIELD_ flags make a flow for multipath routes of that IP version.

        By default the kernel's policy 0: the addresses, for IPv6 flow label and next header too.
        """
        self.next_hops.set_word(_HASHING + version, fields)

    def explain(self, next_hop: int, packet: bytes) -> str:
        """See `libfp.Pipeline.explain`: the longest prefix, and what is done with what it covers."""
        found = self.match(packet)
        return f"{found[0]} {self.next_hops.actions.get(next_hop or found[1])}" if found is not None else ""

    def match(self, packet: bytes) -> tuple[str, int] | None:
        """The longest prefix that holds a frame's destination, and the index of its next hop; None without one."""
        headers = dissect(packet)
        if headers.version == 0 or headers.dst is None:
            return None
        return (self.fib if headers.version == 4 else self.fib6).match(headers.address(headers.dst))

    def stage_tables(self) -> tuple[Table, ...]:
        """See `libfp.engine.Bindable`."""
        return self.fib, self.fib6, self.next_hops

    def stage_view(self, replica: Callable[[Any], Any]) -> RoutesView:
        """See `libfp.engine.Bindable`."""
        return RoutesView(replica(self.fib), replica(self.fib6), replica(self.next_hops))
