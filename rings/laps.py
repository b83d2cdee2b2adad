"""Which slots are written, or read: one byte a slot, the lap in which that was done.

Where several threads write (or read) side by side, they end in any order. One index for all would make each wait for
those before it, and a thread that the kernel has put aside would hold up the rest. So who is done says so of its own
slots alone. Index i is the i // size-th lap's; a byte keeps the lap modulo 256, which is enough, for a slot's byte is
never more than a lap behind.

`states` is the address of `size` bytes, aligned to a line; `shift` is log2(size).
"""

from __future__ import annotations

from libfp.jit import (
    ctz64,
    entry,
    inline,
    kernel,
    load_acquire8,
    load_acquire64,
    mul64,
    shr64,
    store_release8,
    store_release64,
    unlikely,
)
from libfp.rings.slots import ahead

LINE = 64
FURTHER = 8 * LINE - 1
_EACH = 0x0101010101010101


@kernel
@inline
def _mark(at, count, lap):  # type: ignore[no-untyped-def]
    end = at + count
    while at < end:
        if at & 7 == 0 and end - at >= 8:
            store_release64(at, mul64(lap & 255, _EACH))
            at += 8
        else:
            store_release8(at, lap)
            at += 1


@kernel
@inline
def mark(states, size, shift, index, count):  # type: ignore[no-untyped-def]
    """Say of `count` slots, from `index` on, that they are done. Releases what was done to them."""
    at, lap = index & (size - 1), shr64(index, shift)
    first = min(count, size - at)
    _mark(states + at, first, lap)
    if unlikely(first < count):
        _mark(states, count - first, lap + 1)
    ahead(states, size, (index + count) & (size - 1), count, LINE)


@kernel
def run(states, size, shift, index, limit):  # type: ignore[no-untyped-def]
    """How many slots from `index` on are done, one after the other; `limit` at most. Acquires what was done to them."""
    found = 0
    while found < limit:
        at, lap = (index + found) & (size - 1), shr64(index + found, shift) & 255
        if at & 7 == 0 and limit - found >= 8:  # never around the end: the size is a power of two, 8 or more
            differ = load_acquire64(states + at) ^ mul64(lap, _EACH)
            if differ != 0:
                return found + (ctz64(differ) >> 3)
            found += 8
        elif load_acquire8(states + at) == lap:
            found += 1
        else:
            break
    return found


@kernel
@inline
def look(index, wanted):  # type: ignore[no-untyped-def]
    """How far to `run` from `index` for `wanted` slots: some lines of states further, as long as they are done."""
    return ((index + wanted + FURTHER) & -LINE) - index


@entry
def clear(states, size, shift, start):  # type: ignore[no-untyped-def]
    """As if all of the lap before `start` had been done: index i - size is the last of its slot."""
    mark(states, size, shift, start - size, size)
