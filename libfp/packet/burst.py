"""The burst: up to 64 packets of one port as a struct of arrays, and the packet as a value that costs nothing.

Every word of a burst belongs to the worker whose burst it is. Layout, in bytes from `Burst.at`:

    0     count     live packets: entries 0..count-1
    8     base      address of the UMEM's frame 0
    16    port      the port they arrived on
    24    flag      scratch within one stage
    32    worker    number of the worker whose burst it is
    40    workers   how many the application began with
    48    lender    0; of packets that another worker has lent, where that one's lanes are described
    56    first     number of the stage they go on with
    64    frame     64 x u64, the packet's first byte as an offset into the UMEM
    576   length    64 x u32, bytes from the Ethernet header to the end
    832   kind      64 x u32, set by the stage `parse`. Low byte 4: a sound IPv4 header without options, 0x14: one with
                    options, 6: a sound IPv6 header, 0x16: one with hop-by-hop options, 0: anything else; | 0x20: Linux
                    must never get it, | 0x40: made here. Above it how many bytes the network header lies behind where
                    it is in an untagged frame
    1088  verdict   64 x u32, see `libfp.packet.verdict`
    1344  next_hop  64 x u32, index of the next hop that decided, 0 for none
    1600  key       64 x u32, scratch for bulk lookups within one stage
    1856  mark      64 x u64, for stages to talk to later stages; 0 at first
    2368  wide      64 x 16 bytes, scratch as `key` is, for IPv6 addresses
    3392  picked    64 x u32, scratch: which packets a list within one stage is about
    3648  found     64 x u32, scratch: what was looked up for them
    3904  stride    how far apart frames are, a power of 2
    3912  size      how many bytes of each may be used

After a stage, packets that have a verdict leave the burst and the rest move up, in order: a stage finds every packet
of 0..count-1 live when it begins, and within one stage the first verdict wins.
"""

from __future__ import annotations

from libfp.jit import Arena, clear128, load8, load16be, load32, load64, native, store32, store64, ult64, word
from libfp.packet.headers import (
    ETHERNET_SIZE,
    ICMP,
    ICMPV6,
    IPV6_SIZE,
    TCP,
    UDP,
    Ethernet,
    Icmp,
    Ipv4,
    Ipv6,
    Tcp,
    Udp,
)
from libfp.packet.verdict import CONSUME, DROP, FORWARD, HAND_OFF, KIND_SHIFT, PORT_MASK, PUNT, reason_code

#: The most packets of a burst.
BURST = 64
FLAG, WORKER, WORKERS, LENDER, FIRST = range(24, 64, 8)
FRAME, LENGTH, KIND, VERDICT, NEXT_HOP, KEY, MARK = 64, 576, 832, 1088, 1344, 1600, 1856
WIDE, PICKED, FOUND = 2368, 3392, 3648
STRIDE, FRAME_SIZE = 3904, 3912
SIZE = 3968

KIND_IPV4, KIND_IPV4_OPTIONS, KIND_IPV6, KIND_IPV6_OPTIONS = 4, 0x14, 6, 0x16
KIND_KEPT, KIND_MADE = 0x20, 0x40
KIND_FLAGS = KIND_KEPT | KIND_MADE


@native
class Packet:
    """Packet `i` of the burst at `burst`."""

    burst: word
    i: word

    @property
    def data(self) -> int:
        """Address of the first byte (of the Ethernet header)."""
        return load64(self.burst + 8) + load64(self.burst + FRAME + 8 * self.i)

    @property
    def length(self) -> int:
        """Bytes in the frame, Ethernet header included."""
        return load32(self.burst + LENGTH + 4 * self.i)

    @property
    def port(self) -> int:
        """Index of the port it came in by."""
        return load64(self.burst + 16)

    @property
    def mark(self) -> int:
        """A word of your own, 0 at first, that later stages see."""
        return load64(self.burst + MARK + 8 * self.i)

    @mark.setter
    def mark(self, value: int) -> None:
        store64(self.burst + MARK + 8 * self.i, value)

    @property
    def l3(self) -> int:
        """Address of the network header."""
        return self.data + ETHERNET_SIZE + (load32(self.burst + KIND + 4 * self.i) >> 8)

    @property
    def l4(self) -> int:
        """Address of the transport header; mind `is_udp`, `is_tcp`, `is_icmp`, `is_icmpv6`."""
        at = self.l3
        first = load8(at)
        return at + (IPV6_SIZE if first >> 4 == 6 else (first & 15) << 2)

    @property
    def headroom(self) -> int:
        """Bytes of the frame in front of the first byte."""
        return load64(self.burst + FRAME + 8 * self.i) & load64(self.burst + STRIDE) - 1

    @property
    def tailroom(self) -> int:
        """Bytes of the frame behind the last byte."""
        return load64(self.burst + FRAME_SIZE) - self.headroom - self.length

    # As DPDK calls them. Headers are then elsewhere: `libfp.stages.parse_again` finds out what is there.

    def prepend(self, n: int) -> bool:
        """Begin `n` bytes earlier; False, and nothing has changed, if the frame has no room for them."""
        if ult64(self.headroom, n):
            return False
        self._move(-n, n)
        return True

    def adj(self, n: int) -> bool:
        """Begin `n` bytes later; False, and nothing has changed, if there are not as many."""
        if ult64(self.length, n):
            return False
        self._move(n, -n)
        return True

    def append(self, n: int) -> bool:
        """End `n` bytes later; False, and nothing has changed, if the frame has no room for them."""
        if ult64(self.tailroom, n):
            return False
        self._move(0, n)
        return True

    def trim(self, n: int) -> bool:
        """End `n` bytes earlier; False, and nothing has changed, if there are not as many."""
        if ult64(self.length, n):
            return False
        self._move(0, -n)
        return True

    def _move(self, start: int, length: int) -> None:
        at, i = self.burst, self.i
        store64(at + FRAME + 8 * i, load64(at + FRAME + 8 * i) + start)
        store32(at + LENGTH + 4 * i, load32(at + LENGTH + 4 * i) + length)

    def keep(self) -> None:
        """From here on Linux must never get it: a stage that punts it drops it, by the same name."""
        at = self.burst + KIND + 4 * self.i
        store32(at, load32(at) | KIND_KEPT)

    def made(self) -> None:
        """It is one that we have made: kept from Linux, and its source may be this host's own address."""
        at = self.burst + KIND + 4 * self.i
        store32(at, load32(at) | KIND_FLAGS)

    @property
    def is_kept(self) -> bool:
        """`keep` or `made` has been said of it."""
        return load32(self.burst + KIND + 4 * self.i) & KIND_KEPT != 0

    @property
    def ethernet(self) -> Ethernet:
        """The Ethernet header. Always there: `parse` drops shorter frames."""
        return Ethernet(self.data)

    @property
    def is_ipv4(self) -> bool:
        """A sound IPv4 header (`parse` has run): `ipv4` may be used."""
        return load32(self.burst + KIND + 4 * self.i) & 0xF == KIND_IPV4

    @property
    def ipv4(self) -> Ipv4:
        """The IPv4 header, where `is_ipv4`."""
        return Ipv4(self.l3)

    @property
    def is_ipv6(self) -> bool:
        """A sound IPv6 header (`parse` has run): `ipv6` may be used."""
        return load32(self.burst + KIND + 4 * self.i) & 0xF == KIND_IPV6

    @property
    def ipv6(self) -> Ipv6:
        """The IPv6 header, where `is_ipv6`."""
        return Ipv6(self.l3)

    def has_l4(self, protocol: int, size: int) -> bool:
        """A packet of this protocol, no later fragment, with `size` bytes of transport header inside the frame.

        Of IPv6, one whose transport header follows the IPv6 header: extension headers are not skipped.
        """
        if self.is_ipv6:
            at = self.l3
            return load8(at + 6) == protocol and load16be(at + 4) >= size
        if not self.is_ipv4:
            return False
        at = self.l3
        header = (load8(at) & 15) << 2
        inside = header + size <= load16be(at + 2)  # parse has held total_length against the frame
        return inside and load8(at + 9) == protocol and load16be(at + 6) & 0x1FFF == 0

    @property
    def is_udp(self) -> bool:
        """A whole UDP header: `udp` may be used."""
        return self.has_l4(UDP, 8)

    @property
    def udp(self) -> Udp:
        """The UDP header, where `is_udp`."""
        return Udp(self.l4)

    @property
    def is_tcp(self) -> bool:
        """A whole TCP header: `tcp` may be used."""
        return self.has_l4(TCP, 20)

    @property
    def tcp(self) -> Tcp:
        """The TCP header, where `is_tcp`."""
        return Tcp(self.l4)

    @property
    def is_icmp(self) -> bool:
        """IPv4 with an ICMP header: `icmp` may be used."""
        return self.is_ipv4 and self.has_l4(ICMP, 8)

    @property
    def is_icmpv6(self) -> bool:
        """IPv6 with an ICMPv6 header: `icmp` may be used."""
        return self.is_ipv6 and self.has_l4(ICMPV6, 8)

    @property
    def icmp(self) -> Icmp:
        """The ICMP or ICMPv6 header, where `is_icmp` or `is_icmpv6`."""
        return Icmp(self.l4)

    @property
    def is_live(self) -> bool:
        """No verdict yet."""
        return load32(self.burst + VERDICT + 4 * self.i) == 0

    def settle(self, verdict: int) -> None:
        """Give the packet a verdict word unless it has one."""
        at = self.burst + VERDICT + 4 * self.i
        if load32(at) == 0:
            store32(at, verdict)

    def drop(self, reason: str) -> None:
        """Drop it; `reason`, a string literal, becomes a counter."""
        self.settle((DROP << KIND_SHIFT) + reason_code(reason))

    def punt(self, reason: str) -> None:
        """Hand it to Linux as it is; `reason`, a string literal, becomes a counter and has a rate limit."""
        self.settle((PUNT << KIND_SHIFT) + reason_code(reason))

    def forward(self, port: int) -> None:
        """Send it by the port of that index."""
        self.settle((FORWARD << KIND_SHIFT) + (port & PORT_MASK))

    def consume(self) -> None:
        """Take it: its frame goes back to the pool, nothing is sent, and it counts as consumed."""
        self.settle(CONSUME << KIND_SHIFT)

    @property
    def worker(self) -> int:
        """Number of the worker that handles it now."""
        return load64(self.burst + WORKER)

    @property
    def workers(self) -> int:
        """How many workers the application began with; numbers below have a queue for as long as it runs."""
        return load64(self.burst + WORKERS)

    def hand_off(self, worker: int) -> None:
        """Have worker number `worker` go on with it, in the next stage; if that is this one, nothing happens.

        The frame is lent: what the other decides, this worker carries out. Dropped as "bad-worker" where there is none
        or it does not run, as "hand-off-full" where it has too many already.
        """
        if worker != load64(self.burst + WORKER):
            known = ult64(worker, PORT_MASK)
            self.settle((HAND_OFF << KIND_SHIFT) + (worker if known else PORT_MASK))


@native
class Burst:
    """The burst at address `at`; `packet(i)` for 0 <= i < `count`."""

    at: word

    @property
    def count(self) -> int:
        """How many packets there are; when a stage begins, all of them are live."""
        return load64(self.at)

    @count.setter
    def count(self, value: int) -> None:
        store64(self.at, value)

    @property
    def base(self) -> int:
        """Address of the UMEM's frame 0."""
        return load64(self.at + 8)

    @base.setter
    def base(self, value: int) -> None:
        store64(self.at + 8, value)

    @property
    def port(self) -> int:
        """Index of the port they came in by."""
        return load64(self.at + 16)

    @port.setter
    def port(self, value: int) -> None:
        store64(self.at + 16, value)

    def packet(self, i: int) -> Packet:
        """Packet `i`."""
        return Packet(self.at, i)

    def data(self, i: int) -> int:
        """Address of packet `i`'s first byte."""
        return load64(self.at + 8) + load64(self.at + FRAME + 8 * i)

    def frame(self, i: int) -> int:
        """Offset of packet `i`'s first byte in the UMEM."""
        return load64(self.at + FRAME + 8 * i)

    def length(self, i: int) -> int:
        """Bytes in packet `i`'s frame, Ethernet header included."""
        return load32(self.at + LENGTH + 4 * i)

    def next_hop(self, i: int) -> int:
        """Index of the next hop that has been found for packet `i`, 0 for none."""
        return load32(self.at + NEXT_HOP + 4 * i)

    def is_ipv4(self, i: int) -> bool:
        """See `Packet.is_ipv4`."""
        return load32(self.at + KIND + 4 * i) & 0xF == KIND_IPV4

    def is_ipv6(self, i: int) -> bool:
        """See `Packet.is_ipv6`."""
        return load32(self.at + KIND + 4 * i) & 0xF == KIND_IPV6

    def is_live(self, i: int) -> bool:
        """Packet `i` has no verdict yet."""
        return load32(self.at + VERDICT + 4 * i) == 0

    def settle(self, i: int, verdict: int) -> None:
        """Give packet `i` a verdict word unless it has one."""
        Packet(self.at, i).settle(verdict)

    # not by way of the packet: each method that is given a reason is compiled once for each reason
    def drop(self, i: int, reason: str) -> None:
        """See `Packet.drop`."""
        self.settle(i, (DROP << KIND_SHIFT) + reason_code(reason))

    def punt(self, i: int, reason: str) -> None:
        """See `Packet.punt`."""
        self.settle(i, (PUNT << KIND_SHIFT) + reason_code(reason))

    def forward(self, i: int, port: int) -> None:
        """See `Packet.forward`."""
        Packet(self.at, i).forward(port)

    @property
    def worker(self) -> int:
        """See `Packet.worker`."""
        return load64(self.at + WORKER)

    @property
    def workers(self) -> int:
        """See `Packet.workers`."""
        return load64(self.at + WORKERS)

    def hand_off(self, i: int, worker: int) -> None:
        """See `Packet.hand_off`."""
        Packet(self.at, i).hand_off(worker)

    def begin(self, count: int) -> None:
        """Make entries 0..count-1, whose frame and length have been written, fresh packets."""
        at = self.at
        store64(at, count)
        for column in range((count + 31) >> 5):  # two columns' width at a time: 32 packets
            half = at + 128 * column
            clear128(half + KIND)
            clear128(half + VERDICT)
            clear128(half + NEXT_HOP)
            clear128(half + 128 * column + MARK)
            clear128(half + 128 * column + MARK + 128)

    def move(self, i: int, j: int) -> None:
        """Copy entry `i`, a live one, to place `j`."""
        at = self.at
        store64(at + FRAME + 8 * j, load64(at + FRAME + 8 * i))
        store64(at + MARK + 8 * j, load64(at + MARK + 8 * i))
        store32(at + LENGTH + 4 * j, load32(at + LENGTH + 4 * i))
        store32(at + KIND + 4 * j, load32(at + KIND + 4 * i))
        store32(at + VERDICT + 4 * j, 0)
        store32(at + NEXT_HOP + 4 * j, load32(at + NEXT_HOP + 4 * i))


class BurstMemory:
    """The memory of one burst; `burst` is its view."""

    def __init__(self) -> None:
        self.arena = Arena(SIZE)
        self.burst = Burst(self.arena.address)
