"""ClassBench rules and headers: the sets of $LIBFP_DATA.

A rule is a row of ten numbers: source, its length, destination, its length, source ports from and to, destination ports
from and to, protocol, its mask. A header is 16 bytes as on the wire: see `libfp.tables.acl`.
"""

from __future__ import annotations

import gzip
import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from libfp.errors import Error
from libfp.tables import Rule

SETS = ("acl 1k", "fw 1k", "ipc 1k", "acl 10k", "fw 10k")
_RULE = re.compile(
    r"@(\d+)\.(\d+)\.(\d+)\.(\d+)/(\d+)\s+(\d+)\.(\d+)\.(\d+)\.(\d+)/(\d+)\s+"
    r"(\d+) : (\d+)\s+(\d+) : (\d+)\s+0x(\w+)/0x(\w+)"
)


def _read(path: Path) -> list[str]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
        return list(lines)


def folder() -> Path | None:
    """Where the real sets are, if they are."""
    path = Path(os.environ.get("LIBFP_DATA") or "/nowhere") / "acl"
    return path if path.is_dir() else None


def _path(name: str, ending: str) -> Path | None:
    for more in ("", ".gz"):
        path = (folder() or Path("/nowhere")) / f"cutsplit-{name.replace(' ', '_')}{ending}{more}"
        if path.exists():
            return path
    return None


def rules(name: str) -> np.ndarray:
    """The rules of a set, first match first: int64, shape (n, 10)."""
    path = _path(name, ".rules")
    if path is None:
        raise Error(f"there is no rule set {name!r}", "set LIBFP_DATA to a folder that holds acl/")
    rows = []
    for line in _read(path):
        match = _RULE.match(line)
        assert match, line
        text = match.groups()
        numbers = [int(one) for one in text[:14]]
        source, destination = (int.from_bytes(bytes(numbers[at : at + 4]), "big") for at in (0, 5))
        rows.append([source, numbers[4], destination, numbers[9], *numbers[10:], int(text[14], 16), int(text[15], 16)])
    return np.array(rows, np.int64)


def headers(fields: np.ndarray) -> np.ndarray:
    """Rows of (source, destination, sport, dport, protocol) as headers: u8, shape (n, 16)."""
    out = np.zeros((len(fields), 16), np.uint8)
    out[:, 0:8] = fields[:, 0:2].astype(">u4").view(np.uint8).reshape(-1, 8)
    out[:, 8:12] = fields[:, 2:4].astype(">u2").view(np.uint8).reshape(-1, 4)
    out[:, 12] = fields[:, 4]
    out[:, 14] = 0x80  # there are ports
    return out


def trace(name: str, given: np.ndarray, count: int, seed: int = 5) -> np.ndarray:
    """`count` headers drawn at random from the set's trace; of a set without one, from corners of its rules."""
    random, path = np.random.default_rng(seed), _path(name, "_trace.txt")
    if path:
        rows = np.array([[int(word) for word in line.split()[:5]] for line in _read(path)], np.int64)
        return headers(rows[random.integers(0, len(rows), count)])
    return headers(corners(given, count, random))


def corners(given: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """As ClassBench's trace generator: one of a rule's corners in each field, rules drawn at random."""
    picked = given[random.integers(0, len(given), count)]
    high = random.integers(0, 2, (count, 5)).astype(bool)
    out = np.zeros((count, 5), np.int64)
    for i in range(2):
        host = (1 << (32 - picked[:, 2 * i + 1])) - 1
        out[:, i] = np.where(high[:, i], picked[:, 2 * i] | host, picked[:, 2 * i])
        out[:, 2 + i] = np.where(high[:, 2 + i], picked[:, 5 + 2 * i], picked[:, 4 + 2 * i])
    out[:, 4] = np.where(high[:, 4], picked[:, 8] | ~picked[:, 9] & 0xFF, picked[:, 8])
    return out


def uniform(count: int, seed: int = 6) -> np.ndarray:
    """Random headers: every field, the protocol too."""
    random = np.random.default_rng(seed)
    return headers(np.stack([random.integers(0, 1 << bits, count) for bits in (32, 32, 16, 16, 8)], axis=1))


def as_rules(given: np.ndarray, start: int = 0) -> Iterator[Rule]:
    """The rules of a set for `libfp.tables.Acl`; their values are their numbers, from `start` + 1 on."""
    for number, row in enumerate(given.tolist(), start + 1):
        source, destination = (f"{ipaddress.IPv4Address(row[i])}/{row[i + 1]}" if row[i + 1] else None for i in (0, 2))
        sport, dport = ((row[i], row[i + 1]) if row[i : i + 2] != [0, 0xFFFF] else None for i in (4, 6))
        protocol = (row[8] & row[9], row[9]) if row[9] else None
        yield Rule(number, source, destination, sport, dport, protocol)
