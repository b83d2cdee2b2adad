"""A turn of the loop for who wants to know what its parts take: the same calls, and the clock between them.

The loop takes this way while a tap is open. In turns that bring nothing all time is idle, a sleep before them too, so
what the parts took waits in the tap's block until the turn is over.
"""

from __future__ import annotations

from libfp.engine.context import BURSTS, STATISTICS, SYSCALLS, UPDATES, Context
from libfp.engine.loop import REFILL_LEAST, begin, publish
from libfp.engine.replicas import drain
from libfp.engine.tap import (
    COUNTERS,
    EACH_TURN,
    HAND_OFF,
    IDLE,
    MAILBOX,
    RECEIVE,
    RECYCLE,
    SCRATCH,
    SYSTEM_CALLS,
    TRANSMIT,
    tap_charge,
    tap_lap,
)
from libfp.jit import kernel, load64, store64
from libfp.packet.burst import BURST, Burst

_BETWEEN, _DRAINED, _UPDATES, _HANDED, _TURNED, _WASTE, _RECLAIMED, _CALLS, _KICKED = range(SCRATCH, SCRATCH + 72, 8)


@kernel
def turn_begins(context, mailbox, tap, budget):  # type: ignore[no-untyped-def]
    """Drain the mailbox. What has passed since the last turn is the loop's own."""
    store64(tap + _BETWEEN, tap_lap(tap))
    updates = drain(mailbox, budget)
    if updates != 0:
        context.count(UPDATES, updates)
    store64(tap + _UPDATES, updates)
    store64(tap + _DRAINED, tap_lap(tap))
    store64(tap + _WASTE, 0)
    store64(tap + _CALLS, _calls(context))
    store64(tap + _HANDED, 0)
    store64(tap + _TURNED, 0)
    store64(tap + _KICKED, 0)


@kernel
def exchanged(tap: int) -> None:
    """What other workers wanted has been done; those of its packets that ran through stages are in their rows."""
    store64(tap + _HANDED, tap_lap(tap))


@kernel
def turned(tap: int) -> None:
    """Something that wants to be called each turn has been."""
    store64(tap + _TURNED, load64(tap + _TURNED) + tap_lap(tap))


@kernel
def port_receives(context: Context, burst: Burst, port: int, tap: int) -> int:
    """Take back what was sent by `port`, and make a burst of what has come; of how many packets."""
    rings = context.rings(port)
    rings.reclaim(context.free)
    store64(tap + _RECLAIMED, tap_lap(tap))
    begin(context, burst, port)
    count = rings.rx_burst(burst, BURST)
    if count > 0:
        context.count(BURSTS, 1)
        tap_charge(tap, RECEIVE, tap_lap(tap), count)
    return count


@kernel
def port_is_done(context: Context, port: int, tap: int, count: int) -> None:
    """The stages have run, if packets had come: show what was sent, and give frames to the port."""
    rings = context.rings(port)
    if count > 0:
        publish(context)
        tap_charge(tap, TRANSMIT, tap_lap(tap), count)
    rings.refill(context.free, REFILL_LEAST)
    ticks = load64(tap + _RECLAIMED) + tap_lap(tap)
    if count > 0:
        tap_charge(tap, RECYCLE, ticks, count)
    else:
        store64(tap + _WASTE, load64(tap + _WASTE) + ticks)


@kernel
def kicked(tap: int) -> None:
    """The kernel has been called for a port, if that asked for it."""
    store64(tap + _KICKED, load64(tap + _KICKED) + tap_lap(tap))


@kernel
def turn_ends(context: Context, tap: int, idle: int, received: int) -> None:
    """All has been done. `idle`: how many turns before this have brought nothing."""
    called, waste = load64(tap + _KICKED) + tap_lap(tap), load64(tap + _WASTE)
    between, drained, updates = load64(tap + _BETWEEN), load64(tap + _DRAINED), load64(tap + _UPDATES)
    if _calls(context) != load64(tap + _CALLS):
        tap_charge(tap, SYSTEM_CALLS, called, 0)
        called = 0
    if idle != 0:  # it may have slept
        waste += between
        between = 0
    if received != 0 or updates != 0:
        tap_charge(tap, COUNTERS, between + called, received)
        tap_charge(tap, MAILBOX, drained, updates)
        tap_charge(tap, HAND_OFF, load64(tap + _HANDED), 0)
        tap_charge(tap, EACH_TURN, load64(tap + _TURNED), 0)
    else:
        waste += between + called + drained + load64(tap + _HANDED) + load64(tap + _TURNED)
    tap_charge(tap, IDLE, waste, 0)


@kernel
def _calls(context: Context) -> int:
    return load64(load64(context.at + STATISTICS) + SYSCALLS)
