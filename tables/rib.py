"""All routes of a table by themselves: a binary trie in control-plane memory, from which the lookup structure is made.

A node is 16 bytes: two children, the route's value (0: no route ends here) and its cell, which is the lookup
structure's business. Node 0 is none, node 1 the root. An address is two words in host order, `high` and `low`; an IPv4
address is the upper half of `high`.

A route in an array is four words: high, low, length, value.
"""

from __future__ import annotations

from libfp.jit import entry, kernel, load32, load64, shl64, shr64, store32, store64
from libfp.tables.words import TABLE

BITS = 128  # of the longest prefix
#: Fields in the table's control block: the address of the nodes, how many were used, the first free one, the routes.
NODES, MADE, SPARE, ROUTES = TABLE, TABLE + 8, TABLE + 16, TABLE + 24
ROOT = 1
NODE = 16
_VALUE, _CELL = 8, 12
#: More of them: the most routes; why a change of many routes stopped; memory of `STACK_BYTES` for `dump`.
CAPACITY, STOPPED, STACK = TABLE + 64, TABLE + 72, TABLE + 80
#: Results of a change.
UNCHANGED, CHANGED, MISSING, FULL, NO_ROOM = 0, 1, 2, 3, 4
#: Bytes of a route in an array, and of the stack that `dump` wants.
ROUTE, STACK_BYTES = 32, 24 * (BITS + 2)


def nodes_for(routes: int, bits: int) -> int:
    """How many nodes the trie of so many routes of at most `bits` bits can need, whatever they are."""
    return 2 + sum(min(1 << depth, routes) for depth in range(bits + 1))


@kernel
def child(block, node, side):  # type: ignore[no-untyped-def]
    """The node below `node` on `side` (0 or 1), 0 if there is none."""
    return load32(load64(block + NODES) + node * NODE + 4 * side)


@kernel
def is_leaf(block, node):  # type: ignore[no-untyped-def]
    """Whether nothing is below `node`."""
    return load64(load64(block + NODES) + node * NODE) == 0


@kernel
def value_of(block, node):  # type: ignore[no-untyped-def]
    """The value of the route that ends at `node`; 0: none does."""
    return load32(load64(block + NODES) + node * NODE + _VALUE)


@kernel
def cell_of(block, node):  # type: ignore[no-untyped-def]
    """The cell of the route that ends at `node`."""
    return load32(load64(block + NODES) + node * NODE + _CELL)


@kernel
def set_cell(block, node, cell):  # type: ignore[no-untyped-def]
    """Remember the cell of the route that ends at `node`."""
    store32(load64(block + NODES) + node * NODE + _CELL, cell)


@kernel
def bit(high, low, depth):  # type: ignore[no-untyped-def]
    """The bit of an address that leads on from a node at `depth`."""
    return shr64(low if depth & 64 else high, ~depth) & 1


@kernel
def find(block, high, low, length):  # type: ignore[no-untyped-def]
    """The node of the prefix, 0 if the trie does not reach so far."""
    node = ROOT
    for depth in range(length):
        node = child(block, node, bit(high, low, depth))
        if node == 0:
            break
    return node


@kernel
def insert(block, high, low, length, value):  # type: ignore[no-untyped-def]
    """Set the prefix's value; return its node. The caller has seen to it that nodes suffice."""
    node = ROOT
    for depth in range(length):
        at = load64(block + NODES) + node * NODE + 4 * bit(high, low, depth)
        node = load32(at)
        if node == 0:
            node = _make(block)
            store32(at, node)
    at = load64(block + NODES) + node * NODE + _VALUE
    if load32(at) == 0:
        store64(block + ROUTES, load64(block + ROUTES) + 1)
    store32(at, value)
    return node


@kernel
def _make(block):  # type: ignore[no-untyped-def]
    node = load64(block + SPARE)
    at = load64(block + NODES) + node * NODE
    if node:
        store64(block + SPARE, load32(at))
        store64(at, 0)
        store64(at + 8, 0)
        return node
    node = load64(block + MADE)
    store64(block + MADE, node + 1)
    return node


@kernel
def clear(block, node):  # type: ignore[no-untyped-def]
    """Let no route end at `node` any more: it has neither value nor cell."""
    store64(load64(block + NODES) + node * NODE + _VALUE, 0)
    store64(block + ROUTES, load64(block + ROUTES) - 1)


@kernel
def prune(block, high, low, length):  # type: ignore[no-untyped-def]
    """Free the nodes on the way to the prefix that lead nowhere."""
    keep, side, node = ROOT, bit(high, low, 0), ROOT
    for depth in range(length):  # the last node on the way that is needed, and where it leads on
        if value_of(block, node) or child(block, node, 1 - bit(high, low, depth)):
            keep, side = node, bit(high, low, depth)
        node = child(block, node, bit(high, low, depth))
    if length == 0 or value_of(block, node) or not is_leaf(block, node):
        return
    at = load64(block + NODES) + keep * NODE + 4 * side
    node = load32(at)
    store32(at, 0)
    while node:
        at = load64(block + NODES) + node * NODE
        below = load32(at) or load32(at + 4)
        store64(at, 0)
        store32(at, load64(block + SPARE))
        store64(block + SPARE, node)
        node = below


@entry
def exact(block, high, low, length):  # type: ignore[no-untyped-def]
    """The value of the prefix itself, 0 if it is not there."""
    node = find(block, high, low, length)
    return value_of(block, node) if node else 0


@entry
def longest(block, high, low):  # type: ignore[no-untyped-def]
    """The longest prefix that holds the address: its length << 32 | its value; 0 if there is none."""
    node, found = ROOT, 0
    for depth in range(BITS + 1):
        if value_of(block, node):
            found = depth << 32 | value_of(block, node)
        node = child(block, node, bit(high, low, depth)) if depth < BITS else 0
        if node == 0:
            break
    return found


@entry
def dump(block, stack, routes):  # type: ignore[no-untyped-def]
    """Write all routes, by address and then by length, into an array; return how many. `stack` is `STACK_BYTES`."""
    store64(stack, ROOT << 8)  # node << 8 | depth, high, low
    store64(stack + 8, 0)
    store64(stack + 16, 0)
    top, count = 1, 0
    while top > 0:
        top -= 1
        at = stack + 24 * top
        node, depth, high, low = load64(at) >> 8, load64(at) & 0xFF, load64(at + 8), load64(at + 16)
        if value_of(block, node):
            out = routes + ROUTE * count
            store64(out, high)
            store64(out + 8, low)
            store64(out + 16, depth)
            store64(out + 24, value_of(block, node))
            count += 1
        for side in range(1, -1, -1):
            below = child(block, node, side)
            if below:
                at = stack + 24 * top
                store64(at, below << 8 | (depth + 1))
                store64(at + 8, high | (0 if depth & 64 else shl64(side, ~depth)))
                store64(at + 16, low | (shl64(side, ~depth) if depth & 64 else 0))
                top += 1
    return count
