"""What one worker's compiled loop knows: a block of private words, and its statistics in a page others may read.

Every word has one writer. `control` is written by the control plane and read by the worker; everything else here is
written by the worker (or by the control plane before the worker starts).
"""

from __future__ import annotations

from typing import Any

from libfp.jit import Arena, load64, load_acquire64, native, store64, store_release64, word
from libfp.ports.memif_rings import MemifRings
from libfp.ports.rings import BLOCK, FreeFrames, PortRings

# Byte offsets of the private block.
CONTROL, STATISTICS, PORT_COUNT, PORTS, FREE, REASONS, REASON_MASK, BUCKETS = range(0, 64, 8)
PUNT_RING, RECORD, LIBC_SENDTO, LIBC_RECV, LIBC_POLL, LIBC_WRITE, POLL_FDS, LIBC_PRCTL = range(64, 128, 8)
UMEM, IDLE_LIMIT, LENDING, LIBC_READ, SEAL = 128, 136, 144, 152, 160  # SEAL: three words of scratch
SIZE = 192

# The control line, written by the control plane alone: end; and whereto the worker is to show what it does, or 0.
STOP, TAP = 0, 8

# Words of the statistics block. Ports and reasons follow at `FIRST_PORT`.
HEARTBEAT, BURSTS, SYSCALLS, PARKS, UPDATES, PARKED, CONSUMED, THREAD, HANDED_OFF, BORROWED, RETURNED = range(0, 88, 8)
WORKER_COUNTERS = (
    *("heartbeat", "bursts", "syscalls", "parks", "updates", "parked", "consumed", "thread"),
    *("handed_off", "borrowed", "returned"),  # lent to others, taken from others, back from others
)
STOPPED = 2  # of PARKED: 0 turning, 1 asleep for want of packets
FIRST_PORT = 128


@native
class Context:
    """One worker, from inside its loop; `at` is its private block."""

    at: word

    def running(self) -> bool:
        """Until the control plane says stop."""
        return load_acquire64(load64(self.at + CONTROL) + STOP) == 0

    def wanted(self) -> bool:
        """Whether somebody wants to look, by a tap."""
        return load_acquire64(load64(self.at + CONTROL) + TAP) != 0

    def count(self, which: int, by: int) -> None:
        """Add to one of the worker's counters: no lock, since nobody else writes it."""
        at = load64(self.at + STATISTICS) + which
        store64(at, load64(at) + by)

    def beat(self) -> None:
        """Show the watchdog that the loop turns."""
        at = load64(self.at + STATISTICS) + HEARTBEAT
        store_release64(at, load64(at) + 1)

    @property
    def port_count(self) -> int:
        return load64(self.at + PORT_COUNT)

    def rings(self, port: int) -> PortRings:
        return PortRings(load64(self.at + PORTS) + port * BLOCK)

    @property
    def free(self) -> FreeFrames:
        return FreeFrames(load64(self.at + FREE))

    @property
    def umem(self) -> int:
        """Address of the UMEM."""
        return load64(self.at + UMEM)


@native
class MemifContext:
    """The same where the ports are memif's."""

    at: word

    running, wanted, count, beat = Context.running, Context.wanted, Context.count, Context.beat
    port_count, free, umem = Context.port_count, Context.free, Context.umem

    def rings(self, port: int) -> MemifRings:
        return MemifRings(load64(self.at + PORTS) + port * BLOCK)


class ContextMemory:
    """The private block and the control line of one worker, each on lines of its own. `rings` is its ports' class."""

    def __init__(self, rings: type = PortRings) -> None:
        self.arena = Arena(SIZE)
        self.control = Arena(64)
        self.context: Any = (MemifContext if rings is MemifRings else Context)(self.arena.address)
        self.set(CONTROL, self.control.address)

    def set(self, offset: int, value: int) -> None:
        """Write a private word; only while the worker does not run."""
        store64(self.arena.address + offset, value)

    def stop(self, now: bool) -> None:
        """Ask the loop to end after this burst, or let it run again."""
        store_release64(self.control.address + STOP, int(now))

    @property
    def stopping(self) -> bool:
        """What `stop` was last called with."""
        return load64(self.control.address + STOP) != 0

    def tap(self, address: int) -> None:
        """Have the worker show what it does through the block at `address`, 0: no longer; see `libfp.engine.tap`."""
        store_release64(self.control.address + TAP, address)

    @property
    def wanted(self) -> int:
        """What `tap` was last called with."""
        return load64(self.control.address + TAP)

    @property
    def tapped(self) -> int:
        """The block that the worker uses."""
        return load_acquire64(self.arena.address + RECORD)
