"""The four AF_XDP rings of one port and queue, as the worker sees them (Linux, Documentation/networking/af_xdp.rst).

The worker consumes `rx` and `completion`, produces `fill` and `tx`. Whoever is at the other end, the kernel or a
memory port, compiled code is the same. Indexes are free-running 32-bit numbers; the worker keeps its own in private
words and publishes them with release stores, once a burst.

Frames in flight (handed to `tx`, not yet back through `completion`) are capped at `flight_limit`: in copy mode a
frame comes back only when its receiver has freed it.
"""

from __future__ import annotations

from libfp.jit import (
    Arena,
    load32,
    load64,
    load_acquire32,
    native,
    prefetch,
    store32,
    store64,
    store_release32,
    u32,
    ult64,
    word,
)
from libfp.packet.burst import FRAME, LENGTH, Burst

# Byte offsets in a port's block, one cache line for each ring. Rings: producer, consumer, flags and descriptor
# addresses, mask, own index, cached index of the other side (for tx the index up to which there is room), and for tx
# the last published producer.
RX, TX, FILL, COMPLETION, STATE = 0, 64, 128, 192, 256
PRODUCER, CONSUMER, FLAGS, DESCS, MASK, OWN, CACHED, PUBLISHED = range(0, 64, 8)
COUNTERS, FLIGHT_LIMIT, FD, UMEM_SIZE, ZERO_COPY = range(STATE, STATE + 40, 8)
BLOCK = 512

# Words of a port's counters, in the worker's statistics block.
RX_PACKETS, RX_BYTES, TX_PACKETS, TX_BYTES, TX_FULL, RX_STARVED, RX_ERRORS = range(0, 56, 8)
COUNTER_NAMES = ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes", "tx_full", "rx_starved", "rx_errors")
COUNTERS_SIZE = 64

NEED_WAKEUP = 1
STACK = 24  # where the offsets of `FreeFrames` begin


@native
class FreeFrames:
    """A stack of free frames at `at`: count, most, mask to a frame's start, then offsets. Last in, first out: warm."""

    at: word

    @property
    def count(self) -> int:
        return load64(self.at)

    def push(self, address: int) -> None:
        """Give back the frame that holds the offset `address`. More frames than there are: somebody lies; ignored."""
        n = load64(self.at)
        if n < load64(self.at + 8):
            store64(self.at + STACK + 8 * n, address & load64(self.at + 16))
            store64(self.at, n + 1)

    def pop(self) -> int:
        """Take a frame; the caller has looked at `count`."""
        n = load64(self.at) - 1
        store64(self.at, n)
        return load64(self.at + STACK + 8 * n)

    def push_from(self, descs: int, first: int, n: int, mask: int, size: int) -> None:
        """`push` what `n` entries of a ring say, from index `first` on; offsets outside `size` bytes are ignored."""
        at, count, most, start = self.at + STACK, load64(self.at), load64(self.at + 8), load64(self.at + 16)
        for i in range(first, first + n):
            frame = load64(descs + (i & mask) * 8)
            if ult64(frame, size) & int(count < most):
                store64(at + 8 * count, frame & start)
                count += 1
        store64(self.at, count)

    def pop_into(self, descs: int, first: int, n: int, mask: int) -> None:
        """`pop` `n` times, which there must be, into a ring from index `first` on."""
        count = load64(self.at)
        top = self.at + STACK + 8 * count
        for i in range(n):
            store64(descs + ((first + i) & mask) * 8, load64(top - 8 - 8 * i))
        store64(self.at, count - n)


@native
class PortRings:
    """The rings of one port for one worker; `at` is its block."""

    at: word

    def rx_burst(self, burst: Burst, limit: int) -> int:
        """Move up to `limit` (64 at most) received packets into the empty burst; return how many."""
        at = self.at
        own = load64(at + RX + OWN)
        available = u32(load64(at + RX + CACHED) - own)
        if available == 0:
            producer = load_acquire32(load64(at + RX + PRODUCER))
            available = u32(producer - own)
            if available == 0:
                return 0
            store64(at + RX + CACHED, producer)
        n = min(available, limit)
        descs, mask, base, size = (
            load64(at + RX + DESCS),
            load64(at + RX + MASK),
            burst.base,
            load64(at + UMEM_SIZE),
        )
        columns, taken, total = burst.at, 0, 0
        for i in range(n):
            desc = descs + ((own + i) & mask) * 16
            frame, length = load64(desc), load32(desc + 8)
            if frame < 0 or frame + length > size:
                continue  # outside the UMEM: not ours to touch, nor to give back
            prefetch(base + frame)
            store64(columns + FRAME + 8 * taken, frame)
            store32(columns + LENGTH + 4 * taken, length)
            taken += 1
            total += length
        own = u32(own + n)
        store64(at + RX + OWN, own)
        store_release32(load64(at + RX + CONSUMER), own)
        burst.begin(taken)
        counters = load64(at + COUNTERS)
        store64(counters + RX_PACKETS, load64(counters + RX_PACKETS) + taken)
        store64(counters + RX_BYTES, load64(counters + RX_BYTES) + total)
        return taken

    def send(self, frame: int, length: int) -> bool:
        """Put a packet into `tx`, to be published with `publish`; False if there is no room."""
        at = self.at
        own = load64(at + TX + OWN)
        if own == load64(at + TX + CACHED) and not self.find_room(own):
            return False
        desc = load64(at + TX + DESCS) + (own & load64(at + TX + MASK)) * 16
        store64(desc, frame)
        store64(desc + 8, length)  # the upper half, options, is 0
        store64(at + TX + OWN, u32(own + 1))
        counters = load64(at + COUNTERS)
        store64(counters + TX_BYTES, load64(counters + TX_BYTES) + length)
        return True

    def may_put(self, n: int) -> bool:
        """Whether the next `n` entries from `slot` on are free and lie side by side."""
        at = self.at
        own, mask = load64(at + TX + OWN), load64(at + TX + MASK)
        if u32(load64(at + TX + CACHED) - own) < n:
            self.find_room(own)
        return u32(load64(at + TX + CACHED) - own) >= n and (own & mask) + n <= mask + 1

    def slot(self) -> int:
        """Where the next entry of `tx` lies: 8 bytes of frame offset, 4 of length, 4 of options (0)."""
        return load64(self.at + TX + DESCS) + (load64(self.at + TX + OWN) & load64(self.at + TX + MASK)) * 16

    def have_put(self, n: int, length: int) -> None:
        """`n` packets of `length` bytes together have been written from `slot` on; to be published with `publish`."""
        at = self.at
        store64(at + TX + OWN, u32(load64(at + TX + OWN) + n))
        counters = load64(at + COUNTERS)
        store64(counters + TX_BYTES, load64(counters + TX_BYTES) + length)

    def find_room(self, own: int) -> bool:
        """Look how far `tx` may be filled, and keep that index in its CACHED word."""
        at = self.at
        room = load64(at + TX + MASK) + 1 - u32(own - load_acquire32(load64(at + TX + CONSUMER)))
        room = min(room, load64(at + FLIGHT_LIMIT) - u32(own - load64(at + COMPLETION + OWN)))
        store64(at + TX + CACHED, u32(own + max(room, 0)))
        return room > 0

    def publish(self) -> None:
        """Let the other side see what was sent."""
        at = self.at
        own, published = load64(at + TX + OWN), load64(at + TX + PUBLISHED)
        if own == published:
            return
        store_release32(load64(at + TX + PRODUCER), own)
        store64(at + TX + PUBLISHED, own)
        counters = load64(at + COUNTERS)
        store64(counters + TX_PACKETS, load64(counters + TX_PACKETS) + u32(own - published))

    def unsent(self) -> bool:
        """Whether the other side has yet to take packets from `tx`."""
        at = self.at
        return load64(at + TX + PUBLISHED) != load_acquire32(load64(at + TX + CONSUMER))

    def wants_tx_kick(self) -> bool:
        """Packets wait in `tx` and the kernel asks to be called. For any thread: it reads the ring itself."""
        producer = load_acquire32(load64(self.at + TX + PRODUCER))
        waiting = producer != load_acquire32(load64(self.at + TX + CONSUMER))
        return waiting and load_acquire32(load64(self.at + TX + FLAGS)) & NEED_WAKEUP != 0

    def wants_rx_kick(self) -> bool:
        """The driver ran out of frames and asks to be called now that there are some. In copy mode no driver does."""
        if load64(self.at + ZERO_COPY) == 0:
            return False
        return load_acquire32(load64(self.at + FILL + FLAGS)) & NEED_WAKEUP != 0

    def reclaim(self, free: FreeFrames) -> None:
        """Take back the frames of sent packets."""
        at = self.at
        own = load64(at + COMPLETION + OWN)
        if u32(load64(at + TX + PUBLISHED) - own) == 0:
            return  # nothing in flight
        producer = load_acquire32(load64(at + COMPLETION + PRODUCER))
        n = u32(producer - own)
        if n == 0:
            return
        descs, mask = load64(at + COMPLETION + DESCS), load64(at + COMPLETION + MASK)
        free.push_from(descs, own, min(n, mask + 1), mask, load64(at + UMEM_SIZE))
        store64(at + COMPLETION + OWN, producer)
        store_release32(load64(at + COMPLETION + CONSUMER), producer)

    def refill(self, free: FreeFrames, least: int) -> None:
        """Top up `fill` with free frames, once `least` or half of them are missing; with none free, packets wait."""
        at = self.at
        own, mask = load64(at + FILL + OWN), load64(at + FILL + MASK)
        least = min(least, (mask + 1) >> 1)
        room = mask + 1 - u32(own - load64(at + FILL + CACHED))
        if room < least:
            consumer = load_acquire32(load64(at + FILL + CONSUMER))
            store64(at + FILL + CACHED, consumer)
            room = mask + 1 - u32(own - consumer)
            if room < least:
                return
        n = min(room, free.count)
        if n < room:
            counters = load64(at + COUNTERS)
            store64(counters + RX_STARVED, load64(counters + RX_STARVED) + 1)
        if n <= 0:
            return
        free.pop_into(load64(at + FILL + DESCS), own, n, mask)
        own = u32(own + n)
        store64(at + FILL + OWN, own)
        store_release32(load64(at + FILL + PRODUCER), own)


class RingAddresses:
    """Where one ring lies: addresses of its three control words and its descriptors, and its size (a power of 2)."""

    def __init__(self, producer: int, consumer: int, flags: int, descs: int, size: int) -> None:
        self.producer, self.consumer, self.flags, self.descs, self.size = producer, consumer, flags, descs, size


class PortBlocks:
    """The blocks of a worker's ports, side by side in one arena."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.arena = Arena(max(count, 1) * BLOCK)

    def rings(self, port: int) -> PortRings:
        return PortRings(self.arena.address + port * BLOCK)

    def fill_in(
        self,
        port: int,
        rings: tuple[RingAddresses, RingAddresses, RingAddresses, RingAddresses],
        *,
        counters: int,
        flight_limit: int,
        fd: int,
        umem_size: int,
        zero_copy: bool,
    ) -> None:
        """Describe a port: its rings in the order rx, tx, fill, completion, with the indexes they hold now."""
        at = self.arena.address + port * BLOCK
        for offset, ring, produces in zip((RX, TX, FILL, COMPLETION), rings, (False, True, True, False), strict=True):
            own, other = (ring.producer, ring.consumer) if produces else (ring.consumer, ring.producer)
            values = (ring.producer, ring.consumer, ring.flags, ring.descs, ring.size - 1, load32(own), load32(other))
            for k, value in enumerate(values):
                store64(at + offset + 8 * k, value)
        store64(at + TX + CACHED, load64(at + TX + OWN))
        store64(at + RX + CACHED, load64(at + RX + OWN))  # look again, as for tx
        store64(at + TX + PUBLISHED, load64(at + TX + OWN))
        state = {COUNTERS: counters, FLIGHT_LIMIT: flight_limit, FD: fd, UMEM_SIZE: umem_size, ZERO_COPY: zero_copy}
        for where, value in state.items():
            store64(at + where, int(value))
