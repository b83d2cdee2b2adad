"""What is written, or read, where several threads do so side by side: a mark for each claim.

They end in any order. One index for all would make each wait for those before it, and a thread that the kernel has put
aside would hold up the rest. So who has claimed the indexes from `index` to `end`, and is done with them, leaves `end`
in the mark of the first one's slot. The other side goes from mark to mark, as far as they lead.

`marks` is the address of `size` words. A mark of another lap says nothing: it is no more than the index it is looked
up for, or more than `size` beyond it.
"""

from __future__ import annotations

from libfp.jit import inline, kernel, load_acquire64, prefetch, prefetch_write, store_release64

STEPS = 16  # marks that are followed at a time, even if fewer do


@kernel
@inline
def aim(marks, size, index):  # type: ignore[no-untyped-def]
    """Have the line brought that `mark` will store to: while the elements are copied, not after."""
    prefetch_write(marks + 8 * (index & (size - 1)))


@kernel
@inline
def mark(marks, size, index, count):  # type: ignore[no-untyped-def]
    """Say that `count` slots from `index` on, one whole claim, are done. Releases what was done to them."""
    store_release64(marks + 8 * (index & (size - 1)), index + count)


@kernel
@inline
def follow(marks, size, index, wanted):  # type: ignore[no-untyped-def]
    """Up to where all is done from `index`, where a claim began; no further than some marks beyond `wanted` slots.

    Acquires what was done to them. Each mark says where the next one is, so their lines, which are in the other side's
    caches, would come one after the other: a miss a claim. Claims mostly are of one length, so the first one's tells
    which lines to ask for at once.
    """
    at, steps = index, 0
    while steps < STEPS or at - index < wanted:
        end = load_acquire64(marks + 8 * (at & (size - 1)))
        length = end - at
        if length <= 0 or length > size:
            break
        if steps == 0 and length > 1:
            further = length
            while further < min(STEPS * length, size):
                prefetch(marks + 8 * ((at + further) & (size - 1)))
                further += length
        at = end
        steps += 1
    return at
