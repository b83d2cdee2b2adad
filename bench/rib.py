"""The routes and keys of the benches: real prefixes from ``LIBFP_DATA``, a synthetic table of that shape without it."""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path

import numpy as np

# IPv4 prefixes of a full table by length, in thousandths (the shape of the real one).
_SHAPE = {8: 1, 16: 14, 17: 9, 18: 15, 19: 27, 20: 46, 21: 53, 22: 117, 23: 106, 24: 611, 32: 1}
_SYNTHETIC = 900_000


@functools.cache
def ipv4() -> tuple[np.ndarray, np.ndarray, str]:
    """(addresses, lengths, where they come from); addresses in host order without host bits, each prefix once."""
    data = os.environ.get("LIBFP_DATA")
    path = Path(data or "") / "rib" / "bart-tier1-prefixes.txt.gz"
    if not data or not path.exists():
        return *_synthetic(), "synthetic (LIBFP_DATA is not set)"
    addresses, lengths = [], []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            if ":" not in line:
                prefix, _, length = line.strip().partition("/")
                a, b, c, d = prefix.split(".")
                addresses.append(int(a) << 24 | int(b) << 16 | int(c) << 8 | int(d))
                lengths.append(int(length))
    return np.array(addresses, np.int64), np.array(lengths, np.int64), path.name


def _synthetic() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    lengths = random.choice(list(_SHAPE), _SYNTHETIC, p=np.array(list(_SHAPE.values())) / sum(_SHAPE.values()))
    addresses = random.integers(1 << 24, 224 << 24, _SYNTHETIC) >> (32 - lengths) << (32 - lengths)
    kept = np.unique(addresses << 6 | lengths)
    return kept >> 6, kept & 63


def inside(addresses: np.ndarray, lengths: np.ndarray, count: int, seed: int = 2) -> np.ndarray:
    """`count` keys, each in a prefix drawn at random, host bits random; no martians."""
    random = np.random.default_rng(seed)
    usable = np.flatnonzero((addresses >> 24 > 0) & (addresses >> 24 != 127) & (addresses >> 24 < 224))
    drawn = random.choice(usable, count)
    return addresses[drawn] | (random.integers(0, 1 << 32, count) & ((1 << (32 - lengths[drawn])) - 1))
