"""`libfp.tables.Lpm4` against a linear scan of its routes, at both edges of every prefix."""

from __future__ import annotations

import gzip
import ipaddress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.jit import INTERPRETED, Arena, kernel
from libfp.tables import Lpm4

EXAMPLES = settings(max_examples=40 if INTERPRETED else 150, deadline=None)
LAST = (1 << 32) - 1

# Routes crowd into a few places, so that they nest; short ones are rare, for interpreted they take long.
_address = st.builds(
    lambda base, low: base ^ low,
    st.sampled_from([0, 0x0A000000, 0x0A00FFFF, 0xC0A80000, LAST]),
    st.one_of(st.integers(0, 1023), st.integers(0, 1 << 16), st.sampled_from([1 << 14, 1 << 15, 3 << 13, 1 << 8])),
)
_length = st.one_of(st.integers(16 if INTERPRETED else 12, 32), st.sampled_from([0, 16 if INTERPRETED else 8, 18, 24]))
_prefix = st.builds(lambda address, length: (cut(address, length), length), _address, _length)
_value = st.one_of(st.integers(1, 3), st.sampled_from([1 << 31, LAST]))
_route = st.tuples(_prefix, _value)


def cut(address: int, length: int) -> int:
    return address >> (32 - length) << (32 - length)


def scan(routes: dict[tuple[int, int], int], address: int) -> tuple[int, int]:
    """The length and value of the longest prefix that holds the address."""
    best = (-1, 0)
    for (prefix, length), value in routes.items():
        if cut(address, length) == prefix and length > best[0]:
            best = length, value
    return best


def edges(prefixes) -> list[int]:
    found = {0, LAST}
    for address, length in prefixes:
        end = address + (1 << (32 - length))
        found |= {(address - 1) & LAST, address, end - 1, end & LAST}
    return sorted(found)


def agree(table: Lpm4, routes: dict[tuple[int, int], int], keys: list[int]) -> None:
    for key in keys:
        length, value = scan(routes, key)
        assert table.lookup(key) == value, hex(key)
        text = f"{ipaddress.IPv4Address(cut(key, max(length, 0)))}/{length}"
        assert table.match(key) == ((text, value) if value else None)
    burst(table, routes, keys)


@kernel
def _burst(view, keys, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(keys, results, count)


def burst(table: Lpm4, routes: dict[tuple[int, int], int], keys: list[int]) -> None:
    memory = Arena(8 * len(keys))
    words = np.frombuffer(memory.buffer, np.uint32)
    words[: len(keys)] = keys
    _burst(table.view(), memory.address, memory.address + 4 * len(keys), len(keys))
    assert words[len(keys) : 2 * len(keys)].tolist() == [scan(routes, key)[1] for key in keys]


@EXAMPLES
@given(st.lists(st.tuples(_prefix, st.one_of(st.just(0), _value)), max_size=25))
def test_changed_one_by_one(changes):
    table, routes = Lpm4(capacity=100), dict[tuple[int, int], int]()
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
    addresses, lengths, values = (column.tolist() for column in table.routes())
    assert list(zip(zip(addresses, lengths, strict=True), values, strict=True)) == sorted(routes.items())


@EXAMPLES
@given(st.lists(_route, max_size=20), st.lists(_prefix, max_size=10))
def test_loaded_then_applied(given_routes, removed):
    table, routes = Lpm4(capacity=100), dict(given_routes)
    columns = [(*prefix, value) for prefix, value in given_routes]
    table.load(*(np.array([row[i] for row in columns], np.int64) for i in range(3)))
    agree(table, routes, edges(routes))
    table.apply([a for a, _ in removed], [n for _, n in removed], [0] * len(removed))
    for prefix in removed:
        routes.pop(prefix, None)
    agree(table, routes, edges([*routes, *removed]))
    assert len(table) == len(routes)


def _real(data) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(data / "rib" / "bart-tier1-prefixes.txt.gz", "rt") as lines:
        texts = [line.strip().split("/") for line in lines if ":" not in line]
    packed = b"".join(bytes(map(int, address.split("."))) for address, _ in texts)
    return np.frombuffer(packed, ">u4").astype(np.int64), np.array([int(length) for _, length in texts])


def _expected(addresses: np.ndarray, lengths: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Longest match by a sorted array for each length, the longer ones last."""
    found = np.zeros(len(keys), np.int64)
    for length in np.unique(lengths):
        chosen = lengths == length
        order = np.argsort(addresses[chosen])
        prefixes, nexts = addresses[chosen][order], values[chosen][order]
        wanted = keys >> (32 - length) << (32 - length)
        at = np.searchsorted(prefixes, wanted).clip(max=len(prefixes) - 1)
        found = np.where(prefixes[at] == wanted, nexts[at], found)
    return found


@pytest.mark.data
@pytest.mark.skipif(INTERPRETED, reason="a million routes want compiled code")
@pytest.mark.timeout(180)
def test_the_internet(data):
    """901,899 real routes: both edges of every prefix, then again after 100,000 changes."""
    addresses, lengths = _real(data)
    rng = np.random.default_rng(7)
    values = rng.integers(1, 1 << 20, len(addresses))
    table = Lpm4()
    table.load(addresses, lengths, values)
    keys = np.concatenate([addresses, addresses + (1 << (32 - lengths)) - 1])
    _compare(table, keys, _expected(addresses, lengths, values, keys))

    changed = rng.permutation(len(addresses))[:100_000]
    to = rng.integers(0, 1 << 20, len(changed)) * (rng.random(len(changed)) < 0.5)  # half of them go
    table.apply(addresses[changed], lengths[changed], to)
    values[changed] = to
    longer = rng.integers(0, len(addresses), 20_000)  # and some that no real table has
    extra = keys[longer] >> 4 << 4
    fresh = ~np.isin(extra << 6 | 28, addresses << 6 | lengths)
    extra = np.unique(extra[fresh])
    table.apply(extra, np.full(len(extra), 28), np.full(len(extra), LAST))
    addresses, lengths = np.append(addresses, extra), np.append(lengths, np.full(len(extra), 28))
    values = np.append(values, np.full(len(extra), LAST))
    there = values > 0
    assert len(table) == there.sum()
    keys = np.concatenate([keys, extra - 1 & LAST, extra, extra + 15, extra + 16 & LAST])
    _compare(table, keys, _expected(addresses[there], lengths[there], values[there], keys))


def _compare(table: Lpm4, keys: np.ndarray, expected: np.ndarray) -> None:
    memory = Arena(8 * len(keys))
    words = np.frombuffer(memory.buffer, np.uint32)
    words[: len(keys)] = keys
    _burst(table.view(), memory.address, memory.address + 4 * len(keys), len(keys))
    assert np.array_equal(words[len(keys) :], expected)
