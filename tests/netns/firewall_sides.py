"""Sequences of packets for `test_firewall_kernel`, and two who decide about them: a kernel, and our stages."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from libfp import Pipeline
from libfp.apps.firewall.conntrack import Connections, Settings
from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.hits import Hits
from libfp.stages import Forward, Routes, by_flow, parse, rewrite, route
from libfp.tables import Acl
from libfp.testing import ipv4, ipv6, tcp, udp
from libfp.testing.router import Crossroads

MARKER = 9999
ENDS = {4: (Crossroads.CLIENT, Crossroads.SERVER), 6: (Crossroads.CLIENT6, Crossroads.SERVER6)}


def number_of(frame: bytes) -> int:
    """The number by which a frame is known on its way: IPv4's identification, IPv6's flow label."""
    if frame[12:14] == b"\x08\x00":
        return int(struct.unpack_from("!H", frame, 18)[0])
    return int(struct.unpack_from("!I", frame, 14)[0] & 0xFFFF) if frame[12:14] == b"\x86\xdd" else -1


class Wire:
    """Raw sockets at both ends of a router, whoever forwards in it: `send` says whether a frame came through."""

    def __init__(self, net: Crossroads) -> None:
        self.sockets, self.macs = [], []
        for host, end, port in ((net.client, "c0", "r0"), (net.server, "s0", "r1")):
            one = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            one.bind((end, 3))
            one.settimeout(5.0)
            silent = "add table inet silent; add chain inet silent any { type filter hook prerouting priority -300;"
            silent += " policy drop; }"
            host.run(["nft", silent], check=True)  # the host itself answers to nothing
            self.sockets.append(one)
            self.macs.append((net.router.mac(port), host.mac(end)))
        for host, end, port in ((net.client, "c0", "r0"), (net.server, "s0", "r1")):
            number = int(port[1])
            for address in (
                f"{side}{last}" for side in (f"10.0.{number + 1}.", f"2001:db8:{number + 1}::") for last in (2, 7)
            ):
                net.router.netlink(
                    "neigh", "replace", dst=address, lladdr=host.mac(end), ifindex=net.router.index(port), state=0x80
                )
        self.count = 0

    def _put(self, way: int, frame: bytes) -> None:
        to, own = (bytes.fromhex(mac.replace(":", "")) for mac in self.macs[way])
        self.sockets[way].send(to + own + frame[12:])

    def send(self, way: int, frame: bytes) -> bool:
        """Send it from the client (0) or the server (1): was it delivered before the marker that went after it?"""
        self.count += 1
        client, server = ENDS[4]
        ends = {"src": server, "dst": client} if way else {"src": client, "dst": server}
        self._put(way, frame)
        mark = struct.pack("!I", self.count)
        self._put(way, udp(mark, sport=MARKER, dport=MARKER, **ends))
        wanted, came = number_of(frame), False
        while True:
            got = self.sockets[1 - way].recv(2048)
            if got[:6] != bytes.fromhex(self.macs[1 - way][1].replace(":", "")):
                continue  # our own
            if got[12:14] == b"\x08\x00" and got[23] == 17 and got[42:46] == mark and got[36:38] == b"\x27\x0f":
                return came
            came = came or number_of(got) == wanted


class Ours:
    """The firewall's stages over memory ports; `outcome` of the last frame."""

    def __init__(self, settings: Settings | None = None) -> None:
        routes = Routes(routes=1024, routes6=1024, next_hops=4096)
        hops = [routes.next_hops.add(Forward(n, bytes(6), bytes(6), 1500)) for n in (0, 1)]
        for n in (0, 1):
            routes.fib[f"10.0.{n + 1}.0/24"] = routes.fib6[f"2001:db8:{n + 1}::/64"] = hops[n]
        self.acl, self.acl6, self.hits = Acl(1000), Acl(1000, "ipv6"), Hits()
        self.connections = Connections(settings, capacity=10_000)
        filtered = filtering(routes, self.acl, self.acl6, self.hits, self.connections)
        self.pipeline = Pipeline(parse, by_flow, route(routes), filtered, rewrite(routes))

    def load(self, rules: list[Any]) -> None:
        self.acl.load(rules)
        self.acl6.load(rules)

    def send(self, way: int, frame: bytes) -> bool:
        [self.outcome] = self.pipeline.run_once([frame], port=way)
        return self.outcome == "forward"


@dataclass
class Talk:
    """One flow as its ends might have it."""

    protocol: str
    version: int
    ports: tuple[int, int]
    next: list[int] = field(default_factory=lambda: [1000, 500_000])
    told: list[int] = field(default_factory=lambda: [0, 0])

    def ends(self, way: int) -> dict[str, Any]:
        one, two = ENDS[self.version]
        src, dst = (two, one) if way else (one, two)
        return {"src": src, "dst": dst}


FLAGS = [
    "S",
    "SA",
    "A",
    "A",
    "A",
    "FA",
    "R",
    "RA",
    "",
    "SF",
    "SR",
    "F",
    "FAU",
    "AU",
    "SU",
    "PA",
    "SAFR",
    "P",
    "SE",
    "AE",
]


def numbered(frame: bytes, number: int) -> bytes:
    """The same frame with a number to know it by."""
    if frame[12:14] == b"\x86\xdd":
        return frame[:16] + struct.pack("!H", number) + frame[18:]
    bare = frame[:18] + struct.pack("!H", number) + frame[20:24] + b"\0\0" + frame[26:]
    total = sum(struct.unpack("!10H", bare[14:34]))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return bare[:24] + struct.pack("!H", total ^ 0xFFFF) + bare[26:]


def echo(talk: Talk, way: int, kind: int, code: int = 0) -> bytes:
    four = talk.version == 4
    message = struct.pack("!BBHHH", kind, code, 0, talk.ports[0], 1) + b"data"
    return _icmp(message, four, talk.ends(way))


def _icmp(message: bytes, four: bool, ends: dict[str, Any]) -> bytes:
    from libfp.testing.packets import _pseudo, internet_checksum

    pseudo = b"" if four else _pseudo(ends, 58, len(message))
    message = message[:2] + struct.pack("!H", internet_checksum(pseudo + message)) + message[4:]
    return ipv4(message, protocol=1, **ends) if four else ipv6(message, next_header=58, **ends)


def error(about: bytes, way: int, version: int, kind: int, size: int, astray: bool = False) -> bytes:
    """An ICMP error that arrives on side `way`, about a frame that went there, of which it quotes `size` bytes."""
    message = bytes([kind, 0]) + bytes(6) + about[14 : 14 + size]
    to = ENDS[version][1 - way]
    if astray:
        to = to[:-1] + "7"
    source = (Crossroads.SERVER if way else Crossroads.CLIENT)[:-1] + "9"
    source6 = (Crossroads.SERVER6 if way else Crossroads.CLIENT6)[:-1] + "9"
    return _icmp(message, version == 4, {"src": source if version == 4 else source6, "dst": to})


def packets(dice: random.Random, count: int, first: int) -> Iterator[tuple[int, bytes, str]]:
    """So many (side it comes from, frame, what it is)."""
    talks = [Talk("tcp", v, (first + n, 80)) for v in (4, 6) for n in range(2)]
    talks += [Talk("udp", v, (first + 5, 53)) for v in (4, 6)] + [Talk("echo", v, (first + 6, 0)) for v in (4, 6)]
    latest: dict[tuple[int, int], bytes] = {}
    for number in range(count):
        talk, way = dice.choice(talks), dice.randrange(2)
        ends, name = talk.ends(way), f"{talk.protocol}{talk.version} {way}"
        key = (id(talk), 1 - way)
        if dice.random() < 0.12 and key in latest:
            kind = dice.choice([3, 4, 5, 11, 12, 13, 9] if talk.version == 4 else [1, 2, 3, 4, 100])
            size = dice.choice([100, 100, 100, 28, 24, 23, 20, 12, 48, 44, 43, 30, 0])
            frame = error(latest[key], way, talk.version, kind, size, dice.random() < 0.1)
            name += f" error {kind} {size}"
        elif talk.protocol == "tcp":
            frame, flags = segment(talk, way, dice)
            latest[id(talk), way], name = frame, f"{name} {talk.ports[0]} {flags}"
        elif talk.protocol == "udp":
            sport, dport = talk.ports[::-1] if way else talk.ports
            frame = latest[id(talk), way] = udp(bytes(dice.randrange(9)), sport=sport, dport=dport, **ends)
        else:
            request, reply = (8, 0) if talk.version == 4 else (128, 129)
            kind = reply if way else request
            if talk.version == 4 and dice.random() < 0.1:
                kind = dice.choice([19, 9])
            frame = latest[id(talk), way] = echo(talk, way, kind)
            name += f" {kind}"
        if dice.random() < 0.05:
            at = dice.randrange(34 if talk.version == 4 else 54, len(frame))
            frame, name = frame[:at] + bytes([frame[at] ^ dice.randrange(1, 255)]) + frame[at + 1 :], name + " spoilt"
        yield way, numbered(frame, number + 1), name


def segment(talk: Talk, way: int, dice: random.Random) -> tuple[bytes, str]:
    """A segment as that end might send it, or one that makes no sense."""
    flags, size = dice.choice(FLAGS), dice.choice([0, 0, 1, 5])
    sport, dport = talk.ports[::-1] if way else talk.ports
    if flags == "S" and dice.random() < 0.3:
        talk.next[way] += 100_000
    seq, ack = talk.next[way], talk.next[1 - way]
    if "R" in flags:
        seq = dice.choice([seq, talk.told[1 - way], 0, seq - 5, seq + 5])
    elif "S" not in flags or dice.random() < 0.5:
        talk.next[way] += size + ("S" in flags) + ("F" in flags)
    if "A" in flags and "R" not in flags:
        talk.told[way] = ack
    window = dice.choice([65535, 1000, 0])
    told = ack if "A" in flags else 0
    frame = tcp(bytes(size), sport, dport, flags, seq, told, window, **talk.ends(way))
    return frame, f"{flags} {seq} {ack} +{size}"
