"""TCP's states as Linux's nf_conntrack keeps them, who sees both directions of a connection but is neither end.

The states are those of RFC 9293 as far as an observer can tell them, the transitions those of the kernel, both by what
it documents in net/netfilter/nf_conntrack_proto_tcp.c. Of a flow, besides its state, four words:

    notes    bits, see below
    acks     the highest acknowledgement number seen, u32 each direction: a reset must not be older (RFC 5961)
    ends     the highest sequence number seen, u32 each direction: data that is not acknowledged lives less long
    last     of the latest packet: the sequence number behind it, and what it acknowledged (u32 each)
"""

from __future__ import annotations

from libfp.apps.firewall.policy import ESTABLISHED, INVALID, NEW
from libfp.jit import kernel, load8, load16be, load32, load32be, load64, store32, store64, u32, unlikely
from libfp.tables.flow_record import ASSURED, DEADLINE, FLAGS, META, NOW, TIMEOUTS, set_deadline

NONE, SYN_SENT, SYN_RECV, OPEN, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE, SYN_SENT2 = range(10)
RETRANS, UNACKNOWLEDGED = 10, 11  # timeouts
_INVALID, _IGNORE = 10, 11  # moves
SYN, SYN_ACK, FIN, ACK, RST, BAD = range(6)  # what a segment is, by its flags
REOPENED = -1  # of `tcp_packet`

NOTES, ACKS, ENDS, LAST = range(META, META + 32, 8)
_LAST_INDEX, _LAST_REPLY, _LAST = 7, 8, 15  # what the latest packet was, and its direction
_CHALLENGE, _SIMULTANEOUS, _CLOSE_INIT, SEEN_REPLY = 1 << 4, 1 << 5, 1 << 6, 1 << 7
_ACKED, _UNACKED, _BEGUN = 1 << 8, 1 << 10, 1 << 12  # and the next bit, of the other direction
_REPEATS, _REPEATED = 1 << 16, 0xFF << 16  # how often the latest ACK has come before
_WINDOW_AT = 32

# What all workers read: byte offsets of words, and of the tables below.
LOOSE, CHECKSUM, IGNORE_RST, MAX_RETRANS = range(0, 32, 8)
TCP_INDEX, TCP_MOVES = 64, 128


def _index(flags: int) -> int:
    """Of FIN 1, SYN 2, RST 4, ACK 16, URG 32: which are together in no sound segment."""
    sound = {0x02: SYN, 0x22: SYN, 0x12: SYN_ACK, 0x04: RST, 0x14: RST, 0x11: FIN, 0x31: FIN, 0x10: ACK, 0x30: ACK}
    return sound.get(flags, BAD)


INDEXES = bytes(map(_index, range(64)))
# For each direction and kind of segment: the next state for NONE, SYN_SENT, ... in order; i invalid, . ignored.
_ROWS = """
    11.....119   ii2iiiiii2   ii4466678i   3i3355778i   i888888888
    i9iiiii1i9   i2.......2   ii4466678i   i.2355778.   i888888888
"""
_NUMBERS = {"i": _INVALID, ".": _IGNORE}
_CELLS = [_NUMBERS.get(one) or int(one) for one in "".join(_ROWS.split())]
MOVES = b"".join(
    bytes(_CELLS[50 * way + 10 * index :][:10] if index < BAD else ()).ljust(16, bytes([_INVALID]))
    for way in range(2)
    for index in range(8)
)


@kernel
def before(one, two):  # type: ignore[no-untyped-def]
    """Whether sequence number `one` comes before `two`."""
    return u32(one - two) >> 31 != 0


@kernel
def expire(table, at):  # type: ignore[no-untyped-def]
    """End the flow of a record: nobody finds it any more."""
    store32(at + DEADLINE, load64(table + NOW))


@kernel
def end_of(l4, end, flags):  # type: ignore[no-untyped-def]
    """The sequence number behind a segment whose header is at `l4` and whose data ends at `end`."""
    data = end - l4 - (load8(l4 + 12) >> 4 << 2)
    return u32(load32be(l4 + 4) + data + (flags & 1) + (flags >> 1 & 1))


@kernel
def tcp_open(rules, table, at, l4, end):  # type: ignore[no-untyped-def]
    """A new flow begins with this segment: a SYN, or an ACK whose beginning nobody saw."""
    flags = load8(l4 + 13)
    index = load8(rules + TCP_INDEX + (flags & 0x37))
    timeout = state = load8(rules + TCP_MOVES + 16 * index)
    if state == OPEN:
        times = table + TIMEOUTS
        timeout = RETRANS if load64(times + 8 * OPEN) > load64(times + 8 * RETRANS) else OPEN
        if load64(times + 8 * timeout) > load64(times + 8 * UNACKNOWLEDGED):
            timeout = UNACKNOWLEDGED
    store64(at + NOTES, _BEGUN | index)
    store64(at + ENDS, end_of(l4, end, flags))
    store32(at + FLAGS, load32(at + FLAGS) & ~0xFF | state)
    set_deadline(table, at, load64(table + TIMEOUTS + 8 * timeout))


@kernel
def _sees(at, notes, way):  # type: ignore[no-untyped-def]
    """Store the notes; after a packet of the reply direction the flow has been answered."""
    store64(at + NOTES, notes | SEEN_REPLY * way)


@kernel
def _out_of_step(table, at, notes, way, index, old, new, last, ack, window):  # type: ignore[no-untyped-def]
    """A SYN or an answer to one, which says that the ends know better than we; or one that opens a closed flow again.

    The state, REOPENED, or NEW: they agree again.
    """
    if new == SYN_SENT:
        reset = notes & _LAST == RST | _LAST_REPLY * way
        if notes & _CLOSE_INIT != 0 or reset:
            expire(table, at)
            return REOPENED
    other, were = 1 - way, load64(at + LAST)
    if index == SYN_ACK and notes & _LAST == SYN | _LAST_REPLY * other and ack == were & 0xFFFFFFFF:
        kept = notes & (_CHALLENGE | _SIMULTANEOUS | SEEN_REPLY | _REPEATED)
        store64(at + NOTES, kept | _BEGUN << other | SYN | _LAST_REPLY * other)
        store32(at + ENDS + 4 * other, were)
        return NEW
    if index == SYN and way == 0:
        notes = notes & ~(_CHALLENGE | _SIMULTANEOUS) | _CHALLENGE * (old == LAST_ACK)
    store32(at + LAST, last)
    if old == SYN_SENT and index == ACK and way == 1:
        store32(at + LAST + 4, ack)
    notes = notes & ~(_LAST | 0xFFFF << _WINDOW_AT) | index | _LAST_REPLY * way | window << _WINDOW_AT
    _sees(at, notes, way)
    return ESTABLISHED


@kernel
def _reset(rules, at, notes, way, old, seq):  # type: ignore[no-untyped-def]
    """The state after a RST, or INVALID moves for one that is too old."""
    if old >= FIN_WAIT and old <= CLOSE:
        return CLOSE
    if notes & _ACKED << 1 - way == 0 or notes & _LAST_INDEX == SYN:
        return CLOSE
    acked = load32(at + ACKS + 4 * (1 - way))
    assured = old == OPEN and load32(at + FLAGS) & ASSURED != 0
    if seq == 0 and not assured:
        return CLOSE
    if before(seq, acked) and load64(rules + IGNORE_RST) == 0:
        return _INVALID
    if not assured or seq == acked:
        return CLOSE
    if notes & _LAST == ACK | _LAST_REPLY * way and seq == load32(at + LAST):
        return CLOSE
    return old  # it may be forged: the ends will tell


@kernel
def _window(at, notes, way, old, flags, index, last, ack, window):  # type: ignore[no-untyped-def]
    """What has been sent and acknowledged; the notes. Nothing is learnt of data that the other end has not sent."""
    other, end, theirs = 1 - way, load32(at + ENDS + 4 * way), load32(at + ENDS + 4 * (1 - way))
    again = flags & 2 != 0 and before(end, last) and (old in (SYN_SENT, SYN_RECV))
    if notes & _BEGUN << way == 0 or again:
        end = last
        store32(at + ENDS + 4 * way, end)
        notes = notes & ~((_ACKED | _UNACKED) << way) | _BEGUN << way
        if flags & 0x12 == 2 and (way == 1 or not again):
            return notes
        if flags & 2 == 0 and ack == u32(theirs + 1):  # likely it answers a keep-alive
            theirs = ack
            store32(at + ENDS + 4 * other, theirs)
    if flags & 16 == 0 or (ack == 0 and flags & 4 != 0):
        ack = theirs
    elif notes & _BEGUN << other == 0 or before(theirs, ack):
        return notes
    if before(end, last):
        store32(at + ENDS + 4 * way, last)
        notes |= _UNACKED << way
    if flags & 16 != 0 and (notes & _ACKED << way == 0 or before(load32(at + ACKS + 4 * way), ack)):
        store32(at + ACKS + 4 * way, ack)
        notes |= _ACKED << way
    if ack == theirs:
        notes &= ~(_UNACKED << other)
    if index == ACK:
        same = notes & _LAST_REPLY == _LAST_REPLY * way and notes >> _WINDOW_AT == window
        if same and load64(at + LAST) == last | ack << 32:
            if notes & _REPEATED != _REPEATED:
                notes += _REPEATS
        else:
            store32(at + LAST, last)
            store32(at + LAST + 4, ack)
            notes = notes & ~(_REPEATED | 0xFFFF << _WINDOW_AT) | window << _WINDOW_AT
    return notes


@kernel
def tcp_packet(rules, table, at, way, l4, end):  # type: ignore[no-untyped-def]
    """The state of connection tracking of a segment of a known flow, which learns from it; see `NOTES`.

    `at` is the flow's record, `way` 1 for the reply direction, `l4` the sound TCP header, `end` where its data ends.
    REOPENED: the flow is over, and this SYN begins another. A RST ends a flow that has had no answer, too.
    """
    flags = load8(l4 + 13)
    index = load8(rules + TCP_INDEX + (flags & 0x37))
    own = load32(at + FLAGS)
    old = own & 0xFF
    new = load8(rules + TCP_MOVES + (way << 3 | index) * 16 + (old & 15))
    notes = load64(at + NOTES)
    seen = notes & SEEN_REPLY
    state = ESTABLISHED if way | seen != 0 else NEW
    seq, ack, window = load32be(l4 + 4), load32be(l4 + 8), load16be(l4 + 14)
    last = end_of(l4, end, flags)
    if unlikely(new != OPEN):
        if new == _INVALID:
            return INVALID
        if new == _IGNORE or (new == SYN_SENT and old >= TIME_WAIT):
            told = _out_of_step(table, at, notes, way, index, old, new, last, ack, window)
            if told != NEW:
                return state if told == ESTABLISHED else told
            old, new, notes = SYN_SENT, SYN_RECV, load64(at + NOTES)
        elif new == TIME_WAIT and old == LAST_ACK and index == ACK and notes & _CHALLENGE != 0:
            if notes & _LAST == SYN | _LAST_REPLY * (1 - way):
                _sees(at, notes & ~_CHALLENGE, way)
                return state  # RFC 5961: an answer to that SYN, not to the FIN
        elif new == SYN_SENT2:
            notes |= _SIMULTANEOUS
        elif new == SYN_RECV and way == 1 and index == ACK and notes & _SIMULTANEOUS != 0:
            new = OPEN
        elif new == CLOSE and index == RST:
            new = _reset(rules, at, notes, way, old, seq)
            if new == _INVALID:
                return INVALID
    if index != RST or old < FIN_WAIT or old > CLOSE:
        notes = _window(at, notes, way, old, flags, index, last, ack, window)
    notes = notes & ~_LAST | index | _LAST_REPLY * way
    if new == FIN_WAIT and old != new:
        notes |= _CLOSE_INIT
    _sees(at, notes, way)
    times, timeout = table + TIMEOUTS, new
    ticks = load64(times + 8 * new)
    if unlikely((notes & _REPEATED) >> 16 >= load64(rules + MAX_RETRANS)) and ticks > load64(times + 8 * RETRANS):
        timeout = RETRANS
    elif index == RST:
        timeout = CLOSE
    elif notes & 3 * _UNACKED != 0 and ticks > load64(times + 8 * UNACKNOWLEDGED):
        timeout = UNACKNOWLEDGED
    elif notes >> _WINDOW_AT == 0 and ticks > load64(times + 8 * RETRANS):
        timeout = RETRANS
    ticks = load64(times + 8 * timeout)
    if seen == 0:
        if index == RST:
            store32(at + FLAGS, own & ~0xFF | new)
            expire(table, at)
            return state
        elif index == SYN and old == SYN_SENT:
            store32(at + FLAGS, own & ~0xFF | new)
            return state  # a SYN that is sent again does not let it live longer
        elif new == OPEN:
            ticks = min(ticks, load64(times + 8 * UNACKNOWLEDGED))
    elif new == OPEN and (old in (SYN_RECV, OPEN)):
        own |= ASSURED
    store32(at + FLAGS, own & ~0xFF | new)
    set_deadline(table, at, ticks)
    return state
