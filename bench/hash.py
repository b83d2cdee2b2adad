"""`Hash` beside rte_hash: lookups in bursts of 64 of 4 M keys of 16 bytes, drawn from those there or from others.

And what an insertion takes in Python while a table grows from 1 k entries to 256 k, by itself: rte_hash does not grow.

The peer of a case is the fastest of four, all of which are on standard error: rte_hash_lookup_bulk_data, and the same
with hashes computed inline by its caller; each in a table as full as it can be made (98 percent and less) and in one
of twice the size. Ours is 0.9 full. Keys are random, values are 63 random bits. Both sides write every value.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import peers
from bench.harness import Case
from bench.tables import KEYS, Keys, Peer
from libfp.tables import Hash

SIZES = {"1 k": 1000, "64 k": 64_000, "1 M": 1_000_000, "4 M": 4_000_000}


def functions_of(ffi: Any, lib: Any, keys: np.ndarray, values: np.ndarray) -> tuple[list[Peer], list[Any]]:
    """rte_hash's ways to look up, in tables of these entries; and those tables, to be freed."""
    made, count = {}, len(keys)
    given = ffi.cast("uint8_t *", keys.ctypes.data), ffi.cast("uint64_t *", values.ctypes.data), count
    for name, entries in {"full": count, "half full": 2 * count}.items():
        table = lib.hash_make(*given, entries)
        if table:
            made[name] = table
    assert made, "DPDK has room for the entries"
    functions = {"rte_hash": lib.hash_bulk, "rte_hash hashed inline": lib.hash_hashed}
    return [
        Peer(f"{name} ({how})", lambda *asked, run=run, table=table: run(table, *asked))
        for how, table in made.items()
        for name, run in functions.items()
    ], list(made.values())


def _insertions(keys: list[int]) -> np.ndarray:
    """Nanoseconds of each, into a table that has a thousandth of what it may hold."""
    table, clock, times = Hash("u64", capacity=4_000_000), time.perf_counter_ns, np.zeros(len(keys), np.int64)
    for i, key in enumerate(keys):
        began = clock()
        table[key] = i
        times[i] = clock() - began
    return times[1000:]


def cases() -> Iterator[Case]:
    """`1 k hits`, `1 k misses`, and so on, in million lookups a second; `growth` in us."""
    there: Any = peers.found() or (None, None)
    ffi, lib = there
    random = np.random.default_rng(3)
    for size, count in SIZES.items():
        keys = random.integers(-1 << 63, 1 << 63, (2 * count, 2))
        keys, others = keys[:count].copy(), keys[count:]
        values = random.integers(0, (1 << 63) - 1, count)
        table = Hash(key=("u64", "u64"), capacity=count)
        table.load(keys, values)
        functions, made = functions_of(ffi, lib, keys, values) if lib else ([], [])
        text = f"{count} entries of 24 bytes, {table.replica_bytes / 1e6:.1f} MB; {peers.about()}"
        for name, among in (("hits", keys), ("misses", others)):
            bed = Keys(among[random.integers(0, count, KEYS)], 16, ffi, value=8)
            yield bed.case("hash", f"{size} {name}", table.view(), functions, text, 1.5)
        for one in made:
            lib.hash_free(one)

    inserted = random.integers(0, 1 << 64, 256_000, dtype=np.uint64).tolist()
    median, most, longest = np.percentile(_insertions(inserted), [50, 99.9, 100]) / 1e3
    yield Case(
        bench="hash",
        case="growth, p99 of an insertion",
        unit="us",
        better="lower",
        ours=lambda: float(np.percentile(_insertions(inserted), 99)) / 1e3,
        about=f"1 k to 256 k entries: median {median:.1f}, p99.9 {most:.1f}, longest {longest:.0f} us",
    )
