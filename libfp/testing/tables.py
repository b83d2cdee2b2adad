"""Checks that any ring or table must pass, against a deque, a dict and its own replica.

For libfp's own tests and for those of rings and tables written outside it: each function drives the object at random,
from a seed, and raises AssertionError where it and its model part.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from libfp.engine.replicas import Replicas, drain
from libfp.errors import TableFull
from libfp.jit import load64
from libfp.jit.memory import view
from libfp.jit.primitive import signed64
from libfp.tables.table import Table

__all__ = ["catch_up", "check_ring", "check_table", "same_words"]


def check_ring(ring: Any, *, steps: int = 200, seed: int = 0) -> None:
    """Drive an empty ring (`libfp.rings`) from one thread, `steps` calls of every kind, against a deque."""
    rng, model = random.Random(seed), deque[Any]()
    drawn = 0

    def draw(count: int) -> list[Any]:
        nonlocal drawn
        drawn += count
        numbers = [signed64(one * 0x9E3779B97F4A7C15) for one in range(drawn - count, drawn)]
        return [(one, ~one) for one in numbers] if ring.element == 16 else numbers

    def rows(taken: np.ndarray) -> list[Any]:
        return [tuple(row) for row in taken.tolist()] if ring.element == 16 else taken.tolist()

    for _ in range(steps):
        call, count = rng.randrange(6), rng.randrange(ring.size + 2)
        room = ring.size - len(model)
        if call == 0:
            values = draw(count)
            assert ring.enqueue_burst(values) == min(count, room)
            model.extend(values[:room])
        elif call == 1:
            values = draw(count)
            assert ring.enqueue_bulk(values) == (count if count <= room else 0)
            model.extend(values if count <= room else [])
        elif call == 2:
            (value,) = draw(1)
            assert ring.enqueue(value) == (room > 0)
            model.extend([value] if room else [])
        elif call == 3:
            expected = [model.popleft() for _ in range(min(count, len(model)))]
            assert rows(ring.dequeue_burst(count)) == expected
        elif call == 4:
            expected = [model.popleft() for _ in range(count if count <= len(model) else 0)]
            assert rows(ring.dequeue_bulk(count)) == expected
        else:
            assert ring.dequeue() == (model.popleft() if model else None)
        assert len(ring) == len(model)
    assert rows(ring.dequeue_burst(ring.size)) == list(model)


def check_table(
    table: Any,
    keys: Sequence[Any],
    values: Sequence[Any],
    *,
    find: Callable[[Any, Any], Any] | None = None,
    steps: int = 300,
    seed: int = 0,
) -> None:
    """Drive an empty table through its mapping, against a dict, while a worker's replica follows.

    `keys` are written as the table gives them back. ``find(view, key)`` looks a key up as compiled code does and
    returns its value or None; it is asked about the master and the replica (leave it out where a lookup is no exact
    match). The replica's mailbox is small, so that it overflows, and its worker is restarted now and then.
    """
    rng, model = random.Random(seed), dict[Any, Any]()
    replicas = Replicas([table], mailbox=64)
    try:
        replicas.reset()
        for step in range(steps):
            _change(table, model, rng, keys, values)
            key = rng.choice(keys)
            assert table.get(key) == model.get(key)
            assert (key in table) == (key in model)
            assert len(table) == len(model)
            if find:
                assert find(table.view(), key) == model.get(key)
            if rng.random() < 0.3:
                drain(replicas.mailbox, rng.choice([1, 16, 512]))
                replicas.flush()
            if step % 50 == 49:
                assert dict(table.items()) == model
                if rng.random() < 0.3:
                    replicas.stop()
                    replicas.reset()
                catch_up(replicas)
                assert same_words(replicas, table)
                if find:
                    assert all(find(replicas.view(table), key) == model.get(key) for key in keys)
    finally:
        replicas.stop()
        replicas.close()


def _change(table: Any, model: dict[Any, Any], rng: random.Random, keys: Sequence[Any], values: Sequence[Any]) -> None:
    key, value, call = rng.choice(keys), rng.choice(values), rng.random()
    if call < 0.6:
        try:
            table[key] = value
        except TableFull:
            assert key not in model
            assert len(model) == table.capacity
        else:
            model[key] = value
    elif call < 0.95:
        try:
            del table[key]
        except KeyError:
            assert key not in model
        else:
            del model[key]
    elif call < 0.99:
        with table.batch():
            for one in rng.sample(keys, min(5, len(keys))):
                if one in model:
                    assert table.pop(one) == model.pop(one)
    else:
        table.clear()
        model.clear()


def catch_up(replicas: Replicas) -> None:
    """Be the worker until it has nothing more to do."""
    while not replicas.acknowledged():
        drain(replicas.mailbox, 512)
        assert replicas.flush(), "a table's lock is held"


def same_words(replicas: Replicas, table: Table) -> bool:
    """Whether a replica holds the very words of its master. Both must rest."""
    master, copy = (load64(one.cell) for one in (table.view(), replicas.view(table)))
    size = 8 * table._words.used
    return view(master, size) == view(copy, size)
