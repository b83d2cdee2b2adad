"""The routes and keys of the benches: real prefixes from ``LIBFP_DATA``, a synthetic table of that shape without it."""

from __future__ import annotations

import functools
import gzip
import os
import socket
from pathlib import Path

import numpy as np

# IPv4 prefixes of a full table by length, in thousandths (the shape of the real one).
_SHAPE = {8: 1, 16: 14, 17: 9, 18: 15, 19: 27, 20: 46, 21: 53, 22: 117, 23: 106, 24: 611, 32: 1}
_SYNTHETIC = 900_000
# And IPv6 prefixes.
_SHAPE6 = {28: 1, 29: 27, 32: 141, 36: 37, 40: 84, 44: 90, 46: 19, 47: 20, 48: 471}
_SYNTHETIC6 = 160_000


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


@functools.cache
def ipv6() -> tuple[np.ndarray, np.ndarray, str]:
    """The same for IPv6: addresses are rows of two u64 in host order, the high and the low 64 bits."""
    data = os.environ.get("LIBFP_DATA")
    path = Path(data or "") / "rib" / "bart-tier1-prefixes.txt.gz"
    if not data or not path.exists():
        return *_synthetic6(), "synthetic (LIBFP_DATA is not set)"
    packed, lengths = [], []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            if ":" in line:
                address, _, length = line.strip().partition("/")
                packed.append(socket.inet_pton(socket.AF_INET6, address))
                lengths.append(int(length))
    return np.frombuffer(b"".join(packed), ">u8").reshape(-1, 2).astype(np.uint64), np.array(lengths), path.name


def _synthetic6() -> tuple[np.ndarray, np.ndarray]:
    """Networks in 2000::/3, and longer prefixes inside some of them."""
    random = np.random.default_rng(1)
    networks = np.uint64(1) << np.uint64(61) | random.integers(0, 1 << 29, 30_000).astype(np.uint64) << np.uint64(32)
    lengths = random.choice(list(_SHAPE6), _SYNTHETIC6, p=np.array(list(_SHAPE6.values())) / sum(_SHAPE6.values()))
    inside = random.integers(0, 1 << 16, _SYNTHETIC6).astype(np.uint64) << np.uint64(16)
    high = (random.choice(networks[:10_000], _SYNTHETIC6) | inside) & ~masks(lengths)[:, 0]
    high = np.where(lengths <= 32, random.choice(networks, _SYNTHETIC6) & ~masks(lengths)[:, 0], high)
    kept = np.unique(high | lengths.astype(np.uint64))  # no prefix is longer than /48: the low bits are free
    kept_high = kept & ~np.uint64(63)
    return np.stack([kept_high, np.zeros_like(kept_high)], axis=1), (kept & np.uint64(63)).astype(np.int64)


def masks(lengths: np.ndarray) -> np.ndarray:
    """The host bits of IPv6 prefixes of these lengths: rows of two u64."""
    left = np.stack([64 - lengths, 128 - lengths], axis=1).clip(0, 64).astype(np.uint64)
    return np.where(left == 64, ~np.uint64(0), (np.uint64(1) << (left & np.uint64(63))) - np.uint64(1))


def inside6(addresses: np.ndarray, lengths: np.ndarray, drawn: np.ndarray, seed: int = 2) -> np.ndarray:
    """A key in each of the prefixes of these indexes, host bits random: rows of two u64."""
    host = np.random.default_rng(seed).integers(0, 1 << 64, (len(drawn), 2), np.uint64)
    return addresses[drawn] | host & masks(lengths[drawn])


def zipf(routes: int, count: int, seed: int = 5) -> np.ndarray:
    """`count` indexes of routes: rank r has probability proportional to r**-1.1, r = 1 to `routes`, ranks shuffled."""
    random = np.random.default_rng(seed)
    ranked = random.permutation(routes)
    weights = np.cumsum(np.arange(1, routes + 1) ** -1.1)
    return ranked[np.searchsorted(weights, random.random(count) * weights[-1]).clip(max=routes - 1)]
