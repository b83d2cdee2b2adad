"""The layout of `libfp.tables.flow`, and what a record is to a stage.

    control (4 KiB)   secrets of the hash, the time, counts, timeouts, a record for nobody
    wheel             see `libfp.tables.flow_wheel`
    tags              a byte each slot, eight slots a bucket: of the hash of the flow there, 0 for an empty slot
    records           one a slot, of 16 bytes and the words of the key and of the values

    a record          key: 2 words (IPv4) or 5 (IPv6)
                      deadline u32, next in the wheel u32, flags u32, created u32
                      values, a word each

A flow has one record for both directions. Its key is its two endpoints, (address, port), the lower one first, so that
a packet and its answer have the same key and the same hash; a bit remembers which endpoint began. (Two entries, one a
direction, would be needed where the answer is not the mirror image: under NAT. They cost twice the memory and, for
each new flow, twice the work.)

Words have one writer, the worker. It clears a slot's tag before it changes whose record that is, and sets it after, so
that others can tell (`copied`).
"""

from __future__ import annotations

from libfp.jit import (
    BOUNDSCHECK,
    INTERPRETED,
    kernel,
    load32,
    load64,
    load_acquire64,
    native,
    shl64,
    store32,
    store64,
    store_release64,
    u32,
    ult64,
    word,
)

TICKS = 100  # a second
LONGEST = (1 << 31) - 1  # ticks that a deadline may be ahead
WHEEL_SLOTS = 4096

# The control block: byte offsets.
SECRETS = 0
NOW, START, FACTOR = 64, 72, 80  # ticks; the clock at tick 0; ticks a unit of the clock, times 2**64
DONE, LIST = 88, 96  # of the wheel: the latest tick whose list was taken, and what is left of it (slot + 1; 0: nothing)
BUCKETS, WORDS, VALUES, RECORD, RECORDS = range(128, 168, 8)  # words of key, of values; bytes of a record; the first
COUNT, CREATED, EXPIRED, EVICTED, REMOVED, REFUSED = range(192, 240, 8)
TIMEOUTS, STATES = 256, 16  # ticks, a word for each state
NOBODY = 512  # a record that is no flow's: 16 bytes and 8 words
CONTROL = 4096
WHEEL = CONTROL
TAGS = WHEEL + 4 * WHEEL_SLOTS

# A record, from behind its key. The flags: the state in the lowest byte, and three bits.
DEADLINE, NEXT, FLAGS, CREATED_AT = 0, 4, 8, 12
META = 16
ASSURED = 1 << 8
HIGH_BEGAN = 1 << 9  # the first packet came from the higher endpoint
LINKED = 1 << 10  # the slot is in a list of the wheel

FOUND, REPLY, NEW = 1, 2, 4  # of a `FlowEntry`
_CHECKED = INTERPRETED or BOUNDSCHECK


@native
class FlowEntry:
    """A flow as a stage holds it: good until the stage makes or removes another, or returns.

    Check `found`: what is done to an entry that is no flow's reaches a record that is nobody's.
    """

    at: word  # of the record, behind the key
    table: word
    bits: word

    @property
    def found(self):  # type: ignore[no-untyped-def]
        """Whether this is a flow."""
        return self.bits & FOUND != 0

    @property
    def new(self):  # type: ignore[no-untyped-def]
        """Whether the call that returned it made it."""
        return self.bits & NEW != 0

    @property
    def reply(self):  # type: ignore[no-untyped-def]
        """Whether the packet (or tuple) goes the other way than the flow's first packet did."""
        return self.bits & REPLY != 0

    @property
    def state(self):  # type: ignore[no-untyped-def]
        """A number of yours, 0 (in a new flow) to 15, which has a timeout. Setting it leaves the deadline alone."""
        return load32(self.at + FLAGS) & 0xFF

    @state.setter
    def state(self, value):  # type: ignore[no-untyped-def]
        store32(self.at + FLAGS, load32(self.at + FLAGS) & ~0xFF | value & STATES - 1)

    @property
    def assured(self):  # type: ignore[no-untyped-def]
        """Never made to give way to a new flow. For flows that have been answered; false in a new one."""
        return load32(self.at + FLAGS) & ASSURED != 0

    @assured.setter
    def assured(self, value):  # type: ignore[no-untyped-def]
        store32(self.at + FLAGS, load32(self.at + FLAGS) & ~ASSURED | ASSURED * (value != 0))

    @property
    def age(self):  # type: ignore[no-untyped-def]
        """Ticks (of 10 ms) since it was made."""
        return u32(load64(self.table + NOW) - load32(self.at + CREATED_AT))

    def touch(self):  # type: ignore[no-untyped-def]
        """Let it live for its state's timeout from now on: one store."""
        set_deadline(self.table, self.at, load64(self.table + TIMEOUTS + 8 * self.state))

    def keep(self, seconds):  # type: ignore[no-untyped-def]
        """Let it live for so many seconds from now on (one tick at least, 248 days at most), whatever its state."""
        set_deadline(self.table, self.at, seconds * TICKS)

    def value(self, i):  # type: ignore[no-untyped-def]
        """Value word `i`, an int64. All are 0 in a new flow."""
        return load64(value_at(self.table, self.at, i))

    def set_value(self, i, value):  # type: ignore[no-untyped-def]
        """Store value word `i`."""
        store64(value_at(self.table, self.at, i), value)

    def add(self, i, by):  # type: ignore[no-untyped-def]
        """Add to value word `i`."""
        at = value_at(self.table, self.at, i)
        store64(at, load64(at) + by)

    def remove(self):  # type: ignore[no-untyped-def]
        """End the flow now."""
        if self.bits & FOUND != 0 and expired(self.table, self.at) == 0:
            forget(self.table, (self.at - load64(self.table + RECORDS)) // load64(self.table + RECORD), REMOVED)


@kernel
def value_at(table, at, i):  # type: ignore[no-untyped-def]
    """The address of value word `i` of a record; of nobody's for a word it has not (0, which faults, when checked)."""
    if ult64(i, load64(table + VALUES)) == 0:
        return 0 if _CHECKED else table + NOBODY + META
    return at + META + 8 * i


@kernel
def record_of(table, number):  # type: ignore[no-untyped-def]
    """The address of the record of a slot, behind the key."""
    return load64(table + RECORDS) + number * load64(table + RECORD)


@kernel
def expired(table, at):  # type: ignore[no-untyped-def]
    """1 if the flow of the record at `at` has reached its deadline, else 0."""
    return u32(load32(at + DEADLINE) - load64(table + NOW) - 1) >> 31


@kernel
def set_deadline(table, at, ticks):  # type: ignore[no-untyped-def]
    """Let the flow of a record expire so many ticks from now."""
    store32(at + DEADLINE, load64(table + NOW) + min(max(ticks, 1), LONGEST))


@kernel
def set_tag(table, number, tag):  # type: ignore[no-untyped-def]
    """Give a slot another tag, after everything stored before."""
    at, shift = table + TAGS + 8 * (number >> 3), (number & 7) << 3
    store_release64(at, load64(at) & ~shl64(0xFF, shift) | shl64(tag, shift))


@kernel
def count(table, which, by):  # type: ignore[no-untyped-def]
    """Add to one of the counts."""
    store64(table + which, load64(table + which) + by)


@kernel
def forget(table, number, why):  # type: ignore[no-untyped-def]
    """Empty a slot, and count why. It stays in the wheel's list until its turn comes, or serves its next flow there."""
    set_tag(table, number, 0)
    store32(record_of(table, number) + DEADLINE, load64(table + NOW))  # for who has its address still
    count(table, COUNT, -1)
    count(table, why, 1)


@kernel
def copied(table, number, to):  # type: ignore[no-untyped-def]
    """Copy a record to address `to`, from another thread than the one that writes: whether it was one flow's.

    An empty slot, and one that changed hands meanwhile, is not. Values are each as they were at some moment meanwhile.
    """
    words, values = load64(table + WORDS), load64(table + VALUES)
    at, shift = table + TAGS + 8 * (number >> 3), (number & 7) << 3
    record = record_of(table, number) - 8 * words
    before = load_acquire64(at) >> shift & 0xFF
    for i in range(words + 2 + values):
        store64(to + 8 * i, load_acquire64(record + 8 * i))
    after = load_acquire64(at) >> shift & 0xFF
    different = before ^ after
    for i in range(words):
        different |= load64(to + 8 * i) ^ load_acquire64(record + 8 * i)
    began = load_acquire64(record + 8 * words + 8)
    different |= load64(to + 8 * words + 8) >> 32 ^ began >> 32  # created: nor another flow of the same key
    return before != 0 and different == 0 and expired(table, to + 8 * words) == 0
