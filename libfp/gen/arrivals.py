"""What the receiver knows of a stream: which sequence numbers have come, how late, in which order, how often.

A window of the last 2^18 numbers, a bit each, tells a packet that was overtaken from one that comes again (RFC 4737:
reordered is what comes after a higher number). Older ones cannot be told, and are counted as too late.
"""

from __future__ import annotations

from libfp.gen import histogram
from libfp.jit import inline, kernel, load64, shl64, store64

#: Words of a stream: which one it is (-1: the first that comes), the number after the highest so far, intact packets
#: that were not there before, those that came again, those that were overtaken and the most by which, too late ones;
#: ticks on the way, added up, least and most; the first number that came; bytes of the packets.
STREAM, NEXT, RECEIVED, DUPLICATES, REORDERED, EXTENT, LATE, TICKS, LEAST, MOST, FIRST, BYTES = range(0, 96, 8)
LATENCY = 128  # the histogram
WINDOW = LATENCY + histogram.SIZE
WORDS = 1 << 12
SIZE = (WINDOW + 8 * WORDS + 63) // 64 * 64


@kernel
def clear(stream, first, last):  # type: ignore[no-untyped-def]
    """Empty the window's words from `first` to `last`."""
    for word in range(first, min(last + 1, first + WORDS)):
        store64(stream + WINDOW + 8 * (word & (WORDS - 1)), 0)


@kernel
@inline
def add(at, value):  # type: ignore[no-untyped-def]
    store64(at, load64(at) + value)


@kernel
def out_of_order(stream, sequence, following):  # type: ignore[no-untyped-def]
    """A number that is not the next one; whether it is one that has not been there."""
    newest = (following - 1) >> 6
    if sequence > following:
        clear(stream, newest + 1, sequence >> 6)
        store64(stream + NEXT, sequence + 1)
    elif newest - (sequence >> 6) >= WORDS:
        add(stream + LATE, 1)
        return False
    bit, at = shl64(1, sequence & 63), stream + WINDOW + 8 * ((sequence >> 6) & (WORDS - 1))
    seen = load64(at)
    if seen & bit != 0:
        add(stream + DUPLICATES, 1)
        return False
    store64(at, seen | bit)
    if sequence < following:
        add(stream + REORDERED, 1)
        store64(stream + EXTENT, max(load64(stream + EXTENT), following - 1 - sequence))
    return True


@kernel
@inline
def arrived(stream, sequence):  # type: ignore[no-untyped-def]
    """Enter a number; whether it is one that has not been there."""
    following = load64(stream + NEXT)
    if sequence != following:
        return out_of_order(stream, sequence, following)
    store64(stream + NEXT, sequence + 1)
    at = stream + WINDOW + 8 * ((sequence >> 6) & (WORDS - 1))
    before = load64(at) if sequence & 63 != 0 else 0
    store64(at, before | shl64(1, sequence & 63))
    return True
