"""Destinations drawn from a list of prefixes: one a line, plain or gzip, as `ip route` or a table dump has them."""

from __future__ import annotations

import gzip
import ipaddress
import zlib
from pathlib import Path

import numpy as np

from libfp.errors import BadInput

REMEDY = "name a file with a prefix a line, such as 192.0.2.0/24"
Prefixes = tuple[np.ndarray, np.ndarray]


def read(path: str) -> dict[int, Prefixes]:
    """The prefixes at `path` by family (4, 6): addresses as rows of two u64 (high and low) and lengths, as they stand.

    Of a line the first word counts; empty lines, default routes and what follows a # do not. IPv4 addresses are in the
    low word. Raises BadInput that names the line.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text", REMEDY) from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", REMEDY) from None
    found: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split(maxsplit=1)
        if not words or words[0] == "default":
            continue
        try:
            family, address, length = _prefix(words[0])
        except ValueError:
            raise BadInput(f"{path}, line {number}: no prefix: {words[0]!r}", "such as 192.0.2.0/24") from None
        found[family].append((address, length))
    if not any(found.values()):
        raise BadInput(f"{path} has no prefix", REMEDY)
    return {family: _arrays(some) for family, some in found.items() if some}


def _prefix(text: str) -> tuple[int, int, int]:
    address, _, length = text.partition("/")
    if ":" not in address:  # by hand: a full table has a million of them
        parts = [int(one) for one in address.split(".")] if address.replace(".", "").isdigit() else []
        bits = int(length) if length else 32
        if len(parts) != 4 or max(parts) > 255 or not 0 <= bits <= 32:
            raise ValueError(text)
        return 4, parts[0] << 24 | parts[1] << 16 | parts[2] << 8 | parts[3], bits
    network = ipaddress.IPv6Network(text, strict=False)
    return 6, int(network.network_address), network.prefixlen


def _arrays(some: list[tuple[int, int]]) -> Prefixes:
    rows = np.array([(address >> 64, address & (1 << 64) - 1) for address, _ in some], np.uint64)
    return rows, np.array([length for _, length in some], np.int64)


def draw(prefixes: Prefixes, family: int, count: int, zipf: float, random: np.random.Generator) -> list[int]:
    """`count` addresses, each in a prefix drawn from the list, the bits behind the prefix at random.

    zipf: 0 draws each prefix alike, s the k-th of a random order as often as 1 / k^s. Prefixes that no unicast packet
    has (0/8, 127/8, multicast and above) are left out.
    """
    rows, lengths = prefixes
    usable = np.flatnonzero(_unicast(rows, family))
    if not len(usable):
        raise BadInput("no prefix of the list is unicast", "no packet can be sent there")
    if zipf:
        order = random.permutation(usable)
        weights = np.arange(1.0, len(order) + 1) ** -zipf
        drawn = order[
            np.minimum(np.searchsorted(np.cumsum(weights) / weights.sum(), random.random(count)), len(order) - 1)
        ]
    else:
        drawn = random.permutation(usable)[np.arange(count) % len(usable)]
    bits = 32 if family == 4 else 128
    noise = random.integers(0, 1 << 64, (count, 2), np.uint64)
    made = []
    for at, (high, low) in zip(drawn, noise.tolist(), strict=True):
        host = bits - int(lengths[at])
        behind = (high << 64 | low) & ((1 << host) - 1)
        made.append(((int(rows[at, 0]) << 64 | int(rows[at, 1])) >> host << host) | behind)
    return made


def _unicast(rows: np.ndarray, family: int) -> np.ndarray:
    if family == 4:
        first = rows[:, 1] >> np.uint64(24)
        return (first > 0) & (first != 127) & (first < 224)
    first = rows[:, 0] >> np.uint64(56)
    return (first > 0) & (first < 0xFE)
