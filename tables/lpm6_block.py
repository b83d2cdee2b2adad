"""The blocks of the lookup structure of `libfp.tables.lpm6`, made from the routes: compiled, control plane only.

Every step leaves the table right: a new block is written first, then the one word that leads to it is turned. Where a
block keeps its shape (another next hop for the same prefixes), only the words that differ are stored, in place.
"""

from __future__ import annotations

from libfp.jit import kernel, load32, load64, popcount64, shl64, shr64, store32, store64
from libfp.tables import rib
from libfp.tables.words import BASE, TABLE, allocate, fit, free, get, put

ROOT_BITS = 24  # the first step: 2**24 entries, each for a /24
STEP = 6  # every further one: up to 64 entries
#: Offsets in the arena, in words: the default route's value, the roots (two entries a word), the blocks.
DEFAULT, ROOTS, BLOCKS = 0, 8, 8 + (1 << (ROOT_BITS - 1))
#: An entry below CHILD is a value; from there on it leads to the block at that offset; from FAR on to a value's word.
CHILD, FAR, OFFSET = 1 << 31, 3 << 30, (1 << 30) - 1
#: Field in the control block: scratch memory, `SCRATCH_BYTES` of it: a frame for each step below the root.
SCRATCH = TABLE + 128
_OLD, _NEXT, _PATH, _FRAME = 512, 520, 528, 576
SCRATCH_BYTES = _FRAME * -(-(rib.BITS - ROOT_BITS) // STEP)

# A frame's pairs are (entry, 1 if the change reaches it, node there or 0) in 32, 1 and 31 bits.
_REACHED, _NODE = 1 << 31, (1 << 31) - 1


@kernel
def six(high, low, depth):  # type: ignore[no-untyped-def]
    """The six bits of an address from bit `depth` on, zeros where it ends."""
    if depth <= 58:
        return shr64(high, 58 - depth) & 63
    if depth < 64:
        return (shl64(high, depth - 58) | shr64(low, 122 - depth)) & 63
    if depth <= 122:
        return shr64(low, 122 - depth) & 63
    return shl64(low, depth - 122) & 63


@kernel
def is_child(entry):  # type: ignore[no-untyped-def]
    """Whether the entry leads to a block."""
    return entry >> 30 == 2


@kernel
def entry_of(block, node):  # type: ignore[no-untyped-def]
    """The entry for the route that ends at `node`."""
    value = rib.value_of(block, node)
    return FAR | rib.cell_of(block, node) if value >= CHILD else value


@kernel
def _entry_at(block, entry, i):  # type: ignore[no-untyped-def]
    """The `i`-th entry of the block that `entry` leads to; 0 if it leads to none."""
    if not is_child(entry):
        return 0
    at = load64(block + BASE) + 8 * (entry & OFFSET)
    return load32(at + 4 + 4 * popcount64(shl64(load64(at), 63 - i)))


@kernel
def _free(block, entry):  # type: ignore[no-untyped-def]
    offset = entry & OFFSET
    free(block, offset, 1 + ((popcount64(get(block, offset)) + 1) >> 1))


@kernel
def free_chain(block, entry, high, low, depth):  # type: ignore[no-untyped-def]
    """Free the block that `entry` leads to, if any, and those below it on the way to an address: there are no others.

    `depth` is where the block begins.
    """
    while is_child(entry):
        below = _entry_at(block, entry, six(high, low, depth))
        _free(block, entry)
        entry = below
        depth += STEP


@kernel
def root(block, slot):  # type: ignore[no-untyped-def]
    """The entry of a /24."""
    return load32(load64(block + BASE) + 8 * ROOTS + 4 * slot)


@kernel
def turn(block, slot, entry):  # type: ignore[no-untyped-def]
    """Let a /24 lead to `entry`."""
    offset = ROOTS + (slot >> 1)
    word = get(block, offset)
    shift = (slot & 1) << 5
    turned = (word & ~shl64(0xFFFFFFFF, shift)) | shl64(entry, shift)
    if turned != word:
        fit(block, 1)
        put(block, offset, turned)


@kernel
def _enter(block, at, node, entry, reached, old, depth, path, high, low, length):  # type: ignore[no-untyped-def]
    """Begin the frame at `at`: what each of the 64 prefixes below `node`, which is at `depth`, leads to.

    `entry` is what holds where no route below `node` says otherwise. The change reaches all that inherits it if
    `reached`, and what inherits from the changed prefix if that ends in this block: `path` says whether the way to it
    leads here. `old` is the entry of the block as it was, 0 if there was none.
    """
    store64(at + _OLD, old)
    store64(at + _NEXT, 0)
    store64(at + _PATH, path)
    level, index = 0, 0  # where the changed prefix is
    if path and length <= depth + STEP:
        level = length - depth
        index = six(high, low, depth) >> (STEP - level)
    store64(at, shl64(entry, 32) | shl64(reached, 31) | node)
    for above in range(STEP):
        for i in range((1 << above) - 1, -1, -1):
            pair = load64(at + 8 * i)
            for side in range(1, -1, -1):
                here, rest = pair & _NODE, pair & ~_NODE
                if here:
                    here = rib.child(block, here, side)
                    if here and rib.value_of(block, here):
                        rest = shl64(entry_of(block, here), 32)
                if above + 1 == level and 2 * i + side == index:
                    rest |= _REACHED
                store64(at + 8 * (2 * i + side), rest | here)


@kernel
def _finish(block, at):  # type: ignore[no-untyped-def]
    """Make the block of a frame whose pairs have become entries; return its entry, or -1 if out of room."""
    count, last, bitmap = 0, -1, 0
    for i in range(64):
        entry = shr64(load64(at + 8 * i), 32)
        if entry != last:
            bitmap |= shl64(1, i)
            store32(at + 4 * count, entry)  # over pairs already read
            count += 1
            last = entry
    if count & 1:
        store32(at + 4 * count, 0)
    size, old = (count + 1) >> 1, load64(at + _OLD)
    fit(block, size + 1)
    if old and get(block, old & OFFSET) == bitmap:
        for i in range(size):
            if get(block, (old & OFFSET) + 1 + i) != load64(at + 8 * i):
                put(block, (old & OFFSET) + 1 + i, load64(at + 8 * i))
        return old
    offset = allocate(block, size + 1)
    if offset == 0:
        return -1
    put(block, offset, bitmap)
    for i in range(size):
        put(block, offset + 1 + i, load64(at + 8 * i))
    if old:
        _free(block, old)
    return CHILD | offset


@kernel
def _next(block, at, depth, high, low, length):  # type: ignore[no-untyped-def]
    """Turn pairs into entries up to the first whose block is to be made; return its index, or 64."""
    way = six(high, low, depth) if load64(at + _PATH) and length > depth + STEP else -1
    for i in range(load64(at + _NEXT), 64):
        pair = load64(at + 8 * i)
        node, old = pair & _NODE, _entry_at(block, load64(at + _OLD), i)
        if node == 0 or rib.is_leaf(block, node):
            store64(at + 8 * i, pair & ~0xFFFFFFFF)
            if i == way:  # the change has removed the last route below
                free_chain(block, old, high, low, depth + STEP)
        elif pair & _REACHED or i == way or not is_child(old):
            return i
        else:
            store64(at + 8 * i, shl64(old, 32))
    return 64


@kernel
def build(block, node, entry, reached, old, high, low, length):  # type: ignore[no-untyped-def]
    """Make the block for the /24 `node`, and of those below it the ones that a change of the prefix concerns.

    The rest is as for `_enter`. With `reached`, the prefix is outside, and its length is 0. Returns the block's entry,
    or -1 if out of room.
    """
    level, at = 0, load64(block + SCRATCH)
    _enter(block, at, node, entry, reached, old, ROOT_BITS, length > ROOT_BITS, high, low, length)
    while True:
        depth = ROOT_BITS + STEP * level
        i = _next(block, at, depth, high, low, length)
        if i < 64:
            store64(at + _NEXT, i)
            pair, old = load64(at + 8 * i), _entry_at(block, load64(at + _OLD), i)
            old = old if is_child(old) else 0
            path = load64(at + _PATH) and length > depth + STEP and six(high, low, depth) == i
            reached = 1 if pair & _REACHED else 0
            level, at = level + 1, at + _FRAME
            entry, node, path = shr64(pair, 32), pair & _NODE, 1 if path else 0
            _enter(block, at, node, entry, reached, old, depth + STEP, path, high, low, length)
            continue
        done = _finish(block, at)
        if done < 0 or level == 0:
            return done
        level, at = level - 1, at - _FRAME
        store64(at + 8 * load64(at + _NEXT), shl64(done, 32))
        store64(at + _NEXT, load64(at + _NEXT) + 1)
