"""What two memif peers share: regions of memory, and in them rings of descriptors and the buffers these point to.

The client makes it all; the server maps what the client offers. A ring, in the machine's byte order:

    0      cookie   32 bits
    4      flags    16 bits; 1: the consumer polls, and wants no interrupt
    6      head     16 bits, free-running
    64     tail     16 bits, free-running
    128    descriptors of 16 bytes: flags (16 bits; 1: the packet goes on in the next one), region (16), length (32),
           offset in the region (32), metadata (32)

In a ring to the server the client produces packets by `head`, and `tail` gives the buffers back. In a ring to the
client, the client produces empty buffers by `head`, and the server fills them by `tail`: who owns the memory always
writes `head`.

A peer's region must be a memfd sealed against shrinking, or reading it could end this process (SIGBUS); in ordinary
pages, since huge ones can be taken back in spite of the seal and then run out. What is in it is the peer's word, and
so is what is in a region of our own, which the peer can write as well: where our buffers are, we know from elsewhere,
from a table for each ring, in memory that nobody else maps.

Buffers of our own may also lie in a region that several ports offer, each to its peer (`Pool`): then a buffer that one
peer has filled can be put into another one's ring as it is. Each buffer is in one slot of one ring, always, and a move
swaps two: so none is lost, none is in two places, and a connection that ends leaves nothing to be cleared up.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from typing import NamedTuple

from libfp.errors import BadInput, PeerUnsuitable
from libfp.jit import Arena, load16, load32, store16, store32, store64
from libfp.jit.memory import PAGE, SharedMap
from libfp.ports.memif_messages import COOKIE

FLAGS, HEAD, TAIL, DESCS = 4, 6, 64, 128
NO_INTERRUPT = 1
MOST_REGIONS, MOST_BYTES = 64, 1 << 32
POOL_REGION = 1  # a pool's number, in every connection
HEADROOM = 256  # bytes that a packet may grow by at its front, in a pool's buffers and in frames

# A link: what a worker knows of its queue of one connection. Two directions of 64 bytes each: where the index is that
# the peer writes, and ours; what `head` is ahead of `tail` when nothing is under way (see `memif_rings`); descriptors,
# mask; the table of our own buffers (0: the descriptors say where), an offset of 32 bits for each slot, and their size;
# the first index. Then the table of regions, which is (address, size) for each; and the region where our own buffers
# are: its address, and its number as a descriptor has it, 0 unless it is a pool.
LINK_RX, LINK_TX = 0, 64
THEIRS, OURS, BIAS, RING, MASK, BUFFERS, BUFFER_SIZE, FIRST = range(0, 64, 8)
REGIONS, REGION_COUNT, BASE, POOL = range(128, 160, 8)
_TABLE = 192


class Ring(NamedTuple):
    """Where a ring is: its region, the offset there, and how many descriptors it has."""

    region: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + DESCS + 16 * self.size


class Region:
    """Memory of a peer's, or our own: `address`, `size`."""

    def __init__(self, fd: int, size: int) -> None:
        try:
            self._map = SharedMap(fd, size)
        except MemoryError as error:
            raise PeerUnsuitable(f"a region of {size} bytes that cannot be mapped", str(error)) from None
        self.address, self.size = self._map.address, size
        self.close = self._map.close


def map_region(fd: int, size: int) -> Region:
    """The region that a peer offers; `fd` may be closed then. Raises PeerUnsuitable."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise PeerUnsuitable("a region that is no memfd", "let the peer make it with memfd_create(2)") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise PeerUnsuitable("a region that is not sealed against shrinking", "let the peer add F_SEAL_SHRINK")
    if os.fstatvfs(fd).f_bsize != PAGE:
        raise PeerUnsuitable("a region of huge pages, which could be taken back", "let the peer copy: zero-copy off")
    if size > MOST_BYTES:
        raise PeerUnsuitable(f"a region of {size} bytes", f"{MOST_BYTES} are all that an offset of 32 bits reaches")
    there = os.fstat(fd).st_size
    if not 0 < size <= there:
        raise PeerUnsuitable(f"a region of {size} bytes whose file has {there}", "the peer's sizes do not agree")
    return Region(fd, size)


class Link:
    """One queue of a connection; `address` is where the worker reads what is above.

    A client says where the indexes begin: the server may have sent something already. For a server, they are where
    the client has put them.
    """

    def __init__(
        self, regions: list[Region], receive: Ring, send: Ring, *, client: bool, buffer_size: int = 0, first: int = 0
    ) -> None:
        self._arena = Arena(_TABLE + 16 * MOST_REGIONS)
        self.address = at = self._arena.address
        for number, region in enumerate(regions):
            store64(at + _TABLE + 16 * number, region.address)
            store64(at + _TABLE + 16 * number + 8, region.size)
        store64(at + REGIONS, at + _TABLE)
        store64(at + REGION_COUNT, len(regions))
        self.flags = {}
        for part, ring in ((LINK_RX, receive), (LINK_TX, send)):
            start = regions[ring.region].address + ring.offset
            head, tail = start + HEAD, start + TAIL
            theirs, ours = (tail, head) if client else (head, tail)
            bias = ring.size if client else 0
            begin = first if client else load16(tail)
            values = (theirs, ours, bias, start + DESCS, ring.size - 1, 0, buffer_size, begin)
            for number, value in enumerate(values):
                store64(at + part + 8 * number, value)
            self.flags[part] = start + FLAGS
        store16(self.flags[LINK_RX], NO_INTERRUPT)

    def own_buffers(self, memory: OwnMemory, receive: int, send: int) -> None:
        """The buffers are our own: those of the rings of these numbers."""
        at = self.address
        store64(at + LINK_RX + BUFFERS, memory.tables[receive])
        store64(at + LINK_TX + BUFFERS, memory.tables[send])
        store64(at + BASE, memory.buffers.address)
        store64(at + POOL, memory.number << 16)

    def close(self) -> None:
        self._arena.close()


class OwnRegion(Region):
    """A new region, a sealed memfd of `size` bytes: `fd`."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("libfp-memif", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            super().__init__(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def unmap(self) -> None:
        """Close it and its file."""
        self.close()
        os.close(self.fd)


class Pool:
    """The buffers of ports that share them: a region that each offers, to whoever is at its other end.

    `slots` says how many slots the rings of each port have: that many buffers of `size` bytes, with HEADROOM before
    each, are the port's to begin with. Its table, `tables[k]`, which outlives its connections, is its worker's to
    change while it has one, else its control thread's to read. Closed when all ports have left.
    """

    def __init__(self, names: str, slots: Sequence[int], size: int) -> None:
        stride, count = HEADROOM + size, sum(slots)
        if stride * count > MOST_BYTES:
            what = f"{names}: {count} buffers of {size} bytes, with {HEADROOM} before each"
            raise BadInput(f"{what}, are more than {MOST_BYTES >> 30} GiB", "share fewer, or smaller ones")
        self.size = size
        self.region = OwnRegion(stride * count)
        self._arena = Arena(4 * count)
        self._users = len(slots)
        for number in range(count):
            store32(self._arena.address + 4 * number, stride * number + HEADROOM)
        self.tables = [self._arena.address + 4 * sum(slots[:k]) for k in range(len(slots))]

    def leave(self) -> None:
        """A port and its workers use it no more."""
        self._users -= 1
        if self._users == 0:
            self.region.unmap()
            self._arena.close()


class Share(NamedTuple):
    """A port's part of a pool: its table has the rings' slots, in the order of `OwnMemory.rings`."""

    pool: Pool
    table: int


def own_bytes(queues: int, size: int, buffer_size: int) -> int:
    """How much memory a client makes that has no pool."""
    return _ring_bytes(queues, size) + 2 * queues * size * buffer_size


def _ring_bytes(queues: int, size: int) -> int:
    return -(-2 * queues * (DESCS + 16 * size) // PAGE) * PAGE


class OwnMemory:
    """A client's memory: `queues` rings of `size` descriptors in either direction, all in region 0, a sealed memfd.

    `rings` are in the order in which they are announced: those to the server, then those to the client. Their indexes
    begin at `first`. `tables` says for each where the offsets of its buffers are, in the region `buffers` of number
    `number`: behind the rings, or in the pool of `share`.
    """

    def __init__(self, queues: int, size: int, buffer_size: int, first: int = 0, share: Share | None = None) -> None:
        begin, count = _ring_bytes(queues, size), 2 * queues * size
        self.region = OwnRegion(begin if share else begin + count * buffer_size)
        self.buffers, self.number = (share.pool.region, POOL_REGION) if share else (self.region, 0)
        self._arena = None if share else Arena(4 * count)
        table = share.table if share else self._arena.address  # type: ignore[union-attr]
        if not share:
            for number in range(count):
                store32(table + 4 * number, begin + number * buffer_size)
        self.rings = [Ring(0, number * (DESCS + 16 * size), size) for number in range(2 * queues)]
        self.tables = [table + 4 * number * size for number in range(2 * queues)]
        for number, (one, table) in enumerate(zip(self.rings, self.tables, strict=True)):
            at = self.region.address + one.offset
            store32(at, COOKIE)
            for slot in range(size):
                store64(at + DESCS + 16 * slot, buffer_size << 32 | self.number << 16)
                store64(at + DESCS + 16 * slot + 8, load32(table + 4 * slot))
            store16(at + HEAD, first + (0 if number < queues else size))
            store16(at + TAIL, first)

    @property
    def offered(self) -> list[OwnRegion]:
        """The regions, in order."""
        return [self.region, self.buffers] if self.number else [self.region]

    def close(self) -> None:
        """Give up what is not the pool's."""
        self.region.unmap()
        if self._arena is not None:
            self._arena.close()


def check_ring(name: str, regions: list[Region], ring: Ring) -> None:
    """Hold a ring that a peer describes against its regions. Raises PeerUnsuitable."""
    if ring.region >= len(regions):
        raise PeerUnsuitable(f"{name} in region {ring.region} of {len(regions)}", "the peer announces regions first")
    if ring.offset % 64 or ring.end > regions[ring.region].size:
        has = regions[ring.region].size
        what = f"{name} at bytes {ring.offset} to {ring.end} of a region that has {has}"
        raise PeerUnsuitable(what, "a ring lies inside its region, at a multiple of 64")
    cookie = load32(regions[ring.region].address + ring.offset)
    if cookie != COOKIE:
        raise PeerUnsuitable(f"{name} begins with {cookie:#x}", f"a ring of memif begins with {COOKIE:#x}")


def buffer_sizes(regions: list[Region], ring: Ring) -> set[int]:
    """Of the buffers that a ring's descriptors describe now; without those that have not been filled in yet."""
    at = regions[ring.region].address + ring.offset + DESCS
    return {load32(at + 16 * slot + 4) for slot in range(ring.size)} - {0}
