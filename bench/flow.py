"""`Flow` beside rte_hash: flows of established connections found, made and ended, and made in a flood.

`... found`: bursts of 64 of 4 M keys of 16 bytes drawn from the flows there, each value read, beside the fastest of
what `bench.hash` asks rte_hash; ours also holds each flow's deadline against the time. `... made and ended`: each
packet is a new flow; ours ends by the wheel, one revolution of turns after another, beside rte_hash_add_key_data and
rte_hash_del_key of the key that came so many before (rte_hash has no timers; whoever uses it must add them).
`packets`: whole stages, on frames: key, lookup, two counters and the deadline. `flood`: every packet is a new flow and
the table is full, a tenth of it assured; each makes room for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import peers
from bench.harness import Case
from bench.hash import functions_of
from bench.tables import KEYS, Keys
from libfp.jit import Arena, clock, clock_hz, kernel, load64, native, store64
from libfp.jit.memory import view as bytes_at
from libfp.packet.burst import FRAME, KIND_IPV4, LENGTH, SIZE, Burst
from libfp.packet.burst import KIND as BURST_KIND
from libfp.tables import Flow, FlowView
from libfp.tables.flow_table import enter, hash_of
from libfp.tables.flow_view import KIND, LINE
from libfp.tables.flow_wheel import turn
from libfp.testing import udp

BURST = 64
SIZES = {"64 k": 64_000, "1 M": 1_000_000, "4 M": 4_000_000}
LONG, SECONDS = 86_400, 10


@native
class Lookups:
    """A `FlowView` that is given keys in memory."""

    flows: FlowView

    def lookup_burst(self, keys, results, count):  # type: ignore[no-untyped-def]
        lines = self.flows.lines
        for i in range(count):
            store64(lines + LINE * i, load64(keys + 16 * i))
            store64(lines + LINE * i + 8, load64(keys + 16 * i + 8))
            store64(lines + LINE * i + KIND, 2)
        self.flows.find_lines(count)
        for i in range(count):
            store64(results + 8 * i, self.flows.at(i).value(0))


@kernel
def _fill(flows, keys, values, count):  # type: ignore[no-untyped-def]
    """Let each key be a flow with that value, assured; how many found room."""
    there = 0
    for i in range(count):
        key = keys + 16 * i
        flow = enter(flows.four, 2, key, hash_of(flows.four, 2, key), 0)
        there += flow.found
        flow.set_value(0, load64(values + 8 * i))
        flow.assured = True
        flow.keep(LONG)
    return there


@kernel
def _churn(flows, keys, count, first, tick):  # type: ignore[no-untyped-def]
    """Bursts of new flows of keys `first` on, of KEYS that come round; a tick each `tick` flows."""
    lines, began = flows.lines, clock()
    for i in range(first, first + count, BURST):
        turn(flows.four, i // tick)
        for j in range(BURST):
            key = keys + 16 * ((i + j) & KEYS - 1)
            store64(lines + LINE * j, load64(key))
            store64(lines + LINE * j + 8, load64(key + 8))
            store64(lines + LINE * j + KIND, 2)
        flows.find_lines(BURST)
        for j in range(BURST):
            flows.enter_at(j).add(0, 1)
    return clock() - began


@kernel
def _packets(flows, burst, frames, count):  # type: ignore[no-untyped-def]
    """What a stage does with flows it knows; `count` frames of 64 bytes."""
    began = clock()
    for i in range(0, count, BURST):
        for j in range(BURST):
            store64(burst.at + FRAME + 8 * j, frames + 64 * (i + j))
        flows.each_turn()
        flows.find_burst(burst)
        for j in range(BURST):
            flow = flows.at(j)
            flow.add(0, 1)
            flow.add(1, burst.length(j))
            flow.touch()
    return clock() - began


def _ns(ticks: int, count: int) -> float:
    return ticks / clock_hz() * 1e9 / count


def cases() -> Iterator[Case]:
    """`64 k found`, ...; `1 M made and ended`; `1 M packets`; `1 M flood`; all in ns a packet."""
    ffi, lib = peers.found() or (None, None)
    random = np.random.default_rng(7)
    for size, count in SIZES.items():
        yield from _found(size, count, random, ffi, lib)
    yield from _made(1_000_000, random, ffi, lib)
    yield from _stage(1_000_000, random)
    yield from _flood(1_000_000, random)


def _staged(array: np.ndarray) -> Arena:
    arena = Arena(array.nbytes, huge=True)
    arena.words[: array.size] = array.reshape(-1)
    return arena


def _found(size: str, count: int, random: Any, ffi: Any, lib: Any) -> Iterator[Case]:
    keys = random.integers(-1 << 63, 1 << 63, (count, 2))
    values = random.integers(0, (1 << 63) - 1, count)
    flows = Flow(capacity=count, capacity6=0)
    part, given, stored = flows.join(0), _staged(keys), _staged(values)
    there = _fill(part.view, given.address, stored.address, count)
    seen = Lookups(part.view)
    if there < count:  # those few that found no room are not asked for
        kept = _which(seen, given, count)
        keys, values = keys[kept], values[kept]
    functions, made = functions_of(ffi, lib, keys, values) if lib else ([], [])
    bed = Keys(keys[random.integers(0, len(keys), KEYS)], 16, ffi, value=8)
    best, medians = bed.best(seen, functions)
    text = f"{len(keys)} flows, {flows.memory / 1e6:.0f} MB, {count - there} refused; {peers.about()}; M/s: {medians}"
    yield Case(
        bench="flow",
        case=f"{size} found",
        unit="ns/packet",
        better="lower",
        ours=lambda: 1000 / bed.ours(seen),
        peer=best.name if best else None,
        theirs=(lambda: 1000 / bed.theirs(best)) if best else None,
        about=text,
    )
    for one in made:
        lib.hash_free(one)
    flows.leave(part)


def _which(seen: Lookups, given: Arena, count: int) -> np.ndarray:
    results = Arena(8 * (count + BURST))
    _look_all(seen, given.address, results.address, count)
    return results.words[:count] != 0


@kernel
def _look_all(seen, keys, results, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        seen.lookup_burst(keys + 16 * i, results + 8 * i, 1)
        if not seen.flows.at(0).found:
            store64(results + 8 * i, 0)


def _made(count: int, random: Any, ffi: Any, lib: Any) -> Iterator[Case]:
    """`count` flows at a time, a million a round."""
    keys = random.integers(-1 << 63, 1 << 63, (KEYS, 2))
    flows = Flow(capacity=count, capacity6=0, timeouts=[SECONDS])
    part, given = flows.join(0), _staged(keys)
    at = {"ours": 0, "theirs": 0}
    tick = count // (100 * SECONDS)
    table = lib.hash_make(ffi.NULL, ffi.NULL, 0, 2 * count) if lib else None

    def ours(many: int = 1 << 20) -> float:
        ticks = _churn(part.view, given.address, many, at["ours"], tick)
        at["ours"] += many
        return _ns(ticks, many)

    def theirs(many: int = 1 << 20) -> float:
        pointer = ffi.cast("uint8_t *", given.address)
        ticks = lib.hash_churn(table, pointer, KEYS, many, at["theirs"], count)
        at["theirs"] += many
        return _ns(ticks, many)

    for _ in range(3):  # until as many end as are made
        ours()
        if lib:
            theirs()
    yield Case(
        bench="flow",
        case="1 M made and ended",
        unit="ns/packet",
        better="lower",
        ours=ours,
        peer="rte_hash add and del" if lib else None,
        theirs=theirs if lib else None,
        about=f"{count} flows of {SECONDS} s at a time; {peers.about()}",
    )
    _print_counts(flows)
    if table:
        lib.hash_free(table)
    flows.leave(part)


def _print_counts(flows: Flow) -> None:
    print(f"flow: {flows!r}, {flows.counts}", file=sys.stderr)


def _stage(count: int, random: Any) -> Iterator[Case]:
    flows = Flow(capacity=count, capacity6=0, timeouts=[LONG])
    part, frames, columns = flows.join(0), Arena(64 * KEYS, huge=True), Arena(SIZE)
    data = np.frombuffer(frames.buffer, np.uint8).reshape(KEYS, 64)
    data[:, :42] = np.frombuffer(udp(), np.uint8)
    numbers = random.integers(0, count, KEYS)
    addresses = random.permutation(1 << 24)[:count].astype(">u4") + (10 << 24)
    data[:, 26:30] = addresses[numbers].astype(">u4").view(np.uint8).reshape(KEYS, 4)
    burst = Burst(columns.address)
    burst.begin(BURST)
    for i in range(BURST):
        bytes_at(columns.address + LENGTH + 4 * i, 4)[:] = (64).to_bytes(4, "little")
        bytes_at(columns.address + BURST_KIND + 4 * i, 4)[:] = KIND_IPV4.to_bytes(4, "little")
    _enter_all(part.view, burst, frames.address, KEYS)
    yield Case(
        bench="flow",
        case="1 M packets",
        unit="ns/packet",
        better="lower",
        ours=lambda: _ns(_packets(part.view, burst, frames.address, KEYS), KEYS),
        about=f"{len(part)} flows; frames of 64 bytes, 268 MB of them, in order",
    )
    flows.leave(part)


@kernel
def _enter_all(flows, burst, frames, count):  # type: ignore[no-untyped-def]
    for i in range(0, count, BURST):
        for j in range(BURST):
            store64(burst.at + FRAME + 8 * j, frames + 64 * (i + j))
        for j in range(BURST):
            flow = flows.enter(burst.packet(j))
            flow.assured = True


def _flood(count: int, random: Any) -> Iterator[Case]:
    keys = random.integers(-1 << 63, 1 << 63, (KEYS, 2))
    flows = Flow(capacity=count, capacity6=0, timeouts=[LONG])
    part, given = flows.join(0), _staged(keys)
    _fill(part.view, given.address, given.address, count // 10)
    at = {"ours": count // 10 // BURST * BURST}

    def ours(many: int = 1 << 20) -> float:
        ticks = _churn(part.view, given.address, many, at["ours"], 1000)
        at["ours"] += many
        return _ns(ticks, many)

    for _ in range(2):
        ours()
    yield Case(
        bench="flow",
        case="1 M flood",
        unit="ns/packet",
        better="lower",
        ours=ours,
        about=f"a table of {count}, {count // 10} of them assured",
    )
    _print_counts(flows)
    flows.leave(part)
