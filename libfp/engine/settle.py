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
    RECORD,
    STATISTICS,
    Context,
)
from libfp.engine.punt import PuntSlots
from libfp.engine.reasons import number_of, take_token
from libfp.jit import ctz64, kernel, load32, load32_in, load64, popcount64, shl64, store32, store64
from libfp.packet.burst import FRAME, LENGTH, NEXT_HOP, VERDICT, Burst
from libfp.packet.verdict import CONSUME, DROP, FORWARD, KIND_SHIFT, LIVE, PORT_MASK, PUNT, reason_code
from libfp.ports.rings import COUNTERS, COUNTERS_SIZE, TX_FULL

# The record: what a trace sees. Count and capacity, then 32 bytes a packet: frame, length, verdict, ports, next hop.
RECORD_ENTRY = 32

_FORWARDED = FORWARD << KIND_SHIFT
_FEW = 4  # ports of one burst that are served one after the other
_PUNT_RATE = (DROP << KIND_SHIFT) + reason_code("punt-rate")
_PUNT_FULL = (DROP << KIND_SHIFT) + reason_code("punt-ring-full")
_BAD_PORT = (DROP << KIND_SHIFT) + reason_code("bad-port")
_TX_FULL = (DROP << KIND_SHIFT) + reason_code("tx-full")
_UNDECIDED = (PUNT << KIND_SHIFT) + reason_code("undecided")


@kernel
def settle(context: Context, burst: Burst) -> None:
    """Carry out the verdicts of `burst`; leave it with its live packets, in order."""
    settled, other = 0, 0
    for i in range(burst.count):
        verdict = load32_in(burst.at, VERDICT + 4 * i)
        settled |= verdict
        other |= verdict ^ _FORWARDED
    if settled == 0:
        return
    if other <= PORT_MASK and _send_all(context, burst):
        burst.count = 0
        return
    at, kept, n = burst.at, 0, burst.count
    ports, record = load64(context.at + PORT_COUNT), load64(context.at + RECORD)
    for i in range(n):
        verdict = load32(at + VERDICT + 4 * i)
        if verdict == LIVE:
            if kept != i:
                burst.move(i, kept)
            kept += 1
            continue
        if verdict >> KIND_SHIFT == FORWARD:
            frame, length, port = burst.frame(i), burst.length(i), verdict & PORT_MASK
            if port >= ports or not context.rings(port).send(frame, length):
                verdict = _not_sent(context, frame, port)
        else:
            _end(context, burst, i, verdict)
        if record != 0:
            _note(record, burst, i, verdict)
    burst.count = kept


@kernel
def _send_all(context: Context, burst: Burst) -> bool:
    """The usual case, without a branch a packet: every packet goes out, by few ports that have room for all."""
    used, last, n = 0, 0, burst.count
    for i in range(n):
        port = load32_in(burst.at, VERDICT + 4 * i) & PORT_MASK
        used |= shl64(1, port)
        last = max(last, port)
    if last >= min(context.port_count, 64) or popcount64(used) > _FEW or load64(context.at + RECORD) != 0:
        return False
    rest = used
    while rest != 0:
        if context.rings(ctz64(rest)).room() <= n:  # one more than needed: see `put_those`
            return False
        rest &= rest - 1
    while used != 0:
        port = ctz64(used)
        context.rings(port).put_those(burst, _FORWARDED + port)
        used &= used - 1
    return True


@kernel
def finish(context: Context, burst: Burst) -> None:
    """Hand what no stage decided to Linux."""
    record = load64(context.at + RECORD)
    for i in range(burst.count):
        if record != 0:
            _note(record, burst, i, 0)
        _end(context, burst, i, _UNDECIDED)
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
def _end(context: Context, burst: Burst, i: int, verdict: int) -> None:
    """A packet that is not sent: count it, copy it to Linux if that is its verdict, free its frame."""
    kind = verdict >> KIND_SHIFT
    if kind == CONSUME:
        context.count(CONSUMED, 1)
    elif kind == PUNT:
        _punt(context, burst, i, verdict)
    else:
        _count(context, verdict)
    context.free.push(burst.frame(i))


@kernel
def _punt(context: Context, burst: Burst, i: int, verdict: int) -> None:
    number = number_of(load64(context.at + REASONS), load64(context.at + REASON_MASK), verdict)
    if not take_token(load64(context.at + BUCKETS), number):
        _count(context, _PUNT_RATE)
        return
    ring = load64(context.at + PUNT_RING)
    if ring != 0:
        slots = PuntSlots(load64(ring), load64(ring + 8), load64(ring + 16))
        if not slots.put(burst.data(i), burst.length(i), burst.port):
            _count(context, _PUNT_FULL)
            return
    _add(context, number)


@kernel
def _count(context: Context, verdict: int) -> None:
    _add(context, number_of(load64(context.at + REASONS), load64(context.at + REASON_MASK), verdict))


@kernel
def _add(context: Context, number: int) -> None:
    at = load64(context.at + STATISTICS) + FIRST_PORT + load64(context.at + PORT_COUNT) * COUNTERS_SIZE + 8 * number
    store64(at, load64(at) + 1)


@kernel
def _note(record: int, burst: Burst, i: int, verdict: int) -> None:
    count = load64(record)
    if count < load64(record + 8):
        at = record + 16 + RECORD_ENTRY * count
        store64(at, load64(burst.at + FRAME + 8 * i))
        store32(at + 8, load32(burst.at + LENGTH + 4 * i))
        store32(at + 12, verdict)
        store32(at + 16, burst.port)
        store32(at + 24, load32(burst.at + NEXT_HOP + 4 * i))
        store64(record, count + 1)
