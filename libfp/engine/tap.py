"""Taps: what a worker shows of its packets, and of its time, while somebody looks.

A worker looks at one word of its control line a turn. It is 0 while nobody looks; else the address of a block that says
where to: rings of slots, one slot for each packet (see `libfp.engine.slots`), each with one reader, and a page in which
the clock's ticks are summed by stage and by part of the loop. A ring that has no room for a whole burst loses it, and
counts that.

The control plane makes a new block whenever a reader comes or goes and stores its address in the worker's control
line. The worker takes it over between two bursts, in a word of its own: a block that this word no longer names, or
whose worker does not run, may be given back.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from libfp.engine import slots
from libfp.engine.context import CONTROL, RECORD, TAP, Context, ContextMemory
from libfp.errors import BadInput, TableFull
from libfp.jit import (
    Arena,
    clock,
    copy,
    kernel,
    load32,
    load64,
    load_acquire32,
    load_acquire64,
    store32,
    store64,
    store_release32,
    store_release64,
    u32,
    unlikely,
)
from libfp.jit.memory import PAGE, SharedMap
from libfp.packet.burst import BURST, FIRST, KIND, LENDER, LENGTH, MARK, NEXT_HOP, VERDICT, Burst
from libfp.packet.verdict import FORWARD, KIND_SHIFT

log = logging.getLogger("libfp.tap")

# The block, written by the control plane before the worker sees it: how many rings, the address of the page of ticks
# (or 0). Then words of the worker's: the last time stamp, when the burst began, how many packets it had; and, for each
# packet in the burst, which it was when the burst came in.
_RINGS, _PAGE, _STAMP, _BEGAN, _COUNT, _ORDER = 0, 8, 16, 24, 32, 64
# Then 64 bytes for each ring: address, slots - 1, bytes a slot, bytes of a packet, stages; and, the worker's own, how
# many slots this burst has in it, and from which index on.
SCRATCH = _ORDER + 4 * BURST  # 128 bytes of the worker's, see `libfp.engine.clocked`
_FIRST, _ENTRY = SCRATCH + 128, 64
_AT, _MASK, _STRIDE, _SNAP, _STAGES, _TAKEN, _OWN = range(0, 56, 8)
MOST_RINGS = 8
_BLOCK = _FIRST + MOST_RINGS * _ENTRY

PAIR, STAGE_ROW = slots.PAIR, slots.STAGE_ROW
COUNTERS, MAILBOX, HAND_OFF, EACH_TURN, RECEIVE, CARRY_OUT, TRANSMIT, RECYCLE, SYSTEM_CALLS, IDLE = range(1, STAGE_ROW)

PATIENCE = 0.2  # seconds for a worker to let go of a block; later it is given back with the worker


@kernel
def retap(context: Context) -> int:
    """Look where the control plane wants to look, once a turn: the block there, or 0."""
    wanted = load_acquire64(load64(context.at + CONTROL) + TAP)
    if unlikely(wanted != load64(context.at + RECORD)):
        store_release64(context.at + RECORD, wanted)
    return wanted


@kernel
def showing(context: Context) -> int:
    """The block by which packets are shown; 0 where there is none, or where it is but for the clock."""
    record = load64(context.at + RECORD)
    if unlikely(record != 0) and load64(record + _RINGS) == 0:
        return 0
    return record


@kernel
def tap_begin(tap: int, burst: Burst) -> None:
    """A burst has come in: a slot for each of its packets in each ring."""
    if load64(burst.at + LENDER) != 0:  # it came by a lane
        tap_charge(tap, HAND_OFF, tap_lap(tap), burst.count)
    n, now = burst.count, clock()
    if load64(tap + _RINGS) != 0:
        for i in range(n):
            store32(tap + _ORDER + 4 * i, i)
    for entry in range(tap + _FIRST, tap + _FIRST + _ENTRY * load64(tap + _RINGS), _ENTRY):
        at, mask = load64(entry + _AT), load64(entry + _MASK)
        own = load32(at + slots.PRODUCER)
        if mask + 1 - u32(own - load_acquire32(at + slots.CONSUMER)) < n:
            store64(at + slots.DROPPED, load64(at + slots.DROPPED) + n)
            store64(entry + _TAKEN, 0)
            continue
        store64(entry + _TAKEN, n)
        store64(entry + _OWN, own)
        for i in range(n):
            slot, length = _slot(entry, i), burst.length(i)
            store64(slot + slots.TICKS, now)
            store32(slot + slots.LENGTH, length)
            store32(slot + slots.PORT, burst.port)
            store64(slot + slots.VERDICT, 0)
            store64(slot + slots.LENGTH_OUT, 0)
            store64(slot + slots.LOST, load64(burst.at + FIRST) << 32)
            copy(_data(entry, slot), burst.data(i), min(length, load64(entry + _SNAP)))
    store64(tap + _COUNT, n)
    now = clock()
    store64(tap + _BEGAN, now)
    store64(tap + _STAMP, now)


@kernel
def tap_stage(tap: int, burst: Burst, number: int) -> None:
    """Stage `number` has run, and nothing has been carried out yet."""
    tap_charge(tap, STAGE_ROW + number, tap_lap(tap), burst.count)
    for entry in range(tap + _FIRST, tap + _FIRST + _ENTRY * load64(tap + _RINGS), _ENTRY):
        if load64(entry + _TAKEN) == 0 or number >= load64(entry + _STAGES):
            continue
        for i in range(burst.count):
            slot = _slot(entry, load32(tap + _ORDER + 4 * i))
            store32(slot + slots.STAGES + 8 * number, load32(burst.at + KIND + 4 * i))
            store32(slot + slots.STAGES + 8 * number + 4, load32(burst.at + VERDICT + 4 * i))
            store32(slot + slots.RAN, number + 1)
    if load64(tap + _RINGS) != 0:
        store64(tap + _STAMP, clock())


@kernel
def tap_settled(tap: int) -> None:
    """The verdicts of a stage have been carried out."""
    tap_charge(tap, CARRY_OUT, tap_lap(tap), 0)


@kernel
def move_up(tap: int, burst: Burst, i: int, j: int) -> None:
    """Packet `i` of the burst is packet `j` from here on; `tap` (or 0) is told."""
    if i != j:
        burst.move(i, j)
        if tap != 0:
            store32(tap + _ORDER + 4 * j, load32(tap + _ORDER + 4 * i))


@kernel
def tap_end(tap: int, burst: Burst, i: int, verdict: int, lost: int) -> None:
    """What became of packet `i`, whose frame still holds it."""
    for entry in range(tap + _FIRST, tap + _FIRST + _ENTRY * load64(tap + _RINGS), _ENTRY):
        if load64(entry + _TAKEN) == 0:
            continue
        slot, length = _slot(entry, load32(tap + _ORDER + 4 * i)), load32(burst.at + LENGTH + 4 * i)
        store64(slot + slots.FRAME, burst.frame(i))
        store32(slot + slots.VERDICT, verdict)
        store32(slot + slots.NEXT_HOP, load32(burst.at + NEXT_HOP + 4 * i))
        store32(slot + slots.LENGTH_OUT, length)
        store32(slot + slots.LOST, lost)
        store64(slot + slots.MARK, load64(burst.at + MARK + 8 * i))
        if verdict >> KIND_SHIFT == FORWARD:
            snap = load64(entry + _SNAP)
            copy(_data(entry, slot) + snap, burst.data(i), min(length, snap))


@kernel
def tap_skip(tap: int) -> None:
    """The packets of the burst that follows are not shown."""
    for entry in range(tap + _FIRST, tap + _FIRST + _ENTRY * load64(tap + _RINGS), _ENTRY):
        store64(entry + _TAKEN, 0)


@kernel
def tap_publish(tap: int) -> None:
    """Every packet of the burst has a verdict: let the readers see them."""
    for entry in range(tap + _FIRST, tap + _FIRST + _ENTRY * load64(tap + _RINGS), _ENTRY):
        taken = load64(entry + _TAKEN)
        if taken != 0:
            store_release32(load64(entry + _AT) + slots.PRODUCER, u32(load64(entry + _OWN) + taken))
    page = load64(tap + _PAGE)
    if page != 0:
        tap_charge(tap, CARRY_OUT, 0, load64(tap + _COUNT))
        tap_charge(tap, 0, load64(tap + _STAMP) - load64(tap + _BEGAN), 1)
        store64(tap + _STAMP, clock())


@kernel
def _slot(entry: int, i: int) -> int:
    index = (load64(entry + _OWN) + i) & load64(entry + _MASK)
    return load64(entry + _AT) + slots.SLOTS + index * load64(entry + _STRIDE)


@kernel
def _data(entry: int, slot: int) -> int:
    return slot + slots.STAGES + 8 * load64(entry + _STAGES)


@kernel
def tap_lap(tap: int) -> int:
    """Ticks since this was last called, or the stamp set; 0 while nobody wants to know."""
    if load64(tap + _PAGE) == 0:
        return 0
    now, before = clock(), load64(tap + _STAMP)
    store64(tap + _STAMP, now)
    return now - before if before != 0 else 0


@kernel
def tap_charge(tap: int, row: int, ticks: int, packets: int) -> None:
    """So much to this row of the page."""
    page = load64(tap + _PAGE)
    if page != 0:
        at = page + PAIR * row
        store64(at, load64(at) + ticks)
        store64(at + 8, load64(at + 8) + packets)


class Shared:
    """Memory that another process maps through `fd`: it cannot change its size."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("libfp-tap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.map = SharedMap(self.fd, size)
        self.address = self.map.address

    def close(self) -> None:
        if self.fd >= 0:
            self.map.close()
            os.close(self.fd)
            self.fd = -1


class Block:
    """The block of one worker: `rings` are (address, slots, snap), `page` is the address of its ticks, or 0."""

    def __init__(self, rings: Sequence[tuple[int, int, int]], page: int, stages: int) -> None:
        assert len(rings) <= MOST_RINGS
        self.arena = Arena(_BLOCK)
        at = self.address = self.arena.address
        store64(at + _RINGS, len(rings))
        store64(at + _PAGE, page)
        for number, (address, count, snap) in enumerate(rings):
            entry = at + _FIRST + _ENTRY * number
            values = (address, count - 1, slots.stride_of(stages, snap), snap, stages)
            for offset, value in zip((_AT, _MASK, _STRIDE, _SNAP, _STAGES), values, strict=True):
                store64(entry + offset, value)

    def close(self) -> None:
        self.arena.close()


class Rings:
    """One reader's rings, one a worker: `memory` of each, of `slots` slots for packets cut at `snap` bytes."""

    def __init__(self, workers: int, count: int, snap: int, stages: int) -> None:
        self.slots, self.snap = count, snap
        self.memory = _shared(workers, slots.size_of(count, stages, snap))

    def close(self) -> None:
        for one in self.memory:
            one.close()


def _shared(count: int, size: int) -> list[Shared]:
    made: list[Shared] = []
    try:
        for _ in range(count):
            made.append(Shared(size))
    except BaseException:
        for one in made:
            one.close()
        raise
    return made


class Taps:
    """The readers of one application's workers. `workers` returns them: (context memory, whether it runs) of each.

    Thread-safe. Nothing that a reader does or fails to do delays a worker.
    """

    def __init__(self, workers: Callable[[], Sequence[tuple[ContextMemory, bool]]], stages: int) -> None:
        self._workers, self._stages = workers, stages
        self._readers: list[Rings] = []
        self._pages: list[Shared] = []
        self._timed = 0  # how many want the ticks counted
        self._blocks: list[Block] = []
        self._retired: list[Rings | Block] = []  # what a worker that stands still may yet write to
        self._lock = threading.Lock()

    def open(self, *, count: int, snap: int) -> Rings:
        """Show each packet's first `snap` bytes in a ring of `count` slots a worker (a power of 2, 64 at least)."""
        if count < BURST or count & (count - 1) or not 0 <= snap <= 1 << 16:
            raise BadInput(f"a tap of {count} slots and {snap} bytes", "64 slots or more, a power of 2; 65536 bytes")
        with self._lock:
            if len(self._readers) >= MOST_RINGS:
                raise TableFull(f"{MOST_RINGS} traces and captures are open already", "end one of them")
            rings = Rings(len(self._workers()), count, snap, self._stages)
            self._readers.append(rings)
            self._switch()
            return rings

    def close(self, rings: Rings) -> None:
        """The reader has gone. May be called again."""
        with self._lock:
            if rings in self._readers:
                self._readers.remove(rings)
                self._retired.append(rings)
                self._switch()

    def open_clock(self) -> list[Shared]:
        """Count ticks by part of the loop in a page a worker, until as many have called `close_clock`."""
        with self._lock:
            if not self._pages:
                self._pages = _shared(len(self._workers()), max(PAIR * (STAGE_ROW + self._stages), PAGE))
            self._timed += 1
            if self._timed == 1:
                self._switch()
            return self._pages

    def close_clock(self) -> None:
        with self._lock:
            self._timed -= 1
            if self._timed == 0:
                self._switch()

    def close_all(self) -> None:
        """The workers have ended. Nothing may be called afterwards, but this."""
        with self._lock:
            for memory, _ in self._workers():
                memory.tap(0)
            for one in (*self._readers, *self._retired, *self._blocks, *self._pages):
                one.close()
            for some in (self._readers, self._retired, self._blocks, self._pages):
                some.clear()

    def _switch(self) -> None:
        """Give every worker a block that says who looks now; take back what none of them uses any more."""
        self._retired += self._blocks
        self._blocks.clear()
        for number, (memory, _) in enumerate(self._workers()):
            # a worker that was added later has none of the rings there were before
            seen = [rings for rings in self._readers if number < len(rings.memory)]
            page = self._pages[number].address if self._timed and number < len(self._pages) else 0
            if seen or page:
                rings = [(one.memory[number].address, one.slots, one.snap) for one in seen]
                self._blocks.append(Block(rings, page, self._stages))
                memory.tap(self._blocks[-1].address)
            else:
                memory.tap(0)
        deadline = time.monotonic() + PATIENCE
        while any(runs and memory.tapped != memory.wanted for memory, runs in self._workers()):
            if time.monotonic() > deadline:
                log.warning("a worker stands still: what it was to show is kept until it moves")
                return
            time.sleep(0.0005)
        for one in self._retired:
            one.close()
        self._retired.clear()
