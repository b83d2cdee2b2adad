"""What all rings do with their slots: copy elements in and out, and around the end."""

from __future__ import annotations

from libfp.jit import clock, copy64, inline, kernel, load64, pause, prefetch, prefetch_write, store64, unlikely

REST = 600  # ticks of `clock`


@kernel
def rest(looked):  # type: ignore[no-untyped-def]
    """Let the other side be until `REST` ticks after the time at `looked`, which becomes now.

    A line that one core stores to while another loads from it in a loop moves to and fro, and each move takes either
    core as long as dozens of elements do. So who has found a ring empty, or full, and asks again at once, looks at the
    other side's index a few times a microsecond and no more; who has had something else to do meanwhile never waits.
    """
    since = clock() - load64(looked)
    while 0 <= since < REST:
        pause()
        since = clock() - load64(looked)
    store64(looked, clock())


@kernel
@inline
def move(target, source, size):  # type: ignore[no-untyped-def]
    """Copy `size` bytes, a multiple of 8: whole lines first, words at the end. Never a call."""
    at = 0
    while at + 64 <= size:
        copy64(target + at, source + at)
        at += 64
    while at < size:
        store64(target + at, load64(source + at))
        at += 8


@kernel
@inline
def put(slots, nbytes, at, source, size):  # type: ignore[no-untyped-def]
    """Copy `size` bytes from `source` to the `nbytes` of slots, from byte `at` on, around the end."""
    first = min(size, nbytes - at)
    move(slots + at, source, first)
    if unlikely(first < size):
        move(slots, source + first, size - first)


@kernel
@inline
def take(slots, nbytes, at, target, size):  # type: ignore[no-untyped-def]
    """Copy `size` bytes from the slots to `target`: `put` the other way."""
    first = min(size, nbytes - at)
    move(target, slots + at, first)
    if unlikely(first < size):
        move(target + first, slots, size - first)


@kernel
@inline
def ahead(slots, nbytes, end, size):  # type: ignore[no-untyped-def]
    """After `size` bytes up to `end` were written: have the lines brought that the next such bytes will be written to.

    The consumer's core holds them, from a round before. Stores wait for their lines one after the other, and nothing
    else makes a producer slow.
    """
    if end & 63 < size:  # once a line
        at = 0
        while at < size:
            prefetch_write(slots + ((end + 64 + at) & (nbytes - 1)))
            at += 64


@kernel
@inline
def bring(slots, nbytes, end, size, there):  # type: ignore[no-untyped-def]
    """After `size` bytes up to `end` were read: have the next such lines brought, of `there` bytes that are written."""
    if end & 63 < size:
        at = 64
        while at < min(size + 64, there):
            prefetch(slots + ((end + at) & (nbytes - 1)))
            at += 64
