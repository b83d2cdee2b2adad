"""Changes to `libfp.tables.lpm6`: routes set, removed and loaded. Compiled, control plane only."""

from __future__ import annotations

from libfp.jit import entry, kernel, load64, shr64, store64
from libfp.tables import rib
from libfp.tables.lpm6_block import DEFAULT, ROOT_BITS, ROOTS, build, free_chain, is_child, turn
from libfp.tables.rib import CAPACITY, CHANGED, FULL, MISSING, NO_ROOM, STACK, STOPPED, UNCHANGED
from libfp.tables.words import LOG_ROOM, LOGGED, get, put, seal


@kernel
def _make_root(block, slot, node, value, reached, high, low, length):  # type: ignore[no-untyped-def]
    """Bring a /23 up to date: see `build`. Returns 0 if out of room."""
    old = get(block, ROOTS + slot)
    if node == 0 or rib.is_leaf(block, node):
        turn(block, ROOTS + slot, value)
        free_chain(block, old, high, low, ROOT_BITS)
        return 1
    word = build(block, node, value, reached, old if is_child(old) else 0, high, low, length)
    if word == 0:
        return 0
    turn(block, ROOTS + slot, word)
    return 1


@kernel
def _push(stack, top, node, depth, slot, value):  # type: ignore[no-untyped-def]
    at = stack + 24 * top
    store64(at, node << 8 | depth)
    store64(at + 8, slot)
    store64(at + 16, value)
    return top + 1


@kernel
def _cover(block, node, depth, slot, value, anew):  # type: ignore[no-untyped-def]
    """Let everything below `node` that no longer route claims lead to `value`.

    `slot` is the first /23 below `node`, which is at `depth`. With `anew` all of it is made, in an arena still zero.
    Returns 0 if out of room.
    """
    stack = load64(block + STACK)
    top = _push(stack, 0, node, depth, slot, value)
    while top > 0:
        top -= 1
        at = stack + 24 * top
        node, depth, slot, value = load64(at) >> 8, load64(at) & 0xFF, load64(at + 8), load64(at + 16)
        if depth == ROOT_BITS:
            if not _make_root(block, slot, node, value, 1, 0, 0, 0):
                return 0
        elif node == 0:
            if value or not anew:
                for offset in range(ROOTS + slot, ROOTS + slot + (1 << (ROOT_BITS - depth))):
                    turn(block, offset, value)
        else:
            for side in range(1, -1, -1):
                below, its_value = rib.child(block, node, side), value
                if below and rib.value_of(block, below):
                    if not anew:
                        continue
                    its_value = rib.value_of(block, below)
                top = _push(stack, top, below, depth + 1, slot + (side << (ROOT_BITS - 1 - depth)), its_value)
    return 1


@kernel
def _place(block, high, low, length):  # type: ignore[no-untyped-def]
    """Bring the lookup structure up to date: the route has changed. Returns 0 if out of room."""
    if length == 0:
        put(block, DEFAULT, rib.value_of(block, rib.ROOT))
        return 1
    node, value = rib.ROOT, 0
    for depth in range(min(length, ROOT_BITS)):
        node = rib.child(block, node, rib.bit(high, low, depth))
        if node == 0:
            break
        if rib.value_of(block, node):
            value = rib.value_of(block, node)
    slot = shr64(high, 64 - ROOT_BITS)
    if length <= ROOT_BITS:
        return _cover(block, node, length, slot, value, False)
    return _make_root(block, slot, node, value, 0, high, low, length)


@kernel
def _set(block, high, low, length, value):  # type: ignore[no-untyped-def]
    node = rib.find(block, high, low, length)
    old = rib.value_of(block, node) if node else 0
    if old == value:
        return UNCHANGED
    if old == 0 and load64(block + rib.ROUTES) == load64(block + CAPACITY):
        return FULL
    rib.insert(block, high, low, length, value)
    return CHANGED if _place(block, high, low, length) else NO_ROOM


@kernel
def _remove(block, high, low, length):  # type: ignore[no-untyped-def]
    node = rib.find(block, high, low, length)
    if node == 0 or rib.value_of(block, node) == 0:
        return MISSING
    rib.clear(block, node)
    rib.prune(block, high, low, length)
    return CHANGED if _place(block, high, low, length) else NO_ROOM


@entry
def change(block, high, low, length, value):  # type: ignore[no-untyped-def]
    """Set the route, or remove it if `value` is 0. Returns UNCHANGED, CHANGED, MISSING, FULL or NO_ROOM.

    After NO_ROOM the routes have changed and the lookup structure has not quite: it must be made anew.
    """
    result = _set(block, high, low, length, value) if value else _remove(block, high, low, length)
    seal(block)
    return result


@entry
def apply(block, routes, start, count):  # type: ignore[no-untyped-def]
    """`change` each route of an array (see `rib`) from index `start` on; return where it stopped.

    It stops at `count`, or where the log wants emptying, or after a route for want of room: STOPPED says. Removing
    what is not there is no error.
    """
    store64(block + STOPPED, CHANGED)
    for i in range(start, count):
        if load64(block + LOGGED) > LOG_ROOM // 16:
            return i
        at = routes + rib.ROUTE * i
        high, low, length, value = load64(at), load64(at + 8), load64(at + 16), load64(at + 24)
        result = _set(block, high, low, length, value) if value else _remove(block, high, low, length)
        seal(block)
        if result >= FULL:
            store64(block + STOPPED, result)
            return i + 1
    return count


@entry
def load(block, routes, count):  # type: ignore[no-untyped-def]
    """Make an empty table of `count` routes from an array, sorted by address and length. Returns 0 if out of room."""
    for i in range(count):
        at = routes + rib.ROUTE * i
        rib.insert(block, load64(at), load64(at + 8), load64(at + 16), load64(at + 24))
    if rib.value_of(block, rib.ROOT):
        put(block, DEFAULT, rib.value_of(block, rib.ROOT))
    done = _cover(block, rib.ROOT, 0, 0, 0, True)
    seal(block)
    return done
