"""How a node of the trees of `libfp.tables.acl` is cut: which bits tell its children apart, and which rules each has.

All rules are records in control-plane memory (see `acl_layout`), and a list of rules is an array of their numbers (u32)
by priority.

A region is what is known of the headers that reach a node: for each dword, the mask of bits that are the same for all
of them; and the lowest and highest ports that they have. A rule covers a region when all headers there match it: no
rule after it is of any use there.

A cut is (field << 16 | shift << 8 | width).
"""

from __future__ import annotations

from libfp.jit import copy, kernel, load32, load64, mul64, shr64, store32, store64
from libfp.tables.acl_layout import record, rows
from libfp.tables.words import TABLE

#: Fields in the control block: dwords of addresses, the rules, their numbers by priority, how many these are; the tree
#: of each class of rules (2 bits each); how often a rule may be in a tree, on average; memory for lists.
ADDRESSES, RULES, ORDER, COUNT, CLASSES, COPIES, STACK, STACK_END = (TABLE + 8 * i for i in range(8))

NONE = 0xFFFFFFFF
WIDEST = 8
REGION = 160  # bytes: the masks of up to 12 dwords, then the lowest and highest source port and destination port
PORTS = 128
#: Bytes of a child in the making: the first of those with the same list (-1: not to be made), the address of the list,
#: how many rules that has, its hash; later the second is the child's entry.
CHILD = 32
_SAMPLE = 256  # rules of a list that are looked at


@kernel
def rule_at(block, number):  # type: ignore[no-untyped-def]
    return load64(block + RULES) + number * record(load64(block + ADDRESSES))


@kernel
def priority_of(block, number):  # type: ignore[no-untyped-def]
    """The priority of a rule."""
    return load32(rule_at(block, number) + 4 * rows(load64(block + ADDRESSES)))


@kernel
def tree_of(block, number):  # type: ignore[no-untyped-def]
    """In which tree a rule is: that depends on whether its source and destination are short prefixes."""
    at, addresses = rule_at(block, number), load64(block + ADDRESSES)
    bits = 0xFF000000 if addresses == 2 else 0xFFFF0000
    short = 0 if load32(at + 4) & bits == bits else 1
    short |= 0 if load32(at + 4 * addresses + 4) & bits == bits else 2
    return (load64(block + CLASSES) >> (2 * short)) & 3


@kernel
def _ports(at, addresses, shift):  # type: ignore[no-untyped-def]
    """The first and the last of a rule's ports, without the low bits that a cut leaves out."""
    half, shift = shift & 16, shift & 15
    first = ((load32(at + 8 * addresses) >> half) & 0xFFFF) >> shift
    return first, ((load32(at + 8 * addresses + 4) >> half) & 0xFFFF) >> shift


@kernel
def _span(block, number, cut):  # type: ignore[no-untyped-def]
    """(first << 8 | last) of the children that a rule reaches, when they are one after another; or -1."""
    at, addresses = rule_at(block, number), load64(block + ADDRESSES)
    field, shift, full = cut >> 16, (cut >> 8) & 0xFF, (1 << (cut & 0xFF)) - 1
    if field == addresses:
        first, last = _ports(at, addresses, shift)
        if last - first >= full:
            return full
        return (first & full) << 8 | (last & full) if first & full <= last & full else -1
    known = (load32(at + 8 * field + 4) >> shift) & full
    first, unknown = (load32(at + 8 * field) >> shift) & known, known ^ full
    return first << 8 | first | unknown if unknown & (unknown + 1) == 0 else -1


@kernel
def _reaches(block, number, cut, index):  # type: ignore[no-untyped-def]
    """Whether a header that matches the rule may be in child `index`."""
    at, addresses = rule_at(block, number), load64(block + ADDRESSES)
    field, shift, full = cut >> 16, (cut >> 8) & 0xFF, (1 << (cut & 0xFF)) - 1
    if field == addresses:
        first, last = _ports(at, addresses, shift)
        if last - first >= full:
            return True
        first, last = first & full, last & full
        return first <= index <= last if first <= last else index >= first or index <= last
    return ((load32(at + 8 * field) >> shift) ^ index) & (load32(at + 8 * field + 4) >> shift) & full == 0


@kernel
def _covers(block, number, region):  # type: ignore[no-untyped-def]
    at, addresses = rule_at(block, number), load64(block + ADDRESSES)
    for i in range(addresses + 2):
        if i != addresses and load32(at + 8 * i + 4) & ~load64(region + 8 * i):
            return False
    lowest, highest = load32(at + 8 * addresses), load32(at + 8 * addresses + 4)
    return (
        lowest >> 16 <= load64(region + PORTS)
        and load64(region + PORTS + 8) <= highest >> 16
        and lowest & 0xFFFF <= load64(region + PORTS + 16)
        and load64(region + PORTS + 24) <= highest & 0xFFFF
    )


@kernel
def narrow(block, region, child, cut, first, last):  # type: ignore[no-untyped-def]
    """At `child`, the region of a node's children `first` to `last` together."""
    copy(child, region, REGION)
    field, shift, width = cut >> 16, (cut >> 8) & 0xFF, cut & 0xFF
    at = child + 8 * field
    store64(at, load64(at) | ((1 << width) - 1) << shift)
    if field == load64(block + ADDRESSES):
        ports, shift = child + PORTS + (0 if shift & 16 else 16), shift & 15
        lowest, highest = load64(ports), load64(ports + 8)
        if lowest >> (shift + width) == highest >> (shift + width):
            above = lowest >> (shift + width) << width
            store64(ports, max(lowest, (above | first) << shift))
            store64(ports + 8, min(highest, (((above | last) + 1) << shift) - 1))


@kernel
def _listed(block, at, count, cut, index, region, to):  # type: ignore[no-untyped-def]
    """At `to`, those of a list of rules that are of use in a child of that region. Returns how many they are."""
    made = 0
    for i in range(count):
        number = load32(at + 4 * i)
        if _reaches(block, number, cut, index):
            store32(to + 4 * made, number)
            made += 1
            if _covers(block, number, region):
                break
    return made


@kernel
def _width(block, field, shift, widest):  # type: ignore[no-untyped-def]
    """How wide a cut at this bit may be."""
    return min(widest, 16 - (shift & 15)) if field == load64(block + ADDRESSES) else min(widest, 32 - shift)


@kernel
def _price(block, at, count, step, cut, tally, room):  # type: ignore[no-untyped-def]
    """What a cut costs, by every `step`-th rule of a list; -1.0 if it does not help, or lists more than `room` rules.

    That is the length of the list that the rules of a child find there, on average, with something on top for copies of
    rules and for wide nodes.
    """
    width = cut & 0xFF
    for i in range((1 << width) + 1):
        store64(tally + 8 * i, 0)
    asked = 0
    for i in range(0, count, step):
        asked += 1
        span = _span(block, load32(at + 4 * i), cut)
        first, last = (span >> 8, span & 0xFF) if span >= 0 else (0, (1 << width) - 1)
        store64(tally + 8 * first, load64(tally + 8 * first) + 1)
        store64(tally + 8 * last + 8, load64(tally + 8 * last + 8) - 1)
    here = total = squares = 0
    for i in range(1 << width):
        here += load64(tally + 8 * i)
        total += here
        squares += here * here
    if squares * 100 > 93 * total * asked or total * step > room:
        return -1.0
    return squares / total * (total / asked) ** 0.25 * (1 + width / 50)


@kernel
def choose(block, at, count, region, tally, room):  # type: ignore[no-untyped-def]
    """The best cut for a list of rules, 0 if there is none."""
    addresses = load64(block + ADDRESSES)
    step = max(1, count // _SAMPLE)
    widest = 2
    while widest < WIDEST and 1 << widest < 4 * count:
        widest += 1
    best, price = 0, -1.0
    for field in range(addresses + 2):
        told, first = 0, rule_at(block, load32(at)) + 8 * field
        for i in range(0, count, step):
            one = rule_at(block, load32(at + 4 * i)) + 8 * field
            told |= (load32(one) ^ load32(first)) | (load32(one + 4) ^ load32(first + 4))
        if told == 0:
            continue
        for shift in range(31):
            for width in range(2, _width(block, field, shift, widest) + 1):
                bits = ((1 << width) - 1) << shift
                if load64(region + 8 * field) & bits or (field != addresses and told & bits == 0):
                    continue
                cut = field << 16 | shift << 8 | width
                mine = _price(block, at, count, step, cut, tally, room)
                if mine >= 0 and (price < 0 or mine < price):
                    best, price = cut, mine
    return best


@kernel
def _hash(at, count):  # type: ignore[no-untyped-def]
    value = count
    for i in range(count):
        value = mul64(value ^ load32(at + 4 * i), -0x61C8864680B583EB)
        value ^= shr64(value, 29)
    return value


@kernel
def _same(one, other, count):  # type: ignore[no-untyped-def]
    at = 0
    while at < count and load32(one + 4 * at) == load32(other + 4 * at):
        at += 1
    return at == count


@kernel
def split(block, at, count, cut, region, made, inner, top, changed):  # type: ignore[no-untyped-def]
    """Make the lists of a node's children, at address `top` and on; returns where they end, or -1 if out of room.

    `made` are the children in the making; `inner` has room for a region. If `changed` is not -1, it is two numbers of
    rules (one << 32 | other, NONE for none): children in which neither is of use are not to be made.
    """
    one, other = shr64(changed, 32), changed & 0xFFFFFFFF
    for index in range(1 << (cut & 0xFF)):
        child = made + CHILD * index
        store64(child, -1)
        if changed != -1:
            reached = one != NONE and _reaches(block, one, cut, index)
            if not reached and not (other != NONE and _reaches(block, other, cut, index)):
                continue
        if top + 4 * count > load64(block + STACK_END):
            return -1
        narrow(block, region, inner, cut, index, index)
        found = _listed(block, at, count, cut, index, inner, top)
        if changed != -1 and found:
            last = load32(top + 4 * found - 4)
            changes = priority_of(block, one if one != NONE else other)
            if priority_of(block, last) < changes and _covers(block, last, inner):
                continue
        hashed = _hash(top, found)
        store64(child, index)
        store64(child + 8, top)
        store64(child + 16, found)
        store64(child + 24, hashed)
        for i in range(index):
            before = made + CHILD * i
            alike = load64(before) == i and load64(before + 24) == hashed and load64(before + 16) == found
            if alike and _same(load64(before + 8), top, found):
                store64(child, i)
                break
        if load64(child) == index:
            top += 4 * found
    return (top + 7) & -8


@kernel
def listed_in(made, many):  # type: ignore[no-untyped-def]
    """How many rules are in the lists of a node's children together, 1 at least."""
    total = 0
    for i in range(many):
        if load64(made + CHILD * i) == i:
            total += load64(made + CHILD * i + 16)
    return max(total, 1)


@kernel
def last_of(made, many, first):  # type: ignore[no-untyped-def]
    """The last child with the list of child `first`."""
    last = first
    for i in range(first + 1, many):
        if load64(made + CHILD * i) == first:
            last = i
    return last
