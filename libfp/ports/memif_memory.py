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
so is what is in a region of our own, which the peer can write as well: where our buffers are, we know from elsewhere.
"""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple

from libfp.errors import PeerUnsuitable
from libfp.jit import Arena, load16, load32, store16, store32, store64
from libfp.jit.memory import PAGE, SharedMap
from libfp.ports.memif_messages import COOKIE

FLAGS, HEAD, TAIL, DESCS = 4, 6, 64, 128
NO_INTERRUPT = 1
MOST_REGIONS = 64

# A link: what a worker knows of its queue of one connection. Two directions of 64 bytes each: where the index is that
# the peer writes, and ours; what `head` is ahead of `tail` when nothing is under way (see `memif_rings`); descriptors,
# mask; our own buffers' address (0: the descriptors say where) and size; the first index. Then the table of regions,
# which is (address, size) for each, and the offsets of our own buffers in region 0.
LINK_RX, LINK_TX = 0, 64
THEIRS, OURS, BIAS, RING, MASK, BUFFERS, BUFFER_SIZE, FIRST = range(0, 64, 8)
REGIONS, REGION_COUNT, RX_OFFSET, TX_OFFSET = range(128, 160, 8)
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
    there = os.fstat(fd).st_size
    if not 0 < size <= there:
        raise PeerUnsuitable(f"a region of {size} bytes whose file has {there}", "the peer's sizes do not agree")
    return Region(fd, size)


class Link:
    """One queue of a connection; `address` is where the worker reads what is above."""

    def __init__(self, regions: list[Region], receive: Ring, send: Ring, *, client: bool, buffer_size: int = 0) -> None:
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
            values = (theirs, ours, bias, start + DESCS, ring.size - 1, 0, buffer_size, load16(tail))
            for number, value in enumerate(values):
                store64(at + part + 8 * number, value)
            self.flags[part] = start + FLAGS
        store16(self.flags[LINK_RX], NO_INTERRUPT)

    def own_buffers(self, region: Region, rx_offset: int, tx_offset: int) -> None:
        """Our own buffers, side by side from these offsets in region 0."""
        at = self.address
        store64(at + LINK_RX + BUFFERS, region.address + rx_offset)
        store64(at + LINK_TX + BUFFERS, region.address + tx_offset)
        store64(at + RX_OFFSET, rx_offset)
        store64(at + TX_OFFSET, tx_offset)

    def close(self) -> None:
        self._arena.close()


class OwnMemory:
    """A client's memory: `queues` rings of `size` descriptors in either direction, all in region 0, a sealed memfd.

    `rings` are in the order in which they are announced: those to the server, then those to the client. Their indexes
    begin at `first`.
    """

    def __init__(self, queues: int, size: int, buffer_size: int, first: int = 0) -> None:
        ring = DESCS + 16 * size
        buffers = -(-2 * queues * ring // PAGE) * PAGE
        total = buffers + 2 * queues * size * buffer_size
        self.fd = os.memfd_create("libfp-memif", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, total)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self.region = Region(self.fd, total)
        except BaseException:
            os.close(self.fd)
            raise
        self.rings = [Ring(0, number * ring, size) for number in range(2 * queues)]
        self.offsets = [buffers + number * size * buffer_size for number in range(2 * queues)]
        for number, (one, offset) in enumerate(zip(self.rings, self.offsets, strict=True)):
            at = self.region.address + one.offset
            store32(at, COOKIE)
            for slot in range(size):
                store64(at + DESCS + 16 * slot, buffer_size << 32)
                store64(at + DESCS + 16 * slot + 8, offset + slot * buffer_size)
            store16(at + HEAD, first + (0 if number < queues else size))
            store16(at + TAIL, first)

    def close(self) -> None:
        self.region.close()
        os.close(self.fd)


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
