"""A cable between two ports in memory: what one sends, the other receives. And a bad cable, for what tests seek.

It is at the far ends (`libfp.ports.memory.Wire`): it takes what has been sent, copies it to a frame that the receiving
port has offered, and gives the sent one back. As on a wire, nobody waits: what finds no frame or no room is lost, and
counted. The tester's loop drives it, so that there is no other thread; either port may be one of another application.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from libfp.errors import BadInput
from libfp.gen import pacing
from libfp.gen.arrivals import add
from libfp.gen.pacing import fill, price
from libfp.jit import (
    Arena,
    copy,
    copy64,
    kernel,
    load8,
    load32,
    load64,
    load_acquire32,
    store8,
    store64,
    store_release32,
    u32,
)
from libfp.ports.memory import HEADROOM, MemoryPort
from libfp.ports.rings import RingAddresses

#: Words: a bucket; the four rings, with producer, consumer, descriptors and mask of each; the two memories.
TX, COMPLETION, FILL, RX = 64, 96, 128, 160
PRODUCER, CONSUMER, DESCS, MASK = range(0, 32, 8)
FROM, TO, FRAME_SIZE, LIMITED, FROM_STRIDE = range(192, 232, 8)
#: What goes wrong: one packet of so many, 0: none; how many packets a delayed one is overtaken by.
DROP, DUPLICATE, CORRUPT, DELAY, OVERTAKEN = range(256, 296, 8)
#: What went by, and what was lost: by intent, for want of room, above the capacity.
CARRIED, DROPPED, NO_ROOM, OVER = range(320, 352, 8)
PASSED, HELD, HELD_LENGTH, HELD_FOR, NEXT_RX, NEXT_FILL = range(352, 400, 8)
SIZE = 448
BATCH = 64
COUNTERS = {"carried": CARRIED, "dropped": DROPPED, "no_room": NO_ROOM, "over_capacity": OVER}


@kernel
def offered(cable):  # type: ignore[no-untyped-def]
    """A frame that the receiving port has offered, as an offset; -1 if there is none, or no room on its ring."""
    following = load64(cable + NEXT_FILL)
    waiting = u32(load64(cable + NEXT_RX) - load_acquire32(load64(cable + RX + CONSUMER)))
    waiting += int(load64(cable + HELD) >= 0)
    if following == load_acquire32(load64(cable + FILL + PRODUCER)) or waiting > load64(cable + RX + MASK):
        add(cable + NO_ROOM, 1)
        return -1
    store64(cable + NEXT_FILL, u32(following + 1))
    return load64(load64(cable + FILL + DESCS) + 8 * (following & load64(cable + FILL + MASK)))


@kernel
def deliver(cable, frame, length):  # type: ignore[no-untyped-def]
    """Put a frame on the receiving port's ring, which has room: no more are taken than there is room for, but one."""
    following = load64(cable + NEXT_RX)
    desc = load64(cable + RX + DESCS) + 16 * (following & load64(cable + RX + MASK))
    store64(desc, frame)
    store64(desc + 8, length)
    store64(cable + NEXT_RX, u32(following + 1))
    add(cable + CARRIED, 1)


@kernel
def put(cable, source, length):  # type: ignore[no-untyped-def]
    """Copy a packet to a frame that was offered; its offset, -1: it is lost."""
    if length > load64(cable + FRAME_SIZE) - HEADROOM:
        add(cable + NO_ROOM, 1)
        return -1
    frame = offered(cable)
    if frame >= 0:
        target, at = load64(cable + TO) + frame + HEADROOM, 0
        whole = load64(cable + FROM_STRIDE) - (source - load64(cable + FROM) & load64(cable + FROM_STRIDE) - 1)
        while at < length and at + 64 <= whole:  # lines, which both frames have behind the packet, too
            copy64(target + at, source + at)
            at += 64
        if at < length:
            copy(target + at, source + at, length - at)
        return frame + HEADROOM
    return -1


@kernel
def one_in(cable, which):  # type: ignore[no-untyped-def]
    """Whether it is this packet's turn to have this happen to it."""
    every = load64(cable + which)
    return every > 0 and load64(cable + PASSED) % every == 0


@kernel
def carry_badly(cable, source, length):  # type: ignore[no-untyped-def]
    """One packet, over a cable with faults."""
    add(cable + PASSED, 1)
    if one_in(cable, DROP):
        add(cable + DROPPED, 1)
        return
    frame = put(cable, source, length)
    if frame < 0:
        return
    if one_in(cable, CORRUPT):
        at = load64(cable + TO) + frame + length - 3
        store8(at, load8(at) ^ 0x10)
    if one_in(cable, DELAY) and load64(cable + HELD) < 0:
        store64(cable + HELD, frame)
        store64(cable + HELD_LENGTH, length)
        store64(cable + HELD_FOR, load64(cable + OVERTAKEN))
        return
    deliver(cable, frame, length)
    if one_in(cable, DUPLICATE):
        again = put(cable, source, length)
        if again >= 0:
            deliver(cable, again, length)
    if load64(cable + HELD) >= 0:
        store64(cable + HELD_FOR, load64(cable + HELD_FOR) - 1)
        if load64(cable + HELD_FOR) == 0:
            deliver(cable, load64(cable + HELD), load64(cable + HELD_LENGTH))
            store64(cable + HELD, -1)


@kernel
def passes(cable, length):  # type: ignore[no-untyped-def]
    """Whether a packet is within what the cable carries in a second."""
    left = load64(cable + pacing.CREDIT) - price(cable, length)
    if left < 0:
        add(cable + OVER, 1)
        return False
    store64(cable + pacing.CREDIT, left)
    return True


@kernel
def carry(cable, now):  # type: ignore[no-untyped-def]
    """Carry what has been sent, a burst at most."""
    first = load32(load64(cable + TX + CONSUMER))
    count = min(u32(load_acquire32(load64(cable + TX + PRODUCER)) - first), BATCH)
    if count == 0:
        return
    limited, bad = load64(cable + LIMITED), 0
    if limited != 0:
        fill(cable, now)
    for which in range(DROP, OVERTAKEN, 8):
        bad |= load64(cable + which)
    sent, tx_mask, base = load64(cable + TX + DESCS), load64(cable + TX + MASK), load64(cable + FROM)
    done, done_mask = load64(cable + COMPLETION + DESCS), load64(cable + COMPLETION + MASK)
    back = load32(load64(cable + COMPLETION + PRODUCER))
    for i in range(count):
        desc = sent + 16 * ((first + i) & tx_mask)
        frame, length = load64(desc), load32(desc + 8)
        if limited == 0 or passes(cable, length):
            if bad != 0:
                carry_badly(cable, base + frame, length)
            else:
                copied = put(cable, base + frame, length)
                if copied >= 0:
                    deliver(cable, copied, length)
        store64(done + 8 * ((back + i) & done_mask), frame)
    store_release32(load64(cable + FILL + CONSUMER), load64(cable + NEXT_FILL))
    store_release32(load64(cable + RX + PRODUCER), load64(cable + NEXT_RX))
    store_release32(load64(cable + TX + CONSUMER), u32(first + count))
    store_release32(load64(cable + COMPLETION + PRODUCER), u32(back + count))


@dataclass
class Cable:
    """From what `source` sends to what `target` receives; both in memory, and perhaps the same: a loop.

    drop, duplicate, corrupt, delay: each k-th packet, counted from the first, is lost, comes twice, has a bit changed,
    is overtaken by `overtaken` others. capacity: packets a second that pass; what comes beyond a burst of 64 is lost.
    `counters` says what went by. Raises BadInput.
    """

    source: MemoryPort
    target: MemoryPort
    drop: int = 0
    duplicate: int = 0
    corrupt: int = 0
    delay: int = 0
    overtaken: int = 1
    capacity: float = 0

    def __post_init__(self) -> None:
        if min(self.drop, self.duplicate, self.corrupt, self.delay) < 0 or self.overtaken < 1:
            raise BadInput("a fault every so many packets", "0 for none, or a number above; overtaken by 1 or more")
        self._arena: Arena | None = None

    def connect(self, hz: int, queue: int = 0) -> int:
        """Fix it to the far ends of the two ports, which have been opened; the address that `carry` wants."""
        near, far = self.source.wires[queue], self.target.wires[queue]
        self.close()
        self._arena = Arena(SIZE)
        at = self._arena.address
        for where, ring in ((TX, near.tx), (COMPLETION, near.completion), (FILL, far.fill), (RX, far.rx)):
            self._ring(at + where, ring)
        values: dict[int, Any] = {
            FROM: near.frames.address,
            FROM_STRIDE: near.frames.frame_size,
            TO: far.frames.address,
            FRAME_SIZE: far.frames.frame_size,
            DROP: self.drop,
            DUPLICATE: self.duplicate,
            CORRUPT: self.corrupt,
            DELAY: self.delay,
            OVERTAKEN: self.overtaken,
            HELD: -1,
            LIMITED: int(self.capacity > 0),
            NEXT_RX: load32(far.rx.producer),
            NEXT_FILL: load32(far.fill.consumer),
        }
        for offset, value in values.items():
            store64(at + offset, value)
        pacing.set_rate(at, hz, pps=self.capacity)
        return at

    def begin(self, now: int) -> None:
        """A test begins: what the cable may carry at once is as much as it can be."""
        if self._arena is not None:
            store64(self._arena.address + pacing.LAST, now)
            store64(self._arena.address + pacing.CREDIT, load64(self._arena.address + pacing.DEPTH))

    @staticmethod
    def _ring(at: int, ring: RingAddresses) -> None:
        for offset, value in ((PRODUCER, ring.producer), (CONSUMER, ring.consumer), (DESCS, ring.descs)):
            store64(at + offset, value)
        store64(at + MASK, ring.size - 1)

    @property
    def counters(self) -> dict[str, int]:
        """`carried`, `dropped` (by intent), `no_room`, `over_capacity`."""
        if self._arena is None:
            return dict.fromkeys(COUNTERS, 0)
        return {name: load64(self._arena.address + offset) for name, offset in COUNTERS.items()}

    def close(self) -> None:
        """Take it away; no loop may drive it any more."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None
