"""The layout of `libfp.tables.hash`, and how a key is found in it.

Two words of header (the seed), then buckets of 7 entries: a word of tags, then each entry's key and value. A tag is 8
bits of the key's hash, 0 for an empty slot, so that one comparison of a word finds the candidates among seven. A key
is in one of two buckets, which two parts of its hash choose; the highest byte of the tag word of the first says how
many of its keys had to go to their second, so that most searches for what is not there end after one cache line.

Two choices of buckets with several slots: Dietzfelbinger and Weidling, "Balanced allocation and dictionaries with
tightly packed constant size bins" (ICALP 2005).
"""

from __future__ import annotations

from libfp.jit import ctz64, kernel, load64, mul64, mulhi64, shr64

SLOTS = 7
FIRST = 64  # byte offset of the first bucket: a line
SEED = 0  # byte offset of the seed

_ONES, _HIGHS = 0x0001010101010101, 0x0080808080808080
_K, _K2 = 0x2D358DCCAA6C78A5, 0x4B33A62ED433D4A3


def bucket_size(words: int) -> int:
    """Bytes a bucket of keys of so many words: whole cache lines."""
    return (8 + SLOTS * 8 * (words + 1) + 63) & ~63


bucket_bytes = kernel(bucket_size)  # for compiled code: called from Python it would be compiled at every start


@kernel
def mix(hashed, key):  # type: ignore[no-untyped-def]
    """Take another word into a hash."""
    mixed = mul64(hashed ^ key, _K) ^ mulhi64(hashed ^ key, _K)
    return mixed ^ shr64(mixed, 32)


@kernel
def hash_at(seed, key, words):  # type: ignore[no-untyped-def]
    """The hash of the key in memory at address `key`."""
    hashed = seed
    for i in range(words):
        hashed = mix(hashed, load64(key + 8 * i))
    return hashed


@kernel
def tag_of(hashed):  # type: ignore[no-untyped-def]
    """The tag, 2 to 255: see `matching`."""
    return max(hashed & 0xFF, 2)


@kernel
def first_bucket(hashed, buckets):  # type: ignore[no-untyped-def]
    """The number of the bucket where a key belongs."""
    return mulhi64(hashed, buckets)


@kernel
def second_bucket(hashed, buckets):  # type: ignore[no-untyped-def]
    """The number of the bucket where a key goes when its first is full."""
    return mulhi64(mul64(hashed, _K2), buckets)


@kernel
def matching(tags, tag):  # type: ignore[no-untyped-def]
    """Bit 7 of each byte of `tags` that may equal `tag`; the lowest does.

    Above one that does, the borrow also reports a byte that is ``tag ^ 1``. No tag is 1, so that is never an empty
    slot, which may hold a key that was removed.
    """
    different = tags ^ (tag * _ONES)
    return (different - _ONES) & ~different & _HIGHS


@kernel
def overflow(tags):  # type: ignore[no-untyped-def]
    """How many keys that belong in the bucket are in their second one; 255: many."""
    return shr64(tags, 56)


@kernel
def find_word(base, buckets, key):  # type: ignore[no-untyped-def]
    """The address of the entry of a key of one word, 0 if it is not there."""
    hashed = mix(load64(base + SEED), key)
    tag = tag_of(hashed)
    bucket = base + FIRST + first_bucket(hashed, buckets) * 128
    for _ in range(2):
        tags = load64(bucket)
        found = matching(tags, tag)
        while found != 0:
            entry = bucket + 8 + (ctz64(found) >> 3) * 16
            if load64(entry) == key:
                return entry
            found &= found - 1
        if overflow(tags) == 0:
            return 0
        bucket = base + FIRST + second_bucket(hashed, buckets) * 128
    return 0


@kernel
def find_words(base, buckets, words, key):  # type: ignore[no-untyped-def]
    """The address of the entry of a key, a tuple of so many words, 0 if it is not there."""
    hashed = load64(base + SEED)
    for i in range(words):
        hashed = mix(hashed, key[i])
    tag, size = tag_of(hashed), bucket_bytes(words)
    bucket = base + FIRST + first_bucket(hashed, buckets) * size
    for _ in range(2):
        tags = load64(bucket)
        found = matching(tags, tag)
        while found != 0:
            entry = bucket + 8 + (ctz64(found) >> 3) * 8 * (words + 1)
            different = 0
            for i in range(words):
                different |= load64(entry + 8 * i) ^ key[i]
            if different == 0:
                return entry
            found &= found - 1
        if overflow(tags) == 0:
            return 0
        bucket = base + FIRST + second_bucket(hashed, buckets) * size
    return 0


@kernel
def find_at(base, buckets, words, key):  # type: ignore[no-untyped-def]
    """The same for the key in memory at address `key`: its bucket's number << 3 | its slot, -1 if it is not there."""
    hashed = hash_at(load64(base + SEED), key, words)
    tag, size = tag_of(hashed), bucket_bytes(words)
    for choice in range(2):
        number = second_bucket(hashed, buckets) if choice else first_bucket(hashed, buckets)
        bucket = base + FIRST + number * size
        found = matching(load64(bucket), tag)
        while found != 0:
            slot = ctz64(found) >> 3
            different = 0
            for i in range(words):
                different |= load64(bucket + 8 + slot * 8 * (words + 1) + 8 * i) ^ load64(key + 8 * i)
            if different == 0:
                return number << 3 | slot
            found &= found - 1
    return -1
