"""One slot (a /19) of the lookup structure of `libfp.tables.lpm4`, made from the routes: compiled, control plane only.

Every step leaves the table right: a new block is written first, then the slot's word is turned to it. Where the block
keeps its shape (another next hop for the same prefixes), only the words that differ are stored, in place.
"""

from __future__ import annotations

from libfp.jit import kernel, load32, load64, popcount64, shl64, shr64, store32, store64
from libfp.tables import rib
from libfp.tables.words import BASE, TABLE, allocate, fit, free, get, put

SLOT_BITS = 19  # the first step: 2**19 slots, each for a /19
MIDDLE_BITS = 5  # the second: up to 32 leaves a slot, for /24s
DEEP_BITS = 8  # the third, where there are prefixes longer than /24
#: Offsets in the arena, in words: the default route's value, the slots, the blocks.
DEFAULT, SLOTS, BLOCKS = 0, 8, 8 + (1 << SLOT_BITS)
#: Field in the control block: scratch memory, `SCRATCH_BYTES` of it.
SCRATCH = TABLE + 128
STACK, _MIDDLE, _DEEP = 0, 4096, 6144  # byte offsets in the scratch memory
_SHAPE, _LEAVES, _LEFT = 8192, 8256, 9216
SCRATCH_BYTES = 12288

# A slot is (where its leaves are, 1 if some of them are blocks, bitmap) in 31, 1 and 32 bits.
WHERE, DEEPER, BITMAP = 33, 1 << 32, (1 << 32) - 1


@kernel
def _expand(block, node, value, bits, out):  # type: ignore[no-untyped-def]
    """Write what each of the 2**`bits` prefixes below `node` leads to: pairs of (node there or 0, value), 32 bits each.

    `value` is what holds where no route below `node` says otherwise.
    """
    store64(out, value << 32 | node)
    for level in range(bits):
        for i in range((1 << level) - 1, -1, -1):
            above = load64(out + 8 * i)
            for side in range(2):
                here, inherited = above & 0xFFFFFFFF, (above >> 32) & 0xFFFFFFFF
                if here:
                    here = rib.child(block, here, 1 - side)
                    if here and rib.value_of(block, here):
                        inherited = rib.value_of(block, here)
                store64(out + 8 * (2 * i + 1 - side), inherited << 32 | here)


@kernel
def _shape(block, pairs, bits, leaves, bitmap):  # type: ignore[no-untyped-def]
    """Turn `_expand`'s pairs into runs: bit i of `bitmap` where entry i begins a run, its value to `leaves` (u32).

    An entry whose node is not 0 stands alone. Returns the number of leaves.
    """
    count, last, alone = 0, 0, True
    for i in range(1 << bits):
        pair = load64(pairs + 8 * i)
        value, deep = (pair >> 32) & 0xFFFFFFFF, (pair & 0xFFFFFFFF) != 0
        if i & 63 == 0:
            store64(bitmap + 8 * (i >> 6), 0)
        if alone or deep or value != last:
            at = bitmap + 8 * (i >> 6)
            store64(at, load64(at) | shl64(1, i))
            store32(leaves + 4 * count, value)
            count += 1
        last, alone = value, deep
    if count & 1:
        store32(leaves + 4 * count, 0)
    return count


@kernel
def _put_leaves(block, offset, leaves, count):  # type: ignore[no-untyped-def]
    """Store `count` leaves from scratch at `offset`, two a word: only the words that differ."""
    for i in range((count + 1) >> 1):
        word = load64(leaves + 8 * i)
        if get(block, offset + i) != word:
            put(block, offset + i, word)


@kernel
def _deep_leaves(block, offset):  # type: ignore[no-untyped-def]
    """How many leaves the deep block at `offset` has."""
    count = 0
    for i in range(4):
        count += popcount64(get(block, offset + i))
    return count


@kernel
def _deep(block, node, value, old):  # type: ignore[no-untyped-def]
    """A deep block for the prefixes below the /24 `node`: its offset, `old` if changed in place, 0 if out of room.

    Four words of bitmap, then the leaves.
    """
    scratch = load64(block + SCRATCH)
    pairs, bitmap, leaves = scratch + _DEEP, scratch + _SHAPE, scratch + _DEEP
    _expand(block, node, value, DEEP_BITS, pairs)
    for i in range(1 << DEEP_BITS):  # nothing lies below a /32
        store64(pairs + 8 * i, (load64(pairs + 8 * i) >> 32) << 32)
    count = _shape(block, pairs, DEEP_BITS, leaves, bitmap)  # leaves overwrite pairs already read
    same = old != 0
    for i in range(4):
        if same and get(block, old + i) != load64(bitmap + 8 * i):
            same = False
    fit(block, 4 + ((count + 1) >> 1))
    if same:
        _put_leaves(block, old + 4, leaves, count)
        return old
    offset = allocate(block, 4 + ((count + 1) >> 1))
    if offset:
        for i in range(4):
            put(block, offset + i, load64(bitmap + 8 * i))
        for i in range((count + 1) >> 1):
            put(block, offset + 4 + i, load64(leaves + 8 * i))
    return offset


@kernel
def _old_deep(block, slot, i):  # type: ignore[no-untyped-def]
    """The deep block that the `i`-th /24 of a slot has now, or 0."""
    word = get(block, SLOTS + slot)
    where = shr64(word, WHERE)
    if word & DEEPER == 0 or shr64(get(block, (where - 1) >> 1), i) & 1 == 0:
        return 0
    return load32(load64(block + BASE) + 4 * (where + popcount64(shl64(word, 63 - i))))


@kernel
def _free_slot(block, word):  # type: ignore[no-untyped-def]
    """Free the block of a slot that was `word`; deep blocks apart."""
    deeper = 1 if word & DEEPER else 0
    offset = ((shr64(word, WHERE) + 1) >> 1) - deeper
    free(block, offset, deeper + ((popcount64(word & BITMAP) + 1) >> 1))


@kernel
def _free_deep(block, offset):  # type: ignore[no-untyped-def]
    free(block, offset, 4 + ((_deep_leaves(block, offset) + 1) >> 1))


@kernel
def uniform(block, slot, cell):  # type: ignore[no-untyped-def]
    """Let a whole slot lead to `cell` (0: no route but the default)."""
    word, turned = get(block, SLOTS + slot), shl64(2 * cell, WHERE)
    if word == turned:
        return
    left = load64(block + SCRATCH) + _LEFT
    for i in range(1 << MIDDLE_BITS):
        store32(left + 4 * i, _old_deep(block, slot, i) if word & DEEPER else 0)
    fit(block, 1)
    put(block, SLOTS + slot, turned)
    if word & BITMAP:
        _free_slot(block, word)
        for i in range(1 << MIDDLE_BITS):
            if load32(left + 4 * i):
                _free_deep(block, load32(left + 4 * i))


@kernel
def build(block, slot, node, value, first, last):  # type: ignore[no-untyped-def]
    """Make the slot say what is below `node` (at depth 19); `value` holds where no route below does.

    Only the /24s `first` to `last` have changed below /24. Returns 0 if out of room: the slot is as it was, or
    partly new in the deep blocks changed in place.
    """
    scratch = load64(block + SCRATCH)
    pairs, leaves, left, bitmap = scratch + _MIDDLE, scratch + _LEAVES, scratch + _LEFT, scratch + _SHAPE
    _expand(block, node, value, MIDDLE_BITS, pairs)
    marks = 0
    for i in range(1 << MIDDLE_BITS):
        pair = load64(pairs + 8 * i)
        here = pair & 0xFFFFFFFF
        old = _old_deep(block, slot, i)
        store32(left + 4 * i, old)
        if here == 0 or rib.is_leaf(block, here):
            store64(pairs + 8 * i, (pair >> 32) << 32)
            continue
        deep = old
        if old == 0 or first <= i <= last:
            deep = _deep(block, here, (pair >> 32) & 0xFFFFFFFF, old)
            if deep == 0:
                return 0
        if deep == old:
            store32(left + 4 * i, 0)
        marks |= shl64(1, i)
        store64(pairs + 8 * i, deep << 32 | 1)
    count = _shape(block, pairs, MIDDLE_BITS, leaves, bitmap)
    begins, deeper = load64(bitmap), 1 if marks != 0 else 0
    size, word = deeper + ((count + 1) >> 1), get(block, SLOTS + slot)
    offset = (shr64(word, WHERE) + 1) >> 1
    fit(block, size + 1)
    same = word & (DEEPER | BITMAP) == (shl64(deeper, 32) | begins)
    if same and (not deeper or get(block, offset - 1) == marks):
        _put_leaves(block, offset, leaves, count)
    else:
        offset = allocate(block, size)
        if offset == 0:
            return 0
        if deeper:
            put(block, offset, marks)
        for i in range((count + 1) >> 1):
            put(block, offset + deeper + i, load64(leaves + 8 * i))
        put(block, SLOTS + slot, shl64(2 * (offset + deeper) - 1, WHERE) | shl64(deeper, 32) | begins)
        if word & BITMAP:
            _free_slot(block, word)
    for i in range(1 << MIDDLE_BITS):
        if load32(left + 4 * i):
            _free_deep(block, load32(left + 4 * i))
    return 1
