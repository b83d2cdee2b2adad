"""Sets of numbers as sorted ranges, and how prefixes and (value, mask) pairs cover them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

#: Ranges (lowest, highest), sorted, of which no two meet.
Ranges = tuple[tuple[int, int], ...]


def union(some: Iterable[tuple[int, int]]) -> Ranges:
    """Everything that is in one of the ranges given, in any order."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(some):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(high, found[-1][1])
        elif low <= high:
            found.append((low, high))
    return tuple(found)


def complement(some: Ranges, bits: int) -> Ranges:
    """The numbers of so many bits that are in none."""
    edges = [-1, *(edge for pair in some for edge in pair), 1 << bits]
    return union((edges[i] + 1, edges[i + 1] - 1) for i in range(0, len(edges), 2) if edges[i] + 1 < edges[i + 1])


def meet(some: Ranges, others: Ranges) -> Ranges:
    """What is in both."""
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in some for b in others)
    return union(pair for pair in pairs if pair[0] <= pair[1])


def members(some: Ranges) -> frozenset[int]:
    return frozenset(one for low, high in some for one in range(low, high + 1))


def prefixes(some: Ranges, bits: int) -> list[tuple[int, int]]:
    """(value, mask) of the fewest prefixes that together are these ranges."""
    found = []
    for low, high in some:
        while low <= high:
            size = low & -low or 1 << bits
            while low + size - 1 > high:
                size >>= 1
            found.append((low, (1 << bits) - size))
            low += size
    return found


@functools.lru_cache(1 << 10)
def cubes(wanted: frozenset[int], bits: int, possible: frozenset[int]) -> tuple[tuple[int, int], ...]:
    """(value, mask) pairs that match the `wanted` of the `possible` numbers, and no others of these; few, if not the
    fewest.
    """
    never, left, found = possible - wanted, set(wanted), []
    while left:
        value, mask = min(left), (1 << bits) - 1
        for bit in range(bits):
            wider = mask & ~(1 << bit)
            if all((one ^ value) & wider for one in never):
                mask = wider
        found.append((value & mask, mask))
        left = {one for one in left if (one ^ value) & mask}
    return tuple(found)
