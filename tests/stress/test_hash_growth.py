"""A compiled worker looks up the keys that are there while their table grows."""

from __future__ import annotations

import pytest

from libfp.engine.replicas import Replicas, drain
from libfp.jit import INTERPRETED, Arena, call, kernel, load64, load_acquire64, mul64, pause, store64, store_release64
from libfp.tables import Hash
from tests.stress.turning import STOP, TURNS, turning, until

pytestmark = [pytest.mark.stress, pytest.mark.timeout(180)]
KEYS = 2_000 if INTERPRETED else 60_000
MISSED, ASKED, ROOM = 16, 24, 64
ODD = 0x9E3779B97F4A7C15 - (1 << 64)


@kernel
def _worker(mailbox, table, shared, sched_yield):  # type: ignore[no-untyped-def]
    """Key 0 says how many others are there: i * ODD leads to i. Turns until told to stop."""
    turns = missed = asked = 0
    keys, results = shared + ROOM, shared + ROOM + 8 * 128
    while load_acquire64(shared + STOP) == 0:
        drain(mailbox, 64)
        there = table.lookup(0)
        if there > 0:
            for i in range(72):
                store64(keys + 8 * i, mul64((turns * 72 + i) * 7 % there + 1, ODD))
            table.lookup_burst(keys, results, 72)
            for i in range(72):
                missed += mul64(load64(results + 8 * i), ODD) != load64(keys + 8 * i)
            missed += table.lookup(load64(keys)) != load64(results)
            asked += 1
        turns += 1
        store_release64(shared + TURNS, turns)
        if turns & 15 == 0:
            call(sched_yield, 0, 0, 0, 0, 0, 0)
        pause()
    store64(shared + MISSED, missed)
    store64(shared + ASKED, asked)


@pytest.mark.parametrize("mailbox", [256, 1 << 14])
def test_a_worker_misses_no_key_while_the_table_grows(mailbox: int) -> None:
    table = Hash("i64", "i64", capacity=KEYS + 1)
    replicas, shared = Replicas([table], mailbox=mailbox), Arena(4096)
    table[0] = 0
    with turning(_worker, replicas, [table], shared.address):
        for i in range(1, KEYS + 1):
            table[(i * ODD + (1 << 63)) % (1 << 64) - (1 << 63)] = i
            if i % 16 == 0:
                table[0] = i
                replicas.flush()
            if i % 256 == 0:
                until(lambda: len(replicas._ring) < mailbox // 2)  # most of it is to come by the log
    assert load64(shared.address + MISSED) == 0
    assert load64(shared.address + ASKED) > 0
    assert replicas.copies == 0 or mailbox == 256
    replicas.stop()
    replicas.close()
