"""Route messages taken in by compiled code: a dump of a million routes, or a burst of notifications.

What a message says besides its prefix is its *form*: the bytes of its fixed part and its attributes. A table has few
different ones. So Python decodes each form once and numbers the route that it means; and Python decides once what a
list of routes becomes when that route is added or removed (a *move*). Compiled code walks the messages, checks every
length before it reads, and repeats for each prefix what was decided. Whatever it does not know, or does not like the
look of, it leaves to Python, and goes on behind it: so there is one decoder, and one place that knows what Linux does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from libfp.jit import (
    Arena,
    copy,
    entry,
    kernel,
    load8,
    load16,
    load32,
    load32be,
    load64,
    load64be,
    mul64,
    shl64,
    shr64,
    store32,
    store64,
)
from libfp.linux import rtnetlink as rt
from libfp.linux.netlink import NLM_F_APPEND, NLM_F_REPLACE, NLMSG_MIN_TYPE, Malformed, Message, first
from libfp.linux.prefixes import EXTRA, find, has_room, set_value, value_at
from libfp.linux.rib import Numbering, added, removed

if TYPE_CHECKING:
    from libfp.linux.state import Changes, State

DATAGRAM = 1 << 20  # the largest that is taken in, in bytes

# The control block: byte offsets of its words.
WHY, KEY, KEY_SIZE, FLAGS, FORMS, MOVES, WEIGHTS, DUMP = 0, 8, 16, 24, 32, 40, 48, 56
LOG, LOGGED, LOGGED6, OLD, ROUTE, OP = 64, 72, 80, 88, 96, 104
#: Why `take` stopped: at the end; at what is not for it; at an unknown form or move; for want of room; the log is full.
END, OTHER, FORM, MOVE, ROOM, ROOM6, FULL_LOG = range(7)

KEY_ROOM = 240  # bytes of the longest form; a route with more is Python's
_FORM, _FORM_PLACES, _MOST_FORMS = 256, 1 << 13, 1 << 12  # bytes of a form's record: its size, its route, the form
_MOVE_PLACES, _MOST_MOVES = 1 << 17, 1 << 16
LOG_ROOM = 1 << 18  # changed prefixes, in rows of 24 bytes
_IGNORED = 0xFFFFFFFF  # the route of a form that means nothing to us
_DELETE, _REPLACE, _APPEND, _PREPEND, _IPV6 = 0, 1, 2, 3, 4


@kernel
def _parse(control, at, length, bits):  # type: ignore[no-untyped-def]
    """Copy the form of the message at `at` to KEY; return the address of its destination, 0 if it has none.

    Returns -1 for a message that is Python's: a length that does not fit, two destinations, a long form.
    """
    end, size, destination = at + length, 12, 0
    key, at = load64(control + KEY), at + 16
    store64(key, load64(at) & ~0xFF00)  # the prefix length is no part of it
    store32(key + 8, load32(at + 8))
    at += 12
    while end - at >= 4:
        there, kind = load16(at), load16(at + 2) & 0x3FFF
        if there < 4 or there > end - at:
            return -1
        if kind == 1:  # RTA_DST
            if destination or there != 4 + (bits >> 3):
                return -1
            destination = at + 4
        elif kind != 12:  # RTA_CACHEINFO: the age of a route
            if size + there + 8 > KEY_ROOM:
                return -1
            store32(key + size + ((there - 1) & ~3), 0)
            copy(key + size, at, there)
            size += (there + 3) & ~3
        at += (there + 3) & ~3
    store64(key + size, 0)
    store64(control + KEY_SIZE, (size + 7) & ~7)
    return destination


@kernel
def _form(control):  # type: ignore[no-untyped-def]
    """The place of the record of the form at KEY, or the empty one where it belongs."""
    key, size, mixed = load64(control + KEY), load64(control + KEY_SIZE), 0
    for i in range(0, size, 8):
        mixed = mul64(mixed ^ load64(key + i), -0x61C8864680B583EB)
        mixed ^= shr64(mixed, 29)
    at = shr64(mul64(mixed, -0x4B47D0C5A1B4D9A3), 40) & (_FORM_PLACES - 1)
    while True:
        record = load64(control + FORMS) + at * _FORM
        if load32(record) == 0:
            return record
        if load32(record) == size:
            same = True
            for i in range(0, size, 8):
                if load64(record + 8 + i) != load64(key + i):
                    same = False
                    break
            if same:
                return record
        at = (at + 1) & (_FORM_PLACES - 1)


@kernel
def _move(control, key):  # type: ignore[no-untyped-def]
    """The place of the record of a move, or the empty one where it belongs. `key` is not 0."""
    at = shr64(mul64(key, -0x61C8864680B583EB), 40) & (_MOVE_PLACES - 1)
    while True:
        record = load64(control + MOVES) + 16 * at
        if load64(record) == 0 or load64(record) == key:
            return record
        at = (at + 1) & (_MOVE_PLACES - 1)


@kernel
def _move_key(old, route, op):  # type: ignore[no-untyped-def]
    return old << 32 | route << 4 | op << 1 | 1


@kernel
def _one(control, ipv4, ipv6, at, length):  # type: ignore[no-untyped-def]
    """Take in the route message at `at`. Returns END when it is done, else why not: then nothing has changed."""
    family = load8(at + 16)
    if family == 2:
        rib, bits = ipv4, 32
    elif family == 10:
        rib, bits = ipv6, 128
    else:
        return OTHER
    prefix = load8(at + 17)
    destination = _parse(control, at, length, bits)
    if destination < 0 or prefix > bits or (destination == 0 and prefix > 0):
        return OTHER
    record = _form(control)
    if load32(record) == 0:
        return FORM
    route = load32(record + 4)
    if route == _IGNORED:
        return END
    high, low = 0, 0
    if prefix and bits == 32:
        high = load32be(destination) & (-1 << (32 - prefix))
    elif prefix:
        high = load64be(destination)
        if prefix > 64:
            low = load64be(destination + 8) & shl64(-1, 128 - prefix)
        else:
            high &= shl64(-1, 64 - prefix)
    op = _DELETE
    if load16(at + 4) == 24:  # RTM_NEWROUTE
        flags = load16(at + 6)
        op = _PREPEND
        if load64(control + DUMP) or flags & (NLM_F_REPLACE | NLM_F_APPEND) == NLM_F_APPEND:
            op = _APPEND
        elif flags & NLM_F_REPLACE:
            op = _REPLACE
    if bits == 128:
        op |= _IPV6
    number = find(rib, high, low, prefix)
    old = value_at(rib, number) if number else 0
    move = _move(control, _move_key(old, route, op))
    if load64(move) == 0:
        store64(control + OLD, old)
        store64(control + ROUTE, route)
        store64(control + OP, op)
        return MOVE
    new = load64(move + 8)
    if new == old:
        return END
    if new < 0:
        return OTHER
    if number == 0 and not has_room(rib):
        return ROOM6 if bits == 128 else ROOM
    if load64(control + DUMP) == 0:
        if bits == 128:
            counter, log = control + LOGGED6, load64(control + LOG) + 24 * LOG_ROOM
        else:
            counter, log = control + LOGGED, load64(control + LOG)
        logged = load64(counter)
        if logged == LOG_ROOM:
            return FULL_LOG
        row = log + 24 * logged
        store64(row, high)
        store64(row + 8, low)
        store64(row + 16, prefix)
        store64(counter, logged + 1)
    set_value(rib, high, low, prefix, new)
    weights = load64(control + WEIGHTS)
    store64(rib + EXTRA, load64(rib + EXTRA) + load32(weights + 4 * new) - load32(weights + 4 * old))
    return END


@entry
def take(control, ipv4, ipv6, at, end, sequence):  # type: ignore[no-untyped-def]
    """Take in route messages from `at` to `end`; return the address of the one at which it stopped: WHY says why.

    Of a dump (DUMP is not 0) only those with its `sequence`, or all if that is negative. FLAGS gathers theirs.
    """
    why = END
    while end - at >= 16:
        length, kind = load32(at), load16(at + 4)
        if length < 28 or length > end - at or (kind != 24 and kind != 25):
            why = OTHER
            break
        if sequence >= 0 and load32(at + 8) != sequence:
            why = OTHER
            break
        why = _one(control, ipv4, ipv6, at, length)
        if why != END:
            break
        store64(control + FLAGS, load64(control + FLAGS) | load16(at + 6))
        at += (length + 3) & ~3
    store64(control + WHY, why)
    return at


@entry
def form_place(control):  # type: ignore[no-untyped-def]
    """See `_form`."""
    return _form(control)


@entry
def move_place(control, key):  # type: ignore[no-untyped-def]
    """See `_move`."""
    return _move(control, key)


class Bulk:
    """The forms and moves that are known, numbered as `numbering` has it. Of one thread at a time."""

    def __init__(self, numbering: Numbering) -> None:
        self.numbering = numbering
        self._age = numbering.age
        self._control = Arena(4096)
        self._buffer = Arena(DATAGRAM, flush_end=True)  # a datagram ends where the guard page begins
        self._forms = Arena(_FORM * _FORM_PLACES)
        self._moves = Arena(16 * _MOVE_PLACES)
        self._log = Arena(2 * 24 * LOG_ROOM)
        self._key = Arena(512)
        self._form_count = self._move_count = 0
        self._volatile = False
        self._fields = self._control.words
        self._end = self._buffer.address + self._buffer.size
        for field, arena in (
            (FORMS, self._forms), (MOVES, self._moves), (LOG, self._log), (KEY, self._key), (WEIGHTS, numbering.weights)
        ):  # fmt: skip
            self._fields[field // 8] = arena.address

    def take(
        self, state: State, datagram: memoryview, changes: Changes, dump: bool = False, sequence: int = -1
    ) -> tuple[int, list[Message]]:
        """Take in the messages of a datagram in order; the rows of what changed wait for `harvest`.

        Returns the flags of the messages, or-ed together, and the control messages (NLMSG_DONE, NLMSG_ERROR). Messages
        with another `sequence` are skipped, unless that is negative. Raises Malformed; what came before has been taken
        in then.
        """
        if self._age != self.numbering.age:
            self._age = self.numbering.age
            self._forget_forms()
            self._forget_moves()
        size, control, found = len(datagram), self._control.address, list[Message]()
        if size > self._buffer.size:
            raise Malformed(f"a netlink datagram of {size} bytes")
        view = self._buffer.buffer[self._buffer.size - size :]
        view[:] = datagram
        self._fields[DUMP // 8], self._fields[FLAGS // 8] = dump, 0
        at = self._end - size
        while True:
            at = take(control, state.rib.map.block, state.rib6.map.block, at, self._end, sequence)
            why, start = int(self._fields[WHY // 8]), at - (self._end - size)
            if why == END:
                break
            if why in (ROOM, ROOM6):
                (state.rib if why == ROOM else state.rib6).map.grow()
            elif why == FULL_LOG:
                self.harvest(changes)
            elif why == MOVE:
                self._learn_move()
            else:
                message = first(view[start:])
                if sequence < 0 or message.sequence == sequence:
                    if why == FORM:
                        self._learn_form(state, message)
                        continue
                    self._fields[FLAGS // 8] |= message.flags
                    if message.type < NLMSG_MIN_TYPE:
                        found.append(message._replace(body=memoryview(bytes(message.body))))
                    else:
                        state.apply(message, changes, dump)
                at += (16 + len(message.body) + 3) & ~3
        if at < self._end:
            raise Malformed(f"{self._end - at} bytes after the last netlink message")
        return int(self._fields[FLAGS // 8]), found

    def harvest(self, changes: Changes) -> None:
        """Move the rows of what has changed to `changes`."""
        log = self._log.words
        for field, bits, offset in ((LOGGED, 32, 0), (LOGGED6, 128, 3 * LOG_ROOM)):
            count = int(self._fields[field // 8])
            if count:
                changes.add_rows(bits, log[offset : offset + 3 * count].reshape(count, 3).copy())
                self._fields[field // 8] = 0

    def links_changed(self) -> None:
        """Which hops are dead may be another matter now."""
        if self._volatile:
            self._forget_forms()

    def _forget_forms(self) -> None:
        self._forms.words[:] = 0
        self._form_count, self._volatile = 0, False

    def _forget_moves(self) -> None:
        self._moves.words[:] = 0
        self._move_count = 0

    def _learn_form(self, state: State, message: Message) -> None:
        route, volatile = state.route_of(message)
        if self._form_count >= _MOST_FORMS:
            self._forget_forms()
        self._form_count += 1
        self._volatile = self._volatile or volatile
        size, record = int(self._fields[KEY_SIZE // 8]), form_place(self._control.address)
        for i in range(0, size, 8):
            store64(record + 8 + i, load64(self._key.address + i))
        store32(record + 4, _IGNORED if route is None else self.numbering.route(route))
        store32(record, size)

    def _learn_move(self) -> None:
        old, route, op = (int(self._fields[field // 8]) for field in (OLD, ROUTE, OP))
        if self._move_count >= _MOST_MOVES:
            self._forget_moves()
        self._move_count += 1
        before, bits = self.numbering.of(old), 128 if op & _IPV6 else 32
        what = self.numbering.routes[route]
        if op & 3 == _DELETE:
            after = removed(before, what, bits)
        else:
            after = added(before, what, (0, NLM_F_REPLACE, NLM_F_APPEND, 0)[op & 3], bits)
        local = any(one.table == rt.TABLE_LOCAL for one in (*before[:1], *after[:1]))  # `Rib` keeps a list of those
        key = old << 32 | route << 4 | op << 1 | 1  # as _move_key has it
        record = move_place(self._control.address, key)
        store64(record + 8, -1 if local else self.numbering.list(after))
        store64(record, key)
