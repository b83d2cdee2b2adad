"""Hand-off: a worker lends frames to another, which computes in place; the owner sends or drops them and recycles.

        owner                                              borrower
        a stage says hand_off ── `lend` ──► lane ──► `borrow`, the stages after that one
        sent, dropped, punted ◄─ `take_back` ◄── lane ◄── `settle_lent`: given back with their verdicts

Between any two workers, and from each to itself, lie two lanes: what it lends goes by one, comes back by the other. A
lane is an `Spsc` of 16-byte elements, two for each packet:

    frame, bits 48 up: the stage to go on with | length, bits 24 up: port, bits 40 up: kind
    verdict, bits 32 up: next hop              | mark

A worker has at most `MOST` packets out with another, and counts them: no lane can be full but by that count, and who
gives back always finds room. A borrower touches nothing of the owner's but the frames it was lent.

A worker sleeps only while none of its frames is out with another that works; who lends to one that sleeps wakes it.

The block of a worker, at LENDING of its context: what the control plane has written, a line with what others read (NAP:
that it sleeps), and then for each worker there can be a line by the control plane and one of its own. The roll is the
control plane's alone: how many workers there are, and for each whether it takes packets.
"""

from __future__ import annotations

from typing import Any

from libfp.engine.context import (
    BORROWED,
    HANDED_OFF,
    LENDING,
    LIBC_READ,
    LIBC_WRITE,
    POLL_FDS,
    RETURNED,
    SYSCALLS,
    Context,
)
from libfp.engine.settle import UNDECIDED, finish, settle
from libfp.engine.tap import move_up, showing, tap_end, tap_skip
from libfp.jit import (
    call,
    kernel,
    load16,
    load32,
    load64,
    load_acquire64,
    native,
    prefetch,
    shr64,
    store32,
    store64,
    store_release64,
    word,
)
from libfp.packet.burst import BURST, FIRST, FRAME, KIND, LENDER, LENGTH, MARK, NEXT_HOP, VERDICT, Burst
from libfp.packet.verdict import DROP, HAND_OFF, KIND_SHIFT, LIVE, PORT_MASK, reason_code
from libfp.rings import spsc

MOST = 1024  # packets that one worker has out with another
LANE = 2 * MOST  # elements

ROLL, ROOM, WAKE, ONE, SCRATCH, NAP, LINES, LINE = 0, 8, 16, 24, 32, 64, 128, 128
OUT, IN, BACK, HOME, UMEM, PEER = range(0, 48, 8)
LENT, PENDING, WOKEN = range(64, 88, 8)
COUNT, TAKES = 0, 64  # of the roll

_BAD_WORKER = (DROP << KIND_SHIFT) + reason_code("bad-worker")
_FULL = (DROP << KIND_SHIFT) + reason_code("hand-off-full")

_SPSC: Any = spsc.SpscView


@native
class Lane:
    """The `Spsc` of `LANE` elements whose memory begins at `base`."""

    base: word

    @property
    def producer(self) -> int:
        return self.base + spsc.PRODUCERS_OWN

    @property
    def consumer(self) -> int:
        return self.base + spsc.CONSUMERS_OWN

    @property
    def size(self) -> int:
        return LANE

    @property
    def element(self) -> int:
        return 16

    reserve, slot, commit = _SPSC.reserve, _SPSC.slot, _SPSC.commit
    peek, item, release = _SPSC.peek, _SPSC.item, _SPSC.release
    __len__ = _SPSC.__len__


@kernel
def peers(context: Context) -> int:
    """How many workers there are, this one included."""
    return load_acquire64(load64(load64(context.at + LENDING) + ROLL) + COUNT)


@kernel
def line_of(context: Context, peer: int) -> int:
    return load64(context.at + LENDING) + LINES + LINE * peer


@kernel
def settle_lent(context: Context, burst: Burst, following: int) -> None:
    """`settle`, where packets may be handed off, or be another worker's; `following` is the next stage's number."""
    if load64(burst.at + LENDER) != 0:
        give_back(context, burst, following, False)
    else:
        lend(context, burst, following)
        settle(context, burst)


@kernel
def finish_lent(context: Context, burst: Burst) -> None:
    """`finish`, where packets may be another worker's."""
    if load64(burst.at + LENDER) != 0:
        give_back(context, burst, 0, True)
    else:
        finish(context, burst)


@kernel
def lend(context: Context, burst: Burst, following: int) -> None:
    """Lend the packets that are handed off; those that nobody takes are dropped by name. The others move up."""
    at, n = burst.at, burst.count
    record = showing(context)
    kept = 0
    for i in range(n):
        verdict = load32(at + VERDICT + 4 * i)
        if verdict >> KIND_SHIFT == HAND_OFF:
            why = _lend(context, burst, i, verdict & PORT_MASK, following)
            if why == 0:
                if record != 0:
                    tap_end(record, burst, i, verdict, 0)
                continue
            verdict = why
        move_up(record, burst, i, kept)
        store32(at + VERDICT + 4 * kept, verdict)
        kept += 1
    burst.count = kept
    if kept != n:
        context.count(HANDED_OFF, n - kept)
        for peer in range(peers(context)):
            line = line_of(context, peer)
            pending = load64(line + PENDING)
            if pending != 0:
                Lane(load64(line + OUT)).commit(2 * pending)
                store64(line + PENDING, 0)


@kernel
def _lend(context: Context, burst: Burst, i: int, worker: int, following: int) -> int:
    """Write packet `i` into the lane to `worker`, to be committed; 0, or the verdict if it cannot be lent."""
    lending = load64(context.at + LENDING)
    if worker >= load64(lending + ROOM) or load_acquire64(load64(lending + ROLL) + TAKES + 8 * worker) == 0:
        return _BAD_WORKER
    line = line_of(context, worker)
    lent, pending, lane = load64(line + LENT), load64(line + PENDING), Lane(load64(line + OUT))
    if lent >= MOST or lane.reserve(2 * pending + 2) < 2 * pending + 2:
        return _FULL
    store64(line + LENT, lent + 1)
    store64(line + PENDING, pending + 1)
    _write(lane.slot(2 * pending), burst, i, following, LIVE)
    return 0


@kernel
def _write(slot: int, burst: Burst, i: int, following: int, verdict: int) -> None:
    at = burst.at
    store64(slot, burst.frame(i) | following << 48)
    store64(slot + 8, burst.length(i) | burst.port << 24 | load32(at + KIND + 4 * i) << 40)
    store64(slot + 16, verdict | load32(at + NEXT_HOP + 4 * i) << 32)
    store64(slot + 24, load64(at + MARK + 8 * i))


@kernel
def _read(lane: Lane, burst: Burst, base: int) -> int:
    """Make `burst` of what waits in `lane`, as far as it came by one port and is for one stage; how many packets."""
    there = lane.peek(2 * BURST) >> 1
    if there == 0:
        return 0
    stage, port = shr64(load64(lane.item(0)), 48), load64(lane.item(0) + 8) >> 24 & PORT_MASK
    at, n = burst.at, 0
    while n < there:
        slot = lane.item(2 * n)
        frame, head, decided = load64(slot), load64(slot + 8), load64(slot + 16)
        if shr64(frame, 48) != stage or head >> 24 & PORT_MASK != port:
            break
        frame &= (1 << 48) - 1
        prefetch(base + frame)
        store64(at + FRAME + 8 * n, frame)
        store32(at + LENGTH + 4 * n, head & 0xFFFFFF)
        store32(at + KIND + 4 * n, shr64(head, 40))
        store32(at + VERDICT + 4 * n, decided & 0xFFFFFFFF)
        store32(at + NEXT_HOP + 4 * n, shr64(decided, 32))
        store64(at + MARK + 8 * n, load64(slot + 24))
        n += 1
    lane.release(2 * n)
    burst.count, burst.base, burst.port = n, base, port
    store64(at + FIRST, stage)
    return n


@kernel
def borrow(context: Context, burst: Burst, peer: int) -> int:
    """Make `burst` of packets that worker `peer` has lent; how many."""
    line = line_of(context, peer)
    n = _read(Lane(load64(line + IN)), burst, load64(line + UMEM))
    if n != 0:
        store64(burst.at + LENDER, line)
        context.count(BORROWED, n)
    return n


@kernel
def give_back(context: Context, burst: Burst, following: int, all_of_them: bool) -> None:
    """Give the packets that have a verdict back to who lent them, or all; the others move up."""
    at, n = burst.at, burst.count
    record, kept, back = showing(context), 0, 0
    lane = Lane(load64(load64(at + LENDER) + BACK))
    for i in range(n):
        verdict = load32(at + VERDICT + 4 * i)
        if verdict == LIVE and not all_of_them:
            move_up(record, burst, i, kept)
            kept += 1
            continue
        _write(lane.slot(2 * back), burst, i, following, verdict)  # there is room: the owner has counted
        back += 1
        if record != 0:
            tap_end(record, burst, i, verdict, 0)
    burst.count = kept
    if back != 0:
        lane.commit(2 * back)


@kernel
def take_back(context: Context, burst: Burst, peer: int) -> int:
    """Carry out what worker `peer` has decided about packets of ours: one burst of them; how many."""
    line = line_of(context, peer)
    if load64(line + LENT) == 0:
        return 0
    n = _read(Lane(load64(line + HOME)), burst, context.umem)
    if n == 0:
        return 0
    store64(line + LENT, load64(line + LENT) - n)
    context.count(RETURNED, n)
    at = burst.at
    for i in range(n):
        if load32(at + VERDICT + 4 * i) == LIVE:
            store32(at + VERDICT + 4 * i, UNDECIDED)
    record = showing(context)
    if record != 0:
        tap_skip(record)  # the borrower has shown them
    lend(context, burst, load64(at + FIRST))
    settle(context, burst)
    return n


@kernel
def own(burst: Burst) -> None:
    """What comes into `burst` next is this worker's own."""
    store64(burst.at + LENDER, 0)
    store64(burst.at + FIRST, 0)


@kernel
def nothing_lent(context: Context) -> bool:
    """Whether a worker may sleep: it has no frame out with another that works."""
    roll = load64(load64(context.at + LENDING) + ROLL)
    for peer in range(peers(context)):
        if load64(line_of(context, peer) + LENT) != 0 and load_acquire64(roll + TAKES + 8 * peer) != 0:
            return False
    return True


@kernel
def waits(context: Context) -> bool:
    """Whether a packet that somebody has lent this worker waits for it."""
    there = 0
    for peer in range(peers(context)):
        there += len(Lane(load64(line_of(context, peer) + IN)))
    return there != 0


@kernel
def sleeps(lending: int) -> bool:
    """Whether the worker of that block does."""
    return load_acquire64(lending + NAP) != 0


@kernel
def rouse(context: Context, lending: int) -> None:
    """Wake the worker of that block, by a system call of the thread that calls this."""
    call(load64(context.at + LIBC_WRITE), load64(lending + WAKE), lending + ONE, 8, 0, 0, 0)


@kernel
def wake(context: Context) -> None:
    """Policy `inline`: wake workers that sleep while packets of this one wait for them, each once.

    Who goes to sleep looks at its lanes without a fence, and so does this at who sleeps: it looks in every turn.
    """
    for peer in range(peers(context)):
        line = line_of(context, peer)
        if load64(line + LENT) == 0:
            continue
        lending = load64(line + PEER)
        if not sleeps(lending):
            store64(line + WOKEN, 0)
        elif load64(line + WOKEN) == 0 and len(Lane(load64(line + OUT))) != 0:
            rouse(context, lending)
            context.count(SYSCALLS, 1)
            store64(line + WOKEN, 1)


@kernel
def nap(context: Context, yes: int) -> None:
    """Say that this worker sleeps from here on, or has woken up."""
    lending = load64(context.at + LENDING)
    store_release64(lending + NAP, yes)
    if yes == 0 and load16(load64(context.at + POLL_FDS) + 8 * context.port_count + 6) != 0:
        call(load64(context.at + LIBC_READ), load64(lending + WAKE), lending + SCRATCH, 8, 0, 0, 0)
        context.count(SYSCALLS, 1)
