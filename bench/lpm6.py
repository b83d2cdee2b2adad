"""`Lpm6` beside rte_fib6's trie: lookups in bursts of 64 over the same 4 M keys of 16 bytes, as they are on the wire.

Keys and next hops are as in bench lpm4; the peer is the fastest of rte_fib6's lookup functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import peers, rib
from bench.harness import Case
from bench.tables import KEYS, NEXT_HOPS, Keys, Peer, selected
from libfp.tables import Lpm6

#: Lookup functions of rte_fib6 by number, as rte_fib6.h has them.
_FIB6 = {1: "scalar", 2: "avx512"}


def _functions(ffi: Any, lib: Any, routes: np.ndarray) -> tuple[list[Peer], Any]:
    fib = lib.fib6_make(ffi.cast("uint8_t *", routes.ctypes.data), len(routes))
    assert fib, "DPDK has room for the routes"
    return selected("rte_fib6", fib, lib.fib6_select, lib.fib6_lookup, _FIB6), fib


def cases() -> Iterator[Case]:
    """`in-prefix` and `zipf`, in million lookups a second."""
    addresses, lengths, origin = rib.ipv6()
    random = np.random.default_rng(3)
    values = random.integers(1, NEXT_HOPS, len(addresses))
    table = Lpm6()
    table.load(addresses, lengths, values)
    routes = np.zeros(len(addresses), [("address", ">u8", 2), ("length", np.uint32), ("value", np.uint32)])
    routes["address"], routes["length"], routes["value"] = addresses, lengths, values
    there: Any = peers.found() or (None, None)
    ffi, lib = there
    functions, fib = _functions(ffi, lib, routes) if lib else ([], None)
    text = f"{len(addresses)} routes ({origin}), {table.replica_bytes / 1e6:.1f} MB; {peers.about()}"
    sets = {"in-prefix": random.integers(0, len(addresses), KEYS), "zipf": rib.zipf(len(addresses), KEYS)}
    for name, drawn in sets.items():
        bed = Keys(rib.inside6(addresses, lengths, drawn).astype(">u8"), 16, ffi)
        yield bed.case("lpm6", name, table.view(), functions, text, 2.5)
    if lib:
        lib.fib6_free(fib)
