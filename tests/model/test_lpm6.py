"""`libfp.tables.Lpm6` against a linear scan of its routes, at both edges of every prefix."""

from __future__ import annotations

import gzip
import ipaddress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.jit import INTERPRETED, Arena, kernel
from libfp.tables import Lpm6

EXAMPLES = settings(max_examples=30 if INTERPRETED else 150, deadline=None)
LAST = (1 << 128) - 1
Routes = dict[tuple[int, int], int]

# Routes crowd into a few places, so that they nest; short ones are rare, for interpreted they take long.
_address = st.builds(
    lambda base, low, shift: base ^ low << shift,
    st.sampled_from([0, 0x2001 << 112, 0x20010DB8 << 96, 0x20010DB8FFFFFFFFFFFF << 48, LAST]),
    st.integers(0, 1023),
    st.sampled_from([0, 20, 54, 60, 64, 70, 76, 80, 86, 92, 96, 100]),
)
_length = st.one_of(
    st.integers(18 if INTERPRETED else 10, 128),
    st.sampled_from([0, 18 if INTERPRETED else 8, 20, 24, 32, 48, 60, 64, 66]),
)
_prefix = st.builds(lambda address, length: (cut(address, length), length), _address, _length)
_value = st.one_of(st.integers(1, 3), st.sampled_from([(1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
_route = st.tuples(_prefix, _value)


def cut(address: int, length: int) -> int:
    return address >> (128 - length) << (128 - length)


def scan(routes: Routes, address: int) -> tuple[int, int]:
    """The length and value of the longest prefix that holds the address."""
    best = (-1, 0)
    for (prefix, length), value in routes.items():
        if cut(address, length) == prefix and length > best[0]:
            best = length, value
    return best


def edges(prefixes) -> list[int]:
    found = {0, LAST}
    for address, length in prefixes:
        end = address + (1 << (128 - length))
        found |= {(address - 1) & LAST, address, end - 1, end & LAST}
    return sorted(found)


def rows(addresses) -> np.ndarray:
    return np.array([(one >> 64, one & ((1 << 64) - 1)) for one in addresses], np.uint64).reshape(-1, 2)


def agree(table: Lpm6, routes: Routes, keys: list[int]) -> None:
    for key in keys:
        length, value = scan(routes, key)
        assert table.lookup(key) == value, hex(key)
        text = f"{ipaddress.IPv6Address(cut(key, max(length, 0)))}/{length}"
        assert table.match(key) == ((text, value) if value else None)
    assert bulk(table, rows(keys)).tolist() == [scan(routes, key)[1] for key in keys]


@kernel
def _burst(view, keys, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(keys, results, count)


def bulk(table: Lpm6, keys: np.ndarray) -> np.ndarray:
    count = len(keys)
    memory = Arena(20 * count)
    memory.buffer[: 16 * count] = keys.astype(">u8").tobytes()
    _burst(table.view(), memory.address, memory.address + 16 * count, count)
    return np.frombuffer(memory.buffer, np.uint32, count, 16 * count).copy()


@EXAMPLES
@given(st.lists(st.tuples(_prefix, st.one_of(st.just(0), _value)), max_size=25))
def test_changed_one_by_one(changes):
    table, routes = Lpm6(capacity=100), Routes()
    keys = edges(prefix for prefix, _ in changes)
    for prefix, value in changes:
        if value:
            routes[prefix] = value
            table.set(*prefix, value)
        elif prefix in routes:
            del routes[prefix]
            table.remove(*prefix)
        else:
            with pytest.raises(KeyError):
                table.remove(*prefix)
        for key in edges([prefix]):
            assert table.lookup(key) == scan(routes, key)[1], hex(key)
    agree(table, routes, keys)
    columns = (column.tolist() for column in table.routes())
    found = [((high << 64 | low, length), value) for (high, low), length, value in zip(*columns, strict=True)]
    assert found == sorted(routes.items())


@EXAMPLES
@given(st.lists(_route, max_size=20), st.lists(_prefix, max_size=10))
def test_loaded_then_applied(given_routes, removed):
    table, routes = Lpm6(capacity=100), dict(given_routes)
    prefixes = [prefix for prefix, _ in given_routes]
    table.load(rows(a for a, _ in prefixes), [n for _, n in prefixes], [value for _, value in given_routes])
    agree(table, routes, edges(routes))
    table.apply(rows(a for a, _ in removed), [n for _, n in removed], [0] * len(removed))
    for prefix in removed:
        routes.pop(prefix, None)
    agree(table, routes, edges([*routes, *removed]))
    assert len(table) == len(routes)


def _real(data) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(data / "rib" / "bart-tier1-prefixes.txt.gz", "rt") as lines:
        networks = [ipaddress.IPv6Network(line.strip()) for line in lines if ":" in line]
    return rows(int(one.network_address) for one in networks), np.array([one.prefixlen for one in networks])


def _masks(lengths: np.ndarray) -> np.ndarray:
    """The host bits of prefixes: (n, 2) of u64."""
    left = np.stack([64 - lengths, 128 - lengths], axis=1).clip(0, 64)
    return np.where(left == 64, ~np.uint64(0), (np.uint64(1) << (left & 63).astype(np.uint64)) - np.uint64(1))


def _expected(addresses: np.ndarray, lengths: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Longest match by a sorted array for each length, the longer ones last."""

    def sortable(pairs: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(pairs.astype(">u8")).view("S16").ravel()  # compared as bytes, zeros at the end too

    found = np.zeros(len(keys), np.int64)
    for length in np.unique(lengths):
        chosen = lengths == length
        prefixes, nexts = sortable(addresses[chosen]), values[chosen]
        order = np.argsort(prefixes)
        prefixes, nexts = prefixes[order], nexts[order]
        wanted = sortable(keys & ~_masks(np.array([length])))
        at = np.searchsorted(prefixes, wanted).clip(max=len(prefixes) - 1)
        found = np.where(prefixes[at] == wanted, nexts[at], found)
    return found


@pytest.mark.data
@pytest.mark.skipif(INTERPRETED, reason="so many routes want compiled code")
@pytest.mark.timeout(180)
def test_the_internet(data):
    """160,147 real routes: both edges of every prefix, then again after 100,000 changes."""
    addresses, lengths = _real(data)
    rng = np.random.default_rng(7)
    values = rng.integers(1, 1 << 20, len(addresses))
    table = Lpm6()
    table.load(addresses, lengths, values)
    keys = np.concatenate([addresses, addresses | _masks(lengths)])
    assert np.array_equal(bulk(table, keys), _expected(addresses, lengths, values, keys))

    changed = rng.permutation(len(addresses))[:100_000]
    to = rng.integers(0, 1 << 20, len(changed)) * (rng.random(len(changed)) < 0.5)  # half of them go
    to[:1000] |= 1 << 31
    table.apply(addresses[changed], lengths[changed], to)
    values[changed] = to
    extra = np.unique(keys[rng.integers(0, len(keys), 20_000)] & ~_masks(np.array([60])), axis=0)  # no real table has
    known = set(map(tuple, np.column_stack([addresses, lengths.astype(np.uint64)]).tolist()))
    extra = np.array([row for row in extra.tolist() if (*row, 60) not in known], np.uint64)
    table.apply(extra, np.full(len(extra), 60), np.full(len(extra), (1 << 32) - 1))
    addresses = np.concatenate([addresses, extra])
    lengths = np.concatenate([lengths, np.full(len(extra), 60)])
    values = np.concatenate([values, np.full(len(extra), (1 << 32) - 1)])
    there = values > 0
    assert len(table) == there.sum()
    sixteen = np.array([16, 0], np.uint64)
    keys = np.concatenate([keys, extra, extra | _masks(np.array([60])), extra + sixteen, extra - sixteen])
    expected = _expected(addresses[there], lengths[there], values[there], keys)
    assert np.array_equal(bulk(table, keys), expected)
    fresh = Lpm6()
    fresh.load(addresses[there], lengths[there], values[there])
    assert np.array_equal(bulk(fresh, keys), expected)
    for k in rng.integers(0, len(keys), 1000):
        match = table.match(int(keys[k, 0]) << 64 | int(keys[k, 1]))
        assert (match[1] if match else 0) == expected[k]
