"""Header views: an address seen as an Ethernet (IEEE 802.3), IPv4 (RFC 791), UDP (RFC 768), TCP (RFC 9293) or ICMP
(RFC 792) header.

All values are in host order. A view checks nothing: take it from `Packet`, whose ``is_...`` properties say that the
header lies inside the frame.
"""

from __future__ import annotations

from libfp.jit import load8, load16be, load32be, load64be, native, store8, store16be, store32be, word

ETHERNET_SIZE = 14
ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_ARP = 0x0800, 0x86DD, 0x0806
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
HOP_BY_HOP, FRAGMENT = 0, 44  # of IPv6
IPV6_SIZE = 40


@native
class Ethernet:
    """The 14 bytes at `at`; addresses are 48-bit numbers, first byte on the wire highest."""

    at: word

    @property
    def dst(self) -> int:
        """Where it goes."""
        return load16be(self.at) << 32 | load32be(self.at + 2)

    @dst.setter
    def dst(self, value: int) -> None:
        store16be(self.at, value >> 32)
        store32be(self.at + 2, value)

    @property
    def src(self) -> int:
        """Where it comes from."""
        return load16be(self.at + 6) << 32 | load32be(self.at + 8)

    @src.setter
    def src(self, value: int) -> None:
        store16be(self.at + 6, value >> 32)
        store32be(self.at + 8, value)

    @property
    def type(self) -> int:
        """The Ethertype, such as 0x0800 for IPv4."""
        return load16be(self.at + 12)


@native
class Ipv4:
    """The IPv4 header at `at`. Setters leave the checksum alone: see `libfp.packet.checksum`."""

    at: word

    @property
    def header_length(self) -> int:
        """In bytes: 20 without options."""
        return (load8(self.at) & 15) << 2

    @property
    def tos(self) -> int:
        """The octet of DSCP and ECN (RFC 2474, RFC 3168)."""
        return load8(self.at + 1)

    @property
    def total_length(self) -> int:
        """In bytes, the header included."""
        return load16be(self.at + 2)

    @property
    def identification(self) -> int:
        """Which datagram a fragment belongs to."""
        return load16be(self.at + 4)

    @property
    def dont_fragment(self) -> bool:
        """The DF bit."""
        return load8(self.at + 6) & 0x40 != 0

    @property
    def is_fragment(self) -> bool:
        """Any fragment, the first one too: offset not zero, or more to come."""
        return load16be(self.at + 6) & 0x3FFF != 0

    @property
    def fragment_offset(self) -> int:
        """In bytes."""
        return (load16be(self.at + 6) & 0x1FFF) << 3

    @property
    def ttl(self) -> int:
        """Hops it may still take."""
        return load8(self.at + 8)

    @ttl.setter
    def ttl(self, value: int) -> None:
        store8(self.at + 8, value)

    @property
    def protocol(self) -> int:
        """Of what follows the header: ICMP 1, TCP 6, UDP 17, ..."""
        return load8(self.at + 9)

    @property
    def checksum(self) -> int:
        """Of the header."""
        return load16be(self.at + 10)

    @checksum.setter
    def checksum(self, value: int) -> None:
        store16be(self.at + 10, value)

    @property
    def src(self) -> int:
        """The source address, a number below 2**32."""
        return load32be(self.at + 12)

    @src.setter
    def src(self, value: int) -> None:
        store32be(self.at + 12, value)

    @property
    def dst(self) -> int:
        """The destination address, a number below 2**32."""
        return load32be(self.at + 16)

    @dst.setter
    def dst(self, value: int) -> None:
        store32be(self.at + 16, value)


@native
class Ipv6:
    """The IPv6 header (RFC 8200) at `at`. Addresses are pairs of 64-bit words, as keys of tables are."""

    at: word

    @property
    def traffic_class(self) -> int:
        """The octet of DSCP and ECN."""
        return load16be(self.at) >> 4 & 0xFF

    @property
    def flow_label(self) -> int:
        """20 bits."""
        return load32be(self.at) & 0xFFFFF

    @property
    def payload_length(self) -> int:
        """Bytes behind this header, extension headers included."""
        return load16be(self.at + 4)

    @property
    def next_header(self) -> int:
        """The protocol of what follows this header, an extension header perhaps."""
        return load8(self.at + 6)

    @property
    def hop_limit(self) -> int:
        """Hops it may still take."""
        return load8(self.at + 7)

    @hop_limit.setter
    def hop_limit(self, value: int) -> None:
        store8(self.at + 7, value)

    @property
    def src(self) -> tuple[int, int]:
        """The source address: its high and its low 64 bits, as int64 patterns."""
        return load64be(self.at + 8), load64be(self.at + 16)

    @property
    def dst(self) -> tuple[int, int]:
        """The destination address, as `src` is given."""
        return load64be(self.at + 24), load64be(self.at + 32)


@native
class Udp:
    """The UDP header at `at`."""

    at: word

    @property
    def sport(self) -> int:
        """The source port."""
        return load16be(self.at)

    @property
    def dport(self) -> int:
        """The destination port."""
        return load16be(self.at + 2)

    @property
    def length(self) -> int:
        """In bytes, these 8 included."""
        return load16be(self.at + 4)

    @property
    def checksum(self) -> int:
        """0: there is none."""
        return load16be(self.at + 6)


@native
class Tcp:
    """The TCP header at `at`."""

    at: word

    @property
    def sport(self) -> int:
        """The source port."""
        return load16be(self.at)

    @property
    def dport(self) -> int:
        """The destination port."""
        return load16be(self.at + 2)

    @property
    def sequence(self) -> int:
        """The sequence number of the first byte."""
        return load32be(self.at + 4)

    @property
    def acknowledgement(self) -> int:
        """The sequence number that is expected next, where ACK is set."""
        return load32be(self.at + 8)

    @property
    def flags(self) -> int:
        """FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128."""
        return load8(self.at + 13)


@native
class Icmp:
    """The ICMP header at `at`."""

    at: word

    @property
    def type(self) -> int:
        """Of ICMP: echo request 8, its reply 0; of ICMPv6: 128 and 129; ..."""
        return load8(self.at)

    @property
    def code(self) -> int:
        """What kind of its type."""
        return load8(self.at + 1)
