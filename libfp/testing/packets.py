"""Ethernet frames for tests, as bytes.

Each builder takes what its header needs and passes the rest on to the one below, so that one call describes a frame:

    udp(b"hello", src="10.0.1.2", dst="10.0.2.2", dport=53, ttl=1, eth_dst="02:00:00:00:00:01")

Lengths and checksums are right unless they are given. Nothing but the standard library is used: scapy, the oracle of
libfp's own tests, must not check itself.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

from libfp.testing.ping import internet_checksum

__all__ = ["ethernet", "icmp_echo", "icmp_error", "internet_checksum", "ipv4", "ipv6", "tcp", "udp"]

ETH_DST, ETH_SRC = "02:00:00:00:00:01", "02:00:00:00:00:02"
TCP_FLAGS = "FSRPAUEC"  # bit 0 first


def _mac(text: str) -> bytes:
    raw = bytes.fromhex(text.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"not a MAC address: {text!r}")
    return raw


def ethernet(
    payload: bytes,
    ethertype: int = 0x0800,
    eth_dst: str = ETH_DST,
    eth_src: str = ETH_SRC,
    vlan: int | None = None,
    pad: int = 0,
) -> bytes:
    """An Ethernet II frame without its checksum; `vlan` adds an 802.1Q tag, `pad` fills with zeros to that length."""
    tag = b"" if vlan is None else struct.pack("!HH", 0x8100, vlan)
    return (_mac(eth_dst) + _mac(eth_src) + tag + struct.pack("!H", ethertype) + payload).ljust(pad, b"\0")


def ipv4(
    payload: bytes = b"",
    src: str = "10.0.1.2",
    dst: str = "10.0.2.2",
    protocol: int = 253,
    ttl: int = 64,
    tos: int = 0,
    identification: int = 0,
    dont_fragment: bool = False,
    more_fragments: bool = False,
    fragment_offset: int = 0,
    options: bytes = b"",
    version: int = 4,
    header_words: int | None = None,
    total_length: int | None = None,
    checksum: int | None = None,
    **below: Any,
) -> bytes:
    """An IPv4 packet in a frame. `fragment_offset` is in bytes, `options` are padded to a multiple of four bytes.

    `version`, `header_words`, `total_length` and `checksum` are for making malformed packets.
    """
    if fragment_offset % 8:
        raise ValueError("a fragment starts at a multiple of 8 bytes")
    options += b"\0" * (-len(options) % 4)
    words = 5 + len(options) // 4 if header_words is None else header_words
    length = 20 + len(options) + len(payload) if total_length is None else total_length
    fragment = dont_fragment << 14 | more_fragments << 13 | fragment_offset // 8
    addresses = ipaddress.IPv4Address(src).packed + ipaddress.IPv4Address(dst).packed

    def header(check: int) -> bytes:
        first = struct.pack(
            "!BBHHHBBH", version << 4 | words, tos, length, identification, fragment, ttl, protocol, check
        )
        return first + addresses + options

    check = internet_checksum(header(0)) if checksum is None else checksum
    return ethernet(header(check) + payload, **below)


def ipv6(
    payload: bytes = b"",
    src: str = "2001:db8:1::2",
    dst: str = "2001:db8:2::2",
    next_header: int = 253,
    hop_limit: int = 64,
    traffic_class: int = 0,
    flow_label: int = 0,
    version: int = 6,
    payload_length: int | None = None,
    **below: Any,
) -> bytes:
    """An IPv6 packet in a frame. `version` and `payload_length` are for making malformed packets."""
    length = len(payload) if payload_length is None else payload_length
    first = version << 28 | traffic_class << 20 | flow_label
    header = struct.pack("!IHBB", first, length, next_header, hop_limit)
    addresses = ipaddress.IPv6Address(src).packed + ipaddress.IPv6Address(dst).packed
    return ethernet(header + addresses + payload, **({"ethertype": 0x86DD} | below))


def _ip(payload: bytes, protocol: int, below: dict[str, Any]) -> bytes:
    """In IPv6, if `below` has IPv6 addresses."""
    if _is_ipv6(below):
        return ipv6(payload, next_header=protocol, **below)
    return ipv4(payload, protocol=protocol, **below)


def _is_ipv6(below: dict[str, Any]) -> bool:
    return ":" in below.get("src", "") + below.get("dst", "")


def _pseudo(below: dict[str, Any], protocol: int, length: int) -> bytes:
    if _is_ipv6(below):
        ends = (below.get("src", "2001:db8:1::2"), below.get("dst", "2001:db8:2::2"))
        return b"".join(ipaddress.IPv6Address(end).packed for end in ends) + struct.pack("!II", length, protocol)
    src = ipaddress.IPv4Address(below.get("src", "10.0.1.2"))
    dst = ipaddress.IPv4Address(below.get("dst", "10.0.2.2"))
    return src.packed + dst.packed + struct.pack("!BBH", 0, protocol, length)


def udp(
    payload: bytes = b"", sport: int = 40000, dport: int = 9, udp_checksum: int | None = None, **below: Any
) -> bytes:
    """A UDP datagram in an IPv4 frame, or in IPv6 if an address is; `udp_checksum=0` means "none", as in RFC 768."""
    length = 8 + len(payload)
    if udp_checksum is None:
        segment = struct.pack("!HHHH", sport, dport, length, 0) + payload
        udp_checksum = internet_checksum(_pseudo(below, 17, length) + segment) or 0xFFFF
    return _ip(struct.pack("!HHHH", sport, dport, length, udp_checksum) + payload, 17, below)


def tcp(
    payload: bytes = b"",
    sport: int = 40000,
    dport: int = 80,
    flags: str = "S",
    seq: int = 0,
    ack: int = 0,
    window: int = 65535,
    **below: Any,
) -> bytes:
    """A TCP segment without options in an IPv4 frame, or in IPv6 if an address is; `flags` are letters of FSRPAUEC."""
    bits = sum(1 << TCP_FLAGS.index(letter) for letter in set(flags))

    def segment(check: int) -> bytes:
        return struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 5 << 4, bits, window, check, 0) + payload

    check = internet_checksum(_pseudo(below, 6, 20 + len(payload)) + segment(0))
    return _ip(segment(check), 6, below)


def icmp_echo(payload: bytes = b"", identifier: int = 1, sequence: int = 1, reply: bool = False, **below: Any) -> bytes:
    """An ICMP echo request (or reply) in an IPv4 frame."""

    def message(check: int) -> bytes:
        return struct.pack("!BBHHH", 0 if reply else 8, 0, check, identifier, sequence) + payload

    return ipv4(message(internet_checksum(message(0))), protocol=1, **below)


def icmp_error(about: bytes, kind: int = 3, code: int = 4, **below: Any) -> bytes:
    """An ICMP error (RFC 792; by default "fragmentation needed") about the packet of the IPv4 frame `about`."""

    def message(check: int) -> bytes:
        return struct.pack("!BBHI", kind, code, check, 0) + about[14 : 14 + 28]

    return ipv4(message(internet_checksum(message(0))), protocol=1, **below)
