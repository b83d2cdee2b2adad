"""Where things are in `libfp.tables.acl`: headers, rules, leaves, and the entries that lead to them.

A header or rule has A dwords of addresses (2 for IPv4, 8 for IPv6: source, then destination), one of ports (source
port in the upper half) and one more, `meta`: protocol (8 bits), TCP flags (8), ports are there (1), interface (15).
Headers are as on the wire. A rule is a record of u32 in host order: a value and a mask for each dword of addresses, the
lowest and the highest ports, value and mask of meta; then its priority, and the number that it stands for.

    leaf     8 rules side by side: a row of 8 u32 for each u32 of a record, as the header has them but for the ports
             (host order); then a row of 8 words (priority << 32 | number). A negative word links to the next leaf
    node     2**width entries of 4 bytes
    entry    (where << WHERE | field << 8 | shift << 3 | code): a node whose children are told by the `width` = code + 1
             bits of dword `field` from bit `shift` on; a leaf if the code is 0. Entry 0 is the empty leaf
"""

from __future__ import annotations

from libfp.jit import bswap32, kernel, load32, load32be, load64, ult64

LANES = 8
ROW = 4 * LANES
TREES = 4
MISS = 0x7FFFFFFF_00000000
ANY_PORTS = 0xFFFFFFFF
#: Bits of meta.
PROTOCOL_AT, FLAGS_AT = 24, 16
HAS_PORTS, INTERFACE = 0x8000, 0x7FFF


# Python calls these; `rows` and so on below are for compiled code: called from Python those would be compiled for it.
def row_count(addresses: int) -> int:
    """How many u32 of a record a leaf has."""
    return 2 * addresses + 4


def record_size(addresses: int) -> int:
    """Bytes of a rule's record."""
    return 4 * (2 * addresses + 6)


def unit_size(addresses: int) -> int:
    """Bytes that `where` of an entry counts: what nodes and leaves are aligned to."""
    return 64 if addresses == 2 else 128


def where_bit(addresses: int) -> int:
    """The bit at which `where` begins: there are 4 or 10 dwords to tell apart below it."""
    return 10 if addresses == 2 else 12


def leaf_size(addresses: int) -> int:
    """Bytes of a leaf, in whole units."""
    size = ROW * (2 * addresses + 4) + 8 * LANES
    return size + 63 & -64 if addresses == 2 else size + 127 & -128


rows, record, unit = kernel(row_count), kernel(record_size), kernel(unit_size)
where_at, leaf_bytes = kernel(where_bit), kernel(leaf_size)


@kernel
def place(addresses, entry):  # type: ignore[no-untyped-def]
    """Where the node or leaf of an entry is, in bytes from the arena's beginning."""
    return (entry >> where_at(addresses)) * unit(addresses)


@kernel
def matches(leaf, addresses, lane, at, ports, meta):  # type: ignore[no-untyped-def]
    """Whether a header matches the rule in a lane of the leaf at address `leaf`: see `find` for the rest."""
    leaf += 4 * lane
    for i in range(addresses):
        if (load32(at + 4 * i) ^ load32(leaf + 2 * ROW * i)) & load32(leaf + 2 * ROW * i + ROW):
            return False
    leaf += 2 * ROW * addresses
    lowest, highest = load32(leaf), load32(leaf + ROW)
    if (ports >> 16) < (lowest >> 16) or (ports >> 16) > (highest >> 16):
        return False
    if (ports & 0xFFFF) < (lowest & 0xFFFF) or (ports & 0xFFFF) > (highest & 0xFFFF):
        return False
    return (bswap32(meta) ^ load32(leaf + 2 * ROW)) & load32(leaf + 3 * ROW) == 0


@kernel
def scan(base, leaf, addresses, at, ports, meta):  # type: ignore[no-untyped-def]
    """The word of the first rule in a chain of leaves, from byte offset `leaf` on, that a header matches, or MISS."""
    while True:
        word = MISS
        for lane in range(LANES):
            if matches(base + leaf, addresses, lane, at, ports, meta):
                word = load64(base + leaf + ROW * rows(addresses) + 8 * lane)
                break
        if word >= 0:
            return word
        leaf = -word


@kernel
def find(base, addresses, at, ports, meta):  # type: ignore[no-untyped-def]
    """The word of the first rule that a header matches, or MISS.

    Its addresses are at address `at`, as on the wire; its ports and meta are in host order.
    """
    best = MISS
    for tree in range(TREES):
        entry = load64(base + leaf_bytes(addresses) + 8 * tree)
        while entry & 7:
            field = (entry >> 8) & ((1 << (where_at(addresses) - 8)) - 1)
            dword = load32be(at + 4 * field) if field < addresses else (ports if field == addresses else meta)
            index = (dword >> ((entry >> 3) & 31)) & ((2 << (entry & 7)) - 1)
            entry = load32(base + place(addresses, entry) + 4 * index)
        if entry:
            word = scan(base, place(addresses, entry), addresses, at, ports, meta)
            if ult64(word, best):
                best = word
    return best
