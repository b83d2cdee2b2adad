"""How a flow is found, and which one makes room for a new one: part of `libfp.tables.flow`.

A flow may be in any slot of two buckets, of which the emptier is chosen when it comes (Azar et al., "Balanced
allocations", STOC 1994), and stays there: an address of a record is good for as long as its flow lives. With 8 slots a
bucket, 2 of 10,000 flows find both buckets full when the table is 0.8 full (counted), none much below; then the least
worthy of those 16 makes room: one that has expired, else of those that are not assured the one with the nearest
deadline. Where all 16 are assured, the new one is refused. So nobody who sends packets without an answer can push out
an assured flow, nor, since the hash has secrets, aim at a bucket: as Linux's early_drop, but without a search.
"""

from __future__ import annotations

from libfp.jit import (
    ctz64,
    inline,
    kernel,
    load32,
    load64,
    mul64,
    mulhi64,
    popcount64,
    prefetch,
    shl64,
    shr64,
    store_release32,
    store_release64,
    u32,
    without_lowest64,
)
from libfp.tables.buckets import K3, product, scramble, tag_of
from libfp.tables.flow_record import (
    ASSURED,
    BUCKETS,
    COUNT,
    CREATED,
    CREATED_AT,
    DEADLINE,
    EVICTED,
    EXPIRED,
    FLAGS,
    FOUND,
    HIGH_BEGAN,
    LINKED,
    META,
    NEW,
    NOBODY,
    NOW,
    REFUSED,
    REPLY,
    SECRETS,
    TAGS,
    TIMEOUTS,
    VALUES,
    FlowEntry,
    count,
    expired,
    forget,
    record_of,
    set_deadline,
    set_tag,
)
from libfp.tables.flow_wheel import enlist

SLOTS = 8  # a bucket

_ONES, _HIGHS, _LOWS = 0x0101010101010101, ~0x7F7F7F7F7F7F7F7F, 0x7F7F7F7F7F7F7F7F
_LIVE = 1 << 31  # ticks left of a flow that lives are less


@inline
@kernel
def entry_of(table, number, swapped, bits):  # type: ignore[no-untyped-def]
    """The entry of the flow in slot `number`, -1: none, for a packet whose endpoints were `swapped` to make its key."""
    if number < 0:
        return FlowEntry(table + NOBODY, table, 0)
    at = record_of(table, number)
    reply = swapped ^ (load32(at + FLAGS) & HIGH_BEGAN != 0)
    return FlowEntry(at, table, bits | FOUND | REPLY * reply)


@inline
@kernel
def hash_of(table, words, key):  # type: ignore[no-untyped-def]
    """The hash of the key at address `key`: that of `libfp.tables.buckets`."""
    total = 0
    for i in range(words):
        total += product(load64(key + 8 * i) + load64(table + SECRETS + 8 * i))
    return scramble(total)


@kernel
def first_bucket(hashed, buckets):  # type: ignore[no-untyped-def]
    """The first bucket of a key."""
    return shr64(mul64(shr64(hashed, 32), buckets), 32)


@kernel
def other_bucket(hashed, first, buckets):  # type: ignore[no-untyped-def]
    """The second bucket of a key, never its first."""
    second = mulhi64(mul64(hashed, K3), buckets)
    if second != first:
        return second
    return first + 1 if first + 1 < buckets else 0


@kernel
def tags_of(table, bucket):  # type: ignore[no-untyped-def]
    """The eight tags of a bucket."""
    return load64(table + TAGS + 8 * bucket)


@kernel
def candidates(tags, tag):  # type: ignore[no-untyped-def]
    """Bit 7 of each byte of `tags` that may equal `tag` (`matching` of `libfp.tables.buckets`, for eight slots)."""
    different = tags ^ mul64(tag, _ONES)
    return (different - _ONES) & ~different & _HIGHS


@kernel
def vacant(tags):  # type: ignore[no-untyped-def]
    """Bit 7 of each byte of `tags` that is 0, and of no other."""
    return shl64(~(((tags & _LOWS) + _LOWS) | tags | _LOWS), 0)  # by 0: that makes it 64 bits when interpreted


@inline
@kernel
def is_key(table, words, number, key):  # type: ignore[no-untyped-def]
    """Whether the record of a slot has this key."""
    at = record_of(table, number) - 8 * words
    different = 0
    for i in range(words):
        different |= load64(at + 8 * i) ^ load64(key + 8 * i)
    return different == 0


@kernel
def search(table, words, key, hashed):  # type: ignore[no-untyped-def]
    """The number of the slot of the flow whose key is at address `key`, expired or not; -1 if it is not there."""
    buckets, tag = load64(table + BUCKETS), tag_of(hashed)
    first = first_bucket(hashed, buckets)
    bucket = first
    for _ in range(2):
        found = candidates(tags_of(table, bucket), tag)
        while found != 0:
            number = bucket << 3 | ctz64(found) >> 3
            if is_key(table, words, number, key):
                return number
            found = without_lowest64(found)
        bucket = other_bucket(hashed, first, buckets)
    return -1


@inline
@kernel
def is_there(table, words, number, key):  # type: ignore[no-untyped-def]
    """Whether the flow of this key lives in that slot."""
    return expired(table, record_of(table, number)) == 0 and is_key(table, words, number, key)


@kernel
def find(table, words, key, hashed):  # type: ignore[no-untyped-def]
    """The number of the slot of a flow that lives; -1 if there is none of that key."""
    number = search(table, words, key, hashed)
    return number if number >= 0 and expired(table, record_of(table, number)) == 0 else -1


@kernel
def enter(table, words, key, hashed, swapped):  # type: ignore[no-untyped-def]
    """The entry of the flow of a key; made if it is not there, and not `found` if it was refused."""
    number = search(table, words, key, hashed)
    if number >= 0:
        if expired(table, record_of(table, number)) == 0:
            return entry_of(table, number, swapped, 0)
        forget(table, number, EXPIRED)
    return entry_of(table, make(table, words, key, hashed, swapped), swapped, NEW)


@kernel
def room_in(table, first, second):  # type: ignore[no-untyped-def]
    """The slot for a new flow: an empty one of the emptier of two buckets; -1 if both are full."""
    one, two = vacant(tags_of(table, first)), vacant(tags_of(table, second))
    if one | two == 0:
        return -1
    more = popcount64(two) > popcount64(one)
    return (second if more else first) << 3 | ctz64(two if more else one) >> 3


@kernel
def make(table, words, key, hashed, swapped):  # type: ignore[no-untyped-def]
    """Make a flow of a key that is not there; the slot's number, -1: refused.

    Its state is 0, with that state's timeout, its values 0.
    """
    buckets = load64(table + BUCKETS)
    first = first_bucket(hashed, buckets)
    second = other_bucket(hashed, first, buckets)
    number = room_in(table, first, second)
    if number < 0:
        number = least_worthy(table, first, second)
        if number < 0:
            count(table, REFUSED, 1)
            return -1
        forget(table, number, EXPIRED if expired(table, record_of(table, number)) else EVICTED)
    at = record_of(table, number)
    for i in range(words):  # all of it after the tag has gone
        store_release64(at - 8 * words + 8 * i, load64(key + 8 * i))
    for i in range(load64(table + VALUES)):
        store_release64(at + META + 8 * i, 0)
    linked = load32(at + FLAGS) & LINKED
    store_release32(at + FLAGS, LINKED | HIGH_BEGAN * swapped)
    store_release32(at + CREATED_AT, load64(table + NOW))
    set_deadline(table, at, load64(table + TIMEOUTS))
    if linked == 0:
        enlist(table, number, at)
    set_tag(table, number, tag_of(hashed))
    count(table, COUNT, 1)
    count(table, CREATED, 1)
    return number


@kernel
def least_worthy(table, first, second):  # type: ignore[no-untyped-def]
    """Of the slots of two full buckets the one whose flow makes room; -1 if all are assured and live."""
    for i in range(SLOTS):
        prefetch(record_of(table, first << 3 | i))
        prefetch(record_of(table, second << 3 | i))
    now, best, least = load64(table + NOW), -1, _LIVE
    for i in range(2 * SLOTS):
        number = (first if i < SLOTS else second) << 3 | i & 7
        at = record_of(table, number)
        left = u32(load32(at + DEADLINE) - now - 1)
        if left >= _LIVE:
            return number
        if load32(at + FLAGS) & ASSURED == 0 and left < least:
            best, least = number, left
    return best
