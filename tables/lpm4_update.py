"""Changes to `libfp.tables.lpm4`: routes set, removed and loaded. Compiled, control plane only.

A route of length 19 or less that some slot leads to by itself has a cell: a word that holds its value, so that another
next hop for it is one word, however many slots it covers. Each slot turned is a step of its own.
"""

from __future__ import annotations

from libfp.jit import entry, kernel, load64, shr64, store64
from libfp.tables import rib
from libfp.tables.lpm4_slot import DEFAULT, MIDDLE_BITS, SCRATCH, SLOT_BITS, STACK, build, uniform
from libfp.tables.rib import CAPACITY, CHANGED, FULL, MISSING, NO_ROOM, STOPPED, UNCHANGED
from libfp.tables.words import LOG_ROOM, LOGGED, allocate, fit, free, put, seal


@kernel
def _push(stack, top, node, depth, slot, cell, value):  # type: ignore[no-untyped-def]
    at = stack + 32 * top
    store64(at, node << 8 | depth)
    store64(at + 8, slot)
    store64(at + 16, cell)
    store64(at + 24, value)
    return top + 1


@kernel
def _cover(block, node, depth, slot, cell, value, anew):  # type: ignore[no-untyped-def]
    """Let everything below `node` that no longer route claims lead to `cell`, whose value is `value`.

    `slot` is the first below `node`, which is at `depth`. With `anew` all of it is made, in an arena still zero: cells
    too. Returns 0 if out of room.
    """
    stack = load64(block + SCRATCH) + STACK
    top = _push(stack, 0, node, depth, slot, cell, value)
    while top > 0:
        top -= 1
        at = stack + 32 * top
        node, depth = load64(at) >> 8, load64(at) & 0xFF
        slot, cell, value = load64(at + 8), load64(at + 16), load64(at + 24)
        if node == 0 or (depth == SLOT_BITS and rib.is_leaf(block, node)):
            if cell or not anew:
                for one in range(slot, slot + (1 << (SLOT_BITS - depth))):
                    uniform(block, one, cell)
        elif depth == SLOT_BITS:
            if not build(block, slot, node, value, 0, 63):
                return 0
        else:
            for side in range(1, -1, -1):
                below, its_cell, its_value = rib.child(block, node, side), cell, value
                if below and rib.value_of(block, below):
                    if not anew:
                        continue
                    its_value = rib.value_of(block, below)
                    its_cell = _make_cell(block, below, its_value)
                    if its_cell == 0:
                        return 0
                first = slot + (side << (SLOT_BITS - 1 - depth))
                top = _push(stack, top, below, depth + 1, first, its_cell, its_value)
    return 1


@kernel
def _make_cell(block, node, value):  # type: ignore[no-untyped-def]
    cell = allocate(block, 1)
    if cell:
        fit(block, 1)
        put(block, cell, value)
        rib.set_cell(block, node, cell)
    return cell


@kernel
def _make_slot(block, address, length):  # type: ignore[no-untyped-def]
    """Bring the slot up to date in which the route `address`/`length` (longer than the slot's 19) has changed."""
    node, cell, value = rib.ROOT, 0, 0
    for depth in range(SLOT_BITS):
        node = rib.child(block, node, rib.bit(address << 32, 0, depth))
        if node == 0:
            break
        if rib.value_of(block, node):
            cell, value = rib.cell_of(block, node), rib.value_of(block, node)
    slot = address >> (32 - SLOT_BITS)
    if node == 0 or rib.is_leaf(block, node):
        uniform(block, slot, cell)
        return 1
    first = (address >> 8) & ((1 << MIDDLE_BITS) - 1)
    return build(block, slot, node, value, first, first + (1 << max(24 - length, 0)) - 1)


@kernel
def _set(block, address, length, value):  # type: ignore[no-untyped-def]
    node = rib.find(block, address << 32, 0, length)
    old = rib.value_of(block, node) if node else 0
    if old == value:
        return UNCHANGED
    if old == 0 and load64(block + rib.ROUTES) == load64(block + CAPACITY):
        return FULL
    node = rib.insert(block, address << 32, 0, length, value)
    if length == 0:
        put(block, DEFAULT, value)
        return CHANGED
    if length > SLOT_BITS:
        return CHANGED if _make_slot(block, address, length) else NO_ROOM
    if old:
        cell = rib.cell_of(block, node)
        fit(block, 1)
        put(block, cell, value)
    else:
        cell = _make_cell(block, node, value)
    if cell == 0 or not _cover(block, node, length, address >> (32 - SLOT_BITS), cell, value, False):
        return NO_ROOM
    return CHANGED


@kernel
def _remove(block, address, length):  # type: ignore[no-untyped-def]
    node = rib.find(block, address << 32, 0, length)
    if node == 0 or rib.value_of(block, node) == 0:
        return MISSING
    freed = rib.cell_of(block, node)
    rib.clear(block, node)
    if length == 0:
        put(block, DEFAULT, 0)
        return CHANGED
    done = 1
    if length <= SLOT_BITS:
        above, cell, value = rib.ROOT, 0, 0
        for depth in range(length - 1):
            above = rib.child(block, above, rib.bit(address << 32, 0, depth))
            if rib.value_of(block, above):
                cell, value = rib.cell_of(block, above), rib.value_of(block, above)
        done = _cover(block, node, length, address >> (32 - SLOT_BITS), cell, value, False)
        free(block, freed, 1)
        rib.prune(block, address << 32, 0, length)
    else:
        rib.prune(block, address << 32, 0, length)
        done = _make_slot(block, address, length)
    return CHANGED if done else NO_ROOM


@entry
def change(block, high, low, length, value):  # type: ignore[no-untyped-def]
    """Set the route, or remove it if `value` is 0. Returns UNCHANGED, CHANGED, MISSING, FULL or NO_ROOM.

    After NO_ROOM the routes have changed and the lookup structure has not quite: it must be made anew.
    """
    address = shr64(high, 32)
    result = _set(block, address, length, value) if value else _remove(block, address, length)
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
        address, length, value = shr64(load64(at), 32), load64(at + 16), load64(at + 24)
        result = _set(block, address, length, value) if value else _remove(block, address, length)
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
        rib.insert(block, load64(at), 0, load64(at + 16), load64(at + 24))
    if rib.value_of(block, rib.ROOT):
        put(block, DEFAULT, rib.value_of(block, rib.ROOT))
    done = _cover(block, rib.ROOT, 0, 0, 0, 0, True)
    seal(block)
    return done
