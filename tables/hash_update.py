"""Changes to `libfp.tables.hash`: compiled, control plane only. Each is one transaction.

Where both buckets of a new key are full, a chain of keys moves, each to its other bucket; found breadth first, so
that it is short. Keys that are in their second bucket are linked from their first, which takes them back when there
is room.
"""

from __future__ import annotations

from libfp.jit import ctz64, entry, kernel, load32, load64, shl64, store32, store64
from libfp.tables.buckets import (
    EDGE,
    SLOTS,
    SPAN,
    TAGS,
    class_of,
    elsewhere,
    entries_at,
    find_at,
    first_bucket,
    hash_at,
    matching,
    second_bucket,
    size_of,
    tag_of,
)
from libfp.tables.words import BASE, TABLE, get, put, seal

#: Fields in the control block: the most buckets, words a key, entries, the address of scratch memory, and that of the
#: links: eight of four bytes a bucket. Link 7 of a bucket leads to the first of its keys that are in their second, link
#: i of that key's bucket, i being its slot, to the next: (bucket << 3 | slot) + 1, or 0.
BUCKETS, WORDS, ENTRIES, SCRATCH, LINKS = TABLE, TABLE + 8, TABLE + 16, TABLE + 24, TABLE + 32
LINK_BYTES = 32
# The scratch memory: a key, the entries of a bucket, then the search's queue of (bucket, where its room would be used).
_ASIDE, _QUEUE, _QUEUE_SIZE = 64, 1024, 1000
SCRATCH_BYTES = _QUEUE + 16 * _QUEUE_SIZE
#: Results of `store`.
REPLACED, ADDED, NO_PLACE = 0, 1, 2
_SPLITS = 2  # buckets split with each new entry, while the table grows


@kernel
def _tags(block, bucket):  # type: ignore[no-untyped-def]
    """The word offset of a bucket's tags."""
    return (TAGS >> 3) + bucket


@kernel
def _entry(block, bucket, slot):  # type: ignore[no-untyped-def]
    """The word offset of an entry."""
    return (entries_at(load64(block + BUCKETS)) >> 3) + (SLOTS * bucket + slot) * size_of(load64(block + WORDS))


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
def _hash_of(block, place):  # type: ignore[no-untyped-def]
    base = load64(block + BASE)
    return hash_at(base, base + 8 * _entry(block, place >> 3, place & 7), load64(block + WORDS))


@kernel
def _link(block, home, place):  # type: ignore[no-untyped-def]
    links = load64(block + LINKS)
    store32(links + 4 * place, load32(links + 4 * (home << 3 | 7)))
    store32(links + 4 * (home << 3 | 7), place + 1)


@kernel
def _unlink(block, home, place):  # type: ignore[no-untyped-def]
    links = load64(block + LINKS)
    at = home << 3 | 7
    while load32(links + 4 * at) != place + 1:
        at = load32(links + 4 * at) - 1
    store32(links + 4 * at, load32(links + 4 * place))


@kernel
def _leave(block, home, hashed, place):  # type: ignore[no-untyped-def]
    """The key of this hash, whose first bucket is `home`, is in its second, at `place`."""
    _link(block, home, place)
    tags = _tags(block, home)
    if elsewhere(get(block, tags), hashed) == 0:
        put(block, tags, get(block, tags) | shl64(1, 56 + class_of(hashed)))


@kernel
def _return(block, home, hashed, place):  # type: ignore[no-untyped-def]
    """It no longer is."""
    _unlink(block, home, place)
    links = load64(block + LINKS)
    link = load32(links + 4 * (home << 3 | 7))
    while link != 0:
        if class_of(_hash_of(block, link - 1)) == class_of(hashed):
            return
        link = load32(links + 4 * (link - 1))
    tags = _tags(block, home)
    put(block, tags, get(block, tags) & ~shl64(1, 56 + class_of(hashed)))


@kernel
def _copy(block, bucket, slot, entry):  # type: ignore[no-untyped-def]
    """Store the entry at address `entry` in a slot."""
    target = _entry(block, bucket, slot)
    for i in range(load64(block + WORDS) + 1):
        put(block, target + i, load64(entry + 8 * i))


@kernel
def _move(block, bucket, slot, to, free):  # type: ignore[no-untyped-def]
    """Move an entry to slot `free` of its other bucket, `to`."""
    base, hashed = load64(block + BASE), _hash_of(block, bucket << 3 | slot)
    home = first_bucket(base, hashed)
    if home == to:
        _return(block, home, hashed, bucket << 3 | slot)
    _copy(block, to, free, base + 8 * _entry(block, bucket, slot))
    _tag(block, to, free, tag_of(hashed))
    _tag(block, bucket, slot, 0)
    if home != to:
        _leave(block, home, hashed, to << 3 | free)


@kernel
def _other(block, bucket, slot):  # type: ignore[no-untyped-def]
    """The other bucket of an entry."""
    base, hashed = load64(block + BASE), _hash_of(block, bucket << 3 | slot)
    first = first_bucket(base, hashed)
    return second_bucket(base, hashed) if bucket == first else first


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
def _place(block, bucket, slot, key, value, tag):  # type: ignore[no-untyped-def]
    words = load64(block + WORDS)
    for i in range(words):
        put(block, _entry(block, bucket, slot) + i, load64(key + 8 * i))
    put(block, _entry(block, bucket, slot) + words, value)
    _tag(block, bucket, slot, tag)
    store64(block + ENTRIES, load64(block + ENTRIES) + 1)


@kernel
def _store(block, key, value):  # type: ignore[no-untyped-def]
    base, words = load64(block + BASE), load64(block + WORDS)
    place = find_at(base, load64(block + BUCKETS), words, key)
    if place >= 0:
        put(block, _entry(block, place >> 3, place & 7) + words, value)
        return REPLACED
    hashed = hash_at(base, key, words)
    first, second = first_bucket(base, hashed), second_bucket(base, hashed)
    bucket, slot = first, _vacant(block, first)
    if slot == SLOTS:
        bucket, slot = second, _vacant(block, second)
    if slot == SLOTS:
        place = _make_room(block, first, second)
        if place < 0:
            return NO_PLACE
        bucket, slot = place >> 3, place & 7
    _place(block, bucket, slot, key, value, tag_of(hashed))
    if bucket != first:
        _leave(block, first, hashed, bucket << 3 | slot)
    return ADDED


@kernel
def _mark(block, bucket, bits):  # type: ignore[no-untyped-def]
    """Add to a bucket's tags in the master; `_split` logs them when they are complete."""
    at = load64(block + BASE) + 8 * _tags(block, bucket)
    store64(at, load64(at) | bits)


@kernel
def _split(block):  # type: ignore[no-untyped-def]
    """Split the last bucket that is not yet: its entries, and those of its keys that were in their second bucket.

    Two buckets have room for the first; for the others, most often. Fewer than 200 words, whatever the keys.
    """
    base, words, aside = load64(block + BASE), load64(block + WORDS), load64(block + SCRATCH) + _ASIDE
    bucket, size = (load64(base + EDGE) >> 1) - 1, 8 * (words + 1)
    tags, away = get(block, _tags(block, bucket)), load32(load64(block + LINKS) + 4 * (bucket << 3 | 7))
    for slot in range(SLOTS):  # bucket 0 becomes itself and 1, so all is set aside
        if tags & shl64(0xFF, 8 * slot):
            home = first_bucket(base, _hash_of(block, bucket << 3 | slot))
            if home != bucket:
                _unlink(block, home, bucket << 3 | slot)
            for i in range(words + 1):
                store64(aside + size * slot + 8 * i, get(block, _entry(block, bucket, slot) + i))
    put(block, EDGE >> 3, 2 * bucket)
    for child in range(2 * bucket, 2 * bucket + 2):
        store64(base + 8 * _tags(block, child), 0)
        store32(load64(block + LINKS) + 4 * (child << 3 | 7), 0)
    for slot in range(SLOTS):
        if tags & shl64(0xFF, 8 * slot):
            hashed = hash_at(base, aside + size * slot, words)
            home = first_bucket(base, hashed)
            child = home if home >> 1 == bucket else second_bucket(base, hashed)
            free = _vacant(block, child)
            _copy(block, child, free, aside + size * slot)
            _mark(block, child, shl64(tag_of(hashed), 8 * free))
            if child != home:
                _link(block, home, child << 3 | free)
    while away != 0:
        place = away - 1
        away = load32(load64(block + LINKS) + 4 * place)
        hashed = _hash_of(block, place)
        child = first_bucket(base, hashed)
        free = _vacant(block, child)
        if free < SLOTS:
            _copy(block, child, free, base + 8 * _entry(block, place >> 3, place & 7))
            _mark(block, child, shl64(tag_of(hashed), 8 * free))
            _tag(block, place >> 3, place & 7, 0)
        else:
            _link(block, child, place)
            _mark(block, child, shl64(1, 56 + class_of(hashed)))
    for child in range(2 * bucket, 2 * bucket + 2):
        put(block, _tags(block, child), get(block, _tags(block, child)))


@kernel
def _grow(block, steps):  # type: ignore[no-untyped-def]
    """So many buckets more, unless the table has all it may have. Returns how many."""
    base = load64(block + BASE)
    for step in range(steps):
        if load64(base + EDGE) == 0:
            span = load64(base + SPAN)
            if span == load64(block + BUCKETS):
                return step
            put(block, SPAN >> 3, 2 * span)
            put(block, EDGE >> 3, 2 * span)
        _split(block)
        seal(block)
    return steps


@entry
def store(block, value):  # type: ignore[no-untyped-def]
    """Let the key in the scratch memory have `value`: REPLACED, ADDED or NO_PLACE (and no entry has changed).

    A table that is full begins to grow, and goes on with each new entry. Where there is no place, it grows until there
    is: NO_PLACE says that it has all the buckets it may have.
    """
    result = _store(block, load64(block + SCRATCH), value)
    while result == NO_PLACE and _grow(block, _SPLITS) > 0:
        result = _store(block, load64(block + SCRATCH), value)
    seal(block)
    base = load64(block + BASE)
    if result == ADDED and (load64(base + EDGE) > 0 or 10 * load64(block + ENTRIES) > 63 * load64(base + SPAN)):
        _grow(block, _SPLITS)
    return result


@entry
def find(block):  # type: ignore[no-untyped-def]
    """The address of the value of the key in the scratch memory, 0 if it is not there."""
    base, words = load64(block + BASE), load64(block + WORDS)
    place = find_at(base, load64(block + BUCKETS), words, load64(block + SCRATCH))
    return base + 8 * (_entry(block, place >> 3, place & 7) + words) if place >= 0 else 0


@entry
def remove(block):  # type: ignore[no-untyped-def]
    """Remove the key in the scratch memory: 1, or 0 if it is not there. One that had no place there comes home."""
    base, words, key = load64(block + BASE), load64(block + WORDS), load64(block + SCRATCH)
    place = find_at(base, load64(block + BUCKETS), words, key)
    if place < 0:
        return 0
    bucket, slot = place >> 3, place & 7
    hashed = hash_at(base, key, words)
    first = first_bucket(base, hashed)
    if bucket != first:
        _return(block, first, hashed, place)
    _tag(block, bucket, slot, 0)
    store64(block + ENTRIES, load64(block + ENTRIES) - 1)
    away = load32(load64(block + LINKS) + 4 * (bucket << 3 | 7)) - 1
    if away >= 0:
        _move(block, away >> 3, away & 7, bucket, slot)
    seal(block)
    return 1


@entry
def dump(block, out):  # type: ignore[no-untyped-def]
    """Write all entries, each a key and its value, one after another; return how many."""
    base, words, count = load64(block + BASE), load64(block + WORDS) + 1, 0
    for bucket in range(load64(base + SPAN)):
        if load64(base + EDGE) >> 1 <= bucket < load64(base + EDGE):
            continue  # where there was one
        tags = get(block, _tags(block, bucket))
        for slot in range(SLOTS):
            if tags & shl64(0xFF, 8 * slot):
                for i in range(words):
                    store64(out + 8 * (count * words + i), get(block, _entry(block, bucket, slot) + i))
                count += 1
    return count


@entry
def fill(block, entries, count):  # type: ignore[no-untyped-def]
    """Store `count` entries of different keys, laid out as `dump` writes them; return how many found a place.

    First all for which there is room in their first bucket: so the fewest are in their second. The entries' memory
    is used to keep the others.
    """
    base, words, left = load64(block + BASE), load64(block + WORDS), 0
    size = 8 * (words + 1)
    for i in range(count):
        at = entries + size * i
        hashed = hash_at(base, at, words)
        bucket = first_bucket(base, hashed)
        slot = _vacant(block, bucket)
        if slot < SLOTS:
            _place(block, bucket, slot, at, load64(at + 8 * words), tag_of(hashed))
            seal(block)
        else:
            for j in range(words + 1):
                store64(entries + size * left + 8 * j, load64(at + 8 * j))
            left += 1
    for i in range(left):
        at = entries + size * i
        if _store(block, at, load64(at + 8 * words)) == NO_PLACE:
            return count - left + i
        seal(block)
    return count
