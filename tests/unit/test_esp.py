"""The stages of the IPsec gateway, with scapy's IPsec layer as the peer; and with one that lies.

All tests use one gateway with a tunnel for each way to put a packet into another, so one loop is compiled.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.layers.ipsec import ESP, SecurityAssociation
from scapy.layers.l2 import Ether

from libfp import Pipeline
from libfp.apps.ipsec import record, replay
from libfp.apps.ipsec.policies import Policies, Policy
from libfp.apps.ipsec.sa import Sa, SaTable
from libfp.apps.ipsec.stages import decrypt, protect, select, to_sa, to_tunnel
from libfp.engine.crew import Crew
from libfp.engine.state import WorkerState
from libfp.jit import Arena, load64, store64
from libfp.jit.primitive import signed64
from libfp.ports.memory import MemoryPort
from libfp.stages import Forward, Punt, Routes, forward, parse
from libfp.testing.packets import ethernet, icmp_echo, ipv4, ipv6, udp

pytestmark = pytest.mark.timeout(240)  # the first one compiles

LAN, WAN = 0, 1  # ports
OWN, PEER = {4: "198.51.100.1", 6: "2001:db8:ff::1"}, {4: "203.0.113.9", 6: "2001:db8:fe::9"}
PORTS = {4: ("10.0.0.1", OWN[4]), 6: ("2001:db8:10::1", OWN[6])}
WAYS = [(outer, inner, esn) for outer in (4, 6) for inner in (4, 6) for esn in (True, False)]
IDS = [f"{inner} in {outer}{', ESN' if esn else ''}" for outer, inner, esn in WAYS]


@dataclass
class Tunnel:
    """One of the gateway's, and the peer's side of it."""

    number: int
    outer: int
    inner: int
    esn: bool

    def __post_init__(self) -> None:
        n = self.number
        self.keys = [bytes([n + 1, way] * (10 + 8 * (n & 1))) for way in (1, 2)]  # AES-128 and AES-256
        self.out, self.back = (
            Sa(f"t{n}", way, spi=0x1000 * (k + 1) + n, local=OWN[self.outer], remote=PEER[self.outer],
               key=self.keys[k], esn=self.esn, window=64)
            for k, way in enumerate(("out", "in"))
        )  # fmt: skip
        self.net = f"10.{n}.0.0/16" if self.inner == 4 else f"2001:db8:1{n}::/48"
        self.there = f"10.{100 + n}.0.0/16" if self.inner == 4 else f"2001:db8:2{n}::/48"
        ends = (self.net, self.there)
        self.here_host, self.there_host = (one.replace("0.0/16", "0.7").replace("::/48", "::7") for one in ends)

    @property
    def policy(self) -> Policy:
        return Policy("protect", self.net, self.there, tunnel=f"t{self.number}")

    def ends(self, inbound: bool = False) -> dict[str, str]:
        both = (self.there_host, self.here_host) if inbound else (self.here_host, self.there_host)
        return {"src": both[0], "dst": both[1]}

    def plain(self, size: int = 40, inbound: bool = False, **below: Any) -> bytes:
        """A frame with UDP from one side to the other."""
        return udp((bytes(range(256)) * 8)[:size], **self.ends(inbound), **below)

    def scapy(self, inbound: bool) -> SecurityAssociation:
        ends = (PEER, OWN) if inbound else (OWN, PEER)
        header = (IP if self.outer == 4 else IPv6)(src=ends[0][self.outer], dst=ends[1][self.outer])
        sa = self.back if inbound else self.out
        return SecurityAssociation(
            ESP, sa.spi, crypt_algo="AES-GCM", crypt_key=self.keys[inbound], crypt_icv_size=16,
            tunnel_header=header, esn_en=self.esn,
        )  # fmt: skip

    def seal(
        self, sequence: int, inner: bytes, *, trailer: bytes | None = None, following: int = 0, **below: Any
    ) -> bytes:
        """An ESP frame from the peer, made by hand; `trailer` is padding, its length, and the next header."""
        if trailer is None:
            pad = -(len(inner) + 2) % 4
            trailer = bytes(range(1, pad + 1)) + bytes([pad, following or (4 if self.inner == 4 else 41)])
        key, iv = self.keys[1], struct.pack("!Q", sequence * 7 + 1)
        spi, low = struct.pack("!I", self.back.spi), struct.pack("!I", sequence & 0xFFFFFFFF)
        aad = spi + (struct.pack("!I", sequence >> 32) if self.esn else b"") + low
        sealed = AESGCM(key[:-4]).encrypt(key[-4:] + iv, inner + trailer, aad)
        return self.outer_frame(spi + low + iv + sealed, **below)

    def outer_frame(self, payload: bytes, **below: Any) -> bytes:
        """A frame of the peer's, with ESP in it."""
        ends = {"src": PEER[self.outer], "dst": OWN[self.outer]} | below
        make, name = (ipv4, "protocol") if self.outer == 4 else (ipv6, "next_header")
        return make(payload, **({name: 50} | ends))


class Gateway:
    def __init__(self) -> None:
        self.sas = SaTable()
        self.tunnels = [Tunnel(n, *way) for n, way in enumerate(WAYS)]
        for tunnel in self.tunnels:
            self.sas.add(tunnel.out)
            self.sas.add(tunnel.back)
        self.policies = Policies(self.sas)
        self.reset()
        self.routes = routes = Routes(routes=1000, next_hops=64)
        lan, wan = (
            routes.next_hops.add(Forward(port, bytes([2, 0, 0, 0, 0, port]), bytes(6), 1500)) for port in (0, 1)
        )
        self.narrow = routes.next_hops.add(Forward(LAN, bytes(6), bytes(6), 1300))
        local = routes.next_hops.add(Punt("local"))
        routes.fib["10.0.0.0/8"] = routes.fib6["2001:db8:10::/44"] = lan
        routes.fib["203.0.113.0/24"] = routes.fib6["2001:db8:fe::/48"] = wan
        for address in (PORTS[4][0], OWN[4]):
            routes.fib[f"{address}/32"] = local
        for address in (PORTS[6][0], OWN[6]):
            routes.fib6[f"{address}/128"] = local
        for port in range(2):
            packed = [IP(src=PORTS[4][port]), IPv6(src=PORTS[6][port])]
            routes.set_address(port, bytes(packed[0])[12:16], bytes(packed[1])[8:24])
        sas, policies = self.sas, self.policies
        ways = select(sas, policies, routes)
        self.pipeline = Pipeline(
            parse, to_sa(sas), decrypt(sas, policies), ways, to_tunnel(sas), protect(sas), forward(routes)
        )

    def reset(self, *more: Policy) -> None:
        self.policies.load([*more, *(tunnel.policy for tunnel in self.tunnels)])

    def run(self, *frames: bytes, port: int, guard: str = "") -> list[Any]:
        return self.pipeline.run_once(frames, port=port, guard=guard)

    def top(self, tunnel: Tunnel, top: int, seen: bool = False) -> None:
        replay.make(tunnel.back.at + record.WINDOW, 64, top, seen)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.sas.close()


@pytest.fixture
def tunnel(gateway: Gateway, request: pytest.FixtureRequest) -> Tunnel:
    tunnel = gateway.tunnels[getattr(request, "param", 0)]
    gateway.top(tunnel, 0)
    return tunnel


every = pytest.mark.parametrize("tunnel", range(len(WAYS)), indirect=True, ids=IDS)
one_of_each = pytest.mark.parametrize("tunnel", [0, 7], indirect=True, ids=[IDS[0], IDS[7]])


def ip_of(frame: bytes) -> Any:
    """The IP packet of a frame, by scapy."""
    packet = Ether(frame).payload
    return packet


def one_hop_on(frame: bytes) -> bytes:
    """The IP packet of a frame, its TTL one less."""
    packet = ip_of(frame)
    if packet.version == 4:
        packet.ttl -= 1
        del packet.chksum
    else:
        packet.hlim -= 1
    return bytes(packet)


# With scapy as the peer.


@every
def test_scapy_decrypts_what_goes_out(gateway: Gateway, tunnel: Tunnel) -> None:
    """Every length of padding; then over the end of 2^32, where there are extended sequence numbers."""
    peer, before = tunnel.scapy(inbound=False), tunnel.out.sequence
    if tunnel.esn:
        store64(tunnel.out.at + record.SEQUENCE, before := 7 << 32 | 0xFFFFFFFC)
    frames = [tunnel.plain(size, tos=0x2A) if tunnel.inner == 4 else tunnel.plain(size, traffic_class=0x2A)
              for size in (*range(8), 1000)]  # fmt: skip
    for number, (plain, outcome) in enumerate(zip(frames, gateway.run(*frames, port=LAN), strict=True)):
        assert (outcome, outcome.port) == ("forward", WAN)
        outer, sequence = ip_of(outcome.frame), before + 1 + number
        assert (outer.src, outer.dst) == (OWN[tunnel.outer], PEER[tunnel.outer])
        assert outer[ESP].seq == sequence & 0xFFFFFFFF
        length = len(bytes(outer))
        if tunnel.outer == 4:
            assert (outer.ttl, outer.tos, outer.flags, outer.len, outer.id) == (64, 0x2A, "DF", length, 0)
            assert bytes(outer.__class__(bytes(outer))) == outcome.frame[14:]
            assert internet_sum(outcome.frame[14:34]) == 0xFFFF
        else:
            assert (outer.hlim, outer.tc, outer.plen, outer.fl) == (64, 0x2A, length - 40, 0)
        peer.esn = sequence >> 32
        assert bytes(peer.decrypt(outer)) == one_hop_on(plain)


def internet_sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return (total & 0xFFFF) + (total >> 16)


@every
def test_what_scapy_encrypts_comes_in(gateway: Gateway, tunnel: Tunnel) -> None:
    peer, first = tunnel.scapy(inbound=True), (7 << 32 | 0xFFFFFFF0) if tunnel.esn else 100
    gateway.top(tunnel, first - 1)
    for number, size in enumerate([*range(20), 1000]):
        plain, sequence = tunnel.plain(size, inbound=True), first + number
        peer.seq_num, peer.esn = sequence & 0xFFFFFFFF, sequence >> 32
        sealed = peer.encrypt(ip_of(plain))
        frame = ethernet(bytes(sealed), 0x0800 if tunnel.outer == 4 else 0x86DD)
        (outcome,) = gateway.run(frame, port=WAN)
        assert (outcome, outcome.port) == ("forward", LAN), (number, size)
        assert outcome.frame[14:] == one_hop_on(plain)
        assert outcome.frame[12:14] == (b"\x08\x00" if tunnel.inner == 4 else b"\x86\xdd")
        assert tunnel.back.sequence == sequence
        assert gateway.run(frame, port=WAN) == ["drop esp-replayed"]


@one_of_each
def test_counters_of_an_sa(gateway: Gateway, tunnel: Tunnel) -> None:
    before, plain = tunnel.back.counters, tunnel.plain(inbound=True)
    good = tunnel.seal(1, plain[14:])
    bad = good[:-1] + bytes([good[-1] ^ 1])
    assert gateway.run(bad, good, good, port=WAN) == ["drop esp-bad-icv", "forward", "drop esp-replayed"]
    more = {name: tunnel.back.counters[name] - count for name, count in before.items()}
    assert more == dict.fromkeys(before, 0) | {"packets": 1, "bytes": len(plain) - 14, "replayed": 1, "bad_icv": 1}


# A peer that lies, or somebody in between.


@one_of_each
def test_replays_and_forgeries_within_a_burst(gateway: Gateway, tunnel: Tunnel) -> None:
    """Of packets of one number the first genuine one counts, wherever it comes in the burst; order is kept."""
    inner = [tunnel.plain(size, inbound=True)[14:] for size in (20, 21, 22)]
    first, again, later = tunnel.seal(900, inner[0]), tunnel.seal(900, inner[1]), tunnel.seal(901, inner[2])
    far = tunnel.seal(5000, inner[0])
    forged, forged_far = (one[:-1] + bytes([one[-1] ^ 1]) for one in (first, far))
    for many in (1, 5):  # whose policies are asked for one by one, and all at once
        gateway.top(tunnel, 850)
        before, good = tunnel.back.counters, [tunnel.seal(851 + k, inner[0]) for k in range(3 * many)]
        outcomes = gateway.run(*good, first, forged, again, forged_far, first, later, first, later, port=WAN)
        assert outcomes[: 3 * many] == ["forward"] * (3 * many)
        assert outcomes[3 * many :] == [
            "forward", "drop esp-replayed", "drop esp-replayed", "drop esp-bad-icv", "drop esp-replayed", "forward",
            "drop esp-replayed", "drop esp-replayed",
        ]  # fmt: skip
        assert [len(one.frame) for one in outcomes if one == "forward"][-2:] == [14 + len(inner[k]) for k in (0, 2)]
        assert tunnel.back.sequence == 901
        more = {name: tunnel.back.counters[name] - count for name, count in before.items()}
        assert (more["packets"], more["replayed"], more["bad_icv"]) == (3 * many + 2, 5, 1)
    gateway.top(tunnel, 899)
    assert gateway.run(forged, again, forged, first, port=WAN) == [
        "drop esp-bad-icv", "forward", "drop esp-replayed", "drop esp-replayed"
    ]  # fmt: skip


@one_of_each
@pytest.mark.parametrize("guard", ["", "end", "start"])
def test_a_flipped_bit_anywhere_is_found_and_moves_no_window(gateway: Gateway, tunnel: Tunnel, guard: str) -> None:
    """From the destination on: what is in front of that may change on the way, and only IPv4 has a checksum of it."""
    frame = tunnel.seal(500, tunnel.plain(9, inbound=True)[14:])
    gateway.top(tunnel, 499)
    esp = 34 if tunnel.outer == 4 else 54
    begin = 14 if tunnel.outer == 4 else esp - 16
    flipped = [bytearray(frame) for _ in range(begin, len(frame))]
    for at, one in enumerate(flipped, begin):
        one[at] ^= 1 << at % 8
    outcomes = gateway.run(*map(bytes, flipped), port=WAN, guard=guard)
    assert "forward" not in outcomes
    outcomes = outcomes[esp - begin :]
    assert {*outcomes[:4]} <= {"drop esp-unknown-spi", "drop esp-bad-icv"}  # which may be the SPI of another tunnel
    assert {*outcomes[4:8]} <= {"drop esp-bad-icv", "drop esp-replayed"}
    assert {*outcomes[8:]} == {"drop esp-bad-icv"}
    assert tunnel.back.sequence == 499
    assert gateway.run(frame, port=WAN, guard=guard) == ["forward"]


@one_of_each
@pytest.mark.parametrize("guard", ["", "end"])
def test_whatever_is_cut_off_is_dropped(gateway: Gateway, tunnel: Tunnel, guard: str) -> None:
    """The frame alone; then with a header that knows of it."""
    frame = tunnel.seal(600, tunnel.plain(9, inbound=True)[14:])
    gateway.top(tunnel, 599)
    header = 34 if tunnel.outer == 4 else 54
    outcomes = gateway.run(*(frame[:size] for size in range(14, len(frame))), port=WAN, guard=guard)
    assert {*outcomes} == {"drop ipv4-truncated" if tunnel.outer == 4 else "drop ipv6-truncated"}
    cut = [tunnel.outer_frame(frame[header:size]) for size in range(header, len(frame))]
    outcomes = gateway.run(*cut, port=WAN, guard=guard)
    for size, outcome in enumerate(outcomes):
        why = "esp-truncated" if size < 36 else "esp-alignment" if size % 4 else "esp-bad-icv"
        assert outcome == f"drop {why}", size
    assert tunnel.back.sequence == 599


@every
def test_forged_packets(gateway: Gateway, tunnel: Tunnel) -> None:
    frame, other = tunnel.seal(70, tunnel.plain(inbound=True)[14:]), gateway.tunnels[tunnel.number ^ 2]
    gateway.top(tunnel, 69)
    gateway.top(other, 69)
    header = 34 if tunnel.outer == 4 else 54
    stolen = bytearray(frame)
    stolen[header : header + 4] = other.back.spi.to_bytes(4)
    fragment = {"more_fragments": True} if tunnel.outer == 4 else {}
    in_two = tunnel.outer_frame(frame[header:], **fragment)
    if tunnel.outer == 6:
        in_two = tunnel.outer_frame(b"\x32\0\0\1" + bytes(4) + frame[header:], next_header=44)
    elsewhere = tunnel.outer_frame(frame[header:], dst="198.51.100.99" if tunnel.outer == 4 else "2001:db8:ff::99")
    old = tunnel.seal(69, tunnel.plain(inbound=True)[14:])
    forged = [bytes(stolen), in_two, old, tunnel.outer_frame(b"\0\0\1\0" + frame[header + 4 :])]
    names = ["esp-bad-icv", "esp-fragment", "esp-replayed", "esp-unknown-spi"]
    assert gateway.run(*forged, port=WAN) == [f"drop {name}" for name in names]
    assert gateway.run(elsewhere, port=WAN)[0].startswith("punt"), "not for us: as any packet"
    assert tunnel.back.sequence == other.back.sequence == 69


def test_a_wrong_header_checksum(gateway: Gateway, tunnel: Tunnel) -> None:
    frame = tunnel.seal(1, tunnel.plain(inbound=True)[14:], checksum=0x1234)
    assert gateway.run(frame, port=WAN) == ["drop ipv4-checksum"]
    assert tunnel.back.sequence == 0


@every
def test_what_is_inside_is_checked_too(gateway: Gateway, tunnel: Tunnel) -> None:
    """Genuine packets of a peer that is not sound: their sequence numbers are used up."""
    inner = tunnel.plain(16, inbound=True)[14:]
    kind, other = (4, 41) if tunnel.inner == 4 else (41, 4)
    name = "ipv4" if tunnel.inner == 4 else "ipv6"
    strange = tunnel.plain(16, inbound=False)[14:]
    cases = [
        (inner, bytes([2, 1, 2, kind]), "drop esp-bad-padding"),
        (inner, bytes([1, 3, 2, kind]), "drop esp-bad-padding"),
        (b"", bytes([1, 2, 200, kind]), "drop esp-bad-padding"),
        (inner, bytes([1, 2, 2, 59]), "drop esp-dummy"),
        (inner, bytes([1, 2, 2, 17]), "drop esp-next-header"),
        (inner, bytes([1, 2, 2, other]), f"drop {'ipv6' if tunnel.inner == 4 else 'ipv4'}-version"),
        (inner[:24], bytes([1, 2, 2, kind]), f"drop {name}-truncated"),
        (b"", bytes([1, 2, 2, kind]), f"drop {name}-truncated"),
        (strange, bytes([1, 2, 2, kind]), "drop esp-selector"),
        (inner + bytes(100), bytes([1, 2, 2, kind]), "forward"),  # traffic flow confidentiality
        (inner, bytes(range(1, 227)) + bytes([226, kind]), "forward"),
    ]
    for number, (data, trailer, expected) in enumerate(cases, 1):
        frame = tunnel.seal(number, data, trailer=trailer)
        (outcome,) = gateway.run(frame, port=WAN)
        assert outcome == expected, (number, outcome)
        assert tunnel.back.sequence == number
        if outcome == "forward":
            assert outcome.frame[14:] == one_hop_on(tunnel.plain(16, inbound=True))


@pytest.mark.parametrize("tunnel", [0, 2, 4, 6], indirect=True)
def test_ecn_and_dscp(gateway: Gateway, tunnel: Tunnel) -> None:
    """RFC 6040, figure 4; the DSCP of the inner header stays."""
    table = ((0, 1, 2, 3), (0, 1, 1, 3), (0, 1, 2, 3), (None, 3, 3, 3))
    tos, number = ("tos" if tunnel.inner == 4 else "traffic_class"), 0
    outside = "tos" if tunnel.outer == 4 else "traffic_class"
    for outer, row in enumerate(table):
        for inner, expected in enumerate(row):
            number += 1
            plain = tunnel.plain(inbound=True, **{tos: 0x48 | inner})
            (outcome,) = gateway.run(tunnel.seal(number, plain[14:], **{outside: 0x90 | outer}), port=WAN)
            if expected is None:
                assert outcome == "drop esp-ecn"
            else:
                assert outcome.frame[14:] == one_hop_on(tunnel.plain(inbound=True, **{tos: 0x48 | expected}))


def test_garbage(gateway: Gateway) -> None:
    """Behind a header that is to us and, half of the time, an SPI that we know; with unreadable pages behind."""
    draw = random.Random(5)
    frames = []
    for n in range(800):
        tunnel = gateway.tunnels[n % len(WAYS)]
        spi = tunnel.back.spi.to_bytes(4) if n % 3 else draw.randbytes(4)
        frames.append(
            tunnel.outer_frame(spi + draw.randbytes(draw.choice((0, 3, 32, 60, 100, 4 * draw.randrange(400)))))
        )
    tops = [tunnel.back.sequence for tunnel in gateway.tunnels]
    outcomes = gateway.run(*frames, port=WAN, guard="end")
    assert {*outcomes} <= {
        f"drop esp-{why}" for why in ("truncated", "alignment", "unknown-spi", "replayed", "bad-icv")
    }
    assert [tunnel.back.sequence for tunnel in gateway.tunnels] == tops


# Ways out.


@one_of_each
def test_the_last_sequence_number_is_the_last(gateway: Gateway, tunnel: Tunnel) -> None:
    last = 0xFFFFFFFF_FFFFFFFF if tunnel.esn else 0xFFFFFFFF
    store64(tunnel.out.at + record.SEQUENCE, signed64(last - 1))
    assert (tunnel.out.remaining, tunnel.out.exhausted) == (1, False)
    outcomes = gateway.run(*[tunnel.plain()] * 3, port=LAN)
    assert outcomes == ["forward", "drop sa-exhausted", "drop sa-exhausted"]
    assert ip_of(outcomes[0].frame)[ESP].seq == 0xFFFFFFFF
    assert (tunnel.out.sequence, tunnel.out.remaining, tunnel.out.exhausted) == (last, 0, True)
    assert tunnel.out.counters["exhausted"] == 2
    store64(tunnel.out.at + record.SEQUENCE, 0)


@one_of_each
@pytest.mark.parametrize("guard", ["start", "end"])
def test_a_frame_without_room(gateway: Gateway, tunnel: Tunnel, guard: str) -> None:
    before = tunnel.out.sequence
    assert gateway.run(tunnel.plain(), port=LAN, guard=guard) == ["drop esp-no-room"]
    assert tunnel.out.sequence == before


def test_a_frame_longer_than_its_packet(gateway: Gateway, tunnel: Tunnel) -> None:
    (outcome,) = gateway.run(tunnel.plain(1, pad=60), port=LAN)
    peer = tunnel.scapy(inbound=False)
    assert bytes(peer.decrypt(ip_of(outcome.frame))) == one_hop_on(tunnel.plain(1))


@every
def test_time_exceeded_is_said_by_us(gateway: Gateway, tunnel: Tunnel) -> None:
    hops = {"ttl": 1} if tunnel.inner == 4 else {"hop_limit": 1}
    (outcome,) = gateway.run(tunnel.plain(**hops), port=LAN)
    assert (outcome, outcome.port) == ("forward", LAN)
    error = ip_of(outcome.frame)
    assert (error.src, error.dst) == (PORTS[tunnel.inner][LAN], tunnel.here_host)
    assert (error[ICMP].type == 11) if tunnel.inner == 4 else (ICMPv6TimeExceeded in error)


@every
def test_what_would_outgrow_the_way_is_answered(gateway: Gateway, tunnel: Tunnel) -> None:
    """With the most that fits; which then fits."""
    (outcome,) = gateway.run(tunnel.plain(1472 - 20 * (tunnel.inner == 6), dont_fragment=True)
                             if tunnel.inner == 4 else tunnel.plain(1472), port=LAN)  # fmt: skip
    assert (outcome, outcome.port) == ("forward", LAN)
    error = ip_of(outcome.frame)
    room = error[ICMP].nexthopmtu if tunnel.inner == 4 else error[ICMPv6PacketTooBig].mtu
    assert room == (1446 if tunnel.outer == 4 else 1426)
    headers = 28 if tunnel.inner == 4 else 48
    for size in (room, room + 1):
        frame = udp(bytes(size - headers), **tunnel.ends())
        (outcome,) = gateway.run(frame, port=LAN)
        assert (outcome, outcome.port) == ("forward", WAN if size == room else LAN)
        if size == room:
            assert 1496 <= len(outcome.frame) - 14 <= 1500


def test_a_packet_of_a_tunnel_hears_of_it_through_the_tunnel(gateway: Gateway, tunnel: Tunnel) -> None:
    """TTL, and a way out that is too narrow; by an address that the policy protects, or not at all."""
    peer, expired = tunnel.scapy(inbound=False), tunnel.plain(inbound=True, ttl=1)
    gateway.routes.set_address(LAN, bytes([10, 0, 5, 1]), b"")
    (outcome,) = gateway.run(tunnel.seal(1, expired[14:]), port=WAN)
    assert (outcome, outcome.port) == ("forward", WAN)
    error = peer.decrypt(ip_of(outcome.frame))
    assert (error.src, error.dst, error[ICMP].type) == ("10.0.5.1", tunnel.there_host, 11)
    gateway.routes.fib["10.0.0.7/32"] = gateway.narrow
    big = udp(bytes(1380), **tunnel.ends(inbound=True))
    (outcome,) = gateway.run(tunnel.seal(2, big[14:]), port=WAN)
    error = peer.decrypt(ip_of(outcome.frame))
    assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (3, 4, 1300)
    gateway.routes.set_address(LAN, bytes([10, 200, 5, 1]), b"")
    outcomes = gateway.run(tunnel.seal(3, expired[14:]), tunnel.seal(4, big[14:]), port=WAN)
    assert outcomes == ["drop esp-ttl", "drop esp-too-big"]
    del gateway.routes.fib["10.0.0.7/32"]
    gateway.routes.set_address(LAN, bytes([10, 0, 0, 1]), bytes.fromhex("20010db8001000000000000000000001"))


# Policies.


def test_policies_in_order(gateway: Gateway, tunnel: Tunnel) -> None:
    here, there = tunnel.here_host, tunnel.there_host
    gateway.reset(
        Policy("bypass", f"{here}/32", "10.100.9.0/24"),
        Policy("discard", "10.0.0.0/16", "10.100.8.0/24"),
    )
    gateway.routes.fib["10.100.9.0/24"] = 2
    frames = {
        udp(src=here, dst="10.100.9.1"): ("forward", WAN),
        udp(src="10.0.0.8", dst="10.100.9.1"): ("forward", WAN),  # protected
        udp(src=here, dst="10.100.8.1"): ("drop policy-discard", None),
        udp(src="10.100.8.1", dst=here): ("drop policy-discard", None),
        udp(src="10.100.9.1", dst=here): ("forward", LAN),
        udp(src=there, dst=here): ("drop policy-clear", None),
        udp(src="10.100.9.1", dst="10.0.0.8"): ("drop policy-clear", None),
        udp(src="10.50.0.1", dst="10.51.0.1"): ("forward", LAN),  # nobody's business
        udp(src=there, dst=PORTS[4][0]): ("punt local", None),  # Linux's
        udp(src=here, dst="224.0.0.251"): ("punt multicast", None),
        ethernet(bytes(50), 0x0806): ("punt not-ip", None),
    }
    outcomes = gateway.run(*frames, port=LAN)
    assert [(outcome, outcome.port) for outcome in outcomes] == list(frames.values())
    assert outcomes[0].frame[23] == 17
    assert outcomes[1].frame[23] == 50
    gateway.reset()
    del gateway.routes.fib["10.100.9.0/24"]


def test_an_inbound_packet_must_be_for_its_own_tunnel(gateway: Gateway) -> None:
    one, other = gateway.tunnels[0], gateway.tunnels[5]
    assert one.inner == other.inner == 4
    gateway.top(one, 0)
    assert gateway.run(one.seal(1, other.plain(inbound=True)[14:]), port=WAN) == ["drop esp-selector"]


def test_from_one_tunnel_into_another(gateway: Gateway) -> None:
    """A hub: what comes from one peer goes on to the other."""
    one, other = gateway.tunnels[0], gateway.tunnels[5]
    gateway.top(one, 0)
    gateway.reset(
        Policy("protect", "10.96.0.0/12", one.there, tunnel="t0"),
        Policy("protect", "10.96.0.0/12", other.there, tunnel="t5"),
    )
    inner = udp(b"on", src=one.there_host, dst=other.there_host)
    (outcome,) = gateway.run(one.seal(1, inner[14:]), port=WAN)
    assert (outcome, outcome.port) == ("forward", WAN)
    peer = other.scapy(inbound=False)
    peer.esn = other.out.sequence >> 32
    found = peer.decrypt(ip_of(outcome.frame))
    assert bytes(found) == one_hop_on(inner)
    gateway.reset()


def test_unsound_packets_are_not_encrypted(gateway: Gateway, tunnel: Tunnel) -> None:
    before = tunnel.out.sequence
    ends = tunnel.ends()
    frames = [
        udp(checksum=1, **ends),
        udp(options=b"\1\1\1\1", **ends),
        icmp_echo(src=tunnel.here_host, dst=tunnel.there_host, ttl=0),
    ]
    outcomes = gateway.run(*frames, port=LAN)
    assert outcomes[:2] == ["drop ipv4-checksum", "drop ip-options"]
    assert (outcomes[2], outcomes[2].port) == ("forward", LAN), "time exceeded"
    gateway.routes.set_port(WAN, rp_filter=1)
    assert gateway.run(udp(**ends), port=WAN) == ["punt rp-filter"], "nobody outside has things sent through the tunnel"
    gateway.routes.set_port(WAN, rp_filter=0)
    assert tunnel.out.sequence == before


def test_removing_an_sa(gateway: Gateway) -> None:
    gateway.policies.load(
        [*gateway.policies.policies, Policy("protect", "10.77.0.0/16", "10.78.0.0/16", tunnel="gone")]
    )
    plain = udp(src="10.77.0.1", dst="10.78.0.1")
    assert gateway.run(plain, port=LAN) == ["drop no-sa"]
    sa = Sa("gone", "out", spi=0x9999, local=OWN[4], remote=PEER[4], key=bytes(20))
    gateway.sas.add(sa)
    assert gateway.run(plain, port=LAN) == ["forward"]
    gateway.sas.remove(sa)
    assert gateway.run(plain, port=LAN) == ["drop no-sa"]
    gateway.reset()


class TwoWorkers:
    """Stepped by hand, with a memory port of two queues on either side."""

    def __init__(self, gateway: Gateway) -> None:
        self.crew, self.step = Crew(2), gateway.pipeline.module().step
        self.ports = [MemoryPort(f"p{n}", ring_size=256) for n in range(2)]
        self.statistics = [Arena(1 << 16) for _ in range(2)]
        self.states = [
            WorkerState(gateway.pipeline, MemoryPort.open_all, self.ports, n, self.statistics[n].address,
                        workers=2, crew=self.crew) for n in range(2)
        ]  # fmt: skip
        for state in self.states:
            self.step(*state.direct_arguments())
            assert state.member is not None
            state.member.takes(True)

    def turn(self, worker: int) -> int:
        return int(self.step(*self.states[worker].direct_arguments()))

    def settle(self) -> None:
        while self.turn(0) + self.turn(1):
            pass

    def close(self) -> None:
        for state in self.states:
            state.close()
        self.crew.close()


@pytest.fixture
def two(gateway: Gateway) -> Iterator[TwoWorkers]:
    two = TwoWorkers(gateway)
    yield two
    two.close()


def test_each_sa_has_its_worker(gateway: Gateway, two: TwoWorkers) -> None:
    """Packets of all tunnels on both, forwarded as from one; nothing out of order."""
    before = [tunnel.out.sequence for tunnel in gateway.tunnels]
    for tunnel in gateway.tunnels:
        gateway.top(tunnel, 0)
    for worker in range(2):
        assert len(two.ports[LAN].inject([tunnel.plain() for tunnel in gateway.tunnels], worker)) == len(WAYS)
        sealed = [tunnel.seal(1 + worker, tunnel.plain(inbound=True)[14:]) for tunnel in gateway.tunnels]
        assert len(two.ports[WAN].inject(sealed, worker)) == len(WAYS)
    two.settle()
    for worker in range(2):
        assert len(two.ports[LAN].collect(worker)) == len(two.ports[WAN].collect(worker)) == len(WAYS)
    assert [tunnel.out.sequence for tunnel in gateway.tunnels] == [one + 2 for one in before]
    assert [tunnel.back.sequence for tunnel in gateway.tunnels] == [2] * len(WAYS)


def test_packets_on_their_way_to_an_sa_that_goes(gateway: Gateway, two: TwoWorkers) -> None:
    """They are neither sent in clear nor by another SA, not even one that has its place."""
    gateway.policies.load([Policy("protect", "10.77.0.0/16", "10.78.0.0/16", tunnel="brief")])
    plain = udp(src="10.77.0.1", dst="10.78.0.1")
    made = [
        Sa("brief", "out", spi=0x9000 + n, local=OWN[4], remote=PEER[4], key=bytes([200 + n] * 20)) for n in range(4)
    ]
    for old, new in zip(made[:2], made[2:], strict=True):
        gateway.sas.add(old)
        for worker in range(2):
            assert len(two.ports[LAN].inject([plain] * 3, worker)) == 3
        two.turn(0)  # its own are sent, or all are handed to the other one
        first = sum(len(two.ports[WAN].collect(worker)) for worker in range(2))
        at = old.at
        gateway.sas.remove(old)
        for part in gateway.sas._turns.parts:  # as if all had turned, and it had been waiting for longer
            store64(part.view, load64(part.view) + 2)
        gateway.sas.add(new)
        assert new.at == at
        for worker in range(2):
            two.turn(worker)
        frames = [data for worker in range(2) for data in two.ports[WAN].collect(worker)]
        two.settle()
        frames += [data for worker in range(2) for data in two.ports[WAN].collect(worker)]
        # those handed off before are gone; those that worker 1 had not looked at are the new one's
        assert {ip_of(bytes(one))[ESP].spi for one in frames} <= {new.spi}
        assert len(frames) == 3
        assert first in (0, 3)
        assert new.sequence == 3
        gateway.sas.remove(new)
    gateway.reset()
