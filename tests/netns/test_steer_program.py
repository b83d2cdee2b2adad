"""The steering program run by the kernel on single frames (BPF_PROG_TEST_RUN), against its rules written in Python."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import itertools
import socket
import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from libfp.pyxdp import LocalAddresses, bpf, emit, program
from libfp.pyxdp.filters import parse_filter
from libfp.pyxdp.local import PrefixSet
from libfp.testing.netns import Lab

PASS, REDIRECT = 2, 4
AF_XDP = 44
MAC, LIMIT = bytes.fromhex("020000000001"), 120
MARKER = bytes.fromhex("a1a2a3a4a5a6b1b2b3b4b5b688b5")
LOCALS = ["10.0.1.1", "10.9.0.0/16", "2001:db8:1::1", "2001:db8:9::/48"]
CANARY = ["203.0.113.0/24", "2001:db8:2::/48"]
FILTERS = [
    ["ip"],
    ["ip6"],
    ["udp dport 4789"],
    ["ip and udp sport 100-200", "ip6 and tcp dport 7"],
    ["src 10.0.0.0/8 and dst 203.0.113.0/24", "src 2001:db8::/32 and dst 2001:db8:2::2", "proto icmp6"],
    ["dst 239.1.1.1", "dst ff02::/16", "src fe80::/10 and udp sport 1-65535 dport 546"],
]

TAKES = [
    ["proto esp and dst 10.0.1.1"],
    ["proto esp and dst 10.0.1.1", "proto esp and dst 2001:db8:1::1", "udp dport 67"],
    ["ip6", "proto icmp6"],
]


class Loaded:
    """A steering program with its maps, and an AF_XDP socket (bound to nothing) at queue 0."""

    def __init__(self, text: str, stack: contextlib.ExitStack) -> None:
        hold = stack.enter_context
        sockets = hold(bpf.Map(bpf.XSKMAP, 4, 4, 1, "sockets"))
        xsk = hold(socket.socket(AF_XDP, socket.SOCK_RAW, 0))
        sockets[bytes(4)] = struct.pack("=I", xsk.fileno())
        self.configuration = hold(bpf.Map(bpf.ARRAY, 4, program.CONFIG_SIZE, 1, "config"))
        local, only = hold(LocalAddresses(LOCALS)), hold(PrefixSet(CANARY))
        maps = [self.configuration, sockets, local.map, only.map, local.map6, only.map6]
        code = emit.link(emit.compile_bpf(text), [one.fd for one in maps])
        self.program = hold(bpf.Program(code, "libfp_steer"))

    def __call__(self, frame: bytes, families: tuple[str, ...] = ("ipv4", "ipv6"), marker: bytes = b"") -> int:
        self.configuration[bytes(4)] = program.config(MAC, LIMIT, families, marker)
        action, out = self.program.run(frame)
        assert out == frame
        return action


@pytest.fixture(scope="module")
def load():
    with Lab() as lab, contextlib.ExitStack() as stack, lab.host("steer").enter():
        yield functools.cache(lambda text: Loaded(text, stack))


# -- the rules


def covered(address: bytes, prefixes: list[str]) -> bool:
    one = ipaddress.ip_address(address)
    return any(one in ipaddress.ip_network(prefix) for prefix in prefixes if (":" in prefix) == (one.version == 6))


def routed(frame: bytes, families: tuple[str, ...], only: bool) -> bool:
    if not 34 <= len(frame) <= LIMIT or frame[:6] != MAC:
        return False
    if frame[12:14] == b"\x08\0" and "ipv4" in families:
        src, dst, at = frame[26:30], frame[30:34], 14 + (frame[14] & 15) * 4
        if 224 <= dst[0] < 240 or dst == b"\xff" * 4 or b"\xa9\xfe" in (src[:2], dst[:2]):
            return False
        first = struct.unpack_from("!H", frame, 20)[0] & 0x1FFF == 0
        if (
            frame[23] == 17
            and first
            and at + 4 <= len(frame)
            and struct.unpack_from("!H", frame, at + 2)[0] in (67, 68)
        ):
            return False
    elif frame[12:14] == b"\x86\xdd" and "ipv6" in families and len(frame) >= 54:
        src, dst, payload = frame[22:38], frame[38:54], frame[54:]
        length, following, hops = struct.unpack_from("!HBB", frame, 18)
        if length > len(payload) or following == 0:
            return False
        for one in (src, dst):
            address = ipaddress.IPv6Address(one)
            if address.is_multicast or address.is_link_local or address in ipaddress.ip_network("::/64"):
                return False
        if (following, hops) == (58, 255) and payload and payload[0] in range(133, 138):
            return False
        if following == 17 and len(payload) >= 4 and struct.unpack_from("!H", payload, 2)[0] in (546, 547):
            return False
    else:
        return False
    return not covered(dst, LOCALS) and (not only or covered(dst, CANARY))


def let_in(frame: bytes, families: tuple[str, ...], filters: list[str]) -> bool:
    if not 34 <= len(frame) <= LIMIT:
        return False
    if frame[12:14] == b"\x08\0" and "ipv4" in families and 69 <= frame[14] <= 79:
        family, protocol, src, dst = 4, frame[23], frame[26:30], frame[30:34]
        payload = frame[14 + (frame[14] & 15) * 4 :]
        whole, discovery = struct.unpack_from("!H", frame, 20)[0] & 0x3FFF == 0, False
    elif frame[12:14] == b"\x86\xdd" and "ipv6" in families and len(frame) >= 54 and frame[14] >> 4 == 6:
        length, protocol, hops = struct.unpack_from("!HBB", frame, 18)
        family, src, dst, payload, whole = 6, frame[22:38], frame[38:54], frame[54:], True
        if length > len(payload):
            return False
        discovery = (protocol, hops) == (58, 255) and payload[:1] in map(bytes, ([n] for n in range(133, 138)))
    else:
        return False

    def takes(text: str) -> bool:
        one = parse_filter(text)
        if one.family not in (None, family) or one.protocol not in (None, protocol):
            return False
        if not frame[0] & 1 if one.group else frame[:6] != MAC:
            return False
        if discovery and one.protocol is None:
            return False
        for address, prefix in ((src, one.src), (dst, one.dst)):
            if prefix is not None and ipaddress.ip_address(address) not in prefix:
                return False
        for at, ports in ((0, one.sport), (2, one.dport)):
            if ports is not None and not (
                whole and len(payload) >= 4 and ports[0] <= struct.unpack_from("!H", payload, at)[0] <= ports[1]
            ):
                return False
        return True

    return any(map(takes, filters))


# -- frames near the rules' edges

ports = st.sampled_from([7, 9, 67, 68, 100, 150, 200, 201, 545, 546, 547, 548, 4789])
IPV4 = """
    10.0.1.1 10.0.1.2 10.9.255.255 10.10.0.0 203.0.113.7 203.0.114.7 223.255.255.255 224.0.0.1 239.1.1.1
    239.255.255.255 240.0.0.1 255.255.255.254 255.255.255.255 169.253.1.1 169.254.1.1 169.255.0.0 0.0.0.0
"""
IPV6 = """
    2001:db8:1::1 2001:db8:1::2 2001:db8:2::2 2001:db8:2:ffff:ffff:ffff:ffff:ffff 2001:db8:3:: 2001:db8:9:1::1
    2001:db9::1 :: ::1 ::2 ::ffff:10.0.1.1 0:0:0:1:: fe7f::1 fe80::1 febf::1 fec0::1 fe00::1 ff00:: ff02::5 ff0e::1
    feff::1 80fe::1 64:ff9b::1 fd00::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""


def often(usual, *rare):
    """One of `rare` now and then: a frame with many faults at once tells little."""
    return st.sampled_from([usual] * (3 * len(rare)) + list(rare))


addresses4 = often(*[ipaddress.ip_address(text).packed for text in ("203.0.113.5", *IPV4.split())])
addresses6 = often(*[ipaddress.ip_address(text).packed for text in ("2001:db8:2::7", *IPV6.split())])


@st.composite
def transports(draw) -> tuple[int, bytes]:
    kind = draw(st.sampled_from(["udp", "tcp", "icmp6", "other"]))
    rest = draw(st.binary(max_size=12))
    if kind == "icmp6":
        return 58, bytes([draw(st.sampled_from([1, 128, 132, 133, 134, 135, 136, 137, 138]))]) + rest
    if kind == "other":
        return draw(st.sampled_from([0, 1, 43, 44, 50, 59, 60, 253])), rest
    if kind == "udp" and draw(often(False, True)):
        return 17, rest[:4]
    return 17 if kind == "udp" else 6, struct.pack("!HH", draw(ports), draw(ports)) + rest


@st.composite
def frames(draw) -> bytes:
    protocol, payload = draw(transports())
    if draw(st.booleans()):
        words = draw(often(5, 6, 15, 4, 0))
        version = draw(often(4, 5, 6))
        fragment = draw(often(0, 0x4000, 0x2000, 1, 0x1FFF))
        length = 20 + len(payload) + draw(st.sampled_from([0, 0, 1, -1]))
        header = struct.pack("!BBHHHBBH", version << 4 | words, 0, length, 0, fragment, 64, protocol, 0)
        packet = header + draw(addresses4) + draw(addresses4) + bytes(4 * max(0, words - 5)) + payload
        kind = 0x0800
    else:
        version = draw(often(6, 4, 7))
        length = max(0, len(payload) + draw(often(0, 1, -1, 65000)))
        header = struct.pack("!IHBB", version << 28, length, protocol, draw(often(255, 64, 1, 0)))
        packet = header + draw(addresses6) + draw(addresses6) + payload
        kind = 0x86DD
    kind = draw(often(kind, 0x0806, 0x8100, 0x88A8, 0x8847))
    mac = draw(often(MAC, MAC[:5] + b"\2", b"\3" + MAC[1:], b"\xff" * 6, b"\x33\x33\0\0\0\1"))
    frame = mac + bytes(6) + struct.pack("!H", kind) + packet
    cut = draw(often(None, -1, -4, 54, 34, 33, 53, 58, 57, 55))
    pad = draw(often(0, 60, LIMIT, LIMIT + 1))
    return frame[:cut].ljust(pad, b"\0") if cut is None or len(frame[:cut]) >= 14 else frame


ESP_TO_US = bytes.fromhex("0800 45000028000000004032 0000 cb007105 0a000101") + bytes(20)
families_taken = often(("ipv4", "ipv6"), (), ("ipv4",), ("ipv6",))
many = settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(frame=frames(), families=families_taken, only=st.booleans(), generic=st.booleans())
@example(MAC + bytes(6) + b"\x86\xdd", ("ipv6",), False, False)
def test_the_router_follows_its_rules(load, frame, families, only, generic):
    steer = load(program.router(generic=generic, only=only))
    expected = REDIRECT if routed(frame, families, only) else PASS
    assert steer(frame, families, MARKER) == expected, frame.hex()


@many
@given(frame=frames(), families=families_taken, only=st.booleans(), take=st.sampled_from(TAKES), generic=st.booleans())
@example(MAC + bytes(6) + ESP_TO_US, ("ipv4",), True, TAKES[0], False)
@example(MAC + bytes(6) + ESP_TO_US, ("ipv6",), False, TAKES[0], False)
def test_the_router_takes_more(load, frame, families, only, take, generic):
    steer = load(program.router(generic=generic, only=only, take=[parse_filter(text) for text in take]))
    expected = REDIRECT if routed(frame, families, only) or let_in(frame, families, take) else PASS
    assert steer(frame, families, MARKER) == expected, frame.hex()


@many
@given(frame=frames(), families=families_taken, filters=st.sampled_from(FILTERS), generic=st.booleans())
def test_a_pinhole_follows_its_rules(load, frame, families, filters, generic):
    steer = load(program.pinhole([parse_filter(text) for text in filters], generic=generic))
    expected = REDIRECT if let_in(frame, families, filters) else PASS
    assert steer(frame, families, MARKER) == expected, frame.hex()


@many
@given(frame=st.binary(min_size=14, max_size=200), kind=st.sampled_from([b"\x08\0", b"\x86\xdd"]), only=st.booleans())
def test_any_bytes_at_all(load, frame, kind, only):
    frame = MAC + frame[6:12] + kind + frame[14:]
    both = ("ipv4", "ipv6")
    assert (load(program.router(generic=False, only=only))(frame) == REDIRECT) == routed(frame, both, only)
    for filters in FILTERS:
        steer = load(program.pinhole([parse_filter(text) for text in filters], generic=False))
        assert (steer(frame) == REDIRECT) == let_in(frame, both, filters), filters


# -- what the verifier accepts

PARTS = [
    "ip",
    "ip6",
    "udp",
    "udp dport 1-65535",
    "tcp sport 0 dport 65535",
    "proto icmp6",
    "src 0.0.0.0/0",
    "src ::/0",
    "dst 10.0.0.0/9",
    "dst 2001:db8::/64",
    "dst 2001:db8::/33 and src 2001:db8::1",
    "dst ff02::1 and udp dport 546",
    "dst 239.0.0.0/8 and udp sport 546",
]


@pytest.mark.parametrize("generic", [False, True])
def test_the_verifier_accepts_every_combination(load, generic):
    for only, take in itertools.product((False, True), ([], *TAKES, *((one,) for one in PARTS), PARTS)):
        load(program.router(generic=generic, only=only, take=[parse_filter(text) for text in take]))
    for filters in [*((one,) for one in PARTS), *itertools.combinations(PARTS, 2), tuple(PARTS)]:
        load(program.pinhole([parse_filter(text) for text in filters], generic=generic))


def test_the_mark_of_a_reinjected_frame_comes_off(load):
    steer = load(program.router(generic=True, only=False))
    steer.configuration[bytes(4)] = program.config(MAC, LIMIT, ("ipv4", "ipv6"), MARKER)
    for kind in (0x0800, 0x86DD, 0x0806):
        frame = MAC + bytes(6) + struct.pack("!H", kind) + b"\x60" + bytes(60)
        assert steer.program.run(MARKER + frame) == (PASS, frame)
