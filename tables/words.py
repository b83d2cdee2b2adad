"""The words of a table: an arena, the log of every store into it, and the reuse of what was freed.

A table's update code is compiled and keeps everything it needs in a control block, 4 KiB of control-plane memory.
`put` stores a word into the master's arena and appends (offset, value) to the log; `seal` ends a transaction, the
stretch of words that a worker applies whole between two bursts. `allocate` and `free` manage blocks of words inside
the arena; a block that was freed is handed out again only once every worker has acknowledged the change that freed
it: until then it waits in limbo.

Offsets count 64-bit words from the arena's beginning. Offset 0 is never a block.
"""

from __future__ import annotations

from collections.abc import Iterable

from libfp.jit import Arena, kernel, load32, load64, store32, store64
from libfp.jit.memory import HUGE_PAGE, PAGE

#: Most words of a transaction: what a worker may have to apply between two bursts.
BUDGET = 512
#: Room in the log, in elements of 16 bytes. A change longer than that reaches replicas as a fresh copy.
LOG_ROOM = 1 << 16
#: In the log, the offset of a transaction's header; its value is the number of words that follow.
HEADER = -1

# The control block: byte offsets of its fields.
BASE, SIZE, USED = 0, 8, 16  # the arena's address; its words; words handed out so far, from the beginning
LOG, ROOM, LOGGED, OPEN, LOST = 24, 32, 40, 48, 56  # elements logged; the open header or -1; 1: the log overflowed
LINKS, LIMBO, LIMBO_HEAD, LIMBO_TAIL = 64, 72, 80, 88
VERSION, SAFE = 96, 104  # commits so far; the latest of them that every worker has acknowledged
_FREE = 128  # heads of the lists of free blocks, by size
TABLE = 2048  # what follows is the table's own

_LIMBO_SIZE = 1 << 20
_PAGE_WORDS = PAGE // 8
_CHUNK = 1 << 17  # words copied at a time: what fits the cache


@kernel
def put(block, offset, value):  # type: ignore[no-untyped-def]
    """Store `value` in word `offset` of the master, and log it."""
    store64(load64(block + BASE) + 8 * offset, value)
    used = load64(block + LOGGED)
    if used + 2 > load64(block + ROOM):
        store64(block + LOST, 1)
        return
    log = load64(block + LOG)
    if load64(block + OPEN) < 0:
        store64(block + OPEN, used)
        store64(log + 16 * used, HEADER)
        used += 1
    store64(log + 16 * used, offset)
    store64(log + 16 * used + 8, value)
    store64(block + LOGGED, used + 1)


@kernel
def get(block, offset):  # type: ignore[no-untyped-def]
    """Word `offset` of the master."""
    return load64(load64(block + BASE) + 8 * offset)


@kernel
def seal(block):  # type: ignore[no-untyped-def]
    """End the open transaction, if there is one: the table is right as it stands."""
    header = load64(block + OPEN)
    if header >= 0:
        store64(load64(block + LOG) + 16 * header + 8, load64(block + LOGGED) - header - 1)
        store64(block + OPEN, -1)


@kernel
def fit(block, words):  # type: ignore[no-untyped-def]
    """Seal if `words` more would make the open transaction too long. Only where the table is right as it stands."""
    header = load64(block + OPEN)
    if header >= 0 and load64(block + LOGGED) - header - 1 + words > BUDGET:
        seal(block)


@kernel
def rounded(words):  # type: ignore[no-untyped-def]
    """The size of the block that `allocate` gives for `words`."""
    return words if words <= 16 else (words + 7) & ~7


@kernel
def allocate(block, words):  # type: ignore[no-untyped-def]
    """The offset of a block of `words` (at most 136) words, or 0 if there is no room. Its content is undefined."""
    size = rounded(words)
    _reclaim(block, 4)
    for attempt in range(2):
        found = load64(block + _FREE + 8 * size)
        if found:
            store64(block + _FREE + 8 * size, load32(load64(block + LINKS) + 4 * found))
            return found
        found = load64(block + USED)
        if found + size <= load64(block + SIZE):
            store64(block + USED, found + size)
            return found
        if attempt == 0:
            _reclaim(block, _LIMBO_SIZE)
    return 0


@kernel
def free(block, offset, words):  # type: ignore[no-untyped-def]
    """Give a block back; it is reused after every worker has acknowledged the change being made."""
    tail = load64(block + LIMBO_TAIL)
    if tail - load64(block + LIMBO_HEAD) == _LIMBO_SIZE:
        _reclaim(block, _LIMBO_SIZE)
        if tail - load64(block + LIMBO_HEAD) == _LIMBO_SIZE:
            return  # lost until the table is rebuilt; no worker is a million changes behind
    slot = load64(block + LIMBO) + 16 * (tail & (_LIMBO_SIZE - 1))
    store64(slot, (rounded(words) << 32) | offset)
    store64(slot + 8, load64(block + VERSION) + 1)
    store64(block + LIMBO_TAIL, tail + 1)


@kernel
def _reclaim(block, most):  # type: ignore[no-untyped-def]
    head, tail = load64(block + LIMBO_HEAD), load64(block + LIMBO_TAIL)
    safe, links = load64(block + SAFE), load64(block + LINKS)
    while head < tail and most > 0:
        slot = load64(block + LIMBO) + 16 * (head & (_LIMBO_SIZE - 1))
        if load64(slot + 8) > safe:
            break
        size, offset = load64(slot) >> 32, load64(slot) & 0xFFFFFFFF
        store32(links + 4 * offset, load64(block + _FREE + 8 * size))
        store64(block + _FREE + 8 * size, offset)
        head += 1
        most -= 1
    store64(block + LIMBO_HEAD, head)


class Words:
    """The arena, log and control block of one generation of a table. `size` and `reserved` count 64-bit words.

    The first `reserved` words are the table's to lay out; the rest is for `allocate`. All memory is reserved in full
    and populated by use.
    """

    def __init__(self, size: int, reserved: int) -> None:
        self.size = size
        self.arena = _arena(size)
        self._log = Arena(16 * LOG_ROOM)
        self._control = Arena(PAGE)
        self.block = self._control.address
        self._memory = [self.arena, self._log, self._control]
        self.fields = self._control.buffer.cast("q")
        self._set(BASE, self.arena.address)
        self._set(SIZE, size)
        self._set(USED, reserved)
        self._set(LOG, self._log.address)
        self._set(OPEN, -1)
        if reserved < size:
            self._set(LINKS, self.extra(4 * size))
            self._set(LIMBO, self.extra(16 * _LIMBO_SIZE))

    def _set(self, field: int, value: int) -> None:
        self.fields[field // 8] = value

    def extra(self, size: int) -> int:
        """The address of `size` more bytes of control-plane memory, freed with the rest."""
        self._memory.append(Arena(size, huge=size >= 16 * HUGE_PAGE))
        return self._memory[-1].address

    @property
    def used(self) -> int:
        """Words handed out, from the beginning of the arena: what a copy must hold."""
        return self.fields[USED // 8]

    @property
    def logged(self) -> int:
        """Elements in the log."""
        return self.fields[LOGGED // 8]

    @property
    def lost(self) -> bool:
        """The log overflowed: replicas need a fresh copy."""
        return self.fields[LOST // 8] != 0

    @property
    def log(self) -> int:
        """The address of the log: elements of 16 bytes, (HEADER, count) or (offset, value)."""
        return self._log.address

    @property
    def version(self) -> int:
        """How many changes have been committed."""
        return self.fields[VERSION // 8]

    def log_changes(self, wanted: bool) -> None:
        """Whether anybody wants the log."""
        self._set(ROOM, LOG_ROOM if wanted else 0)

    def committed(self) -> None:
        """The log has been handed over: empty it, and count the change."""
        fields = self.fields
        fields[LOGGED // 8] = fields[LOST // 8] = 0
        fields[VERSION // 8] += 1

    def acknowledged(self, version: int) -> None:
        """What changes up to `version` freed may be used again."""
        self._set(SAFE, version)

    def copy(self, extents: Iterable[tuple[int, int]]) -> Arena:
        """A fresh arena with the same words from and to these. Pages of zeros stay unpopulated."""
        arena = _arena(self.size)
        for begin, end in extents:
            source, target = self.arena.words[:end], arena.words[:end]
            for at in range(begin, end, _CHUNK):
                part = source[at : at + _CHUNK]
                whole = len(part) // _PAGE_WORDS * _PAGE_WORDS
                pages = part[:whole].reshape(-1, _PAGE_WORDS)
                used = pages.any(axis=1)
                target[at : at + whole].reshape(-1, _PAGE_WORDS)[used] = pages[used]
                target[at + whole : at + len(part)] = part[whole:]
        return arena

    def close(self) -> None:
        """Free all memory."""
        self.fields.release()
        for arena in self._memory:
            arena.close()


def _arena(size: int) -> Arena:
    return Arena(8 * size, huge=8 * size >= HUGE_PAGE // 2)
