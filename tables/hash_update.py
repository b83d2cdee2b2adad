"""Changes to `libfp.tables.hash`: compiled, control plane only. Each is one transaction.

Where both buckets of a new key are full, a chain of keys moves, each to its other bucket; found breadth first, so
that it is short.
"""

from __future__ import annotations

from libfp.jit import ctz64, entry, kernel, load8, load64, shl64, store8, store64
from libfp.tables.buckets import (
    SLOTS,
    TAGS,
    class_of,
    entries_at,
    find_at,
    first_bucket,
    hash_at,
    matching,
    second_bucket,
    tag_of,
)
from libfp.tables.words import BASE, TABLE, get, put, seal

#: Fields in the control block: buckets, words a key, entries, the address of scratch memory, and that of the counts:
#: eight bytes a bucket, how many of its keys of each class are in their second.
BUCKETS, WORDS, ENTRIES, SCRATCH, COUNTS = TABLE, TABLE + 8, TABLE + 16, TABLE + 24, TABLE + 32
# The scratch memory: a key, then the search's queue of (bucket, where its room would be used).
_QUEUE, _QUEUE_SIZE = 64, 1000
SCRATCH_BYTES = _QUEUE + 16 * _QUEUE_SIZE
#: Results of `store`.
REPLACED, ADDED, NO_PLACE = 0, 1, 2


@kernel
def _tags(block, bucket):  # type: ignore[no-untyped-def]
    """The word offset of a bucket's tags."""
    return (TAGS >> 3) + bucket


@kernel
def _entry(block, bucket, slot):  # type: ignore[no-untyped-def]
    """The word offset of an entry."""
    return (entries_at(load64(block + BUCKETS)) >> 3) + (SLOTS * bucket + slot) * (load64(block + WORDS) + 1)


@kernel
def _vacant(block, bucket):  # type: ignore[no-untyped-def]
    """An empty slot of the bucket, `SLOTS` if it is full."""
    empty = matching(get(block, _tags(block, bucket)), 0)
    return ctz64(empty) >> 3 if empty != 0 else SLOTS


@kernel
def _tag(block, bucket, slot, tag):  # type: ignore[no-untyped-def]
    at = _tags(block, bucket)
    put(block, at, (get(block, at) & ~shl64(0xFF, 8 * slot)) | shl64(tag, 8 * slot))


@kernel
def _displaced(block, bucket, hashed, change):  # type: ignore[no-untyped-def]
    """One more, or one fewer, of the bucket's keys, that of this hash, is in its second. A count of 255 stays."""
    at = load64(block + COUNTS) + 8 * bucket + class_of(hashed)
    count = load8(at)
    if count == 255:
        return
    store8(at, count + change)
    if count + change <= 1 and count <= 1:
        tags = _tags(block, bucket)
        put(block, tags, get(block, tags) ^ shl64(1, 56 + class_of(hashed)))


@kernel
def _hash_of(block, bucket, slot):  # type: ignore[no-untyped-def]
    base = load64(block + BASE)
    return hash_at(base, base + 8 * _entry(block, bucket, slot), load64(block + WORDS))


@kernel
def _move(block, bucket, slot, to, free):  # type: ignore[no-untyped-def]
    """Move an entry to slot `free` of its other bucket, `to`."""
    hashed = _hash_of(block, bucket, slot)
    source, target = _entry(block, bucket, slot), _entry(block, to, free)
    for i in range(load64(block + WORDS) + 1):
        put(block, target + i, get(block, source + i))
    _tag(block, to, free, tag_of(hashed))
    _tag(block, bucket, slot, 0)
    home = first_bucket(hashed, load64(block + BUCKETS))
    _displaced(block, home, hashed, -1 if home == to else 1)


@kernel
def _other(block, bucket, slot):  # type: ignore[no-untyped-def]
    """The other bucket of an entry."""
    hashed, buckets = _hash_of(block, bucket, slot), load64(block + BUCKETS)
    first = first_bucket(hashed, buckets)
    return second_bucket(hashed, buckets) if bucket == first else first


@kernel
def _make_room(block, first, second):  # type: ignore[no-untyped-def]
    """Empty a slot of one of two full buckets: bucket << 3 | slot, -1 if there is no way."""
    queue = load64(block + SCRATCH) + _QUEUE
    store64(queue, first)
    store64(queue + 8, -1)
    store64(queue + 16, second)
    store64(queue + 24, -1)
    at, end = 0, 2
    while at < end:
        bucket = load64(queue + 16 * at)
        for slot in range(SLOTS):
            other = _other(block, bucket, slot)
            if other == bucket:
                continue
            free = _vacant(block, other)
            if free < SLOTS:
                return _shift(block, queue, at, slot, other, free)
            if end < _QUEUE_SIZE:
                store64(queue + 16 * end, other)
                store64(queue + 16 * end + 8, at << 3 | slot)
                end += 1
        at += 1
    return -1


@kernel
def _shift(block, queue, at, slot, to, free):  # type: ignore[no-untyped-def]
    """Move the chain of entries that the search found, the last one first."""
    while True:
        bucket, came = load64(queue + 16 * at), load64(queue + 16 * at + 8)
        _move(block, bucket, slot, to, free)
        if came < 0:
            return bucket << 3 | slot
        to, free = bucket, slot
        at, slot = came >> 3, came & 7


@kernel
def _store(block, key, value):  # type: ignore[no-untyped-def]
    base, buckets, words = load64(block + BASE), load64(block + BUCKETS), load64(block + WORDS)
    place = find_at(base, buckets, words, key)
    if place >= 0:
        put(block, _entry(block, place >> 3, place & 7) + words, value)
        return REPLACED
    hashed = hash_at(base, key, words)
    first, second = first_bucket(hashed, buckets), second_bucket(hashed, buckets)
    bucket, slot = first, _vacant(block, first)
    if slot == SLOTS:
        bucket, slot = second, _vacant(block, second)
    if slot == SLOTS:
        place = _make_room(block, first, second)
        if place < 0:
            return NO_PLACE
        bucket, slot = place >> 3, place & 7
    for i in range(words):
        put(block, _entry(block, bucket, slot) + i, load64(key + 8 * i))
    put(block, _entry(block, bucket, slot) + words, value)
    _tag(block, bucket, slot, tag_of(hashed))
    if bucket != first:
        _displaced(block, first, hashed, 1)
    store64(block + ENTRIES, load64(block + ENTRIES) + 1)
    return ADDED


@entry
def store(block, value):  # type: ignore[no-untyped-def]
    """Let the key in the scratch memory have `value`: REPLACED, ADDED or NO_PLACE (and nothing changed)."""
    result = _store(block, load64(block + SCRATCH), value)
    seal(block)
    return result


@entry
def find(block):  # type: ignore[no-untyped-def]
    """The address of the value of the key in the scratch memory, 0 if it is not there."""
    base, words = load64(block + BASE), load64(block + WORDS)
    place = find_at(base, load64(block + BUCKETS), words, load64(block + SCRATCH))
    return base + 8 * (_entry(block, place >> 3, place & 7) + words) if place >= 0 else 0


@entry
def remove(block):  # type: ignore[no-untyped-def]
    """Remove the key in the scratch memory: 1, or 0 if it is not there."""
    base, buckets, words = load64(block + BASE), load64(block + BUCKETS), load64(block + WORDS)
    key = load64(block + SCRATCH)
    place = find_at(base, buckets, words, key)
    if place < 0:
        return 0
    _tag(block, place >> 3, place & 7, 0)
    hashed = hash_at(base, key, words)
    first = first_bucket(hashed, buckets)
    if place >> 3 != first:
        _displaced(block, first, hashed, -1)
    store64(block + ENTRIES, load64(block + ENTRIES) - 1)
    seal(block)
    return 1


@entry
def dump(block, out):  # type: ignore[no-untyped-def]
    """Write all entries, each a key and its value, one after another; return how many."""
    words, count = load64(block + WORDS) + 1, 0
    for bucket in range(load64(block + BUCKETS)):
        tags = get(block, _tags(block, bucket))
        for slot in range(SLOTS):
            if tags & shl64(0xFF, 8 * slot):
                for i in range(words):
                    store64(out + 8 * (count * words + i), get(block, _entry(block, bucket, slot) + i))
                count += 1
    return count


@entry
def fill(block, entries, count):  # type: ignore[no-untyped-def]
    """Store `count` entries laid out as `dump` writes them; return how many found a place."""
    words = load64(block + WORDS)
    for i in range(count):
        at = entries + 8 * (words + 1) * i
        if _store(block, at, load64(at + 8 * words)) == NO_PLACE:
            return i
        seal(block)
    return count
