"""How the trees of `libfp.tables.acl` are made and changed: see there for what they are, `acl_layout` for the layout.

A tree, or any part of it, is made from the list of the rules that reach it: `_make`. A change walks down to the parts
that the changed rule reaches, with the lists as they are now, and makes those anew: `_revise`. Lists and regions lie on
a stack.
"""

from __future__ import annotations

from libfp.jit import bswap32, entry, kernel, load32, load64, shr64, store32, store64
from libfp.tables.acl_cut import (
    ADDRESSES,
    CHILD,
    COPIES,
    COUNT,
    NONE,
    ORDER,
    PORTS,
    REGION,
    STACK,
    STACK_END,
    WIDEST,
    choose,
    last_of,
    listed_in,
    narrow,
    priority_of,
    rule_at,
    split,
    tree_of,
)
from libfp.tables.acl_layout import ANY_PORTS, LANES, ROW, TREES, leaf_bytes, place, rows, unit, where_at
from libfp.tables.words import SIZE, USED, allocate, fit, free, get, put, seal

#: Results of a change.
DONE, NO_ROOM = 0, 1

_DEEPEST = 20


@kernel
def _leaf(block, at, count):  # type: ignore[no-untyped-def]
    """The entry of a new leaf, or chain of leaves, with a list of rules; -1 if out of room."""
    addresses = load64(block + ADDRESSES)
    words, lines = leaf_bytes(addresses) >> 3, rows(addresses)
    blocks = 1 if count <= LANES else 1 + (count - 2) // (LANES - 1)
    link = 0
    for back in range(blocks):
        first = (blocks - 1 - back) * (LANES - 1)
        fit(block, words)
        leaf = allocate(block, words)
        if leaf == 0:
            return -1
        for row in range(lines):
            for pair in range(LANES // 2):
                word = 0
                for lane in range(2 * pair, 2 * pair + 2):
                    if link and lane == LANES - 1:
                        value = ANY_PORTS if row == lines - 3 else 0
                    elif first + lane < count:
                        value = load32(rule_at(block, load32(at + 4 * (first + lane))) + 4 * row)
                    else:
                        value = ANY_PORTS if row == lines - 4 else 0
                    if row < lines - 4 or row >= lines - 2:
                        value = bswap32(value)
                    word |= value << (32 * (lane & 1))
                put(block, leaf + row * ROW // 8 + pair, word)
        for lane in range(LANES):
            word = -link
            if first + lane < count and not (link and lane == LANES - 1):
                rule = rule_at(block, load32(at + 4 * (first + lane))) + 4 * lines
                word = load32(rule) << 32 | load32(rule + 4)
            put(block, leaf + lines * ROW // 8 + lane, word)
        link = 8 * leaf
    return link // unit(addresses) << where_at(addresses)


@kernel
def _release(block, entry):  # type: ignore[no-untyped-def]
    """Free what an entry leads to."""
    addresses = load64(block + ADDRESSES)
    if entry == 0:
        return 0
    at = place(addresses, entry) >> 3
    if entry & 7 == 0:
        while at:
            word = get(block, at + rows(addresses) * ROW // 8 + LANES - 1)
            free(block, at, leaf_bytes(addresses) >> 3)
            at = -word >> 3 if word < 0 else 0
        return 0
    many = 2 << (entry & 7)
    for i in range(many):
        one, known = _child(block, entry, i), False
        for j in range(i):
            if _child(block, entry, j) == one:
                known = True
                break
        if not known:
            _release(block, one)
    free(block, at, _node_words(block, many))
    return 0


@kernel
def _child(block, entry, index):  # type: ignore[no-untyped-def]
    at = place(load64(block + ADDRESSES), entry) >> 3
    return shr64(get(block, at + (index >> 1)), 32 * (index & 1)) & 0xFFFFFFFF


@kernel
def _node_words(block, many):  # type: ignore[no-untyped-def]
    words = unit(load64(block + ADDRESSES)) >> 3
    return ((many >> 1) + words - 1) & -words


@kernel
def _make(block, at, count, region, top, depth, copies):  # type: ignore[no-untyped-def]
    """The entry of a new tree for a list of rules in a region; -1 if out of room. The stack is free from `top` on."""
    made, inner = top, top + (CHILD << WIDEST)
    lists = inner + REGION
    if count <= LANES or depth == _DEEPEST or copies < count or lists > load64(block + STACK_END):
        return _leaf(block, at, count) if count else 0
    if load64(block + USED) > load64(block + SIZE) // 8 * 7:
        return _leaf(block, at, count)
    cut = choose(block, at, count, region, made, copies)
    if cut == 0:
        return _leaf(block, at, count)
    addresses, many = load64(block + ADDRESSES), 1 << (cut & 0xFF)
    lists = split(block, at, count, cut, region, made, inner, lists, -1)
    if lists < 0:
        return _leaf(block, at, count)
    listed = listed_in(made, many)
    for i in range(many):
        child = made + CHILD * i
        first = load64(child)
        if first < i:
            store64(child + 8, load64(made + CHILD * first + 8))
            continue
        narrow(block, region, inner, cut, i, last_of(made, many, i))
        mine = load64(child + 16)
        found = _make(block, load64(child + 8), mine, inner, lists, depth + 1, copies * mine // listed)
        if found < 0:
            return -1
        store64(child + 8, found)
    words = _node_words(block, many)
    node = allocate(block, words)
    if node == 0:
        return -1
    fit(block, words)
    for i in range(0, many, 2):
        child = made + CHILD * i
        put(block, node + (i >> 1), load64(child + CHILD + 8) << 32 | load64(child + 8))
    where = 8 * node // unit(addresses) << where_at(addresses)
    return where | (cut >> 16) << 8 | ((cut >> 8) & 0xFF) << 3 | (cut & 0xFF) - 1


@kernel
def _revise(block, entry, at, count, region, top, depth, copies, changed):  # type: ignore[no-untyped-def]
    """The entry of a tree brought up to date with its list of rules, in which those of `changed` (see `split`) are
    new or missing; -1 if out of room. Every step leaves the tree right, for the rules as they were or as they are."""
    made, inner = top, top + (CHILD << WIDEST)
    lists = inner + REGION
    if entry & 7 == 0 or count <= LANES or lists > load64(block + STACK_END):
        return _make(block, at, count, region, top, depth, copies)
    addresses, many = load64(block + ADDRESSES), 2 << (entry & 7)
    field = (entry >> 8) & ((1 << (where_at(addresses) - 8)) - 1)
    cut = field << 16 | ((entry >> 3) & 31) << 8 | (entry & 7) + 1
    lists = split(block, at, count, cut, region, made, inner, lists, changed)
    if lists < 0:
        return -1
    node = place(addresses, entry) >> 3
    for i in range(many):
        child = made + CHILD * i
        if load64(child) != i:
            continue
        old, alone, last = _child(block, entry, i), True, last_of(made, many, i)
        for j in range(many):
            if (load64(made + CHILD * j) == i) != (_child(block, entry, j) == old):
                alone = False
        narrow(block, region, inner, cut, i, last)
        mine = load64(child + 16)
        given = max(copies // 2, 4 * mine)
        if alone:
            found = _revise(block, old, load64(child + 8), mine, inner, lists, depth + 1, given, changed)
        else:
            found = _make(block, load64(child + 8), mine, inner, lists, depth + 1, given)
        if found < 0:
            return -1
        if found == old:
            continue
        for j in range(i, last + 1):  # all that have this list; what they had is free when nobody has it any more
            if load64(made + CHILD * j) == i:
                before = _child(block, entry, j)
                fit(block, 1)
                kept = 0xFFFFFFFF << (32 * (1 - (j & 1)))
                put(block, node + (j >> 1), get(block, node + (j >> 1)) & kept | found << (32 * (j & 1)))
                used = False
                for k in range(many):
                    if _child(block, entry, k) == before:
                        used = True
                if not used:
                    _release(block, before)
    return entry


@kernel
def _list(block, tree, to):  # type: ignore[no-untyped-def]
    """At `to`, the rules of a tree by priority. Returns how many they are."""
    made, order = 0, load64(block + ORDER)
    for i in range(load64(block + COUNT)):
        number = load32(order + 4 * i)
        if tree_of(block, number) == tree:
            store32(to + 4 * made, number)
            made += 1
    return made


@kernel
def _root(block, region):  # type: ignore[no-untyped-def]
    """The region of all headers."""
    for i in range(REGION >> 3):
        store64(region + 8 * i, 0)
    store64(region + PORTS + 8, 0xFFFF)
    store64(region + PORTS + 24, 0xFFFF)


@kernel
def _change_tree(block, tree, changed):  # type: ignore[no-untyped-def]
    region = load64(block + STACK)
    at = region + REGION
    _root(block, region)
    count = _list(block, tree, at)
    top = (at + 4 * count + 7) & -8
    root = (leaf_bytes(load64(block + ADDRESSES)) >> 3) + tree
    old = get(block, root)
    copies = load64(block + COPIES) * count
    found = _make(block, at, count, region, top, 0, copies) if changed == -1 else 0
    if changed != -1:
        found = _revise(block, old, at, count, region, top, 0, copies, changed)
    if found < 0:
        return NO_ROOM
    if found != old:
        fit(block, 1)
        put(block, root, found)
        _release(block, old)
    return DONE


@entry
def build(block):  # type: ignore[no-untyped-def]
    """Make the trees of an empty table whose rules and order are there. Returns DONE or NO_ROOM."""
    addresses = load64(block + ADDRESSES)
    for lane in range(0, LANES, 2):  # the empty leaf
        put(block, 2 * addresses * ROW // 8 + (lane >> 1), -1)
    for tree in range(TREES):
        if _change_tree(block, tree, -1) == NO_ROOM:
            return NO_ROOM
    seal(block)
    return DONE


@entry
def change(block, old, new, at):  # type: ignore[no-untyped-def]
    """Let rule `new` be where rule `old` was, at index `at` of the order; NONE for none. Returns DONE or NO_ROOM.

    After NO_ROOM the order has changed, and the trees have not quite: they must be made anew.
    """
    order, count = load64(block + ORDER), load64(block + COUNT)
    if old == NONE:
        for i in range(count, at, -1):
            store32(order + 4 * i, load32(order + 4 * i - 4))
        store64(block + COUNT, count + 1)
    if new == NONE:
        for i in range(at, count - 1):
            store32(order + 4 * i, load32(order + 4 * i + 4))
        store64(block + COUNT, count - 1)
    else:
        store32(order + 4 * at, new)
    result = DONE
    if old != NONE and new != NONE and tree_of(block, old) == tree_of(block, new):
        result = _change_tree(block, tree_of(block, new), new << 32 | old)
    else:
        if new != NONE:
            result = _change_tree(block, tree_of(block, new), new << 32 | NONE)
        if old != NONE and result == DONE:
            result = _change_tree(block, tree_of(block, old), NONE << 32 | old)
    seal(block)
    return result


@entry
def index(block, priority):  # type: ignore[no-untyped-def]
    """The index in the order of the first rule of at least this priority."""
    order, first, last = load64(block + ORDER), 0, load64(block + COUNT)
    while first < last:
        middle = (first + last) >> 1
        if priority_of(block, load32(order + 4 * middle)) < priority:
            first = middle + 1
        else:
            last = middle
    return first
