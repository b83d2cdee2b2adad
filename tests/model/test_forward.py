"""Whatever arrives, the router does with it what the oracle says; headers are read as scapy reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from libfp import Pipeline, stage
from libfp.jit import store8, store16be, store32be
from libfp.stages import Forward, Punt, Routes, forward, parse, rewrite, route
from libfp.testing import ethernet, ipv4, ipv6

pytestmark = pytest.mark.timeout(300)  # compiling takes long on a busy machine

Oracle = Callable[[bytes], tuple[str, bytes]]

address = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.sampled_from(["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.5", "239.255.255.255", "240.0.0.1", "255.255.255.255",
                     "255.255.255.254", "223.255.255.255", "128.0.0.0", "126.255.255.255", "1.0.0.0"]),
)  # fmt: skip


@st.composite
def packets(draw: Any) -> bytes:
    """IPv4 packets with any one thing wrong, or nothing; cut, padded, or with bytes changed."""
    fields: dict[str, Any] = {
        "src": draw(address),
        "dst": draw(address),
        "ttl": draw(st.one_of(st.sampled_from([0, 1, 2, 64, 255]), st.integers(0, 255))),
        "tos": draw(st.integers(0, 255)),
        "identification": draw(st.integers(0, 65535)),
        "dont_fragment": draw(st.booleans()),
        "options": draw(st.sampled_from([b"", b"", b"\1" * 4, b"\1" * 40])),
    }
    for name, values in (
        ("version", st.integers(0, 15)),
        ("header_words", st.integers(0, 15)),
        ("total_length", st.integers(0, 65535)),
        ("checksum", st.integers(0, 65535)),
    ):
        if draw(st.integers(0, 9)) == 0:
            fields[name] = draw(values)
    payload = bytes(draw(st.sampled_from([0, 1, 26, 1480, 1481, 2000])))
    frame = ipv4(payload, **fields)
    change = draw(st.integers(0, 5))
    if change == 0:
        frame = frame[: draw(st.integers(0, len(frame)))]
    elif change == 1:
        frame += bytes(draw(st.integers(0, 60)))
    elif change == 2:
        at = draw(st.integers(0, min(len(frame) - 1, 40)))
        frame = frame[:at] + bytes([draw(st.integers(0, 255))]) + frame[at + 1 :]
    return frame


address6 = st.one_of(
    st.ip_addresses(v=6).map(str),
    st.sampled_from(["::", "::1", "::2", "::ffff:192.0.2.1", "64:ff9b::1", "fe7f::1", "fe80::1", "febf::1", "fec0::1",
                     "fc00::1", "ff00::", "ff02::1", "feff::1", "100::1", "2001:db8::1"]),
)  # fmt: skip


@st.composite
def packets6(draw: Any) -> bytes:
    """IPv6 packets with any one thing wrong, or nothing; cut, padded, or with bytes changed."""
    fields: dict[str, Any] = {
        "src": draw(address6),
        "dst": draw(address6),
        "hop_limit": draw(st.one_of(st.sampled_from([0, 1, 2, 64, 255]), st.integers(0, 255))),
        "next_header": draw(st.sampled_from([0, 6, 17, 44, 58, 59])),
        "flow_label": draw(st.integers(0, 0xFFFFF)),
        "traffic_class": draw(st.integers(0, 255)),
    }
    for name, values in (("version", st.integers(0, 15)), ("payload_length", st.integers(0, 65535))):
        if draw(st.integers(0, 9)) == 0:
            fields[name] = draw(values)
    frame = ipv6(bytes(draw(st.sampled_from([0, 1, 26, 1460, 1461, 2000]))), **fields)
    change = draw(st.integers(0, 4))
    if change == 0:
        frame = frame[: draw(st.integers(0, len(frame)))]
    elif change == 1:
        frame += bytes(draw(st.integers(0, 60)))
    return frame


@pytest.fixture(scope="module")
def router() -> Pipeline:
    routes = Routes(routes=1000, next_hops=16)
    hop = Forward(1, bytes.fromhex("020000000b02"), bytes.fromhex("020000000b01"), 1500)
    routes.fib["0.0.0.0/0"] = routes.fib6["::/0"] = routes.next_hops.add(hop)
    return Pipeline(parse, forward(routes))


@pytest.fixture(scope="module")
def halves(router: Pipeline) -> Pipeline:
    """The same in two stages, over the same tables."""
    (routes,) = router.stages[1].arguments
    return Pipeline(parse, route(routes), rewrite(routes))


@pytest.mark.parametrize("guard", ["end", "start"])
@pytest.mark.parametrize("made", ["router", "halves"])
def test_router_and_oracle_agree(made: str, oracle: Oracle, guard: Any, request: pytest.FixtureRequest) -> None:
    router, seen = request.getfixturevalue(made), set()

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(st.lists(st.one_of(packets(), packets6(), st.binary(max_size=100)), min_size=1, max_size=20))
    def agree(frames: list[bytes]) -> None:
        known = {frame: oracle(frame) for frame in frames}
        frames *= 8  # whole vectors of each, and a rest
        for frame, outcome in zip(frames, router.run_once(frames, guard=guard), strict=True):
            expected, after = known[frame]
            assert (outcome, outcome.frame) == (expected, after)
            assert (outcome.port, outcome.next_hop) == ((1, 1) if expected == "forward" else (None, outcome.next_hop))
            seen.add(expected)

    agree()
    assert {"forward", "drop ipv4-checksum", "punt ttl-expired", "drop ipv4-version", "punt not-ip"} <= seen
    assert {"drop ipv6-truncated", "drop ipv6-version", "punt link-local", "drop martian-source"} <= seen


@stage
def copy_out(packet: Any) -> None:
    """Write what the packet's views say over its Ethernet header and far into its payload."""
    if not packet.is_ipv4:
        return
    ip, at = packet.ipv4, packet.data + 200
    store32be(at, ip.src)
    store32be(at + 4, ip.dst)
    store16be(at + 8, ip.identification)
    store16be(at + 10, ip.total_length)
    store16be(at + 12, ip.fragment_offset)
    store16be(at + 14, ip.checksum)
    store8(at + 16, ip.ttl)
    store8(at + 17, ip.protocol)
    store8(at + 18, ip.tos)
    store8(at + 19, ip.header_length)
    store8(at + 20, ip.dont_fragment)
    store8(at + 21, ip.is_fragment)
    if packet.is_udp:
        store16be(at + 22, packet.udp.sport)
        store16be(at + 24, packet.udp.dport)
        store16be(at + 26, packet.udp.length)
        store16be(at + 28, packet.udp.checksum)
    if packet.is_tcp:
        store16be(at + 22, packet.tcp.sport)
        store16be(at + 24, packet.tcp.dport)
        store32be(at + 26, packet.tcp.sequence)
        store32be(at + 30, packet.tcp.acknowledgement)
        store8(at + 34, packet.tcp.flags)
    store16be(at + 36, packet.ethernet.type)
    store32be(at + 38, packet.ethernet.src)
    store32be(at + 42, packet.ethernet.dst >> 16)


def test_views_read_what_scapy_reads() -> None:
    pipeline = Pipeline(parse, copy_out)

    @settings(max_examples=200, deadline=None)
    @given(
        st.binary(min_size=54, max_size=54),
        st.sampled_from([6, 17, 1]),
        st.sampled_from([5, 6, 15]),
        st.integers(0, 3),
    )
    def agree(content: bytes, protocol: int, words: int, flags: int) -> None:
        header = bytearray(content[:20])
        header[0], header[9] = 0x40 + words, protocol
        header[2:4] = struct.pack("!H", 400)
        header[6:8] = bytes([flags << 5, 0])
        frame = content[34:46] + b"\x08\x00" + bytes(header) + bytes(4 * (words - 5)) + content[20:] * 12
        frame = frame[:414].ljust(414, b"x")
        (outcome,) = pipeline.run_once([frame])
        packet, told = Ether(frame), outcome.frame[200:]
        ip = packet[IP]
        expected = struct.pack(
            "!4s4sHHHHBBBBBB",
            bytes(map(int, ip.src.split("."))), bytes(map(int, ip.dst.split("."))), ip.id, ip.len, 8 * ip.frag,
            ip.chksum, ip.ttl, ip.proto, ip.tos, 4 * ip.ihl, ip.flags.DF, bool(ip.flags.MF or ip.frag),
        )  # fmt: skip
        assert told[:22] == expected
        if UDP in packet:
            udp = packet[UDP]
            assert told[22:30] == struct.pack("!HHHH", udp.sport, udp.dport, udp.len, udp.chksum)
        elif TCP in packet:
            tcp = packet[TCP]
            flags_seen = int(tcp.flags) & 0xFF
            assert told[22:35] == struct.pack("!HHIIB", tcp.sport, tcp.dport, tcp.seq, tcp.ack, flags_seen)
        source, destination = (bytes.fromhex(mac.replace(":", "")) for mac in (packet.src, packet.dst))
        assert told[36:46] == b"\x08\x00" + source[2:] + destination[:4]

    agree()


def test_longest_match_and_actions(router: Pipeline) -> None:
    """Not only the default route: what each kind of next hop does, and none."""
    from libfp.stages import Drop

    routes = Routes(routes=1000, next_hops=16)
    add = routes.next_hops.add
    routes.fib["198.51.100.0/24"] = add(Forward(0, b"a" * 6, b"b" * 6, 1500))
    routes.fib["198.51.100.128/25"] = add(Forward(1, b"c" * 6, b"d" * 6, 576))
    routes.fib["198.51.100.129/32"] = add(Punt("no-neighbour"))
    routes.fib["203.0.113.0/24"] = add(Drop("blackhole"))
    pipeline = Pipeline(parse, forward(routes))
    frames = [ipv4(dst=one) for one in ("198.51.100.1", "198.51.100.128", "198.51.100.129", "203.0.113.9", "192.0.2.1")]
    frames += [ipv4(bytes(size), dst="198.51.100.130") for size in (556, 557)]
    outcomes = pipeline.run_once(frames)
    assert outcomes == [
        "forward", "forward", "punt no-neighbour", "drop blackhole", "punt no-route", "forward", "punt fragment-needed",
    ]  # fmt: skip
    assert [one.port for one in outcomes[:2]] == [0, 1]
    assert outcomes[0].frame[:14] == b"a" * 6 + b"b" * 6 + b"\x08\x00"
    assert outcomes[2].frame == frames[2]
    assert [one.next_hop for one in outcomes] == [1, 2, 3, 4, 0, 2, 2]
    assert ethernet(b"", 0x86DD) == pipeline.run_once([ethernet(b"", 0x86DD)])[0].frame


def test_ipv6_longest_match_and_actions_in_mixed_bursts() -> None:
    """IPv6 packets between IPv4 ones; one that would leave the way it came is Linux's."""
    from libfp.stages import Drop

    routes = Routes(routes=1000, next_hops=16)
    add = routes.next_hops.add
    routes.fib6["2001:db8::/32"] = add(Forward(2, b"a" * 6, b"b" * 6, 1500))
    routes.fib6["2001:db8:1::/48"] = add(Forward(1, b"c" * 6, b"d" * 6, 1280))
    routes.fib6["2001:db8:1::7/128"] = add(Punt("no-neighbour"))
    routes.fib6["2001:db8:dead::/48"] = add(Drop("blackhole"))
    routes.fib6["2001:db8:2::/48"] = add(Forward(0, b"e" * 6, b"f" * 6, 1500))
    routes.fib["192.0.2.0/24"] = add(Forward(1, b"4" * 6, b"f" * 6, 1500))
    pipeline = Pipeline(parse, forward(routes))
    expected = {
        "2001:db8::1": ("forward", 1), "2001:db8:1::6": ("forward", 2), "2001:db8:1::7": ("punt no-neighbour", 3),
        "2001:db8:dead::1": ("drop blackhole", 4), "2001:db8:2::1": ("punt redirect", 5),
        "2001:db9::1": ("punt no-route", 0),
    }  # fmt: skip
    frames, wanted = [], []
    for name, what in expected.items():
        frames += [ipv6(dst=name), ipv4(dst="192.0.2.9")]
        wanted += [what, ("forward", 6)]
    outcomes = pipeline.run_once(frames, ports=3)
    assert [(str(one), one.next_hop) for one in outcomes] == wanted
    assert outcomes[2].frame[:22] == b"c" * 6 + b"d" * 6 + frames[2][12:21] + b"\x3f"
    assert outcomes[4].frame == frames[4]
    large = [ipv6(bytes(size), dst="2001:db8:1::8") for size in (1240, 1241)]
    assert pipeline.run_once(large, ports=3) == ["forward", "punt fragment-needed"]
    assert pipeline.run_once([ipv6(dst="2001:db8::1", next_header=0)], ports=3) == ["punt ip-options"]


@stage
def deny_hosts(packet: Any, hosts: Any) -> None:
    if packet.is_ipv6 and packet.ipv6.src in hosts:
        packet.drop("denied")
    if packet.is_udp and packet.udp.dport == 53 and packet.is_ipv6 and packet.ipv6.hop_limit == 7:
        packet.drop("dns")
    if packet.is_icmpv6 and packet.icmp.type == 128 and packet.ipv6.flow_label == 0xABCDE:
        packet.drop("ping")


def test_stages_read_ipv6_headers() -> None:
    from libfp.tables import Hash
    from libfp.testing import udp

    hosts = Hash(key="ipv6", capacity=16)
    pipeline = Pipeline(parse, deny_hosts(hosts))
    hosts["2001:db8::bad"] = True
    frames = [
        ipv6(src="2001:db8::bad"),
        ipv6(src="2001:db8::900d"),
        udp(dport=53, src="2001:db8::1", dst="2001:db8::2", hop_limit=7),
        udp(dport=53, src="2001:db8::1", dst="2001:db8::2", hop_limit=8),
        udp(dport=53, ttl=7),
        ipv6(b"\x80" + bytes(7), next_header=58, flow_label=0xABCDE),
        ipv6(b"\x80" + bytes(6), next_header=58, flow_label=0xABCDE),
    ]
    expected = ["drop denied", "pass", "drop dns", "pass", "pass", "drop ping", "pass"]
    assert [str(one).replace("punt undecided", "pass") for one in pipeline.run_once(frames)] == expected


def test_a_source_that_is_our_own_is_found_in_any_burst() -> None:
    routes = Routes(routes=1000, next_hops=16)
    routes.fib["0.0.0.0/0"] = routes.next_hops.add(Forward(1, b"a" * 6, b"b" * 6, 1500))
    routes.fib["192.0.2.1/32"] = routes.next_hops.add(Punt("local"))
    routes.set_local([(0xC0000201, 32)])
    pipeline = Pipeline(parse, forward(routes))
    for count in (1, 7, 8, 9, 17):
        outcomes = pipeline.run_once([ipv4(src="192.0.2.1"), ipv4(src="192.0.2.2")] * count)
        assert outcomes == ["drop martian-source", "forward"] * count
