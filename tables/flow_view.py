"""Flows as stages see them: part of `libfp.tables.flow`.

A flow's key is made of a packet's addresses, protocol and ports: those of TCP, UDP, UDP-Lite, DCCP and SCTP, of ICMP
and ICMPv6 echo the identifier as both, and 0 of all else, later fragments and what is behind extension headers
included. In memory, words in host order:

    IPv4   low address << 16 | its port | protocol << 48, high address << 16 | its port
    IPv6   low address (2 words), high address (2 words), its port << 32 | the other's << 16 | protocol

A burst's keys are in lines of 64 bytes, one a packet: the key, then these words.
"""

from __future__ import annotations

from libfp.jit import (
    ctz64,
    inline,
    kernel,
    load8,
    load16be,
    load32be,
    load64,
    load64be,
    native,
    prefetch,
    store64,
    ult64,
    unlikely,
    word,
)
from libfp.tables.buckets import tag_of
from libfp.tables.flow_record import BUCKETS, TAGS, expired, record_of
from libfp.tables.flow_table import (
    candidates,
    enter,
    entry_of,
    find,
    first_bucket,
    hash_of,
    is_key,
    is_there,
    other_bucket,
    room_in,
    search,
    tags_of,
)
from libfp.tables.flow_wheel import ticks_of, turn

LINE = 64
KIND, HASH, SLOT = 40, 48, 56  # words of the key | 1 << 8 if its endpoints were swapped, 0: no key; -1: not found
LINES = 64

_ICMP, _ICMPV6 = 1, 58
_WITH_PORTS = (6, 17, 33, 132, 136)  # TCP, UDP, DCCP, SCTP, UDP-Lite


@kernel
def key4(at, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
    """Store the key of an IPv4 flow at `at`; 1 if its endpoints had to be swapped, else 0."""
    one, two = src << 16 | sport, dst << 16 | dport
    store64(at, min(one, two) | protocol << 48)
    store64(at + 8, max(one, two))
    return 1 if one > two else 0


@kernel
def key6(at, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
    """The same of an IPv6 flow, whose addresses are pairs of words."""
    swapped = ult64(dst[0], src[0])
    if dst[0] == src[0]:
        swapped = ult64(dst[1], src[1])
        if dst[1] == src[1]:
            swapped = 1 if dport < sport else 0
    low, high = at + 16 * swapped, at + 16 - 16 * swapped
    store64(low, src[0])
    store64(low + 8, src[1])
    store64(high, dst[0])
    store64(high + 8, dst[1])
    ports = dport << 32 | sport << 16 if swapped else sport << 32 | dport << 16
    store64(at + 32, ports | protocol)
    return swapped


@kernel
def ports_of(packet, protocol):  # type: ignore[no-untyped-def]
    """Source port << 16 | destination port, or what stands for them."""
    if protocol in _WITH_PORTS:
        if packet.has_l4(protocol, 4):
            return load32be(packet.l4)
    elif protocol in (_ICMP, _ICMPV6) and packet.has_l4(protocol, 8):
        kind = load8(packet.l4)
        if (kind & ~8 == 0) if protocol == _ICMP else kind >> 1 == 64:  # 0 and 8; 128 and 129
            return load16be(packet.l4 + 4) * 0x10001
    return 0


@kernel
def packet_key(packet, at):  # type: ignore[no-untyped-def]
    """Store the key of a packet at `at`; return its words | swapped << 8, 0 if the packet is not IP."""
    if packet.is_ipv4:
        ip = packet.l3
        protocol = load8(ip + 9)
        ports = ports_of(packet, protocol)
        return 2 | key4(at, load32be(ip + 12), ports >> 16, load32be(ip + 16), ports & 0xFFFF, protocol) << 8
    if packet.is_ipv6:
        ip = packet.l3
        protocol = load8(ip + 6)
        ports = ports_of(packet, protocol)
        src, dst = (load64be(ip + 8), load64be(ip + 16)), (load64be(ip + 24), load64be(ip + 32))
        return 5 | key6(at, src, ports >> 16, dst, ports & 0xFFFF, protocol) << 8
    return 0


@kernel
def find_one(table, words, key, swapped):  # type: ignore[no-untyped-def]
    return entry_of(table, find(table, words, key, hash_of(table, words, key)), swapped, 0)


@kernel
def enter_one(table, words, key, swapped):  # type: ignore[no-untyped-def]
    return enter(table, words, key, hash_of(table, words, key), swapped)


@inline
@kernel
def ask_tags(table, hashed, line):  # type: ignore[no-untyped-def]
    """Ask for the tags of a key's two buckets; their numbers go into its line."""
    buckets = load64(table + BUCKETS)
    first = first_bucket(hashed, buckets)
    second = other_bucket(hashed, first, buckets)
    prefetch(table + TAGS + 8 * first)
    prefetch(table + TAGS + 8 * second)
    store64(line + HASH, hashed)
    store64(line + SLOT, first << 32 | second)


@inline
@kernel
def ask_record(table, line):  # type: ignore[no-untyped-def]
    """Ask for the record that is probably a key's: the first candidate's; its slot goes into the line, -1: none.

    No branch on which of its buckets a key is in, which nobody foresees. For a key that is not there, ask for the
    record that it would get.
    """
    buckets, tag = load64(line + SLOT), tag_of(load64(line + HASH))
    first, second = buckets >> 32, buckets & 0xFFFFFFFF
    one, two = candidates(tags_of(table, first), tag), candidates(tags_of(table, second), tag)
    there = -(one != 0)
    found = two ^ (one ^ two) & there
    bucket = second ^ (first ^ second) & there
    number = (bucket << 3 | ctz64(found) >> 3 & 7) | -(found == 0)
    store64(line + SLOT, number)
    at = record_of(table, room_in(table, first, second) if unlikely(found == 0) else number)
    prefetch(at + 8)  # the end of what a lookup reads, and the beginning
    prefetch(at - 16)


@inline
@kernel
def confirm(table, words, line):  # type: ignore[no-untyped-def]
    """Put the slot of the key's flow into its line, -1 if it has none."""
    number = load64(line + SLOT)
    if number < 0:
        return
    if unlikely(not is_key(table, words, number, line)):  # another key of the same tag
        number = search(table, words, line, load64(line + HASH))
    if number >= 0 and expired(table, record_of(table, number)) != 0:
        number = -1
    store64(line + SLOT, number)


@native
class FlowView:
    """One worker's flows, as compiled code sees them.

    `find` looks only, `enter` makes a flow where there is none. Both return a `FlowEntry`; a packet that is not IP
    (`parse` has run), and a new flow that was refused for want of room, are not `found`. A stage of bursts looks up all
    packets of a burst side by side, then takes them one by one: ``flows.find_burst(burst)``, then ``flows.at(i)`` or
    ``flows.enter_at(i)``, which see what was made and removed meanwhile.
    """

    four: word  # the table of IPv4 flows
    six: word  # of IPv6 flows, or 0
    lines: word  # 64 of 64 bytes

    def find(self, packet):  # type: ignore[no-untyped-def]
        """The flow of a packet, either way."""
        kind = packet_key(packet, self.lines)
        if kind & 0xFF == 2:
            return find_one(self.four, 2, self.lines, kind >> 8)
        if kind != 0 and self.six != 0:
            return find_one(self.six, 5, self.lines, kind >> 8)
        return entry_of(self.four, -1, 0, 0)

    def enter(self, packet):  # type: ignore[no-untyped-def]
        """The flow of a packet, either way; a new one, begun by this packet, if there is none."""
        kind = packet_key(packet, self.lines)
        if kind & 0xFF == 2:
            return enter_one(self.four, 2, self.lines, kind >> 8)
        if kind != 0 and self.six != 0:
            return enter_one(self.six, 5, self.lines, kind >> 8)
        return entry_of(self.four, -1, 0, 0)

    def find4(self, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
        """The IPv4 flow of a tuple, either way; numbers in host order."""
        return find_one(self.four, 2, self.lines, key4(self.lines, src, sport, dst, dport, protocol))

    def enter4(self, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
        """The same, made if there is none."""
        return enter_one(self.four, 2, self.lines, key4(self.lines, src, sport, dst, dport, protocol))

    def find6(self, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
        """The IPv6 flow of a tuple, either way; addresses are pairs of words, as `Packet.ipv6` has them."""
        if self.six == 0:
            return entry_of(self.four, -1, 0, 0)
        return find_one(self.six, 5, self.lines, key6(self.lines, src, sport, dst, dport, protocol))

    def enter6(self, src, sport, dst, dport, protocol):  # type: ignore[no-untyped-def]
        """The same, made if there is none."""
        if self.six == 0:
            return entry_of(self.four, -1, 0, 0)
        return enter_one(self.six, 5, self.lines, key6(self.lines, src, sport, dst, dport, protocol))

    def find_burst(self, burst):  # type: ignore[no-untyped-def]
        """Look up the flow of every packet of a burst, for `at` and `enter_at`."""
        for i in range(burst.count):
            line = self.lines + LINE * i
            store64(line + KIND, packet_key(burst.packet(i), line))
        self.find_lines(burst.count)

    def find_lines(self, count):  # type: ignore[no-untyped-def]
        """The second half of `find_burst`: `count` keys and kinds are in `lines`. A step of all before the next."""
        for i in range(count):
            line = self.lines + LINE * i
            kind = load64(line + KIND)
            if kind & 0xFF == 2:
                ask_tags(self.four, hash_of(self.four, 2, line), line)
            elif kind != 0 and self.six != 0:
                ask_tags(self.six, hash_of(self.six, 5, line), line)
            else:
                store64(line + KIND, 0)
        for i in range(count):
            line = self.lines + LINE * i
            kind = load64(line + KIND)
            if kind != 0:
                ask_record(self.four if kind & 0xFF == 2 else self.six, line)
        for i in range(count):
            line = self.lines + LINE * i
            kind = load64(line + KIND)
            if kind & 0xFF == 2:
                confirm(self.four, 2, line)
            elif kind != 0:
                confirm(self.six, 5, line)

    def table(self, kind):  # type: ignore[no-untyped-def]
        """The table of a kind of key."""
        return self.four if kind & 0xFF == 2 else self.six

    @inline
    def at(self, i):  # type: ignore[no-untyped-def]
        """The flow of packet `i` of the burst that was looked up, as long as it lives."""
        line = self.lines + LINE * (i & LINES - 1)
        kind, number, table = load64(line + KIND), load64(line + SLOT), self.four
        if kind & 0xFF == 2:
            if number >= 0 and not is_there(table, 2, number, line):
                number = -1
        elif kind != 0:
            table = self.six
            if number >= 0 and not is_there(table, 5, number, line):
                number = -1
        else:
            number = -1
        return entry_of(table, number, kind >> 8, 0)

    def enter_at(self, i):  # type: ignore[no-untyped-def]
        """The same, made if there is none."""
        entry = self.at(i)
        line = self.lines + LINE * (i & LINES - 1)
        kind = load64(line + KIND)
        if entry.found or kind == 0:
            return entry
        return enter(self.table(kind), kind & 0xFF, line, load64(line + HASH), kind >> 8)

    def each_turn(self):  # type: ignore[no-untyped-def]
        """Called by the worker's loop once a turn: it ends flows whose time has come, 64 at most."""
        now = ticks_of(self.four)
        more = turn(self.four, now)
        if self.six != 0:
            more |= turn(self.six, now)
        return more
