"""Changes to `libfp.tables.lpm6`: routes set, removed and loaded. Compiled, control plane only.

A value of 2**31 and more does not fit an entry beside the mark of a block: its route has a cell, a word that holds it.
"""

from __future__ import annotations

from libfp.jit import entry as entry_point
from libfp.jit import kernel, load64, shl64, shr64, store64
from libfp.tables import rib
from libfp.tables.lpm6_block import (
    CHILD,
    DEFAULT,
    ROOT_BITS,
    ROOTS,
    build,
    entry_of,
    free_chain,
    is_child,
    root,
    turn,
)
from libfp.tables.rib import CAPACITY, CHANGED, FULL, MISSING, NO_ROOM, STACK, STOPPED, UNCHANGED
from libfp.tables.words import LOG_ROOM, LOGGED, allocate, fit, free, get, put, seal


@kernel
def _make_root(block, slot, node, entry, reached, high, low, length):  # type: ignore[no-untyped-def]
    """Bring a /24 up to date: see `build`. Returns 0 if out of room."""
    old = root(block, slot)
    if node == 0 or rib.is_leaf(block, node):
        turn(block, slot, entry)
        free_chain(block, old, high, low, ROOT_BITS)
        return 1
    entry = build(block, node, entry, reached, old if is_child(old) else 0, high, low, length)
    if entry < 0:
        return 0
    turn(block, slot, entry)
    return 1


@kernel
def _push(stack, top, node, depth, slot, entry):  # type: ignore[no-untyped-def]
    at = stack + 24 * top
    store64(at, node << 8 | depth)
    store64(at + 8, slot)
    store64(at + 16, entry)
    return top + 1


@kernel
def _cover(block, node, depth, slot, entry, anew):  # type: ignore[no-untyped-def]
    """Let everything below `node` that no longer route claims lead to `entry`.

    `slot` is the first /24 below `node`, which is at `depth`. With `anew` all of it is made, in an arena still
    zero. Returns 0 if out of room.
    """
    stack = load64(block + STACK)
    top = _push(stack, 0, node, depth, slot, entry)
    while top > 0:
        top -= 1
        at = stack + 24 * top
        node, depth, slot, entry = load64(at) >> 8, load64(at) & 0xFF, load64(at + 8), load64(at + 16)
        if depth == ROOT_BITS:
            if not _make_root(block, slot, node, entry, 1, 0, 0, 0):
                return 0
        elif node == 0 and entry == 0 and anew:
            continue  # as it is
        elif node == 0:
            both = shl64(entry, 32) | entry
            for offset in range(ROOTS + (slot >> 1), ROOTS + ((slot + (1 << (ROOT_BITS - depth))) >> 1)):
                if get(block, offset) != both:
                    fit(block, 1)
                    put(block, offset, both)
        else:
            for side in range(1, -1, -1):
                below, its_entry = rib.child(block, node, side), entry
                if below and rib.value_of(block, below):
                    if not anew:
                        continue
                    its_entry = entry_of(block, below)
                top = _push(stack, top, below, depth + 1, slot + (side << (ROOT_BITS - 1 - depth)), its_entry)
    return 1


@kernel
def _place(block, high, low, length):  # type: ignore[no-untyped-def]
    """Bring the lookup structure up to date: the route (not the default one) has changed. 0 if out of room."""
    node, entry = rib.ROOT, 0
    for depth in range(min(length, ROOT_BITS)):
        node = rib.child(block, node, rib.bit(high, low, depth))
        if node == 0:
            break
        if rib.value_of(block, node):
            entry = entry_of(block, node)
    slot = shr64(high, 64 - ROOT_BITS)
    if length <= ROOT_BITS:
        return _cover(block, node, length, slot, entry, False)
    return _make_root(block, slot, node, entry, 0, high, low, length)


@kernel
def _make_cell(block, node, value):  # type: ignore[no-untyped-def]
    cell = allocate(block, 1)
    if cell:
        fit(block, 1)
        put(block, cell, value)
        rib.set_cell(block, node, cell)
    return cell


@kernel
def _set(block, high, low, length, value):  # type: ignore[no-untyped-def]
    node = rib.find(block, high, low, length)
    old = rib.value_of(block, node) if node else 0
    if old == value:
        return UNCHANGED
    if old == 0 and load64(block + rib.ROUTES) == load64(block + CAPACITY):
        return FULL
    node = rib.insert(block, high, low, length, value)
    if length == 0:
        put(block, DEFAULT, value)
        return CHANGED
    cell = rib.cell_of(block, node)
    if value < CHILD:
        rib.set_cell(block, node, 0)
    elif cell:
        put(block, cell, value)
        return CHANGED
    elif not _make_cell(block, node, value):
        return NO_ROOM
    done = _place(block, high, low, length)
    if cell:
        free(block, cell, 1)
    return CHANGED if done else NO_ROOM


@kernel
def _remove(block, high, low, length):  # type: ignore[no-untyped-def]
    node = rib.find(block, high, low, length)
    if node == 0 or rib.value_of(block, node) == 0:
        return MISSING
    cell = rib.cell_of(block, node)
    rib.clear(block, node)
    if length == 0:
        put(block, DEFAULT, 0)
        return CHANGED
    rib.prune(block, high, low, length)
    done = _place(block, high, low, length)
    if cell:
        free(block, cell, 1)
    return CHANGED if done else NO_ROOM


@entry_point
def change(block, high, low, length, value):  # type: ignore[no-untyped-def]
    """Set the route, or remove it if `value` is 0. Returns UNCHANGED, CHANGED, MISSING, FULL or NO_ROOM.

    After NO_ROOM the routes have changed and the lookup structure has not quite: it must be made anew.
    """
    result = _set(block, high, low, length, value) if value else _remove(block, high, low, length)
    seal(block)
    return result


@entry_point
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


@entry_point
def load(block, routes, count):  # type: ignore[no-untyped-def]
    """Make an empty table of `count` routes from an array, sorted by address and length. Returns 0 if out of room."""
    for i in range(count):
        at = routes + rib.ROUTE * i
        value = load64(at + 24)
        node = rib.insert(block, load64(at), load64(at + 8), load64(at + 16), value)
        if value >= CHILD and node != rib.ROOT and not _make_cell(block, node, value):
            return 0
    if rib.value_of(block, rib.ROOT):
        put(block, DEFAULT, rib.value_of(block, rib.ROOT))
    done = _cover(block, rib.ROOT, 0, 0, 0, True)
    seal(block)
    return done
