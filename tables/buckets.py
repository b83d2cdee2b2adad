"""The layout of `libfp.tables.hash`, and how a key is found in it.

    secrets (8 words, a line)     what the hash adds to the words of a key
    span, edge (a line)           how many buckets there are: see below
    tags (a word each bucket)     of its seven entries; the highest byte: which of its keys are in their second
    entries                       seven each bucket: a key, its value, and maybe room to the next: see `entry_words`

A tag is 8 bits of the key's hash, 0 for an empty slot, so that one comparison of a word finds the candidates among
seven. A key is in one of two buckets, which two parts of its hash choose. Bit i of the highest byte of the first says
that keys of class i, of eight, had to go to their second; so nearly all searches for what is not there end after one
word of tags. Those of 4 M entries take 5 MB, so most lookups wait for one line of memory, an entry's, and
misses for none.

There is room for as many buckets as the full table needs, and it begins with few of them: that number, divided by a
power of two. A table that is full doubles them, bucket by bucket, from the last to the first. Bucket b becomes buckets
2 b and 2 b + 1 of twice as many, `span`; a key's number among those is a fraction of `span`, so half of that was its
number before. Numbers below `edge`, which is even, still stand for their halves. Bucket b goes to where none is any
more, so nothing is kept twice, and the numbers of all other keys stay what they are. (Linear hashing, Litwin, "Linear
hashing: a new tool for file and table addressing", VLDB 1980, with the order of Larson's "Dynamic hashing", 1978.)

Two choices of buckets with several slots: Dietzfelbinger and Weidling, "Balanced allocation and dictionaries with
tightly packed constant size bins" (ICALP 2005). The hash is NH (Black et al., "UMAC", CRYPTO 1999) of the halves of
each word plus a secret one, whose products vector instructions have, and then Murmur3's finalizer.
"""

from __future__ import annotations

from libfp.jit import ctz64, kernel, load64, mul64, shr64, without_lowest64

SLOTS = 7
SECRETS = 0  # byte offset of the secrets, one for each word of a key
SPAN, EDGE = 64, 72  # byte offsets of these words
TAGS = 128  # byte offset of the tags: a line

_ONES, _HIGHS = 0x0001010101010101, 0x0080808080808080
HALF = 0xFFFFFFFF
K, K2, K3 = 0x2D358DCCAA6C78A5, 0x4B33A62ED433D4A3, 0x6A5D39EAE12657AB


def table_size(buckets: int, words: int) -> int:
    """Bytes of a table of so many buckets for keys of so many words."""
    return first_entry(buckets) + buckets * SLOTS * 8 * entry_words(words)


def entry_words(words: int) -> int:
    """The words of an entry: the key's, its value, and what keeps it within a line if that is a third or less."""
    if words == 2:
        return 4
    return 8 if 5 <= words <= 7 else words + 1


def first_entry(buckets: int) -> int:
    """The byte offset of the entries: a line."""
    return TAGS + (8 * buckets + 63 & ~63)


# For compiled code: called from Python they would be compiled at every start.
entries_at, size_of = kernel(first_entry), kernel(entry_words)


@kernel
def product(word):  # type: ignore[no-untyped-def]
    """NH of one word, its secret added: (low + 2**32) * (high + 1) - 2**32, which is never 0 for many words."""
    return mul64(word & HALF, shr64(word, 32)) + word


@kernel
def scramble(total):  # type: ignore[no-untyped-def]
    """The hash of a key whose products add up to `total`."""
    mixed = mul64(total ^ shr64(total, 32), K)
    mixed = mul64(mixed ^ shr64(mixed, 32), K2)
    return mixed ^ shr64(mixed, 32)


@kernel
def hash_at(base, key, words):  # type: ignore[no-untyped-def]
    """The hash of the key in memory at address `key`."""
    total = 0
    for i in range(words):
        total += product(load64(key + 8 * i) + load64(base + SECRETS + 8 * i))
    return scramble(total)


@kernel
def tag_of(hashed):  # type: ignore[no-untyped-def]
    """The tag, 2 to 255: see `matching`."""
    return max(hashed & 0xFF, 2)


@kernel
def number_of(base, part):  # type: ignore[no-untyped-def]
    """The number of a bucket, `part` of its range being 2**64."""
    number = shr64(mul64(shr64(part, 32), load64(base + SPAN)), 32)
    return number if number >= load64(base + EDGE) else number >> 1


@kernel
def first_bucket(base, hashed):  # type: ignore[no-untyped-def]
    """The number of the bucket where a key belongs."""
    return number_of(base, hashed)


@kernel
def second_bucket(base, hashed):  # type: ignore[no-untyped-def]
    """The number of the bucket where a key goes when its first is full."""
    return number_of(base, mul64(hashed, K3))


@kernel
def matching(tags, tag):  # type: ignore[no-untyped-def]
    """Bit 7 of each byte of `tags` that may equal `tag`; the lowest does.

    Above one that does, the borrow also reports a byte that is ``tag ^ 1``. No tag is 1, so that is never an empty
    slot, which may hold a key that was removed.
    """
    different = tags ^ (tag * _ONES)
    return (different - _ONES) & ~different & _HIGHS


@kernel
def class_of(hashed):  # type: ignore[no-untyped-def]
    """Which of eight classes a key is of."""
    return shr64(hashed, 8) & 7


@kernel
def elsewhere(tags, hashed):  # type: ignore[no-untyped-def]
    """Whether keys of the same class are in their second bucket, `tags` being their first's."""
    return shr64(tags, 56 + class_of(hashed)) & 1


@kernel
def entry_of(base, buckets, words, bucket, slot):  # type: ignore[no-untyped-def]
    """The address of an entry."""
    return base + entries_at(buckets) + (SLOTS * bucket + slot) * 8 * size_of(words)


@kernel
def find_word(base, buckets, key):  # type: ignore[no-untyped-def]
    """The address of the entry of a key of one word, 0 if it is not there."""
    hashed = scramble(product(key + load64(base + SECRETS)))
    tag, bucket = tag_of(hashed), first_bucket(base, hashed)
    for _ in range(2):
        tags = load64(base + TAGS + 8 * bucket)
        found = matching(tags, tag)
        while found != 0:
            entry = entry_of(base, buckets, 1, bucket, ctz64(found) >> 3)
            if load64(entry) == key:
                return entry
            found = without_lowest64(found)
        if elsewhere(tags, hashed) == 0:
            return 0
        bucket = second_bucket(base, hashed)
    return 0


@kernel
def find_words(base, buckets, words, key):  # type: ignore[no-untyped-def]
    """The address of the entry of a key, a tuple of so many words, 0 if it is not there."""
    total = 0
    for i in range(words):
        total += product(key[i] + load64(base + SECRETS + 8 * i))
    hashed = scramble(total)
    tag, bucket = tag_of(hashed), first_bucket(base, hashed)
    for _ in range(2):
        tags = load64(base + TAGS + 8 * bucket)
        found = matching(tags, tag)
        while found != 0:
            entry = entry_of(base, buckets, words, bucket, ctz64(found) >> 3)
            different = 0
            for i in range(words):
                different |= load64(entry + 8 * i) ^ key[i]
            if different == 0:
                return entry
            found = without_lowest64(found)
        if elsewhere(tags, hashed) == 0:
            return 0
        bucket = second_bucket(base, hashed)
    return 0


@kernel
def slot_of(base, buckets, words, bucket, tag, key):  # type: ignore[no-untyped-def]
    """The slot, in a bucket, of the key in memory at address `key`; -1 if it is not there."""
    found = matching(load64(base + TAGS + 8 * bucket), tag)
    while found != 0:
        slot = ctz64(found) >> 3
        entry = entry_of(base, buckets, words, bucket, slot)
        different = 0
        for i in range(words):
            different |= load64(entry + 8 * i) ^ load64(key + 8 * i)
        if different == 0:
            return slot
        found = without_lowest64(found)
    return -1


@kernel
def find_at(base, buckets, words, key):  # type: ignore[no-untyped-def]
    """Where the key in memory at address `key` is: its bucket's number << 3 | its slot, -1 if it is not there."""
    hashed = hash_at(base, key, words)
    bucket = first_bucket(base, hashed)
    slot = slot_of(base, buckets, words, bucket, tag_of(hashed), key)
    if slot < 0 and elsewhere(load64(base + TAGS + 8 * bucket), hashed) != 0:
        bucket = second_bucket(base, hashed)
        slot = slot_of(base, buckets, words, bucket, tag_of(hashed), key)
    return bucket << 3 | slot if slot >= 0 else -1


@kernel
def value_at(base, buckets, words, key, default):  # type: ignore[no-untyped-def]
    """The value of the key in memory at address `key`, or `default`."""
    place = find_at(base, buckets, words, key)
    return load64(entry_of(base, buckets, words, place >> 3, place & 7) + 8 * words) if place >= 0 else default
