"""What happens to packets once they have a verdict: sent, dropped, punted or consumed; the rest move up.

Called after every stage. When nothing was decided it costs one pass over the verdict column.
"""

from __future__ import annotations

from libfp.engine.context import (
    BUCKETS,
    CONSUMED,
    FIRST_PORT,
    PORT_COUNT,
    PUNT_RING,
    REASON_MASK,
    REASONS,
    STATISTICS,
    Context,
)
from libfp.engine.punt import slots_of
from libfp.engine.reasons import number_of, take_token
from libfp.engine.slots import DELIVERED, OVER_RATE, RING_FULL
from libfp.engine.tap import move_up, showing, tap_end
from libfp.jit import kernel, load32, load64, load64_in, shr64, store64, unlikely
from libfp.packet.burst import FRAME, KIND, KIND_KEPT, LENGTH, VERDICT, Burst
from libfp.packet.verdict import CONSUME, DROP, FORWARD, KIND_SHIFT, LIVE, PORT_MASK, PUNT, reason_code
from libfp.ports.rings import COUNTERS, COUNTERS_SIZE, TX_FULL

_PUNT_RATE = (DROP << KIND_SHIFT) + reason_code("punt-rate")
_PUNT_FULL = (DROP << KIND_SHIFT) + reason_code("punt-ring-full")
_BAD_PORT = (DROP << KIND_SHIFT) + reason_code("bad-port")
_TX_FULL = (DROP << KIND_SHIFT) + reason_code("tx-full")
UNDECIDED = (PUNT << KIND_SHIFT) + reason_code("undecided")


@kernel
def settle(context: Context, burst: Burst) -> None:
    """Carry out the verdicts of `burst`; leave it with its live packets, in order."""
    at, n = burst.at, burst.count
    settled, common = 0, -1
    for i in range(n >> 1):  # two verdicts at a time
        both = load64_in(at, VERDICT + 8 * i)
        settled |= both
        common &= both
    if n & 1:
        last = load32(at + VERDICT + 4 * n - 4)
        settled |= last
        common &= last | last << 32
    if settled != 0:
        _carry_out(context, burst, (settled | shr64(settled, 32)) & 0xFFFFFFFF, common & shr64(common, 32))


@kernel
def _carry_out(context: Context, burst: Burst, settled: int, common: int) -> None:
    """`settle`, given all verdicts together by or and by and."""
    at, n = burst.at, burst.count
    record = showing(context)
    if common >> KIND_SHIFT == FORWARD and settled >> KIND_SHIFT == FORWARD and record == 0:
        ports = settled ^ common
        if ports & ports - 1 != 0 or not _send_by_two(context, burst, common, settled):
            _send_all(context, burst)
        burst.count = 0
        return
    kept = 0
    ports = context.port_count
    for i in range(n):
        verdict = load32(at + VERDICT + 4 * i)
        if verdict == LIVE:
            move_up(record, burst, i, kept)
            kept += 1
            continue
        lost = DELIVERED
        if verdict >> KIND_SHIFT == FORWARD:
            frame, length, port = burst.frame(i), burst.length(i), verdict & PORT_MASK
            if port >= ports or not _send(context, port, frame, length):
                verdict = _not_sent(context, frame, port)
        else:
            verdict = _unless_kept(burst, i, verdict)
            lost = _end(context, burst, i, verdict)
        if record != 0:
            tap_end(record, burst, i, verdict, lost)
    burst.count = kept


@kernel
def _unless_kept(burst: Burst, i: int, verdict: int) -> int:
    """The verdict; of a packet that Linux must never get, and that is punted: a drop of the same name."""
    if verdict >> KIND_SHIFT == PUNT and load32(burst.at + KIND + 4 * i) & KIND_KEPT != 0:
        return verdict + (DROP - PUNT << KIND_SHIFT)
    return verdict


@kernel
def _send_by_two(context: Context, burst: Burst, first: int, second: int) -> bool:
    """Send all packets of a burst that has these two verdicts (or one) alone, if both ports have room; no branch."""
    n, a, b = burst.count, first & PORT_MASK, second & PORT_MASK
    if b >= context.port_count or not context.rings(a).may_put(n) or not context.rings(b).may_put(n):
        return False
    one, two = context.rings(a).slot(), context.rings(b).slot()
    start, bytes_one, bytes_two = two, 0, 0
    words, frames = burst.at, burst.at + FRAME  # one step on with each packet: LLVM keeps these two in registers
    for _ in range(n):
        length, moved = load32(words + LENGTH), int(load32(words + VERDICT) != first)
        desc = two if moved else one
        store64(desc, load64(frames))
        store64(desc + 8, length)
        two += 16 * moved
        one += 16 - 16 * moved
        bytes_one += length
        bytes_two += length & -moved
        words += 4
        frames += 8
    moved = (two - start) >> 4
    context.rings(a).have_put(n - moved, bytes_one - bytes_two)
    context.rings(b).have_put(moved, bytes_two)
    return True


@kernel
def _send_all(context: Context, burst: Burst) -> None:
    """Send all packets, each by its port."""
    at, ports = burst.at, context.port_count
    for i in range(burst.count):
        frame, length = load64(at + FRAME + 8 * i), load32(at + LENGTH + 4 * i)
        port = load32(at + VERDICT + 4 * i) & PORT_MASK
        if unlikely(port >= ports) or not _send(context, port, frame, length):
            _not_sent(context, frame, port)


@kernel
def _send(context: Context, port: int, frame: int, length: int) -> bool:
    """`send`; where there is no room, once more when the frames that have been sent are taken back."""
    rings = context.rings(port)
    if unlikely(not rings.send(frame, length)):
        rings.reclaim(context.free)
        return rings.send(frame, length)
    return True


@kernel
def finish(context: Context, burst: Burst) -> None:
    """Hand what no stage decided to Linux."""
    if burst.count != 0:
        _leave_to_linux(context, burst)


@kernel
def _leave_to_linux(context: Context, burst: Burst) -> None:
    record = showing(context)
    for i in range(burst.count):
        verdict = _unless_kept(burst, i, UNDECIDED)
        lost = _end(context, burst, i, verdict)
        if record != 0:
            tap_end(record, burst, i, 0 if verdict == UNDECIDED else verdict, lost)
    burst.count = 0


@kernel
def _not_sent(context: Context, frame: int, port: int) -> int:
    """A forwarded packet whose port has no room, or does not exist: drop it, and return that verdict."""
    verdict = _BAD_PORT
    if port < context.port_count:
        counters = load64(context.rings(port).at + COUNTERS)
        store64(counters + TX_FULL, load64(counters + TX_FULL) + 1)
        verdict = _TX_FULL
    _count(context, verdict)
    context.free.push(frame)
    return verdict


@kernel
def _end(context: Context, burst: Burst, i: int, verdict: int) -> int:
    """A packet that is not sent: count it, copy it to Linux if that is its verdict, free its frame.

    Returns whether it got to Linux, or why not (see `libfp.engine.slots`).
    """
    kind, lost = verdict >> KIND_SHIFT, DELIVERED
    if kind == CONSUME:
        context.count(CONSUMED, 1)
    elif kind == PUNT:
        lost = _punt(context, burst, i, verdict)
    else:
        _count(context, verdict)
    context.free.push(burst.frame(i))
    return lost


@kernel
def _punt(context: Context, burst: Burst, i: int, verdict: int) -> int:
    number = number_of(load64(context.at + REASONS), load64(context.at + REASON_MASK), verdict)
    if not take_token(load64(context.at + BUCKETS), number):
        _count(context, _PUNT_RATE)
        return OVER_RATE
    ring = load64(context.at + PUNT_RING)
    if ring != 0:
        slots = slots_of(ring)
        if not slots.put(burst.data(i), burst.length(i), burst.port):
            _count(context, _PUNT_FULL)
            return RING_FULL
    _add(context, number)
    return DELIVERED


@kernel
def _count(context: Context, verdict: int) -> None:
    _add(context, number_of(load64(context.at + REASONS), load64(context.at + REASON_MASK), verdict))


@kernel
def _add(context: Context, number: int) -> None:
    at = load64(context.at + STATISTICS) + FIRST_PORT + load64(context.at + PORT_COUNT) * COUNTERS_SIZE + 8 * number
    store64(at, load64(at) + 1)
