"""The headers of a frame, read in Python, for people: what `fp trace` prints and filters look at.

Whatever the bytes are, and wherever they were cut, there is an answer. Sources: IEEE 802.3 and 802.1Q, RFC 826, 791,
8200, 768, 9293, 792, 4443.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

IPV4, ARP, IPV6, VLAN, QINQ = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8
ICMP, TCP, UDP, ICMP6, SCTP = 1, 6, 17, 58, 132
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "icmp6": 58, "sctp": 132}
_NAMES = {number: name.upper() for name, number in PROTOCOLS.items()} | {ICMP6: "ICMPv6"}
_EXTENSIONS = (0, 43, 60)  # hop-by-hop, routing, destination options: next header, length in 8 bytes less 1
_FRAGMENT = 44
_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
_ICMP = {0: "echo reply", 3: "unreachable", 5: "redirect", 8: "echo request", 11: "time exceeded"}
_ICMP6 = {1: "unreachable", 2: "packet too big", 3: "time exceeded", 128: "echo request", 129: "echo reply",
          133: "router solicitation", 134: "router advertisement", 135: "neighbour solicitation",
          136: "neighbour advertisement"}  # fmt: skip


@dataclass
class Headers:
    """What was found. `type` is the EtherType behind any tags; `version` 4 or 6 for IP, 0 for anything else.

    `src` and `dst` are addresses as numbers (of ARP: sender and target), `proto` the transport's number, None where
    the header was cut; `sport` and `dport` are None but for the first fragment of TCP, UDP and SCTP.
    """

    length: int
    type: int | None = None
    vlan: int | None = None
    version: int = 0
    src: int | None = None
    dst: int | None = None
    proto: int | None = None
    ttl: int = 0
    fragment: bool = False
    sport: int | None = None
    dport: int | None = None
    macs: tuple[bytes, bytes] | None = None  # source, destination
    detail: str = ""

    def address(self, number: int | None) -> str:
        if number is None:
            return "?"
        return str(ipaddress.IPv6Address(number) if self.version == 6 else ipaddress.IPv4Address(number))

    def summary(self) -> str:
        """One line: addresses, protocol and ports, TTL; MAC addresses last."""
        parts = []
        if self.vlan is not None:
            parts.append(f"VLAN {self.vlan}")
        if self.version:
            src, dst = self.address(self.src), self.address(self.dst)
            if self.sport is not None:
                wrap = "[{}]:{}" if self.version == 6 else "{}:{}"
                src, dst = wrap.format(src, self.sport), wrap.format(dst, self.dport)
            parts.append(f"IPv{self.version} {src} > {dst}")
            name = "cut" if self.proto is None else _NAMES.get(self.proto, f"protocol {self.proto}")
            parts.append(f"{name} {self.detail}".strip())
            if self.fragment:
                parts.append("fragment")
            parts.append(f"{'TTL' if self.version == 4 else 'hop limit'} {self.ttl}")
        elif self.type == ARP:
            parts.append(f"ARP {self.detail}" if self.detail else "ARP")
        elif self.type is not None:
            parts.append(f"type {self.type:#06x}")
        if self.macs is not None:
            parts.append(" > ".join(mac.hex(":") for mac in self.macs))
        return ", ".join(parts) or "cut"


def dissect(data: bytes, length: int | None = None) -> Headers:
    """The headers of a frame of `length` bytes, of which `data` is the beginning."""
    found = Headers(len(data) if length is None else length)
    if len(data) < 14:
        return found
    found.macs = data[6:12], data[:6]
    at, kind = 14, int.from_bytes(data[12:14])
    while kind in (VLAN, QINQ) and len(data) >= at + 4:
        found.vlan = int.from_bytes(data[at : at + 2]) & 0xFFF
        kind = int.from_bytes(data[at + 2 : at + 4])
        at += 4
    found.type = kind
    if kind == IPV4 and len(data) >= at + 20 and data[at] >> 4 == 4:
        _ipv4(found, data[at:])
    elif kind == IPV6 and len(data) >= at + 40 and data[at] >> 4 == 6:
        _ipv6(found, data[at:])
    elif kind == ARP and data[at : at + 6] == b"\0\1\x08\0\6\4" and len(data) >= at + 28:
        found.src, found.dst = int.from_bytes(data[at + 14 : at + 18]), int.from_bytes(data[at + 24 : at + 28])
        what = {1: "request", 2: "reply"}.get(int.from_bytes(data[at + 6 : at + 8]), "?")
        found.detail = f"{what} {found.address(found.src)} > {found.address(found.dst)}"
    return found


def _ipv4(found: Headers, data: bytes) -> None:
    found.version, found.ttl, found.proto = 4, data[8], data[9]
    found.src, found.dst = int.from_bytes(data[12:16]), int.from_bytes(data[16:20])
    where = int.from_bytes(data[6:8])
    found.fragment = where & 0x3FFF != 0
    if where & 0x1FFF == 0:
        _transport(found, data[max((data[0] & 15) << 2, 20) :])


def _ipv6(found: Headers, data: bytes) -> None:
    found.version, found.ttl = 6, data[7]
    found.src, found.dst = int.from_bytes(data[8:24]), int.from_bytes(data[24:40])
    kind, at, first = data[6], 40, True
    while kind in _EXTENSIONS or kind == _FRAGMENT:
        if len(data) < at + 8:
            return
        if kind == _FRAGMENT:
            found.fragment = True
            first = int.from_bytes(data[at + 2 : at + 4]) & 0xFFF8 == 0
            kind, at = data[at], at + 8
            if not first:
                break
        else:
            kind, at = data[at], at + 8 * (data[at + 1] + 1)
    found.proto = kind
    if first:
        _transport(found, data[at:])


def _transport(found: Headers, data: bytes) -> None:
    if found.proto in (TCP, UDP, SCTP) and len(data) >= 4:
        found.sport, found.dport = int.from_bytes(data[:2]), int.from_bytes(data[2:4])
        if found.proto == TCP and len(data) >= 14:
            found.detail = " ".join(name for bit, name in enumerate(_FLAGS) if data[13] >> bit & 1)
    elif found.proto in (ICMP, ICMP6) and len(data) >= 2:
        known = _ICMP if found.proto == ICMP else _ICMP6
        found.detail = known.get(data[0], f"type {data[0]}") + (f" code {data[1]}" if data[1] else "")
