"""What the trees of `libfp.tables.acl` cost to look up: that decides which rules share one."""

from __future__ import annotations

from libfp.jit import entry, kernel, load32, load32be, load64, mul64, shr64, store32be
from libfp.tables.acl_cut import ADDRESSES, COUNT, ORDER, STACK, rule_at
from libfp.tables.acl_layout import LANES, ROW, TREES, leaf_bytes, matches, place, rows, where_at
from libfp.tables.words import BASE, USED

_SAMPLES = 2048  # every other one is a corner of a rule, the others are random
_ABREAST = 16
_TREE, _LEAF, _FURTHER = 5, 6, 25  # what they cost, in levels; further leaves of a chain are hard to foretell
_NEAR, _FAR = 1 << 21, 3  # bytes that are near in any case; what each half as many again cost


@kernel
def _random(state):  # type: ignore[no-untyped-def]
    return mul64(state, 0x5851F42D4C957F2D) + 0x14057B7EF767814F


@kernel
def _sample(block, state, number, to):  # type: ignore[no-untyped-def]
    """A header in a corner of rule `number`, at address `to`; anywhere if that is negative. Returns the next state."""
    addresses = load64(block + ADDRESSES)
    for i in range(addresses + 2):
        state = _random(state)
        dword = shr64(state, 32)
        if number >= 0:
            at = rule_at(block, number) + 8 * i
            other = load32(at + 4) if i == addresses else load32(at) | ~load32(at + 4) & 0xFFFFFFFF
            dword = load32(at) if state & 1 << 40 else other
        store32be(to + 4 * i, dword)
    return state


@kernel
def _depth(block, root, header):  # type: ignore[no-untyped-def]
    """(entry of the leaf << 8 | levels above it) for a header."""
    addresses, base, entry, depth = load64(block + ADDRESSES), load64(block + BASE), root, 0
    while entry & 7:
        field = (entry >> 8) & ((1 << (where_at(addresses) - 8)) - 1)
        index = (load32be(header + 4 * field) >> ((entry >> 3) & 31)) & ((2 << (entry & 7)) - 1)
        entry = load32(base + place(addresses, entry) + 4 * index)
        depth += 1
    return entry << 8 | depth


@kernel
def _leaves(block, entry, header):  # type: ignore[no-untyped-def]
    """How many leaves of a chain a header is compared with."""
    addresses, at, count = load64(block + ADDRESSES), load64(block + BASE), 1
    leaf = place(addresses, entry)
    ports, meta = load32be(header + 4 * addresses), load32be(header + 4 * addresses + 4)
    while True:
        for lane in range(LANES - 1):
            if matches(at + leaf, addresses, lane, header, ports, meta):
                return count
        word = load64(at + leaf + ROW * rows(addresses) + 8 * (LANES - 1))
        if word >= 0:
            return count
        leaf, count = -word, count + 1


@entry
def effort(block):  # type: ignore[no-untyped-def]
    """About what a lookup costs, in hundredths of a level, for the headers that a table of rules may see."""
    addresses, count = load64(block + ADDRESSES), load64(block + COUNT)
    header, roots = load64(block + STACK), load64(block + BASE) + leaf_bytes(addresses)
    far, bytes_used = 0, 8 * load64(block + USED)
    while bytes_used > _NEAR:
        far, bytes_used = far + 1, bytes_used * 2 // 3
    total = _SAMPLES * _FAR * far
    for tree in range(TREES):
        root, state, deepest = load64(roots + 8 * tree), 1, 0
        if root == 0:
            continue
        total += _SAMPLES * _TREE
        for i in range(_SAMPLES):
            number = load32(load64(block + ORDER) + 4 * (shr64(state, 33) % count)) if i & 1 else -1
            state = _sample(block, state, number, header)
            found = _depth(block, root, header)
            deepest = max(deepest, found & 0xFF)
            if i % _ABREAST == _ABREAST - 1:
                total, deepest = total + _ABREAST * deepest, 0
            total += _LEAF + _FURTHER * (_leaves(block, found >> 8, header) - 1)
    return total * 100 // _SAMPLES
