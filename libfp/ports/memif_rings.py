"""The two memif rings of one port and queue, as the worker sees them; the decisions of `libfp.ports.memif` in code.

The worker's block of a port has the same words as an AF_XDP port's (`libfp.ports.rings`) where it has the same things:
RX and TX hold its own indexes, COUNTERS leads to the counters. TX describes a private array of packets that are to be
sent: `send` and its like fill it as if it were a ring of the kernel's, `publish` copies them to the peer's buffers.

One word of the block is the control plane's: LINK, the address of the connection's description (`memif_memory`), 0 for
none. The worker looks at it before it receives; SEEN says which one it has gone by since, and the former is nobody's
then. Whatever the peer stores, indexes are held against the ring's size, and each descriptor is read once (atomically,
so that no compiler reads it again) and held against the regions. An index that cannot be, or a buffer to send by that
cannot be, stops the link (BROKEN, which the control plane looks at); a received descriptor that cannot be costs its
packet.
"""

from __future__ import annotations

from libfp.jit import (
    Arena,
    inline,
    kernel,
    load32,
    load64,
    load_acquire16,
    load_acquire64,
    native,
    prefetch,
    prefetch_write,
    shr64,
    store16,
    store32,
    store64,
    store_release16,
    store_release64,
    unlikely,
    word,
)
from libfp.jit.raw import copy64, load8, store8
from libfp.packet.burst import FRAME, LENGTH, Burst
from libfp.ports.memif_memory import (
    BASE,
    BIAS,
    BUFFER_SIZE,
    BUFFERS,
    FIRST,
    HEADROOM,
    LINK_RX,
    LINK_TX,
    MASK,
    OURS,
    POOL,
    REGION_COUNT,
    REGIONS,
    RING,
    THEIRS,
)
from libfp.ports.rings import (
    CACHED,
    COUNTERS,
    DESCS,
    OWN,
    PUBLISHED,
    RX,
    RX_BYTES,
    RX_ERRORS,
    RX_PACKETS,
    RX_STARVED,
    TX,
    TX_BYTES,
    TX_FULL,
    TX_PACKETS,
    FreeFrames,
    PortRings,
)

# Words of the block beside those: the control plane's on a line of its own, the worker's on the next.
LINK = 128
SEEN, BROKEN, FREE, MEMORY, ROOM, TX_NEXT, TX_LIMIT, TARGETS = range(320, 384, 8)
SPLIT, RESTS, FRAME_SHIFT, WATCHED = range(384, 416, 8)

STAGE = 256  # packets to be sent, at most, before they are published
BATCH = 64
NEXT = 1  # of a descriptor's flags
AHEAD, FAR = 3, 640  # packets and bytes: what is fetched while the packets before are copied
WHOLE = 1 << 40  # a SPLIT that no packet reaches
# What RESTS has for each frame: where the rest of its packet is, its length; and of a pool's buffer, the word of the
# pool's table that says whose it is (0: no such buffer), and where the pool is.
REST_LENGTH, REST_SLOT, REST_BASE = range(8, 32, 8)
REST = 32


@kernel
@inline
def copy_bytes(target, source, size):  # type: ignore[no-untyped-def]
    """Copy `size` bytes and touch no other: lines or words, the last of which overlaps the one before."""
    at = 0
    if size >= 64:
        while at + 64 < size:
            copy64(target + at, source + at)
            at += 64
        copy64(target + size - 64, source + size - 64)
    elif size >= 8:
        while at + 8 < size:
            store64(target + at, load64(source + at))
            at += 8
        store64(target + size - 8, load64(source + size - 8))
    else:
        while at < size:
            store8(target + at, load8(source + at))
            at += 1


@kernel
@inline
def place(link, part, slot, first, second):  # type: ignore[no-untyped-def]
    """Where the buffer of `slot` is, of which `first` and `second` are our copy of the descriptor; 0: nowhere."""
    length = shr64(first, 32)
    buffers = load64(link + part + BUFFERS)
    if buffers != 0:
        return load64(link + BASE) + load32(buffers + 4 * slot) if length <= load64(link + part + BUFFER_SIZE) else 0
    region = shr64(first, 16) & 0xFFFF
    if region >= load64(link + REGION_COUNT):
        return 0
    entry, offset = load64(link + REGIONS) + 16 * region, second & 0xFFFFFFFF
    return load64(entry) + offset if offset + length <= load64(entry + 8) else 0


@native
class MemifRings:
    """The rings of one port for one worker; `at` is its block."""

    at: word

    send, may_put, slot, have_put = PortRings.send, PortRings.may_put, PortRings.slot, PortRings.have_put

    def count(self, which: int, by: int) -> None:
        at = load64(self.at + COUNTERS) + which
        store64(at, load64(at) + by)

    def rx_burst(self, burst: Burst, limit: int) -> int:
        """Copy up to `limit` (64 at most) received packets into frames and the empty burst; return how many."""
        at = self.at
        link = load_acquire64(at + LINK)
        if unlikely(link != load64(at + SEEN)):
            self.adopt(link)
        if link == 0:
            return 0
        own = load64(at + RX + OWN)
        if own != load64(at + RX + PUBLISHED):
            self.give_back(link, own)
        ready = (load64(at + RX + CACHED) - own) & 0xFFFF
        if ready == 0:
            theirs = load_acquire16(load64(link + LINK_RX + THEIRS))
            ready = (theirs - own) & 0xFFFF
            if ready == 0 or load64(at + BROKEN) == link:
                return 0
            if unlikely(ready > load64(link + LINK_RX + MASK) + 1):
                store_release64(at + BROKEN, link)
                return 0
            store64(at + RX + CACHED, theirs)
        free = FreeFrames(load64(at + FREE))
        if unlikely(free.count < limit):
            self.count(RX_STARVED, 1)
            return 0
        used = self.look(link, burst, own, min(ready, limit))
        if used != 0:
            self.fetch(link, burst)
        else:
            used = self.join(link, burst, own, ready)
        store64(at + RX + OWN, (own + used) & 0xFFFF)
        taken, total = burst.count, 0
        if taken > 0:
            for i in range(taken):
                total += load32(burst.at + LENGTH + 4 * i)
            burst.begin(taken)
            self.count(RX_PACKETS, taken)
            self.count(RX_BYTES, total)
        return taken

    def look(self, link: int, burst: Burst, own: int, most: int) -> int:
        """Where up to `most` packets are, each of one buffer, into FRAME and LENGTH of the burst; how many slots."""
        at, columns, taken = self.at, burst.at, 0
        slots = load64(at + TARGETS)
        descs, mask, room = load64(link + LINK_RX + RING), load64(link + LINK_RX + MASK), load64(at + ROOM)
        for i in range(most):
            slot = (own + i) & mask
            first, second = load_acquire64(descs + 16 * slot), load_acquire64(descs + 16 * slot + 8)
            if unlikely(first & NEXT != 0):
                most = i
                break
            source, length = place(link, LINK_RX, slot, first, second), shr64(first, 32)
            if unlikely(int(source == 0) | int(length == 0) | int(length > room)):
                self.count(RX_ERRORS, 1)
                continue
            prefetch(source)
            store64(columns + FRAME + 8 * taken, source)
            store32(columns + LENGTH + 4 * taken, length)
            store64(slots + 8 * taken, load64(link + LINK_RX + BUFFERS) + 4 * slot)
            taken += 1
        burst.count = taken
        return most

    def fetch(self, link: int, burst: Burst) -> None:
        """Copy what `look` has found into frames."""
        at, columns = self.at, burst.at
        pool, base, slots = load64(link + POOL), load64(link + BASE), load64(at + TARGETS)
        free, memory = FreeFrames(load64(at + FREE)), load64(at + MEMORY)
        split = load64(at + SPLIT) if load64(load64(at + WATCHED)) == 0 else WHOLE
        count = burst.count
        for i in range(count):
            ahead = min(i + AHEAD, count - 1)
            source, length = load64(columns + FRAME + 8 * ahead), load32(columns + LENGTH + 4 * ahead)
            for offset in range(64, min(length, split, FAR), 64):
                prefetch(source + offset)
            source, length = load64(columns + FRAME + 8 * i), load32(columns + LENGTH + 4 * i)
            frame = free.pop()
            self.rest_of(frame, source + split, length - split, load64(slots + 8 * i) if pool != 0 else 0, base)
            copy_bytes(memory + frame + HEADROOM, source, min(length, split))
            store64(columns + FRAME + 8 * i, frame + HEADROOM)

    def rest_of(self, frame: int, source: int, length: int, slot: int, base: int) -> None:
        """Note where what is to follow the first SPLIT bytes of a packet lies, and in which slot's buffer of a pool."""
        at = self.at
        if load64(at + SPLIT) != WHOLE:
            rest = load64(at + RESTS) + REST * shr64(frame, load64(at + FRAME_SHIFT))
            store64(rest, source)
            store64(rest + REST_LENGTH, length)
            store64(rest + REST_SLOT, slot)
            store64(rest + REST_BASE, base)

    def join(self, link: int, burst: Burst, own: int, ready: int) -> int:
        """One packet of several buffers, into a frame of its own; how many slots it had, 0: it is not all there."""
        at, columns, used, more = self.at, burst.at, 0, True
        descs, mask, room = load64(link + LINK_RX + RING), load64(link + LINK_RX + MASK), load64(at + ROOM)
        free, total, sound = FreeFrames(load64(at + FREE)), 0, True
        frame = free.pop()
        target = load64(at + MEMORY) + frame + HEADROOM
        while more and used < ready:
            slot = (own + used) & mask
            first, second = load_acquire64(descs + 16 * slot), load_acquire64(descs + 16 * slot + 8)
            source, length = place(link, LINK_RX, slot, first, second), shr64(first, 32)
            sound = sound and source != 0 and total + length <= room
            if sound:
                copy_bytes(target + total, source, length)
                total += length
            more = first & NEXT != 0
            used += 1
        burst.count = 0
        if not more or used > mask:
            for i in range(used):  # DPDK 22.11 never takes NEXT back itself: its next packet here would be a chain
                store16(descs + 16 * ((own + i) & mask), 0)
        if not more and sound and total > 0:
            self.rest_of(frame, 0, 0, 0, 0)
            store64(columns + FRAME, frame + HEADROOM)
            store32(columns + LENGTH, total)
            burst.count = 1
            return used
        free.push(frame)
        if more and used <= mask:
            return 0  # its end has not come yet
        self.count(RX_ERRORS, 1)
        return used

    def give_back(self, link: int, own: int) -> None:
        """Let the peer have the slots again whose packets have been dealt with."""
        at, bias = self.at, load64(link + LINK_RX + BIAS)
        if bias != 0:  # they are ours, and the peer may have written what it likes
            descs, mask, size = (
                load64(link + LINK_RX + RING),
                load64(link + LINK_RX + MASK),
                load64(link + LINK_RX + BUFFER_SIZE),
            )
            first, offsets = size << 32 | load64(link + POOL), load64(link + LINK_RX + BUFFERS)
            released = load64(at + RX + PUBLISHED)
            for i in range((own - released) & 0xFFFF):
                slot = (released + i) & mask
                store64(descs + 16 * slot, first)
                store64(descs + 16 * slot + 8, load32(offsets + 4 * slot))
        store_release16(load64(link + LINK_RX + OURS), own + bias)
        store64(at + RX + PUBLISHED, own)

    def adopt(self, link: int) -> None:
        """From here on go by the connection at `link`; what was to be sent by the former one is lost."""
        at = self.at
        self.lose(0)
        self.empty(0)
        if link != 0:
            first = load64(link + LINK_RX + FIRST)
            for which in (OWN, CACHED, PUBLISHED):
                store64(at + RX + which, first)
            store64(at + TX_NEXT, load64(link + LINK_TX + FIRST))
            store64(at + TX_LIMIT, load64(link + LINK_TX + FIRST))
        store_release64(at + BROKEN, 0)  # the next link may come to lie where this one was
        store_release64(at + SEEN, link)

    def lose(self, first: int) -> None:
        """Count what is to be sent, from entry `first` on, as not sent for want of room."""
        at, staged = self.at, load64(self.at + TX + OWN)
        stage, total = load64(at + TX + DESCS), 0
        for i in range(first, staged):
            total += load32(stage + 16 * i + 8)
        self.count(TX_FULL, staged - first)
        self.count(TX_BYTES, -total)

    def empty(self, room: int) -> None:
        """Free all frames that were to be sent; there is room for so many more."""
        at, free = self.at, FreeFrames(load64(self.at + FREE))
        stage = load64(at + TX + DESCS)
        for i in range(load64(at + TX + OWN)):
            free.push(load64(stage + 16 * i))
        store64(at + TX + OWN, 0)
        store64(at + TX + CACHED, min(room, STAGE))

    def find_room(self, own: int) -> bool:
        """Look how many packets more may be sent, if each fits a buffer, and keep the end of that in TX's CACHED."""
        at = self.at
        room = self.room(load64(at + SEEN), load64(at + TX_NEXT))
        room = min(max(room, own), STAGE)
        store64(at + TX + CACHED, room)
        return room > own

    def room(self, link: int, following: int) -> int:
        """Look how many buffers there are for what is sent from index `following` on, and keep their end."""
        at, room = self.at, 0
        if link != 0 and load64(at + BROKEN) != link:
            limit = load_acquire16(load64(link + LINK_TX + THEIRS)) + load64(link + LINK_TX + BIAS)
            room = (limit - following) & 0xFFFF
            if unlikely(room > load64(link + LINK_TX + MASK) + 1):
                store_release64(at + BROKEN, link)
                room = 0
            store64(at + TX_LIMIT, following + room)
        return room

    def reclaim(self, free: FreeFrames) -> None:
        """Make room for more: what has been sent so far is copied now."""
        if load64(self.at + TX + OWN) != 0:
            self.publish()

    def refill(self, free: FreeFrames, least: int) -> None:
        """Buffers go back with the next burst."""

    def publish(self) -> None:
        """Copy what is to be sent to the peer's buffers, let it see that, and take the frames back."""
        at, staged = self.at, load64(self.at + TX + OWN)
        if staged == 0:
            return
        link, done, following = load64(at + SEEN), 0, load64(at + TX_NEXT)
        fresh = link == 0 or load64(at + BROKEN) == link
        room = 0 if fresh else (load64(at + TX_LIMIT) - following) & 0xFFFF
        while done < staged and (room != 0 or not fresh):
            count = min(staged - done, room, BATCH)
            sound = self.aim(link, following, count)
            put = self.put(link, following, done, sound)
            done, following, room = done + put, following + put, room - put
            if put < sound:  # one that does not fit its buffer
                slots = self.put_long(link, following, done, room)
                if slots != 0:
                    done, following, room = done + 1, following + slots, room - slots
                    continue
            elif sound < count:
                store_release64(at + BROKEN, link)
                break
            elif room != 0:
                continue
            if fresh or done == staged:
                break
            fresh = True
            room = self.room(link, following)
        if done < staged:
            self.lose(done)
        if done > 0:
            store64(at + TX_NEXT, following & 0xFFFF)
            store_release16(load64(link + LINK_TX + OURS), following)
            self.count(TX_PACKETS, done)
        self.empty(room)

    def aim(self, link: int, following: int, count: int) -> int:
        """The buffers of the next `count` slots, (address, size) each, to TARGETS; how many, up to one that is none."""
        descs, mask = load64(link + LINK_TX + RING), load64(link + LINK_TX + MASK)
        buffers, size = load64(link + LINK_TX + BUFFERS), load64(link + LINK_TX + BUFFER_SIZE)
        targets, base = load64(self.at + TARGETS), load64(link + BASE)
        for i in range(count):
            slot = (following + i) & mask
            if buffers != 0:
                target = base + load32(buffers + 4 * slot)
            else:
                first, second = load_acquire64(descs + 16 * slot), load_acquire64(descs + 16 * slot + 8)
                target, size = place(link, LINK_TX, slot, first, second), shr64(first, 32)
            if unlikely(int(target == 0) | int(size == 0)):
                return i
            prefetch_write(target)
            store64(targets + 16 * i, target)
            store64(targets + 16 * i + 8, size)
        return count

    def put(self, link: int, following: int, done: int, count: int) -> int:
        """Copy `count` packets, from entry `done` on, to what `aim` has found; how many, up to one that is too long.

        One whose rest is in the pool that the link has, too, is moved: only its headers are copied, to where they were.
        """
        at = self.at
        stage, targets = load64(at + TX + DESCS) + 16 * done, load64(at + TARGETS)
        rests, shift, split = load64(at + RESTS), load64(at + FRAME_SHIFT), load64(at + SPLIT)
        moves = load64(link + POOL) != 0
        for i in range(count):
            ahead = min(i + AHEAD, count - 1)
            length = min(load32(stage + 16 * ahead + 8), FAR)
            if length > 64 and not (moves and length > split):
                target = load64(targets + 16 * ahead)
                for offset in range(64, length, 64):
                    prefetch_write(target + offset)
                if length > split:
                    source = load64(rests + REST * shr64(load64(stage + 16 * ahead), shift))
                    for offset in range(0, length - split, 64):
                        prefetch(source + offset)
            length = load32(stage + 16 * i + 8)
            frame, target = load64(stage + 16 * i), 0
            if moves and length > split:
                target = self.move(link, following + i, frame, length)
            if target == 0:
                target = load64(targets + 16 * i)
                if unlikely(length > load64(targets + 16 * i + 8)):
                    return i
            self.copy_out(target, frame, 0, length)
            self.describe(link, following + i, target, length, 0)
        return count

    def move(self, link: int, index: int, frame: int, length: int) -> int:
        """Have the slot that is to send the packet at `frame` swap buffers with the one where it came in.

        Returns where it begins there; 0: it did not come in by a buffer of the link's pool, or does not fit there.
        """
        at, shift = self.at, load64(self.at + FRAME_SHIFT)
        rest, base = load64(at + RESTS) + REST * shr64(frame, shift), load64(link + BASE)
        theirs, begin = load64(rest + REST_SLOT), (frame & ((1 << shift) - 1)) - HEADROOM
        if theirs == 0 or load64(rest + REST_BASE) != base or load64(rest + REST_LENGTH) <= 0:
            return 0
        if begin + length > load64(link + LINK_TX + BUFFER_SIZE):
            return 0
        ours = load64(link + LINK_TX + BUFFERS) + 4 * (index & load64(link + LINK_TX + MASK))
        offset = load32(theirs)
        store32(theirs, load32(ours))
        store32(ours, offset)
        store64(rest + REST_SLOT, 0)
        return base + offset + begin

    def put_long(self, link: int, following: int, entry: int, room: int) -> int:
        """Copy one packet to as many buffers as it needs; how many, 0: there are not as many."""
        at, slots, done = self.at, 0, 0
        staged = load64(at + TX + DESCS) + 16 * entry
        frame, length, targets = load64(staged), load32(staged + 8), load64(at + TARGETS)
        while done < length:
            if slots == room or self.aim(link, following + slots, 1) == 0:
                return 0
            size = min(length - done, load64(targets + 8))
            self.copy_out(load64(targets), frame, done, size)
            done += size
            self.describe(link, following + slots, load64(targets), size, NEXT if done < length else 0)
            slots += 1
        return slots

    def describe(self, link: int, index: int, target: int, length: int, flags: int) -> None:
        """Fill a descriptor in; where the buffer is ours, all of it, since the peer may have written what it likes."""
        slot = index & load64(link + LINK_TX + MASK)
        desc = load64(link + LINK_TX + RING) + 16 * slot
        if load64(link + LINK_TX + BUFFERS) != 0:
            store64(desc, length << 32 | load64(link + POOL) | flags)
            store64(desc + 8, target - load64(link + BASE))
        else:
            store16(desc, flags)
            store32(desc + 4, length)

    def copy_out(self, target: int, frame: int, start: int, size: int) -> None:
        """Copy `size` bytes of the packet at `frame`, from byte `start` on, wherever they are."""
        at, shift = self.at, load64(self.at + FRAME_SHIFT)
        source = load64(at + MEMORY) + frame + start
        if load64(at + SPLIT) == WHOLE:
            copy_bytes(target, source, size)
            return
        rest = load64(at + RESTS) + REST * shr64(frame, shift)
        behind = ((frame & ((1 << shift) - 1)) + start) - HEADROOM - load64(at + SPLIT)  # < 0: so many are here
        here = min(size, max(-behind, 0))
        left = load64(rest + REST_LENGTH) - max(behind, 0)  # of those that are still where the peer put them
        there = min(size - here, max(left, 0))
        copy_bytes(target, source, here)
        source_there = load64(rest) + max(behind, 0)
        if there > 0 and source_there != target + here:
            copy_bytes(target + here, source_there, there)
        if here + there < size:  # what a stage has appended
            copy_bytes(target + here + there, source + here + there, size - here - there)


class MemifBlock:
    """What belongs to the block of one port for one worker besides the block itself: see `MemifRings`.

    `rests` says, for each frame of the worker, where the rest of its packet is: all its ports share the first one's.
    """

    def __init__(self, frames: int, first: MemifBlock | None) -> None:
        self._arena = Arena(16 * (STAGE + BATCH))
        self._rests = Arena(REST * frames) if first is None else None
        self.stage, self.targets = self._arena.address, self._arena.address + 16 * STAGE
        self.rests: int = self._rests.address if self._rests is not None else first.rests  # type: ignore[union-attr]

    def close(self) -> None:
        """Unmap it; that of the first port is closed last."""
        self._arena.close()
        if self._rests is not None:
            self._rests.close()
