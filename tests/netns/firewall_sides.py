"""Sequences of packets for `test_firewall_kernel`, and who decides about them: a kernel, our stages, `fp firewall`."""

from __future__ import annotations

import ipaddress
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from libfp import Pipeline
from libfp.apps.firewall.conntrack import Connections, Settings
from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.hits import Hits
from libfp.stages import Forward, Routes, by_flow, parse, rewrite, route
from libfp.tables import Acl
from libfp.testing import ipv4, ipv6, tcp, udp
from libfp.testing.packets import _pseudo, internet_checksum
from libfp.testing.router import AppProcess, Crossroads

MARKER, MARK = 9999, b"mark"
ENDS = (("client", "c0", "r0"), ("server", "s0", "r1"), ("other", "o0", "r2"))
LASTS = (2, 7, 40)  # of the addresses that there are on each side
SILENT = """add table inet silent
add chain inet silent any { type filter hook prerouting priority -300; policy drop; }
"""


def address(side: int, last: int, version: int) -> str:
    return f"10.0.{side + 1}.{last}" if version == 4 else f"2001:db8:{side + 1}::{last}"


def plain(frame: bytes) -> bytes:
    """A frame's IP packet without what two kernels number each in its own way."""
    if frame[12:14] == b"\x08\x00":
        return frame[14:18] + bytes(2) + frame[20:24] + bytes(2) + frame[26:]
    again = frame[20] == 44  # fragments, of a datagram that netfilter had put together
    return frame[14:15] + bytes(3) + (frame[18:58] + frame[62:] if again else frame[18:])


class Wire:
    """Raw sockets at the ends of a router, whoever forwards in it, and hosts that answer to nothing themselves."""

    def __init__(self, net: Crossroads) -> None:
        self.net, self.count = net, 0
        self.sockets, self.headers, self.macs = list[socket.socket](), list[bytes](), list[bytes]()
        for side, (name, end, port) in enumerate(ENDS):
            host = getattr(net, name)
            host.run(["nft", SILENT], check=True)
            one = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            one.bind((end, 3))
            one.setblocking(False)
            self.sockets.append(one)
            to, own = (bytes.fromhex(mac.replace(":", "")) for mac in (net.router.mac(port), host.mac(end)))
            self.headers.append(to + own)
            self.macs.append(own)
            for last in LASTS:
                for version in (4, 6):
                    net.router.neighbour(port, address(side, last, version), host.mac(end))
        self.got: list[tuple[int, bytes]] = []
        self.marks = 0

    def put(self, side: int, frame: bytes) -> None:
        self.sockets[side].send(self.headers[side] + frame[12:])

    def put_mark(self, side: int, options: bytes = b"", sport: int = MARKER) -> None:
        """One more that is to come through after what was sent before."""
        self.count += 1
        ends = {"src": address(side, 2, 4), "dst": address(0 if side else 1, 2, 4)}
        self.put(side, udp(MARK + struct.pack("!I", self.count), sport, MARKER, options=options, **ends))

    def take(self, limit: float = 0.0) -> bool:
        """Put what has come out into `got`, and count marks; wait so many seconds for the first."""
        found = False
        for one in select.select(self.sockets, (), (), limit)[0]:
            side = self.sockets.index(one)
            while True:
                try:
                    frame, told = one.recvfrom(2048)
                except BlockingIOError:
                    break
                if told[2] == socket.PACKET_OUTGOING or frame[:6] != self.macs[side]:
                    continue
                found = True
                if frame[-8:-4] == MARK:
                    self.marks += 1
                elif not (frame[12:14] == b"\x86\xdd" and frame[20] == 58 and 133 <= frame[54] <= 137):
                    self.got.append((side, plain(frame)))
        return found

    def wait(self, test: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 5
        while not test():
            self.take(0.001)
            assert time.monotonic() < deadline, what

    def send(self, side: int, frame: bytes) -> list[tuple[int, bytes]]:
        """Have Linux alone forward it: what has come out, and where."""
        self.got.clear()
        marks = self.marks
        self.put(side, frame)
        self.put_mark(side)
        self.wait(lambda: self.marks > marks, "the mark")
        return sorted(self.got)


class Watched(Wire):
    """The same where `fp firewall` forwards: `outcome` of the last frame, and so many punts by reason."""

    OPTIONS = b"\1\1\1\0"  # only Linux forwards a packet with some

    def __init__(self, net: Crossroads) -> None:
        super().__init__(net)
        self.process: AppProcess
        self.outcome, self.punts = "", dict[str, int]()

    def settled(self) -> Any:
        """The counters, when the last packet has been counted."""
        return self.process.counters()

    def send_as(self, side: int, frame: bytes, expected: int) -> list[tuple[int, bytes]]:
        """What has come out; wait for so many if Linux has to decide."""
        self.got.clear()
        before = self.settled()
        self.put(side, frame)
        total = before.forwarded + before.dropped + before.punted
        after = before

        def counted() -> bool:
            nonlocal after
            after = self.settled()
            return bool(after.forwarded + after.dropped + after.punted > total)

        self.wait(counted, f"a verdict about {frame.hex()}")
        if after.forwarded > before.forwarded:
            self.outcome = "forward"
            self.wait(lambda: self.got, "what was forwarded")
        elif after.dropped > before.dropped:
            [reason] = [name for name in after.drops if after.drops[name] != before.drops.get(name, 0)]
            self.outcome = f"drop {reason}"
            self.take()
        else:
            [reason] = [name for name in after.punts if after.punts[name] != before.punts.get(name, 0)]
            self.outcome = f"punt {reason}"
            self.punts[reason] = self.punts.get(reason, 0) + 1
            marks = self.marks
            for sport in range(MARKER, MARKER + 4):  # by each worker's way to Linux
                self.put_mark(side, self.OPTIONS, sport)
            self.wait(lambda: self.marks >= marks + 4 and len(self.got) >= expected, f"Linux: {self.outcome}")
        return sorted(self.got)


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
    """One flow as its ends might have it; each is (side, last byte of the address)."""

    protocol: str
    version: int
    ports: tuple[int, int]
    hosts: tuple[tuple[int, int], tuple[int, int]] = ((0, 2), (1, 2))
    next: list[int] = field(default_factory=lambda: [1000, 500_000])
    told: list[int] = field(default_factory=lambda: [0, 0])

    def ends(self, way: int) -> dict[str, Any]:
        src, dst = (address(*self.hosts[n], self.version) for n in (way, 1 - way))
        return {"src": src, "dst": dst}


FLAGS = [
    "S", "SA", "A", "A", "A", "FA", "R", "RA", "", "SF", "SR", "F", "FAU", "AU", "SU", "PA", "SAFR", "P", "SE", "AE",
]  # fmt: skip
SEMBLANCE = [*["S", "SA"] * 3, *["A", "PA"] * 4, "FA", "FA", "R", "RA", "SAFR"]  # nearer to what ends do


def echo(talk: Talk, way: int, kind: int, code: int = 0) -> bytes:
    message = struct.pack("!BBHHH", kind, code, 0, talk.ports[0], 1) + b"data"
    return _icmp(message, talk.version == 4, talk.ends(way))


def _icmp(message: bytes, four: bool, ends: dict[str, Any]) -> bytes:
    pseudo = b"" if four else _pseudo(ends, 58, len(message))
    message = message[:2] + struct.pack("!H", internet_checksum(pseudo + message)) + message[4:]
    return ipv4(message, protocol=1, **ends) if four else ipv6(message, next_header=58, **ends)


def error(about: bytes, talk: Talk, way: int, kind: int, size: int, astray: bool = False) -> bytes:
    """An ICMP error from the side of end `way`, about a frame that went there, of which it quotes `size` bytes."""
    message = bytes([kind, 0]) + bytes(6) + about[14 : 14 + size]
    side, last = talk.hosts[1 - way]
    ends = {
        "src": address(talk.hosts[way][0], 9, talk.version),
        "dst": address(side, 7 if astray else last, talk.version),
    }
    return _icmp(message, talk.version == 4, ends)


def pairs(first: int) -> list[Talk]:
    """Flows between two ends, of each protocol that is tracked."""
    talks = [Talk("tcp", v, (first + n, 80)) for v in (4, 6) for n in range(2)]
    return talks + [Talk(kind, v, (first + 5, 53)) for kind in ("udp", "echo") for v in (4, 6)]


def mixed(dice: random.Random, first: int) -> list[Talk]:
    """Flows of all sorts between three sides."""
    talks = []
    for n in range(16):
        kind = dice.choice([*["tcp"] * 8, *["udp"] * 5, *["echo"] * 4, "pieces", "other"])
        one, two = dice.choice([(0, 1), (0, 1), (0, 2), (1, 2), (2, 0), (1, 0)])
        hosts = (one, dice.choice([2, *LASTS])), (two, dice.choice([2, *LASTS]))
        port = dice.choice([80, 443, 22, 8042, 113] if kind == "tcp" else [5005, 5005, 53, 4500, 113])
        talks.append(Talk(kind, dice.choice([4, 6]), (first + n, port), hosts))
    return talks


def packets(
    dice: random.Random, count: int, talks: Sequence[Talk], flags: Sequence[str] = ()
) -> Iterator[tuple[int, bytes, str]]:
    """So many (side it comes from, frame, what it is)."""
    latest: dict[tuple[int, int], bytes] = {}
    while count > 0:
        talk = dice.choice(talks)
        begun = (id(talk), 0) in latest
        way = dice.randrange(2) if begun else int(dice.random() < 0.2)
        ends, name = talk.ends(way), f"{talk.protocol}{talk.version} {way}"
        side, key = talk.hosts[way][0], (id(talk), 1 - way)
        sport, dport = talk.ports[::-1] if way else talk.ports
        some: list[bytes] = []
        if dice.random() < 0.12 and key in latest:
            kind = dice.choice([3, 4, 5, 11, 12, 13, 9] if talk.version == 4 else [1, 2, 3, 4, 100])
            size = dice.choice([100, 100, 100, 28, 24, 23, 20, 12, 48, 44, 43, 30, 0])
            frame = error(latest[key], talk, way, kind, size, dice.random() < 0.1)
            name += f" error {kind} {size}"
        elif talk.protocol == "tcp":
            frame, told = (
                segment(talk, way, dice, flags or FLAGS) if begun else segment(talk, way, dice, ["S", "S", "A"])
            )
            latest[id(talk), way], name = frame, f"{name} {talk.ports} {told}"
        elif talk.protocol == "udp":
            frame = latest[id(talk), way] = udp(bytes(dice.randrange(9)), sport=sport, dport=dport, **ends)
        elif talk.protocol == "echo":
            request, reply = (8, 0) if talk.version == 4 else (128, 129)
            kind = reply if way else request
            if talk.version == 4 and dice.random() < 0.1:
                kind = dice.choice([19, 9])
            frame = latest[id(talk), way] = echo(talk, way, kind)
            name += f" {kind}"
        elif talk.protocol == "other":
            frame = (ipv4 if talk.version == 4 else ipv6)(b"anything", **ends)
        else:
            frame, *some = pieces(udp(bytes(40), sport=sport, dport=dport, **ends), dice.randrange(1 << 16))
        if not some and dice.random() < 0.05:
            at = dice.randrange(34 if talk.version == 4 else 54, len(frame))
            frame, name = frame[:at] + bytes([frame[at] ^ dice.randrange(1, 255)]) + frame[at + 1 :], name + " spoilt"
        for one in (frame, *some):
            yield side, one, name
            count -= 1


def pieces(frame: bytes, number: int) -> list[bytes]:
    """A datagram in two fragments."""
    if frame[12:14] == b"\x86\xdd":
        ends = {"src": str(ipaddress.IPv6Address(frame[22:38])), "dst": str(ipaddress.IPv6Address(frame[38:54]))}
        header = struct.pack("!BxHI", 17, 1, number), struct.pack("!BxHI", 17, 24, number)
        return [ipv6(header[n] + part, next_header=44, **ends) for n, part in enumerate((frame[54:78], frame[78:]))]
    ends = {"src": str(ipaddress.IPv4Address(frame[26:30])), "dst": str(ipaddress.IPv4Address(frame[30:34]))}
    ends |= {"protocol": 17, "identification": number}
    return [ipv4(frame[34:58], more_fragments=True, **ends), ipv4(frame[58:], fragment_offset=24, **ends)]


def segment(talk: Talk, way: int, dice: random.Random, some: Sequence[str]) -> tuple[bytes, str]:
    """A segment as that end might send it, or one that makes no sense."""
    flags, size = dice.choice(some), dice.choice([0, 0, 1, 5])
    sport, dport = talk.ports[::-1] if way else talk.ports
    if flags == "S" and dice.random() < 0.3:
        talk.next[way] += dice.choice([40, 500])
    seq, ack = talk.next[way], talk.next[1 - way]
    if "R" in flags:
        seq = dice.choice([seq, talk.told[1 - way], 0, seq - 5, seq + 5])
    elif "S" not in flags or dice.random() < 0.5:
        talk.next[way] += size + ("S" in flags) + ("F" in flags)
    if "A" in flags and "R" not in flags:
        talk.told[way] = ack
    window = dice.choice([65535, 1000, 0] if flags == "A" else [65535, 1000])
    told = ack if "A" in flags else 0
    frame = tcp(bytes(size), sport, dport, flags, seq, told, window, **talk.ends(way))
    return frame, f"{flags} {seq} {ack} +{size}"
