"""The blocks of the lookup structure of `libfp.tables.lpm6`, made from the routes: compiled, control plane only.

Every step leaves the table right: a new block is written first, then the one word that leads to it is turned. Where a
block keeps its shape (another next hop for the same prefixes), only the words that differ are stored, in place.
"""

from __future__ import annotations

from libfp.jit import kernel, load32, load64, popcount64, shl64, shr64, store64
from libfp.tables import rib
from libfp.tables.words import BASE, TABLE, allocate, fit, free, get, put

ROOT_BITS = 23  # the first step: 2**23 words, each for a /23
STEP = 5  # every further one: up to 32 words
#: Offsets in the arena, in words: the default route's value, the roots, the blocks.
DEFAULT, ROOTS, BLOCKS = 0, 8, 8 + (1 << ROOT_BITS)
#: A word is a value (32 bits), or it leads to a block: a bitmap, whether the block's words are WIDE (64 bits, some lead
#: on) or of 32 bits (values all), and from bit WHERE on, in units of 32 bits, where the word before the first would be.
WIDE, WHERE, BITMAP = 1 << 33, 34, (1 << 32) - 1
#: Field in the control block: scratch memory, `SCRATCH_BYTES` of it: a frame for each step below the root.
SCRATCH = TABLE + 128
_WIDTH = 1 << STEP
_SHAPE = WIDE | BITMAP
_OUT, _OLD, _FRAME = 8 * _WIDTH, 16 * _WIDTH + 8, 16 * _WIDTH + 64  # OUT has room for a word more
_NEXT, _PATH = _OLD + 8, _OLD + 16
SCRATCH_BYTES = _FRAME * -(-(rib.BITS - ROOT_BITS) // STEP)

# A frame's pairs are (value, 1 if the change reaches it, node there or 0) in 32, 1 and 31 bits.
_REACHED, _NODE = 1 << 31, (1 << 31) - 1


@kernel
def five(high, low, depth):  # type: ignore[no-untyped-def]
    """The five bits of an address from bit `depth` on."""
    if depth <= 59:
        return shr64(high, 59 - depth) & 31
    if depth < 64:
        return (shl64(high, depth - 59) | shr64(low, 123 - depth)) & 31
    return shr64(low, 123 - depth) & 31


@kernel
def is_child(word):  # type: ignore[no-untyped-def]
    """Whether the word leads to a block."""
    return shr64(word, 32) != 0


@kernel
def entry_at(base, word, place):  # type: ignore[no-untyped-def]
    """What the block that `word` leads to says of a place, in the arena at `base`."""
    rank, where = popcount64(shl64(word, 63 - place)), base + 4 * shr64(word, WHERE)
    return load64(where + 8 * rank) if word & WIDE else load32(where + 4 * rank)


@kernel
def _old(block, word, place):  # type: ignore[no-untyped-def]
    """The same in the master; 0 if `word` leads to no block."""
    return entry_at(load64(block + BASE), word, place) if is_child(word) else 0


@kernel
def _words(word, count):  # type: ignore[no-untyped-def]
    """How many words of 64 bits hold `count` of the block's."""
    return count if word & WIDE else (count + 1) >> 1


@kernel
def _offset(word):  # type: ignore[no-untyped-def]
    """The offset of the block that `word` leads to."""
    return (shr64(word, WHERE) + (2 if word & WIDE else 1)) >> 1


@kernel
def _free(block, word):  # type: ignore[no-untyped-def]
    free(block, _offset(word), _words(word, popcount64(word & BITMAP)))


@kernel
def free_chain(block, word, high, low, depth):  # type: ignore[no-untyped-def]
    """Free the block that `word` leads to, if any, and those below it on the way to an address: there are no others.

    `depth` is where the block begins.
    """
    while is_child(word):
        below = _old(block, word, five(high, low, depth))
        _free(block, word)
        word = below
        depth += STEP


@kernel
def turn(block, offset, word):  # type: ignore[no-untyped-def]
    """Let the word at `offset` be `word`."""
    if get(block, offset) != word:
        fit(block, 1)
        put(block, offset, word)


@kernel
def _enter(block, at, node, value, reached, old, depth, path, high, low, length):  # type: ignore[no-untyped-def]
    """Begin the frame at `at`: what each of the 32 prefixes below `node`, which is at `depth`, leads to.

    `value` is what holds where no route below `node` says otherwise. The change reaches all that inherits it if
    `reached`, and what inherits from the changed prefix if that ends in this block: `path` says whether the way to it
    leads here. `old` is the word that led to the block as it was, 0 if there was none.
    """
    store64(at + _OLD, old)
    store64(at + _NEXT, 0)
    store64(at + _PATH, path)
    level, index = 0, 0  # where the changed prefix is
    if path and length <= depth + STEP:
        level = length - depth
        index = five(high, low, depth) >> (STEP - level)
    store64(at, shl64(value, 32) | shl64(reached, 31) | node)
    for above in range(STEP):
        for i in range((1 << above) - 1, -1, -1):
            pair = load64(at + 8 * i)
            for side in range(1, -1, -1):
                here, rest = pair & _NODE, pair & ~_NODE
                if here:
                    here = rib.child(block, here, side)
                    if here and rib.value_of(block, here):
                        rest = shl64(rib.value_of(block, here), 32)
                if above + 1 == level and 2 * i + side == index:
                    rest |= _REACHED
                store64(at + 8 * (2 * i + side), rest | here)


@kernel
def _finish(block, at):  # type: ignore[no-untyped-def]
    """Make the block of a frame whose words are all there; return the word that leads to it, or 0 if out of room."""
    count, last, shape, out = 0, -1, 0, at + _OUT
    for i in range(_WIDTH):
        word = load64(out + 8 * i)
        if is_child(word):
            shape |= WIDE
        if i == 0 or word != last:
            shape |= 1 << i
            store64(out + 8 * count, word)  # over words already read
            count += 1
            last = word
    if not shape & WIDE:
        store64(out + 8 * count, 0)
        for i in range((count + 1) >> 1):
            store64(out + 8 * i, load64(out + 16 * i) | shl64(load64(out + 16 * i + 8), 32))
    size, old = _words(shape, count), load64(at + _OLD)
    fit(block, size)
    if old and old & _SHAPE == shape:
        for i in range(size):
            if get(block, _offset(old) + i) != load64(out + 8 * i):
                put(block, _offset(old) + i, load64(out + 8 * i))
        return old
    offset = allocate(block, size)
    if offset == 0:
        return 0
    for i in range(size):
        put(block, offset + i, load64(out + 8 * i))
    if old:
        _free(block, old)
    return shl64(2 * offset - (2 if shape & WIDE else 1), WHERE) | shape


@kernel
def _next(block, at, depth, high, low, length):  # type: ignore[no-untyped-def]
    """Turn pairs into words up to the first whose block is to be made; return its index, or 32."""
    way = five(high, low, depth) if load64(at + _PATH) and length > depth + STEP else -1
    for i in range(load64(at + _NEXT), _WIDTH):
        pair = load64(at + 8 * i)
        node, old = pair & _NODE, _old(block, load64(at + _OLD), i)
        if node == 0 or rib.is_leaf(block, node):
            store64(at + _OUT + 8 * i, shr64(pair, 32))
            if i == way:  # the change has removed the last route below
                free_chain(block, old, high, low, depth + STEP)
        elif pair & _REACHED or i == way or not is_child(old):
            return i
        else:
            store64(at + _OUT + 8 * i, old)
    return _WIDTH


@kernel
def build(block, node, value, reached, old, high, low, length):  # type: ignore[no-untyped-def]
    """Make the block for the /23 `node`, and of those below it the ones that a change of the prefix concerns.

    The rest is as for `_enter`. With `reached`, the prefix is outside, and its length is 0. Returns the word that
    leads to the block, or 0 if out of room.
    """
    level, at = 0, load64(block + SCRATCH)
    _enter(block, at, node, value, reached, old, ROOT_BITS, length > ROOT_BITS, high, low, length)
    while True:
        depth = ROOT_BITS + STEP * level
        i = _next(block, at, depth, high, low, length)
        if i < _WIDTH:
            store64(at + _NEXT, i)
            pair, old = load64(at + 8 * i), _old(block, load64(at + _OLD), i)
            old = old if is_child(old) else 0
            path = load64(at + _PATH) and length > depth + STEP and five(high, low, depth) == i
            reached = 1 if pair & _REACHED else 0
            level, at = level + 1, at + _FRAME
            value, node, path = shr64(pair, 32), pair & _NODE, 1 if path else 0
            _enter(block, at, node, value, reached, old, depth + STEP, path, high, low, length)
            continue
        done = _finish(block, at)
        if done == 0 or level == 0:
            return done
        level, at = level - 1, at - _FRAME
        store64(at + _OUT + 8 * load64(at + _NEXT), done)
        store64(at + _NEXT, load64(at + _NEXT) + 1)
