"""Time, and the wheel by which flows end: part of `libfp.tables.flow`, whose layout `libfp.tables.flow_record` says.

A hashed timing wheel with unsorted lists (Varghese and Lauck, "Hashed and hierarchical timing wheels", SOSP 1987,
scheme 6): slot ``tick % 4096`` of the wheel is a list of slots of the table, linked through their records. Once a turn
of its loop the worker reads the clock; for each tick that has passed it takes that tick's list and looks at what is in
it, `LOOKS` at most, and the next turn goes on where this one stopped: however many end at once, no burst waits for it.

A look finds the slot empty, and takes it out; or its flow expired, and ends it; or a deadline that has moved on since
(to touch a flow is to store its deadline and no more), and puts it where that belongs, but never further than a
revolution, 41 s, ahead. So a list entry belongs to the slot, whoever lives there: a flow that ends early leaves its
slot in its list, to be used again at once, and nothing is ever unlinked from the middle of a list. A deadline that
moved closer is noticed by the wheel up to a revolution late. Nobody sees it late: what has expired is not found.

A tick is 10 ms; ticks count from when the worker was made. Deadlines are 32 bits, compared modulo 2**32: at most 248
days ahead.
"""

from __future__ import annotations

from libfp.jit import clock, kernel, load8, load32, load64, mulhi64, prefetch, store32, store64, u32
from libfp.tables.flow_record import (
    DEADLINE,
    DONE,
    EXPIRED,
    FACTOR,
    FLAGS,
    LINKED,
    LIST,
    NEXT,
    NOW,
    START,
    TAGS,
    WHEEL,
    WHEEL_SLOTS,
    expired,
    forget,
    record_of,
)

LOOKS = 64  # a turn: as many as a burst can make


@kernel
def enlist(table, number, at):  # type: ignore[no-untyped-def]
    """Put a slot, whose record is at `at`, into the list of its deadline's tick, or of the last one in reach."""
    done = load64(table + DONE)
    tick = done + min(u32(load32(at + DEADLINE) - done), WHEEL_SLOTS)
    head = table + WHEEL + 4 * (tick & WHEEL_SLOTS - 1)
    store32(at + NEXT, load32(head))
    store32(head, number + 1)


@kernel
def ticks_of(table):  # type: ignore[no-untyped-def]
    """The time, in ticks."""
    return mulhi64(clock() - load64(table + START), load64(table + FACTOR))


@kernel
def turn(table, now):  # type: ignore[no-untyped-def]
    """Let it be tick `now`, and look at what may have expired; 1 if there is more to look at, else 0."""
    store64(table + NOW, now)
    if load64(table + LIST) == 0 and load64(table + DONE) == now:
        return 0
    return look_on(table, now)


@kernel
def look_on(table, now):  # type: ignore[no-untyped-def]
    done, entry = load64(table + DONE), load64(table + LIST)
    if done < now - WHEEL_SLOTS:  # the worker stood still: each list is to be looked at once
        done = now - WHEEL_SLOTS
        store64(table + DONE, done)
    for _ in range(LOOKS):
        if entry != 0:
            number = entry - 1
            at = record_of(table, number)
            entry = load32(at + NEXT)
            prefetch(record_of(table, entry - 1))
            look(table, number, at)
        elif done != now:
            done += 1
            store64(table + DONE, done)
            head = table + WHEEL + 4 * (done & WHEEL_SLOTS - 1)
            entry = load32(head)
            store32(head, 0)
    store64(table + LIST, entry)
    return 1 if entry != 0 or done != now else 0


@kernel
def look(table, number, at):  # type: ignore[no-untyped-def]
    """The turn of a slot has come: it leaves its list, ended if it has expired, or goes into another."""
    if load8(table + TAGS + number) != 0:
        if expired(table, at) == 0:
            enlist(table, number, at)
            return
        forget(table, number, EXPIRED)
    store32(at + FLAGS, load32(at + FLAGS) & ~LINKED)
