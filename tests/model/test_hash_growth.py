"""`Hash` while it grows: a replica holds every key at the end of every transaction, however the table is used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from libfp.jit import INTERPRETED, Arena, kernel, load64, store64
from libfp.tables import Hash
from libfp.tables.buckets import EDGE, SPAN, TAGS
from libfp.tables.table import Table
from libfp.tables.words import BUDGET, HEADER


@kernel
def _burst(view, keys, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(keys, results, count)


class Reader:
    """A subscriber that applies what it is given at once and looks at the table after each transaction."""

    def __init__(self, table: Hash, words: int) -> None:
        self.table, self.words, self.model = table, words, dict[Any, int]()
        self.unsettled: Any = None  # the key that is being changed
        self.longest = self.transactions = self.copies = 0
        self.cell = Arena(8)
        self.view = table.view_for(self.cell.address)
        self.refresh(table)
        table.subscribe(self)

    def deliver(self, table: Table, log: int, count: int) -> None:
        at = 0
        while at < count:
            assert load64(log + 16 * at) == HEADER
            words = load64(log + 16 * at + 8)
            for i in range(at + 1, at + 1 + words):
                store64(load64(self.cell.address) + 8 * load64(log + 16 * i), load64(log + 16 * i + 8))
            at += 1 + words
            self.longest = max(self.longest, words)
            self.transactions += 1
            self.check()

    def refresh(self, table: Table) -> None:
        self.copy = table.copy_words()
        store64(self.cell.address, self.copy.address)
        self.copies += 1

    def mark(self) -> int:
        return 0

    def passed(self, table: Table, mark: int) -> bool:
        return True

    def reached(self, table: Table) -> Callable[[], bool]:
        return lambda: True

    def check(self) -> None:
        asked = list(self.model)
        if not asked:
            return
        keys, results = Arena(8 * self.words * len(asked)), Arena(8 * len(asked))
        keys.words[:] = [word for key in asked for word in (key if self.words > 1 else (key,))]
        _burst(self.view, keys.address, results.address, len(asked))
        for key, found in zip(asked, results.words.tolist(), strict=True):
            assert found == self.model[key] or key == self.unsettled


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables begin with two buckets, or three."""
    monkeypatch.setattr("libfp.tables.hash._LEAST", 2)


def _steps(rng: random.Random, words: int, keys: int) -> Iterator[Any]:
    while True:
        row = tuple(rng.randrange(keys) for _ in range(words))
        yield row if words > 1 else row[0]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("words", "capacity"), [(1, 60), (1, 200), (2, 90), (3, 64), (8, 150)])
@pytest.mark.parametrize("seed", range(1 if INTERPRETED else 8))
def test_a_replica_misses_no_key_between_transactions(words: int, capacity: int, seed: int) -> None:
    rng = random.Random(seed)
    table = Hash(("i64",) * words if words > 1 else "i64", "i64", capacity=capacity)
    reader, sizes = Reader(table, words), set[tuple[int, int]]()
    some = _steps(rng, words, 4 * capacity)
    removal = rng.choice([0.0, 0.1, 0.4])
    for step in range(2 * capacity):
        base = load64(table.view().cell)
        sizes.add((load64(base + SPAN), load64(base + EDGE)))
        if reader.model and rng.random() < removal:
            key = reader.unsettled = rng.choice(list(reader.model))
            del table[key], reader.model[key]
        elif len(table) < capacity:
            key = reader.unsettled = next(some)
            table[key] = step
            reader.model[key] = step
        reader.unsettled = None
        reader.check()
        if step % 16 == 0:
            assert dict(table) == reader.model
    assert dict(table) == reader.model
    assert len(sizes) > 1, "it grew"
    assert any(edge for _, edge in sizes), "in steps"
    assert reader.longest <= BUDGET
    for key in list(reader.model):
        reader.unsettled = key
        del table[key], reader.model[key]
    assert dict(table) == {}
    base = load64(table.view().cell)
    tags = [load64(base + TAGS + 8 * bucket) for bucket in range(load64(base + SPAN))]
    edge = load64(base + EDGE)
    assert not any(tags[: edge // 2] + tags[edge:]), "and no bucket says that keys of it are elsewhere"


@pytest.mark.usefixtures("small")
def test_a_copy_in_the_middle_of_growth() -> None:
    """What a worker gets that begins then, or was late: all of it, and it can follow from there."""
    table, copies = Hash("u64", capacity=1000), 0
    for key in range(500):
        table[key << 32] = key
        if load64(load64(table.view().cell) + EDGE) and key % 7 == 0:
            reader, copies = Reader(table, 1), copies + 1
            reader.model.update({one << 32: one for one in range(key + 1)})
            reader.check()
            table[1 << 63] = reader.unsettled = 1
            assert reader.transactions > 0
            table.unsubscribe(reader)
            del table[1 << 63]
    assert copies > 10
