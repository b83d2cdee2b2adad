"""When the next packet may leave: a bucket of ticks that the clock fills and packets empty.

A packet's price is a fixed part (packets a second) or one for each of its bytes (bits a second), in ticks of 2^-20. The
bucket holds little: what a machine has not sent while it did something else is never sent, since a burst of it would
measure the queues on the way instead of the way. What was really sent is counted, and reported beside what was asked.
"""

from __future__ import annotations

from libfp.errors import BadInput
from libfp.gen.signature import FCS
from libfp.jit import kernel, load64, store64

#: Bytes of a bucket's words: credit, the time it was last filled, price of a packet and of a byte, most credit.
CREDIT, LAST, PER_PACKET, PER_BYTE, DEPTH = range(0, 40, 8)
SIZE = 40
FRACTION = 20
DEEP_PACKETS, DEEP_SECONDS = 64, 20e-6  # a bucket holds so many packets, or what so long earns, if that is more
LONGEST = 1 << 36  # ticks between two looks, at most


@kernel
def fill(bucket, now):  # type: ignore[no-untyped-def]
    """Earn what the time since the last call is worth; return the credit."""
    passed = min(max(now - load64(bucket + LAST), 0), LONGEST)
    store64(bucket + LAST, now)
    credit = min(load64(bucket + CREDIT) + (passed << FRACTION), load64(bucket + DEPTH))
    store64(bucket + CREDIT, credit)
    return credit


@kernel
def price(bucket, length):  # type: ignore[no-untyped-def]
    """What a frame of `length` bytes, and 4 more on the wire, costs; 0 for all of them: there is no limit."""
    return load64(bucket + PER_PACKET) + load64(bucket + PER_BYTE) * (length + FCS)


def set_rate(bucket: int, hz: int, *, pps: float = 0, bps: float = 0, longest: int = 1514) -> None:
    """Let so many packets, or bits of frames with their FCS, pass a second; neither: as many as come.

    `hz` is what the clock counts in a second, `longest` the longest frame. The bucket is empty at first. Raises
    BadInput.
    """
    if pps < 0 or bps < 0 or (pps and bps):
        raise BadInput(f"a rate of {pps:g} packets and {bps:g} bits a second", "one of them, above 0")
    per_packet = round((hz << FRACTION) / pps) if pps else 0
    per_byte = round((8 * hz << FRACTION) / bps) if bps else 0
    dearest = max(per_packet, (longest + FCS) * per_byte)
    if dearest >> 56 or ((pps or bps) and not dearest):
        raise BadInput(f"a rate of {pps or bps:g} a second cannot be kept", "from 1 packet in 10 s to 1 Pbit a second")
    depth = max(DEEP_PACKETS * (per_packet + 64 * per_byte), round(DEEP_SECONDS * hz) << FRACTION)
    depth = max(depth, dearest)
    for at, value in ((CREDIT, 0), (PER_PACKET, per_packet), (PER_BYTE, per_byte), (DEPTH, depth)):
        store64(bucket + at, value)
