"""`Lpm4` beside rte_lpm and rte_fib: lookups in bursts of 64 over the same 4 M keys, and the bulk build.

The peer of a case is the fastest of rte_lpm's and rte_fib's lookup functions with those keys; all are on standard
error. Keys are `random` addresses, `in-prefix` (in a route drawn at random), or `zipf`: P(rank r) proportional to
r**-1.1 over all routes, ranks shuffled. Host bits are random, next hops are 2**20 different ones of 4 bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import peers, rib
from bench.harness import Case
from bench.tables import KEYS, NEXT_HOPS, Keys, Peer, selected
from libfp.jit import clock_hz
from libfp.tables import Lpm4

BARS = {"random": 1.5, "in-prefix": 1.2, "zipf": 1.0}


def _functions(ffi: Any, lib: Any, routes: np.ndarray) -> tuple[list[Peer], Any, Any]:
    rows = ffi.cast("uint32_t *", routes.ctypes.data)
    lpm, fib = lib.lpm_make(rows, len(routes)), lib.fib_make(rows, len(routes), ffi.new("uint64_t *"))
    assert lpm, "DPDK has room for the routes"
    assert fib, "DPDK has room for the routes"

    made = [
        Peer("rte_lpm bulk", lambda *given: lib.lpm_bulk(lpm, *given)),
        Peer("rte_lpm x4", lambda *given: lib.lpm_x4(lpm, *given)),
    ]
    return made + selected("rte_fib", fib, lib.fib_select, lib.fib_lookup, peers.FIB), lpm, fib


def cases() -> Iterator[Case]:
    """`random`, `in-prefix`, `zipf` in million lookups a second; `build` in seconds."""
    addresses, lengths, origin = rib.ipv4()
    random = np.random.default_rng(3)
    values = random.integers(1, NEXT_HOPS, len(addresses))
    table = Lpm4()
    table.load(addresses, lengths, values)
    drawn = rib.zipf(len(addresses), KEYS)
    host = random.integers(0, 1 << 32, KEYS) & ((1 << (32 - lengths[drawn])) - 1)
    sets = {
        "random": random.integers(0, 1 << 32, KEYS),
        "in-prefix": rib.inside(addresses, lengths, KEYS),
        "zipf": addresses[drawn] | host,
    }
    routes = np.ascontiguousarray(np.stack([addresses, lengths, values], axis=1).astype(np.uint32))
    there: Any = peers.found() or (None, None)
    ffi, lib = there
    functions, lpm, fib = _functions(ffi, lib, routes) if lib else ([], None, None)
    text = f"{len(addresses)} routes ({origin}), {table.replica_bytes / 1e6:.1f} MB; {peers.about()}"
    for name, keys in sets.items():
        bed = Keys(keys.astype(np.uint32), 4, ffi)
        yield bed.case("lpm4", name, table.view(), functions, text, BARS[name])
    if lib:
        lib.lpm_free(lpm)
        lib.fib_free(fib)

    def build() -> float:
        began = time.perf_counter()
        table.load(addresses, lengths, values)
        return time.perf_counter() - began

    def add() -> float:
        ticks = ffi.new("uint64_t *")
        made = lib.fib_make(ffi.cast("uint32_t *", routes.ctypes.data), len(routes), ticks)
        lib.fib_free(made)
        return float(ticks[0]) / clock_hz()

    about = f"{len(addresses)} routes from arrays; rte_fib_add one by one, without its free"
    theirs, peer = (add, "rte_fib") if lib else (None, None)
    yield Case("lpm4", "build", "s", "lower", build, peer, theirs, about=about, limit=1)
