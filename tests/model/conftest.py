"""The oracle of the forwarding tests in plain Python: RFC 791, RFC 1812 section 5, RFC 8200, and what Linux adds."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable

import pytest

DST, SRC = bytes.fromhex("020000000b02"), bytes.fromhex("020000000b01")
MTU = 1500

Verdict = tuple[str, bytes]


def ones_complement(data: bytes) -> int:
    """The internet checksum by definition: RFC 1071, one 16-bit word after the other."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def parsed(frame: bytes) -> str:
    """What `parse` makes of a frame: a drop, "ipv4", "ipv6", or "" for everything else."""
    if len(frame) < 14:
        return "drop ethernet-truncated"
    if frame[12:14] == b"\x86\xdd":
        return parsed6(frame[14:])
    if frame[12:14] != b"\x08\x00":
        return ""
    ip = frame[14:]
    if len(ip) < 20:
        return "drop ipv4-truncated"
    if ip[0] >> 4 != 4:
        return "drop ipv4-version"
    header, (total,) = ip[0] % 16 * 4, struct.unpack_from("!H", ip, 2)
    if header < 20 or total < header:
        return "drop ipv4-header-length"
    return "drop ipv4-truncated" if total > len(ip) else "ipv4"


def routed(frame: bytes) -> Verdict:
    """The outcome, and the frame afterwards, where one default route leads to DST from SRC with an MTU of 1500."""
    kind = parsed(frame)
    if kind == "ipv6":
        return routed6(frame)
    if kind != "ipv4":
        return kind or "punt not-ip", frame
    ip, header = frame[14:], frame[14] % 16 * 4
    if ones_complement(ip[:header]) != 0:
        return "drop ipv4-checksum", frame
    if header > 20:
        return "punt ip-options", frame
    source, destination, ttl = ip[12:16], ip[16:20], ip[8]
    if source[0] in (0, 127) or 224 <= source[0] < 240 or source == b"\xff" * 4:
        return "drop martian-source", frame
    if destination == b"\xff" * 4:
        return "punt broadcast", frame
    if destination[0] in (0, 127):
        return "drop martian-destination", frame
    if 224 <= destination[0] < 240:
        return "punt multicast", frame
    if ttl < 2:
        return "punt ttl-expired", frame
    if struct.unpack_from("!H", ip, 2)[0] > MTU:
        return "punt fragment-needed", frame
    sent = bytearray(ip[:20])
    sent[8], sent[10:12] = ttl - 1, b"\0\0"
    sent[10:12] = struct.pack("!H", ones_complement(bytes(sent)))
    return "forward", DST + SRC + frame[12:14] + bytes(sent) + ip[20:]


def parsed6(ip: bytes) -> str:
    """The same for what an Ethernet header says is IPv6."""
    if len(ip) >= 20 and ip[0] >> 4 != 6:  # fewer bytes are not looked at
        return "drop ipv6-version"
    return "drop ipv6-truncated" if len(ip) < 40 or 40 + struct.unpack_from("!H", ip, 4)[0] > len(ip) else "ipv6"


def routed6(frame: bytes) -> Verdict:
    """The outcome of a sound IPv6 packet."""
    ip, (length,), next_header, hops = frame[14:], struct.unpack_from("!H", frame, 18), frame[20], frame[21]
    source, destination = ipaddress.IPv6Address(ip[8:24]), ipaddress.IPv6Address(ip[24:40])
    if next_header == 0:
        return "punt ip-options", frame
    if source.is_multicast or source.is_loopback:
        return "drop martian-source", frame
    if destination.is_loopback:
        return "drop martian-destination", frame
    if destination.is_multicast:
        return "punt multicast", frame
    if source.is_link_local or destination.is_link_local or destination.is_unspecified:
        return "punt link-local", frame
    if source.is_unspecified:
        return "drop martian-source", frame
    if hops < 2:
        return "punt ttl-expired", frame
    if 40 + length > MTU:
        return "punt fragment-needed", frame
    return "forward", DST + SRC + frame[12:21] + bytes([hops - 1]) + frame[22:]


@pytest.fixture(scope="session")
def oracle() -> Callable[[bytes], Verdict]:
    return routed


@pytest.fixture(scope="session")
def internet_checksum() -> Callable[[bytes], int]:
    return ones_complement
