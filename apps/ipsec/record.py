"""A security association as stages see it: a record of words, which its owner among the workers alone writes.

0     the cipher's block: `libfp.apps.ipsec.libcrypto`
128   sequence   outbound: the last one sent; inbound: not used, the window has it
136   limit      outbound: the last one that may be sent now; the control plane moves it on
144   iv         outbound: what is added to a sequence number to give its IV
152   last       the last one there may ever be: 2^32 - 1, or 2^64 - 1 with extended sequence numbers
160   spi        168  flags      176  share: of 2^32, whose worker it is      184  tunnel, its number
192   header     40 bytes: the outer header, as far as it is the same for all packets
232   outer      20 or 40, its size
240   local      16 bytes: the outer address that is ours, as it lies in a packet
256   counters   8 words
320   ticket     outbound: the mark of packets that it is to encrypt; another one whenever the record changes hands
384   the window: `libfp.apps.ipsec.replay`
"""

from __future__ import annotations

from libfp.apps.ipsec import libcrypto, replay
from libfp.jit import kernel, load32, load64, native, store64, word
from libfp.packet.burst import Burst
from libfp.tables.buckets import find_word

CIPHER, SEQUENCE, LIMIT, IV, LAST, SPI, FLAGS, SHARE, TUNNEL, HEADER, OUTER, LOCAL, COUNTERS, TICKET, WINDOW = (
    0, 128, 136, 144, 152, 160, 168, 176, 184, 192, 232, 240, 256, 320, 384
)  # fmt: skip
SIZE = WINDOW + replay.SIZE + 64 - (WINDOW + replay.SIZE) % 64
assert libcrypto.SIZE <= SEQUENCE

ESN, INBOUND = 1, 2
COUNTER_NAMES = ("packets", "bytes", "replayed", "bad_icv", "bad_padding", "selector", "malformed", "exhausted")
PACKETS, BYTES, REPLAYED, BAD_ICV, BAD_PADDING, SELECTOR, MALFORMED, EXHAUSTED = range(COUNTERS, WINDOW - 64, 8)

ESP = 50
ESP_HEADER, IV_SIZE, ICV_SIZE = 8, 8, libcrypto.TAG_SIZE
#: The least an ESP packet has: header, IV, four bytes of which two are its trailer, ICV.
LEAST = ESP_HEADER + IV_SIZE + 4 + ICV_SIZE

#: In the mark of a packet that `select` leaves to `protect`; then 24 bits that tell apart those who have the record one
#: after the other, and 24 of its number. A packet may wait for its worker longer than its SA is there.
MARK = 0x0E5B << 48
MARK_MASK = 0xFFFF << 48
NUMBER_MASK = 0xFFFFFF

# In the memory that all workers read: how many local addresses; the addresses, 16 bytes each, IPv4 with zeros behind;
# and for each tunnel the address of the record that it sends by, 0 for none.
LOCALS, LOCAL_AT, MOST_LOCALS = 0, 64, 1024
TUNNELS_AT = LOCAL_AT + 16 * MOST_LOCALS


@native
class SasView:
    """The `SaTable` as one worker sees it: `cell` and `buckets` of its replica of SPIs, the records, what all share,
    libcrypto's functions, and where it counts its turns."""

    cell: word
    buckets: word
    records: word
    shared: word
    functions: word
    turns: word

    def each_turn(self) -> int:
        """Called by the loop once a turn: whoever has been removed two turns ago is in nobody's hands."""
        store64(self.turns, load64(self.turns) + 1)
        return 0

    def find(self, spi: int) -> int:
        """The record of the inbound SA with that SPI, 0 if there is none. The replica may lag behind the records."""
        entry = find_word(load64(self.cell), self.buckets, spi)
        if entry == 0:
            return 0
        record = load64(entry + 8)
        return record if load64(record + SPI) == spi else 0

    def holder(self, ticket: int) -> int:
        """The record of the outbound SA that a packet has been marked for, 0 if it is gone."""
        record = self.records + SIZE * (ticket & NUMBER_MASK)
        return record if load64(record + TICKET) == ticket else 0

    def outbound(self, tunnel: int) -> int:
        """The record that tunnel number `tunnel` sends by, 0 if there is none."""
        return load64(self.shared + TUNNELS_AT + 8 * tunnel)

    def is_local(self, low: int, high: int) -> bool:
        """Whether one of the local addresses is these 16 bytes."""
        at, found = self.shared + LOCAL_AT, False
        for i in range(load64(self.shared)):
            found |= load64(at + 16 * i) == low and load64(at + 16 * i + 8) == high
        return found


@kernel
def owner_of(record: int, burst: Burst) -> int:
    """Number of the worker whose SA it is."""
    return load64(record + SHARE) * burst.workers >> 32


@kernel
def count(record: int, which: int, by: int) -> None:
    """Add to one of an SA's counters."""
    store64(record + which, load64(record + which) + by)


@kernel
def is_to_local4(sas: SasView, ip: int) -> bool:
    """Whether the IPv4 packet at `ip` is for one of the local ends of tunnels."""
    return sas.is_local(load32(ip + 16), 0)


@kernel
def is_to_local6(sas: SasView, ip: int) -> bool:
    """Whether the IPv6 packet at `ip` is for one of the local ends of tunnels."""
    return sas.is_local(load64(ip + 24), load64(ip + 32))
