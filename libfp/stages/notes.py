"""What a worker writes down beside its routes: for whom it found no neighbour, and how many ICMP errors it has sent.

Packets that Linux must never get cannot be handed to it for its neighbour to be found. Their destinations are noted in
a ring of which only the worker writes, and from which the control plane reads what it likes. Layout, from `at`:

    0   the token bucket of ICMP errors (`libfp.engine.reasons`)
    32  how many destinations have been noted so far
    64  RING times: index of the next hop, the destination as two words (IPv4: 0 and 32 bits), the epoch of hit marks
"""

from __future__ import annotations

from libfp.engine.reasons import take_token
from libfp.jit import (
    clock_hz,
    kernel,
    load8,
    load32be,
    load64,
    load64be,
    load_acquire64,
    store64,
    store_release64,
)

_COUNT, _RING = 32, 64
RING = 16
SIZE = _RING + 32 * RING
ERRORS_A_SECOND, ERRORS_AT_ONCE = 1000, 64  # of a worker; Linux: net.ipv4.icmp_msgs_per_sec, _burst


def begin(at: int) -> None:
    """Fill in the bucket of fresh notes."""
    cost = clock_hz() // ERRORS_A_SECOND
    store64(at, cost)
    store64(at + 8, cost * ERRORS_AT_ONCE)


@kernel
def may_send_error(at: int) -> bool:
    """Whether one more ICMP error may be sent; counted as sent."""
    return take_token(at, 0)


@kernel
def note(at: int, hop: int, ip: int, epoch: int) -> None:
    """Note where the packet at `ip` cannot go for want of a neighbour, if that is not what was noted last, just now."""
    high, low = 0, 0
    if load8(ip) >> 4 == 6:
        high, low = load64be(ip + 24), load64be(ip + 32)
    else:
        low = load32be(ip + 16)
    count = load64(at + _COUNT)
    last, slot = at + _RING + 32 * (count - 1 & RING - 1), at + _RING + 32 * (count & RING - 1)
    if load64(last) == hop and load64(last + 8) == high and load64(last + 16) == low and load64(last + 24) == epoch:
        return
    store64(slot, hop)
    store64(slot + 8, high)
    store64(slot + 16, low)
    store64(slot + 24, epoch)
    store_release64(at + _COUNT, count + 1)


def noted(at: int, since: int) -> tuple[set[tuple[int, int, int]], int]:
    """What has been noted after the first `since` notes, as far as it is still there, and how many notes there are."""
    end = load_acquire64(at + _COUNT)
    begin = max(since, end - RING)
    slots = [at + _RING + 32 * (number & RING - 1) for number in range(begin, end)]
    rows = [(load64(slot), load64(slot + 8), load64(slot + 16)) for slot in slots]
    gone = load_acquire64(at + _COUNT) - RING + 1 - begin  # overwritten meanwhile, or about to be
    return set(rows[max(0, gone) :]), end
