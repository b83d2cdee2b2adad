"""`libfp.engine.replicas`: order, budgets, a full mailbox, restarts, and who frees what when."""

from __future__ import annotations

import threading

import pytest

from libfp.engine.replicas import Replicas, drain
from libfp.jit import Arena, load64
from libfp.tables import Hash, Lpm4
from libfp.testing.tables import catch_up, same_words


@pytest.fixture
def tables():
    return Lpm4(capacity=1000), Hash("u32", capacity=100)


@pytest.fixture
def replicas(tables):
    made = Replicas(tables, mailbox=64)
    made.reset()
    yield made
    made.stop()
    made.close()


def test_a_change_is_seen_after_drain_and_not_before(tables, replicas):
    fib, hops = tables
    hops[1] = 11
    fib["10.0.0.0/24"] = 1
    assert replicas.view(hops).lookup(1) == -1
    assert not replicas.acknowledged()
    assert drain(replicas.mailbox, 512) > 0
    assert replicas.view(hops).lookup(1) == 11
    assert replicas.view(fib).lookup(10 << 24) == 1
    assert replicas.acknowledged()
    assert drain(replicas.mailbox, 512) == 0


def test_transactions_arrive_whole_and_in_order_of_commit(tables, replicas):
    fib, hops = tables
    for k in range(1, 4):
        hops[k] = k
        fib.set(k << 24, 32, k)
    seen = []
    while drain(replicas.mailbox, 1):  # one transaction at a time: it is longer than the budget
        routed = [k for k in range(1, 4) if replicas.view(fib).lookup(k << 24)]
        known = [k for k in range(1, 4) if replicas.view(hops).lookup(k) == k]
        assert known[: len(routed)] == routed
        seen.append(len(known) + len(routed))
    assert seen[-1] == 6
    assert seen == sorted(seen)


def test_a_budget_is_kept_but_for_one_long_transaction(tables, replicas):
    _, hops = tables
    for k in range(10):
        hops[k] = k
    first = drain(replicas.mailbox, 0)
    assert first > 0
    assert [drain(replicas.mailbox, 2 * first + 1) for _ in range(5)] == [2 * first] * 4 + [first]


def test_a_view_is_the_same_each_time(tables, replicas):
    assert replicas.view(tables[0]) is replicas.view(tables[0])
    assert Replicas([tables[0], tables[0]]).tables == [tables[0]]


def test_a_full_mailbox_means_fresh_copies_of_all_tables_together(tables, replicas):
    fib, hops = tables
    while replicas.flush():
        hops[len(hops)] = 7
    assert not replicas.acknowledged()
    last = len(hops) - 1
    fib["10.0.0.0/24"] = 3  # while stale: part of the copy to come
    assert replicas.copies == 0
    assert drain(replicas.mailbox, 512) > 0  # what was posted before still holds
    assert replicas.view(hops).lookup(last) == -1
    assert replicas.view(hops).lookup(0) == 7
    assert replicas.flush()
    assert replicas.copies == 1
    assert replicas.view(fib).lookup(10 << 24) == 0
    assert drain(replicas.mailbox, 512) == 2  # two cells
    assert replicas.view(fib).lookup(10 << 24) == 3
    assert replicas.view(hops).lookup(last) == 7
    assert same_words(replicas, fib)
    assert same_words(replicas, hops)


def test_waiting_until_the_worker_goes_by_a_change(tables, replicas):
    fib, hops = tables
    hops[1] = 11
    with pytest.raises(TimeoutError, match=r"1 workers have not taken in a table's changes within 0\.01 s"):
        hops.wait_applied(0.01)
    reached = replicas.reached(hops)
    hops[2] = 12
    assert drain(replicas.mailbox, 1) > 0, "one transaction"
    assert reached()
    assert not replicas.reached(hops)()
    drain(replicas.mailbox, 512)
    hops.wait_applied(0)
    last = 0
    while replicas.flush():
        hops[last := last + 1] = 7
    reached = replicas.reached(hops)
    drain(replicas.mailbox, 512)
    assert not reached(), "the fresh copy is still to be made"
    replicas.flush()
    assert not reached(), "and to be taken"
    drain(replicas.mailbox, 512)
    assert replicas.view(hops).lookup(last) == 7
    assert reached()
    fib.wait_applied(0)


def test_a_commit_retries_by_itself(tables, replicas):
    _, hops = tables
    while replicas.flush():
        hops[len(hops)] = 7
    drain(replicas.mailbox, 512)
    hops[5] = 8  # no flush; were it delivered by itself, the replica would lack what was dropped before
    drain(replicas.mailbox, 512)
    assert replicas.view(hops).lookup(5) == 8
    assert all(replicas.view(hops).lookup(k) == 7 for k in hops if k != 5)


def test_old_copies_are_freed_once_acknowledged(tables, replicas):
    fib, _ = tables
    old = load64(replicas.view(fib).cell)
    fib.load([10 << 24], [8], [1])
    replicas.flush()
    assert load64(old) == 0  # the worker may still be there
    drain(replicas.mailbox, 512)
    assert replicas.view(fib).lookup(10 << 24) == 1
    replicas.flush()
    with pytest.raises(IndexError):
        load64(old)


def test_a_second_load_waits_for_the_first(tables, replicas):
    fib, _ = tables
    for k in range(1, 5):
        fib.load([10 << 24], [8], [k])
    assert replicas.copies == 1
    drain(replicas.mailbox, 512)
    assert replicas.view(fib).lookup(10 << 24) == 1
    replicas.flush()
    drain(replicas.mailbox, 512)
    assert replicas.view(fib).lookup(10 << 24) == 4
    catch_up(replicas)
    assert replicas.copies == 2


def test_while_nobody_runs_flush_brings_them_up_to_date(tables):
    fib, hops = tables
    replicas = Replicas(tables, mailbox=64)
    fib["10.0.0.0/8"] = 1  # more words than the mailbox holds
    for k in range(50):
        hops[k] = k
    assert replicas.acknowledged()
    assert replicas.flush()
    assert replicas.view(fib).lookup(10 << 24) == 1
    assert replicas.view(hops).lookup(49) == 49
    hops[1] = 2
    assert replicas.flush()
    assert replicas.view(hops).lookup(1) == 2
    replicas.close()


def test_a_restart_begins_with_fresh_copies(tables, replicas):
    fib, hops = tables
    hops[1] = 1
    replicas.stop()
    hops[2] = 2
    fib["10.0.0.0/8"] = 3
    replicas.reset()
    assert drain(replicas.mailbox, 512) == 0
    assert [replicas.view(hops).lookup(k) for k in (1, 2)] == [1, 2]
    hops[3] = 3
    drain(replicas.mailbox, 512)
    assert replicas.view(hops).lookup(3) == 3
    assert same_words(replicas, fib)


def test_memory_waits_for_running_workers_only(tables):
    fib, _ = tables
    slow, fast = Replicas([fib], mailbox=1024), Replicas([fib], mailbox=1024)
    for one in (slow, fast):
        one.reset()

    def used_by(changes: int) -> int:
        before = fib.replica_bytes
        for k in range(changes):
            fib[f"10.0.0.{k % 2 * 128}/25"] = 1
            del fib[f"10.0.0.{k % 2 * 128}/25"]
            catch_up(fast)
        return fib.replica_bytes - before

    used_by(2)
    assert used_by(10) > 0  # the slow one may still look at all of it
    slow.stop()
    used_by(2)
    assert used_by(10) == 0
    slow.close()
    fast.stop()
    fast.close()


def test_closed_replicas_are_forgotten(tables):
    fib, hops = tables
    replicas = Replicas(tables)
    cell = replicas.view(fib).cell
    replicas.close()
    fib["10.0.0.0/8"] = 1
    hops[1] = 1
    with pytest.raises(IndexError):
        load64(cell)


def test_flush_never_waits_for_a_table_that_changes(tables, replicas):
    fib, hops = tables
    fib.load([10 << 24], [8], [1])
    fib.load([10 << 24], [8], [2])  # wants another copy; the mailbox holds the first
    drain(replicas.mailbox, 512)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with fib.lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(30)
    try:
        hops.load([1], [1])
        assert not replicas.flush()
    finally:
        done.set()
        thread.join()
    assert replicas.flush()
    catch_up(replicas)
    assert replicas.view(hops).lookup(1) == 1
    assert replicas.view(fib).lookup(10 << 24) == 2


def test_only_what_is_stale_is_copied(tables, replicas):
    fib, hops = tables
    hops[1] = 1
    cell = load64(replicas.view(hops).cell)
    fib.load([10 << 24], [8], [1])
    drain(replicas.mailbox, 1 << 20)
    assert replicas.view(fib).lookup(10 << 24) == 1
    assert load64(replicas.view(hops).cell) == cell
    hops[2] = 2  # its replica goes on being delivered to
    drain(replicas.mailbox, 512)
    assert [replicas.view(hops).lookup(k) for k in (1, 2)] == [1, 2]


def test_a_batch_is_handed_over_at_its_end(tables, replicas):
    fib, hops = tables
    with hops.batch():
        hops[1] = 1
        with hops.batch():
            hops[2] = 2
        fib["10.0.0.0/24"] = 1
        assert drain(replicas.mailbox, 512) > 0
        assert replicas.view(hops).lookup(1) == -1
    drain(replicas.mailbox, 512)
    assert replicas.view(hops).lookup(2) == 2


def test_without_tables():
    replicas = Replicas([])
    replicas.reset()
    assert drain(replicas.mailbox, 512) == 0
    assert replicas.flush()
    replicas.stop()
    replicas.close()


def test_apply_feeds_a_worker_in_parts(tables):
    fib = Lpm4(capacity=5000)
    replicas = Replicas([fib])
    replicas.reset()
    count = 300
    addresses = [k << 14 for k in range(count)]
    fib.apply(addresses, [24] * count, [5] * count)
    catch_up(replicas)
    assert all(replicas.view(fib).lookup(one) == 5 for one in addresses)
    assert same_words(replicas, fib)
    replicas.stop()
    replicas.close()


def test_arenas_of_tables_do_not_pile_up(tables, replicas):
    fib, hops = tables
    for k in range(10):
        hops.load([k], [k])
        catch_up(replicas)
        replicas.flush()
    assert len(replicas._retired) == 0
    assert isinstance(replicas._arenas[id(fib)], Arena)
