"""`Hash` against a dict: whatever is put in and taken out, lookups in bursts find what single ones and a dict do."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.jit import INTERPRETED, Arena, kernel
from libfp.tables import Hash

WORDS = [1, 2, 3, 5, 8]
FAR = [0, 1, -1, 1 << 62, -(1 << 63), 1 << 32, -(1 << 32), 0x5555_5555_5555_5555]


@kernel
def _burst(view, keys, results, count, default):  # type: ignore[no-untyped-def]
    view.get_burst(keys, results, count, default)


@kernel
def _lookup_burst(view, keys, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(keys, results, count)


@kernel
def _get(view, key, default):  # type: ignore[no-untyped-def]
    return view.get(key, default)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Tables begin with two buckets, or three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("libfp.tables.hash._LEAST", 2)
        yield


def made(words: int, capacity: int) -> Hash:
    return Hash(key=("i64",) * words if words > 1 else "i64", value="i64", capacity=capacity)


def burst(table: Hash, rows: list[tuple[int, ...]], default: int = -1) -> list[int]:
    """What a burst finds. Keys and results end at the end of their arenas: a read beyond them faults."""
    flat = np.array(rows, np.int64).reshape(-1)
    keys, results = Arena(8 * len(flat), flush_end=True), Arena(8 * len(rows), flush_end=True)
    keys.words[:], results.words[:] = flat, 7
    if default == -1:
        _lookup_burst(table.view(), keys.address, results.address, len(rows))
    else:
        _burst(table.view(), keys.address, results.address, len(rows), default)
    found: list[int] = results.words.tolist()
    keys.close()
    results.close()
    return found


def single(table: Hash, row: tuple[int, ...], default: int) -> int:
    return int(_get(table.view(), row if len(row) > 1 else row[0], default))


@pytest.mark.parametrize("words", WORDS)
@settings(max_examples=5 if INTERPRETED else 40, deadline=None)
@given(data=st.data())
def test_bursts_and_single_lookups_find_what_a_dict_does(words: int, data: st.DataObject) -> None:
    word = st.sampled_from(FAR) | st.integers(-3, 3)
    rows = data.draw(st.lists(st.tuples(*[word] * words), min_size=1, max_size=100, unique=True), "keys")
    table, model = made(words, max(1, len(rows) * 3 // 4)), dict[tuple[int, ...], int]()
    for row, value, keep in data.draw(
        st.lists(st.tuples(st.sampled_from(rows), st.integers(-1 << 63, (1 << 63) - 1), st.booleans()), max_size=150),
        "changes",
    ):
        key = row if words > 1 else row[0]
        if keep and (row in model or len(model) < table.capacity):
            table[key] = model[row] = value
        elif not keep and row in model:
            del table[key], model[row]
    default = data.draw(st.sampled_from([-1, 5]), "default")
    asked = (rows * 2)[: data.draw(st.integers(1, 2 * len(rows)), "count")]
    expected = [model.get(row, default) for row in asked]
    assert burst(table, asked, default) == expected
    assert [single(table, row, default) for row in asked[:20]] == expected[:20]


@pytest.mark.parametrize("words", WORDS)
def test_a_full_table_under_change(words: int) -> None:
    """Nine tenths full: many keys are in their second bucket, and their first ones must go on saying so, and stop."""
    count = 60 if INTERPRETED else 3000
    rng = random.Random(words)
    rows = [tuple(rng.randrange(-1 << 63, 1 << 63) for _ in range(words)) for _ in range(2 * count)]
    table, model = made(words, count), {row: rng.randrange(1 << 40) for row in rows[:count]}
    table.load(np.array(list(model)), np.array(list(model.values())))
    for _ in range(5):
        assert burst(table, rows) == [model.get(row, -1) for row in rows]
        for row in rng.sample(sorted(model), count // 4):
            del table[row if words > 1 else row[0]], model[row]
        for row in rng.sample(rows, len(rows)):
            if row not in model and len(model) < count:
                table[row if words > 1 else row[0]] = model[row] = rng.randrange(1 << 40)
    assert len(table) == len(model) == count
    table.clear()
    assert burst(table, rows) == [-1] * len(rows)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 72, 130])
def test_nothing_but_the_results_asked_for_is_written(count: int) -> None:
    table = made(2, 200)
    rows = [(i, -i) for i in range(200)]
    for i, row in enumerate(rows[::2]):
        table[row] = i
    keys, results = Arena(16 * 200), Arena(8 * 200)
    keys.words[:], results.words[:] = np.array(rows).reshape(-1), 7
    _lookup_burst(table.view(), keys.address, results.address, count)
    assert results.words.tolist() == [-1 if i % 2 else i // 2 for i in range(count)] + [7] * (200 - count)
