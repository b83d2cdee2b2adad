"""What is sent: frames of which sizes, in how many flows, from where to where; or the frames of a capture, as they are.

A `Traffic` is a description; `Schedule` is what the compiled loop walks round and round: a packet after the other, each
an address of what to copy, and what its signature is made with.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.gen import prefixes as lists
from libfp.gen.signature import ECHO, FCS, FIRST_SOURCE, PAYLOAD4, PAYLOAD6, SIGNATURE
from libfp.jit import Arena
from libfp.jit.memory import view
from libfp.ports.pcap import Capture

#: The usual mix of sizes, frames on the wire: 7 of 64 bytes, 4 of 570, 1 of 1,518 (simple IMIX; RFC 6985 names others).
IMIX = {64: 7, 570: 4, 1518: 1}
#: RFC 2544, 9.1, for Ethernet.
RFC2544_SIZES = (64, 128, 256, 512, 1024, 1280, 1518)
#: The least frames on the wire that have room for a signature, by family.
LEAST = {4: PAYLOAD4 + SIGNATURE + FCS, 6: PAYLOAD6 + SIGNATURE + FCS}
MOST = 9622  # bytes of a frame on the wire

BLOCK = 64  # bytes of a frame that belong to its flow; those behind are the same in all
ENTRY = 16  # bytes of the schedule for a packet: address, length (32 bits), sum (16), where the payload begins (8)
LENGTH, SUM, PAYLOAD = 8, 12, 14
PORTS = (1 << 16) - FIRST_SOURCE  # source ports of an address
LONG_ROUND = 1 << 16  # packets of a schedule beyond which a flow has one size in it
FLOWS = 1 << 22


@dataclass(frozen=True)
class Traffic:
    """Frames of UDP, RFC 2544 C.2.6.4: to port 7 (echo), from ports 49184 and up.

    size: of the frames on the wire, FCS included; or several with how many of each in a mix (`IMIX`). None: the least
    that has room for a signature: 64, with IPv6 84.
    flows: how many, 1 by default, of prefixes 8,192. Each has its source port, and after 16,352 another source address.
    to: the destination, or a prefix of destinations; or else `prefixes`, a file with one a line (see
    `libfp.gen.prefixes`): each flow has a destination in one of them, drawn alike, or, with `zipf`, the k-th most
    frequent as often as 1 / k^zipf.
    families: 4, 6 or both; of a file of prefixes what it has, by default.
    eth_dst, eth_src: MAC addresses of frames; ttl; seed: of everything that is drawn.
    pcap: instead of all that, the frames of this capture. They carry no signature: they can only be counted.
    """

    size: int | Mapping[int, int] | None = field(default=None, hash=False)
    flows: int | None = None
    source: str = "198.18.0.2"
    to: str = "198.19.0.2"
    source6: str = "2001:2::2"
    to6: str = "2001:2:0:8000::2"
    prefixes: str | None = None
    zipf: float = 0.0
    families: tuple[int, ...] = ()
    eth_dst: str = "02:00:00:00:00:01"
    eth_src: str = "02:00:00:00:00:02"
    ttl: int = 64
    seed: int = 1
    pcap: str | None = None
    _read: Any = field(default_factory=dict, repr=False, compare=False)

    def sizes(self) -> dict[int, int]:
        """How many frames of which size there are in a round of the mix."""
        if self.size is None:
            return {max(LEAST[family] for family in self.used_families()): 1}
        return {self.size: 1} if isinstance(self.size, int) else dict(self.size)

    def used_families(self) -> list[int]:
        """The families of the packets."""
        if self.families:
            return list(self.families)
        return sorted(self._prefixes()) if self.prefixes else [4]

    def _prefixes(self) -> dict[int, lists.Prefixes]:
        """The list, read once: the same traffic in frames of another size shares it."""
        assert self.prefixes is not None
        made: dict[str, dict[int, lists.Prefixes]] = self._read
        if self.prefixes not in made:
            made[self.prefixes] = lists.read(self.prefixes)
        return made[self.prefixes]

    @property
    def flow_count(self) -> int:
        """How many flows there are."""
        return self.flows if self.flows is not None else 8192 if self.prefixes else 1

    @property
    def signed(self) -> bool:
        """Whether the frames carry signatures."""
        return self.pcap is None

    def reverse(self) -> Traffic:
        """The same the other way. Raises BadInput where the destinations are not one address."""
        if self.prefixes or self.pcap or "/" in self.to + self.to6:
            raise BadInput("traffic both ways, to prefixes or from a capture", "send it by one port")
        source, to, source6, to6 = self.to, self.source, self.to6, self.source6
        return replace(self, source=source, to=to, source6=source6, to6=to6)

    def check(self) -> None:
        """Raise BadInput for what cannot be sent."""
        if not 1 <= self.flow_count <= FLOWS:
            raise BadInput(f"{self.flows} flows", f"1 to {FLOWS:,}")
        if not 1 <= self.ttl <= 255 or not 0 <= self.zipf <= 100:
            raise BadInput(f"a TTL of {self.ttl}, a Zipf exponent of {self.zipf:g}", "1 to 255, and 0 to 100")
        if self.seed < 0:
            raise BadInput(f"a seed of {self.seed}", "0 or more")
        if self.zipf and not self.prefixes:
            raise BadInput("a Zipf exponent without prefixes", "name a file of prefixes")
        if not set(self.used_families()) <= {4, 6}:
            raise BadInput(f"families {list(self.families)}", "4, 6 or both")
        for size, times in self.sizes().items():
            for family in self.used_families():
                if not LEAST[family] <= size <= MOST or times < 1:
                    what = f"frames of {size} bytes" if times > 0 else f"{times} frames of {size} bytes"
                    raise BadInput(what, f"IPv{family} with a signature has {LEAST[family]} to {MOST:,} bytes")
        if sum(self.sizes().values()) > 1 << 12:
            raise BadInput("a mix of more than 4,096 frames a round", "divide its weights")

    def destinations(self) -> list[tuple[int, int]]:
        """(family, address) of each flow."""
        random = np.random.default_rng(self.seed)
        families = self.used_families()
        share = {family: len(range(k, self.flow_count, len(families))) for k, family in enumerate(families)}
        drawn = {family: iter(self._drawn(family, count, random)) for family, count in share.items()}
        return [(families[k % len(families)], next(drawn[families[k % len(families)]])) for k in range(self.flow_count)]

    def _drawn(self, family: int, count: int, random: np.random.Generator) -> list[int]:
        if self.prefixes:
            known = self._prefixes()
            if family not in known:
                raise BadInput(f"{self.prefixes} has no IPv{family} prefix", "name another file, or other families")
            return lists.draw(known[family], family, count, self.zipf, random)
        network = _network(self.to if family == 4 else self.to6, family)
        first, room = int(network.network_address), network.num_addresses
        return [first + k % room for k in range(count)]


def _network(text: str, family: int) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.IPv4Network(text, strict=False) if family == 4 else ipaddress.IPv6Network(text, strict=False)
    except ValueError:
        raise BadInput(f"no IPv{family} destination: {text!r}", "an address or a prefix") from None


def _address(text: str, family: int) -> int:
    try:
        return int(ipaddress.IPv4Address(text) if family == 4 else ipaddress.IPv6Address(text))
    except ValueError:
        raise BadInput(f"no IPv{family} address: {text!r}", "such as 198.18.0.2 or 2001:2::2") from None


def _mac(text: str) -> bytes:
    parts = text.split(":")
    if len(parts) != 6 or not all(len(one) == 2 and one.isascii() and one.isalnum() for one in parts):
        raise BadInput(f"no MAC address: {text!r}", "such as 02:00:00:00:00:01")
    try:
        return bytes.fromhex("".join(parts))
    except ValueError:
        raise BadInput(f"no MAC address: {text!r}", "such as 02:00:00:00:00:01") from None


def _sum(data: bytes) -> int:
    """The one's complement sum, in network order; no more than 16 bits."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Schedule:
    """The packets of a `Traffic` in order, `count` of them at `address`, for the compiled loop to walk round and round.

    `longest` is the length of the longest at the port, without FCS. Raises BadInput.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.signed = traffic.signed
        if traffic.pcap is None:
            self._made(traffic)
        else:
            self._captured(traffic.pcap)

    def _reserve(self, entries: int, data: int) -> None:
        self.count = entries
        self._arena = Arena(ENTRY * entries + data + BLOCK)
        self.address = self._arena.address
        self._free = ENTRY * entries

    def _put(self, data: bytes, room: int) -> int:
        at, self._free = self._free, self._free + room
        self._arena.buffer[at : at + len(data)] = data
        return self.address + at

    def _entry(self, number: int, source: int, length: int, total: int, payload: int) -> None:
        self._arena.buffer[ENTRY * number : ENTRY * (number + 1)] = struct.pack(
            "<qIHBx", source, length, total, payload
        )

    def _made(self, traffic: Traffic) -> None:
        traffic.check()
        destinations = traffic.destinations()
        sizes = sorted(traffic.sizes().items())
        random = np.random.default_rng(traffic.seed + 1)
        mix = random.permutation([size - FCS for size, times in sizes for _ in range(times)]).tolist()
        self.longest = max(mix)
        entries = traffic.flow_count * len(mix)
        if entries > LONG_ROUND and len(mix) > 1:
            entries = -(-traffic.flow_count // len(mix)) * len(mix)
        flows, kinds = traffic.flow_count, len(set(mix))
        room = -(-self.longest // BLOCK) * BLOCK + BLOCK
        self._reserve(entries, BLOCK * flows * kinds + room)
        pattern = np.arange(room, dtype=np.uint16).astype(np.uint8)
        pattern ^= (np.arange(room) >> 8).astype(np.uint8)
        self.filler = self._put(pattern.tobytes(), len(pattern))
        made: dict[tuple[int, int], tuple[int, int, int]] = {}
        frames = _Frames(traffic, pattern.tobytes())
        for number in range(entries):
            flow, length = number % flows, mix[number % len(mix)]
            if (flow, length) not in made:
                family, address = destinations[flow]
                block, total, payload = frames.block(flow, family, address, length)
                made[flow, length] = self._put(block, BLOCK), total, payload
            source, total, payload = made[flow, length]
            self._entry(number, source, length, total, payload)

    def _captured(self, path: str) -> None:
        with Capture(path) as capture:
            frames = [bytes(capture.data[one.at : one.at + one.size]) for one in capture if one.size >= 14]
            if not frames:
                raise BadInput(f"{path} holds no frame", "name another")
            self.longest = max(map(len, frames))
            self._reserve(len(frames), sum(-(-len(one) // BLOCK) * BLOCK for one in frames))
            self.filler = 0
            for number, frame in enumerate(frames):
                source = self._put(frame, -(-len(frame) // BLOCK) * BLOCK)
                self._entry(number, source, len(frame), 0, 0)

    def frame(self, number: int) -> bytes:
        """The frame of an entry, but for its signature."""
        source, length, _, payload = struct.unpack_from("<qIHB", self._arena.buffer, ENTRY * number)
        head = bytes(view(source, min(length, BLOCK) if payload else length))
        return head + bytes(view(self.filler + BLOCK, length - BLOCK)) if payload and length > BLOCK else head

    def close(self) -> None:
        """Unmap it; no loop may walk it any more."""
        self._arena.close()


class _Frames:
    """Headers, with the filler of a frame behind them up to its first 64 bytes."""

    def __init__(self, traffic: Traffic, pattern: bytes) -> None:
        self._ethernet = _mac(traffic.eth_dst) + _mac(traffic.eth_src)
        self._sources = {4: _address(traffic.source, 4), 6: _address(traffic.source6, 6)}
        self._ttl, self._pattern = traffic.ttl, pattern
        self._sums: dict[tuple[int, int], int] = {}

    def block(self, flow: int, family: int, destination: int, length: int) -> tuple[bytes, int, int]:
        """(64 bytes, the sum of the filler in the payload as the machine loads words, where the payload begins)."""
        source = self._sources[family] + flow // PORTS
        if family == 4:
            payload = PAYLOAD4
            ends = struct.pack("!II", source & 0xFFFFFFFF, destination)
            start = struct.pack("!BBHHHBB", 0x45, 0, length - 14, 0, 0, self._ttl, 17)
            header = start + struct.pack("!H", _sum(start + ends) ^ 0xFFFF) + ends
            ether = b"\x08\x00"
        else:
            payload = PAYLOAD6
            ends = source.to_bytes(16, "big") + destination.to_bytes(16, "big")
            header = struct.pack("!IHBB", 6 << 28, length - 54, 17, self._ttl) + ends
            ether = b"\x86\xdd"
        size = length - payload + 8
        udp = struct.pack("!HHH", FIRST_SOURCE + flow % PORTS, ECHO, size)
        check = _sum(ends + struct.pack("!HH", 17, size) + udp) ^ 0xFFFF  # the payload adds nothing
        head = self._ethernet + ether + header + udp + struct.pack("!H", check or 0xFFFF)
        if (payload, length) not in self._sums:
            inside = bytearray(self._pattern[payload + 16 : length])
            at = ((length - payload - 2) & ~1) - 16
            inside[at : at + 2] = b"\0\0"
            self._sums[payload, length] = int.from_bytes(_sum(bytes(inside)).to_bytes(2, "big"), "little")
        return head + self._pattern[payload:BLOCK], self._sums[payload, length], payload
