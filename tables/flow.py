"""Flows: what packets of one conversation have in common, kept by the worker that sees them.

See `libfp.tables.flow_record` and `flow_table` for the layout, `flow_wheel` for how flows end, `flow_view` for what
stages call.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from libfp.errors import BadInput
from libfp.jit import Arena, clock_hz, entry, load64, store64
from libfp.jit.clock import now
from libfp.jit.memory import HUGE_PAGE, PAGE
from libfp.jit.primitive import signed64
from libfp.tables import flow_record as r
from libfp.tables.flow_record import TICKS, copied
from libfp.tables.flow_table import SLOTS, find, hash_of
from libfp.tables.flow_view import LINE, LINES, FlowView, key4, key6
from libfp.tables.keys import codec
from libfp.tables.per_worker import PerWorker

_MOST = 1 << 28
_LOAD = 0.8
_LONGEST = r.LONGEST // TICKS
_COUNTS = ("created", "expired", "evicted", "removed", "refused")
_FOUR, _SIX = codec("ipv4"), codec("ipv6")


class FlowKey(NamedTuple):
    """A flow as its first packet had it: addresses as text, ports and the number of the protocol."""

    src: str
    sport: int
    dst: str
    dport: int
    protocol: int


@dataclass(frozen=True)
class FlowInfo:
    """A flow as it was when it was asked for: `age` and `left` (until it expires) in seconds, `value` as declared."""

    state: int
    assured: bool
    age: float
    left: float
    value: Any


@dataclass(frozen=True)
class FlowCounts:
    """What has become of flows; created = expired + evicted + removed + those that live.

    `evicted` made room for new ones; `refused` were new ones for which nothing made room.
    """

    created: int = 0
    expired: int = 0
    evicted: int = 0
    removed: int = 0
    refused: int = 0

    def __add__(self, other: FlowCounts) -> FlowCounts:
        return FlowCounts(*(getattr(self, one) + getattr(other, one) for one in _COUNTS))


@entry
def _copy(table, first, last, to, room):  # type: ignore[no-untyped-def]
    """Copy the records of slots `first` on, until `last` or until `room` are there; (how many, the next slot)."""
    size, count, number = 8 * (load64(table + r.WORDS) + 2 + load64(table + r.VALUES)), 0, first
    while number < last and count < room:
        count += copied(table, number, to + size * count)
        number += 1
    return count, number


@entry
def _find4(table, key, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
    key4(key, src, sport, dst, dport, protocol)
    return find(table, 2, key, hash_of(table, 2, key))


@entry
def _find6(table, key, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
    key6(key, src, sport, dst, dport, protocol)
    return find(table, 5, key, hash_of(table, 5, key))


class _Table:
    """The memory of one family's flows: IPv4's keys are 2 words, IPv6's 5."""

    def __init__(self, flow: Flow, words: int, capacity: int, start: int) -> None:
        values = flow._words
        buckets = max(2, int(capacity / (SLOTS * _LOAD)) + 1)
        self.slots = SLOTS * buckets
        tags = r.TAGS + (self.slots + 63 & ~63)
        record = r.META + 8 * (words + values)
        size = tags + self.slots * record
        self.arena = Arena(size, huge=size >= HUGE_PAGE)
        self.arena.words[:: PAGE // 8] = 0  # populated now: a worker is not to wait for the kernel's zeros
        self.words, self.width = words, words + 2 + values
        at = self.at = self.arena.address
        for i in range(words):
            store64(at + r.SECRETS + 8 * i, signed64(secrets.randbits(64)))
        store64(at + r.START, start)
        store64(at + r.FACTOR, signed64((TICKS << 64) // clock_hz()))
        fields = {r.BUCKETS: buckets, r.WORDS: words, r.VALUES: values, r.RECORD: record}
        for offset, value in {**fields, r.RECORDS: at + tags + 8 * words}.items():
            store64(at + offset, value)
        for state in range(r.STATES):
            ticks = round(flow.timeouts[min(state, len(flow.timeouts) - 1)] * TICKS)
            store64(at + r.TIMEOUTS + 8 * state, max(1, ticks))

    def copy(self, first: int, last: int) -> tuple[np.ndarray, int]:
        """Flows of slots `first` on, and the next slot. A row: key, deadline and next, flags and created, values."""
        room, width = min(4096, last - first), self.width
        arena = Arena(8 * width * room)
        try:
            count, first = _copy(self.at, first, last, arena.address, room)
            return arena.words[: width * count].reshape(count, width).copy(), first
        finally:
            arena.close()


class FlowPart(Mapping[FlowKey, FlowInfo]):
    """The flows of worker number `worker`, read while it writes: a mapping of `FlowKey` to `FlowInfo`.

    Each flow is whole, or left out while it changes hands; the counts in its values are each as they were at some
    moment of the reading. A key is found either way round, given as any 5-tuple of what `FlowKey` holds; it comes out
    as the first packet had it. Looking one up is O(1), iteration goes through all slots.
    """

    def __init__(self, flow: Flow, worker: int) -> None:
        self.worker, self._flow = worker, flow
        self._lock = threading.Lock()  # between those who read and the end
        start = now()
        self._tables = [_Table(flow, 2, flow.capacity, start)]
        if flow.capacity6:
            self._tables.append(_Table(flow, 5, flow.capacity6, start))
        self._lines, self._key = Arena(LINE * LINES), Arena(LINE)
        self.view = FlowView(self._tables[0].at, self._tables[-1].at if flow.capacity6 else 0, self._lines.address)
        self._closed = False
        self._last = FlowCounts()

    @property
    def counts(self) -> FlowCounts:
        """What has become of this worker's flows so far."""
        with self._lock:
            return self._last if self._closed else self._counts()

    def _counts(self) -> FlowCounts:
        offsets = (r.CREATED, r.EXPIRED, r.EVICTED, r.REMOVED, r.REFUSED)
        return FlowCounts(*(sum(load64(one.at + at) for one in self._tables) for at in offsets))

    def pass_time(self, seconds: float) -> None:
        """Let this part's clock be so much later, for tests: only while the worker does not run."""
        for one in self._tables:
            store64(one.at + r.START, load64(one.at + r.START) - round(seconds * clock_hz()))

    def __len__(self) -> int:
        """How many there are: those that have expired, and that the wheel has not come to yet, included."""
        with self._lock:
            return 0 if self._closed else sum(load64(one.at + r.COUNT) for one in self._tables)

    def __iter__(self) -> Iterator[FlowKey]:
        return (key for key, _ in self._all())

    def items(self) -> Any:
        """Pairs of key and flow, read as the iteration comes to them."""
        return self._all()

    def values(self) -> Any:
        """The flows alone."""
        return (info for _, info in self._all())

    def __getitem__(self, key: Any) -> FlowInfo:
        table, arguments = self._encoded(key)
        with self._lock:
            if not self._closed and table < len(self._tables):
                one = self._tables[table]
                number = (_find6 if table else _find4)(one.at, self._key.address, *arguments)
                wanted = self._key.words[: one.words].tolist()
                for row in one.copy(number, number + 1)[0].tolist() if number >= 0 else ():
                    if row[: one.words] == wanted:
                        return self._shown(one, row)[1]
        raise KeyError(key)

    def _encoded(self, key: Any) -> tuple[int, tuple[Any, ...]]:
        try:
            src, sport, dst, dport, protocol = key
            numbers = [number.__index__() for number in (sport, dport, protocol)]
        except (TypeError, ValueError, AttributeError):
            raise BadInput(f"{key!r} is not a flow", "(src, sport, dst, dport, protocol)") from None
        if not (0 <= numbers[0] < 1 << 16 and 0 <= numbers[1] < 1 << 16 and 0 <= numbers[2] < 1 << 8):
            raise BadInput(f"{key!r} is not a flow", "ports are below 65536, protocols below 256")
        six = (isinstance(src, str) and ":" in src) or getattr(src, "version", 4) == 6
        one, two = (_SIX if six else _FOUR).encode(src), (_SIX if six else _FOUR).encode(dst)
        ends = (one, two) if six else (one[0], two[0])
        return int(six), (ends[0], numbers[0], ends[1], numbers[1], numbers[2])

    def _all(self) -> Iterator[tuple[FlowKey, FlowInfo]]:
        for table in list(self._tables):
            first = 0
            while first < table.slots:
                with self._lock:
                    if self._closed:
                        return
                    found, first = table.copy(first, table.slots)
                    shown = [self._shown(table, row) for row in found.tolist()]
                yield from shown

    def _shown(self, table: _Table, row: list[int]) -> tuple[FlowKey, FlowInfo]:
        words = table.words
        deadline, flags = row[words] & 0xFFFFFFFF, row[words + 1] & 0xFFFFFFFF
        created, time = row[words + 1] >> 32, load64(table.at + r.NOW)
        if words == 2:
            ends = [(_FOUR.decode((one >> 16 & 0xFFFFFFFF,)), one & 0xFFFF) for one in row[:2]]
            protocol = row[0] >> 48 & 0xFF
        else:
            ports, protocol = row[4], row[4] & 0xFF
            ends = [
                (_SIX.decode((row[0], row[1])), ports >> 32 & 0xFFFF),
                (_SIX.decode((row[2], row[3])), ports >> 16 & 0xFFFF),
            ]
        began, other = ends[::-1] if flags & r.HIGH_BEGAN else ends
        info = FlowInfo(
            flags & 0xFF,
            flags & r.ASSURED != 0,
            (time - created & 0xFFFFFFFF) / TICKS,
            (deadline - time & 0xFFFFFFFF) / TICKS,
            self._flow._decoded(row[words + 2 :]),
        )
        return FlowKey(*began, *other, protocol), info

    # A thing and not a value, though it is a mapping.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def close(self) -> None:
        """Free everything but the counts."""
        with self._lock:
            if not self._closed:
                self._last, self._closed = self._counts(), True
                for arena in [*(table.arena for table in self._tables), self._lines, self._key]:
                    arena.close()

    def __repr__(self) -> str:
        return f"<flows of worker {self.worker}: {len(self)}>"


class Flow(PerWorker[FlowPart]):
    """Flows by 5-tuple, made, aged and ended by the worker whose packets they are; bound to a stage as a table is.

    A packet and its answer find the same flow: see `FlowView` and `FlowEntry` for what a stage does with it. Both must
    come to the same worker.

    capacity, capacity6: IPv4 and IPv6 flows a worker has room for (IPv6: as many, if None; 0: none). Beyond that, and
    for 2 in 10,000 close to it, a new flow takes the place of one that has expired or is not `assured`.
    value: the types of its value words, as of a `Hash`; a tuple of up to 8, or None.
    timeouts: seconds a flow lives from its last `touch`, by state: that of state 0 first, the last for all further.

    `parts` are the workers' flows, each a mapping of `FlowKey` to `FlowInfo` that may be read at any time. Nothing but
    its worker writes them; they live as long as the worker, stops and restarts included.

    A worker takes `memory` bytes, populated when it is made: 32 and 8 each value word for an IPv4 flow, 24 more for an
    IPv6 flow, and a byte, at 0.8 full: with two values 61 and 91 bytes a flow. Any call in a stage takes O(1) time and
    2 lines of memory, a new flow in a full table 16. Raises BadInput for a capacity, value or timeout that cannot be.
    """

    def __init__(
        self,
        capacity: int = 65536,
        value: Any = ("u64", "u64"),
        timeouts: Sequence[float] = (30, 180),
        *,
        capacity6: int | None = None,
    ) -> None:
        super().__init__()
        self.capacity, self.capacity6 = capacity, capacity if capacity6 is None else capacity6
        if not 0 < capacity <= _MOST or not 0 <= self.capacity6 <= _MOST:
            raise BadInput(f"room for {capacity} and {self.capacity6} flows", f"it is 1 to {_MOST}, IPv6 also 0")
        self._value = None if value is None else codec(value)
        self._words = self._value.words if self._value else 0
        self.timeouts = tuple(timeouts)
        if not 0 < len(self.timeouts) <= r.STATES or not all(0 < one <= _LONGEST for one in self.timeouts):
            raise BadInput(
                f"timeouts {self.timeouts}", f"1 to {r.STATES} of them, in seconds, above 0 and at most {_LONGEST}"
            )
        self._gone = FlowCounts()

    def make(self, worker: int) -> FlowPart:
        """See `PerWorker.make`."""
        return FlowPart(self, worker)

    def leave(self, part: FlowPart) -> None:
        """See `PerWorker.leave`. What is counted stays counted."""
        super().leave(part)
        self._gone += part.counts

    def _decoded(self, words: list[int]) -> Any:
        return self._value.decode(tuple(words)) if self._value else ()

    @property
    def counts(self) -> FlowCounts:
        """What has become of all workers' flows, those of workers that have ended included."""
        return sum((part.counts for part in self.parts), self._gone)

    @property
    def memory(self) -> int:
        """Bytes a worker's flows take."""
        sizes = [(self.capacity, 2), (self.capacity6, 5)]
        slots = [(SLOTS * max(2, int(count / (SLOTS * _LOAD)) + 1), words) for count, words in sizes if count]
        return sum(r.TAGS + many * (1 + r.META + 8 * (words + self._words)) for many, words in slots)

    def __len__(self) -> int:
        """Flows of all workers."""
        return sum(map(len, self.parts))

    def __repr__(self) -> str:
        return f"<Flow: {len(self)} flows, at most {self.capacity} and {self.capacity6} a worker>"
