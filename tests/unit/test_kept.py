"""Packets that Linux must never get, that change size, or that are made here: what stages do, and `forward` with it."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, IPerror
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPerror6, IPv6
from scapy.layers.l2 import Ether

from libfp import Pipeline, stage
from libfp.jit import load8, store8
from libfp.packet.burst import Burst
from libfp.stages import Forward, Punt, Routes, parse, parse_again, rewrite, route
from libfp.stages.icmp import icmp_error
from libfp.stages.routes import RoutesView
from libfp.testing.packets import icmp_echo, ipv4, ipv6, udp
from libfp.testing.packets import icmp_error as an_error

OWN, PEER = "02:00:00:00:00:01", "02:00:00:00:00:02"
PORT4, PORT6 = "192.0.2.1", "2001:db8::1"
TTL, TOO_BIG, NOTHING, KEEP, MADE, PREPEND, ADJ, APPEND, TRIM, BOTH_WAYS = range(10, 20)


@stage.burst
def alter(burst: Burst, routes: RoutesView) -> None:
    """What the last byte of a packet's Ethernet destination says; how much, the last but one."""
    for i in range(burst.count):
        packet, what = burst.packet(i), load8(burst.data(i) + 5)
        n = load8(burst.data(i) + 4)
        n = -1 if n == 255 else n * 8
        done = True
        if what == TTL:
            done = icmp_error(burst, i, routes, 3 if packet.is_ipv6 else 11, 0, 0)
        elif what == TOO_BIG:
            done = icmp_error(burst, i, routes, 2 if packet.is_ipv6 else 3, 0 if packet.is_ipv6 else 4, 1400)
        elif what == KEEP:
            packet.keep()
        elif what == MADE:
            packet.made()
        elif what == PREPEND:
            done = packet.prepend(n)
        elif what == ADJ:
            done = packet.adj(n)
        elif what == APPEND:
            done = packet.append(n)
        elif what == TRIM:
            done = packet.trim(n)
        elif what == BOTH_WAYS:  # a header in front, as of a tunnel, and off again
            packet.keep()
            done = packet.prepend(20) and packet.adj(20)
            parse_again(burst, i)
        if not done:
            packet.drop("no-room")
        elif what in (PREPEND, ADJ, APPEND, TRIM):
            for at in range(packet.length):
                store8(packet.data + at, load8(packet.data + at))  # every byte of it is ours
            packet.forward(0)


@pytest.fixture(scope="module")
def routes() -> Routes:
    routes = Routes(routes=1000, next_hops=64)
    hops = [routes.next_hops.add(Forward(port, bytes(6), bytes(6), 1500)) for port in range(2)]
    routes.fib["192.0.2.0/24"] = routes.fib6["2001:db8::/32"] = hops[0]
    routes.fib["198.51.100.0/24"] = routes.fib6["2001:db8:1::/48"] = hops[1]
    routes.fib[f"{PORT4}/32"] = routes.fib6[f"{PORT6}/128"] = routes.next_hops.add(Punt("local"))
    routes.fib["203.0.113.0/24"] = routes.fib6["2001:db8:2::/48"] = routes.next_hops.add(Punt("no-neighbour"))
    routes.set_local([(0xC0000201, 32)])
    routes.set_port(0, rp_filter=1, redirects=True)
    routes.set_address(0, bytes([192, 0, 2, 1]), bytes.fromhex("20010db8000000000000000000000001"))
    return routes


@pytest.fixture(scope="module")
def pipeline(routes: Routes) -> Pipeline:
    return Pipeline(parse, alter(routes), route(routes), rewrite(routes))


def to(what: int, n: int = 0) -> str:
    return f"02:00:00:00:{n:02x}:{what:02x}"


def ends(version: int, src: str = "", dst: str = "") -> dict[str, Any]:
    default = ("192.0.2.7", "198.51.100.7") if version == 4 else ("2001:db8::7", "2001:db8:1::7")
    return {"src": src or default[0], "dst": dst or default[1]}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("what", "size"), [(TTL, 10), (TTL, 1400), (TOO_BIG, 2000), (TOO_BIG, 3)])
def test_an_icmp_error_is_what_scapy_would_send(pipeline: Pipeline, version: int, what: int, size: int) -> None:
    sent = udp(b"x" * size, sport=1, dport=2, eth_dst=to(what), pad=100, **ends(version))
    (outcome,) = pipeline.run_once([sent])
    assert (outcome, outcome.port) == ("forward", 0)
    frame = Ether(outcome.frame)
    if version == 4:
        ip, icmp = frame[IP], frame[ICMP]
        assert (ip.src, ip.dst, ip.ttl, ip.len) == (PORT4, "192.0.2.7", 64, min(28 + 28 + size, 576))
        assert (icmp.type, icmp.code) == ((11, 0) if what == TTL else (3, 4))
        assert what == TTL or icmp.nexthopmtu == 1400
        assert (frame[IPerror].dst, frame[IPerror].ttl) == ("198.51.100.7", 64)
    else:
        ip = frame[IPv6]
        assert (ip.src, ip.dst, ip.hlim, ip.plen + 40) == (PORT6, "2001:db8::7", 64, min(48 + 48 + size, 1280))
        kind = ICMPv6TimeExceeded if what == TTL else ICMPv6PacketTooBig
        assert frame[kind].type == kind().type
        assert what == TTL or frame[kind].mtu == 1400
        assert frame[IPerror6].dst == "2001:db8:1::7"
    assert len(outcome.frame) == 14 + len(ip)
    again = Ether(outcome.frame)
    if version == 4:
        del again[IP].chksum, again[ICMP].chksum
    else:
        del again[kind].cksum
    assert bytes(again) == outcome.frame, "checksums are as scapy makes them"


SILENT = {
    "to a group": {"src": "192.0.2.7", "dst": "239.1.1.1"},
    "from a group": {"src": "224.0.0.5", "dst": "198.51.100.7"},
    "from nobody": {"src": "0.0.0.0", "dst": "198.51.100.7"},
    "from loopback": {"src": "127.0.0.1", "dst": "198.51.100.7"},
    "from :: ": {"src": "::", "dst": "2001:db8:1::7"},
    "to a group of IPv6": {"src": "2001:db8::7", "dst": "ff02::1"},
}


@pytest.mark.parametrize("name", SILENT)
def test_no_error_about_what_must_not_cause_one(pipeline: Pipeline, name: str) -> None:
    assert pipeline.run_once([udp(b"", eth_dst=to(TTL), **SILENT[name])])[0].startswith("drop")


def test_no_error_about_errors_fragments_and_frames_to_groups(pipeline: Pipeline) -> None:
    inner = ipv4(b"12345678", protocol=17)
    silent = [
        an_error(inner, 11, 0, eth_dst=to(TTL), **ends(4)),
        ipv4(b"12345678", protocol=17, fragment_offset=8, eth_dst=to(TTL), **ends(4)),
        ipv4(b"", protocol=1, eth_dst=to(TTL), **ends(4)),
        udp(b"", eth_dst="03:00:00:00:00:0a", **ends(4)),
        ipv6(bytes([1, 0, 0, 0, 0, 0, 0, 0]), next_header=58, eth_dst=to(TTL), **ends(6)),
        ipv6(bytes([137, 0, 0, 0, 0, 0, 0, 0]), next_header=58, eth_dst=to(TTL), **ends(6)),
        ipv6(b"", next_header=58, eth_dst=to(TTL), **ends(6)),
        ipv6(bytes(8), next_header=44, eth_dst=to(TTL), **ends(6)),
    ]
    assert [str(one) for one in pipeline.run_once(silent)] == ["drop no-room"] * len(silent)
    assert pipeline.run_once([icmp_echo(eth_dst=to(TTL), **ends(4))])[0] == "forward"


def test_no_error_from_a_port_without_address_or_a_frame_without_room(pipeline: Pipeline) -> None:
    frames = [udp(b"", eth_dst=to(TTL), **ends(version)) for version in (4, 6)]
    assert pipeline.run_once(frames, port=1) == ["drop no-room"] * 2
    assert pipeline.run_once(frames, guard="start") == ["drop no-room"] * 2
    assert pipeline.run_once(frames, guard="end") == ["forward"] * 2


def test_errors_have_a_rate(pipeline: Pipeline) -> None:
    frames = [udp(b"", eth_dst=to(TTL), **ends(4))] * 640
    assert pipeline.run_once(frames).count("drop no-room") > 300


@pytest.mark.parametrize("version", [4, 6])
def test_what_linux_must_not_get_is_dropped_by_the_name_of_the_punt(
    pipeline: Pipeline, routes: Routes, version: int
) -> None:
    def outcome(**fields: Any) -> list[str]:
        """Left to Linux, and kept from it."""
        where = ends(version, fields.pop("src", ""), fields.pop("dst", ""))
        return [str(pipeline.run_once([udp(b"", eth_dst=to(what), **fields, **where)])[0]) for what in (NOTHING, KEEP)]

    six = version == 6
    absent, unknown = ("2001:db8:2::9", "2001:db9::") if six else ("203.0.113.9", "9.9.9.9")
    routes.wanted()
    assert outcome(dst=absent) == ["punt no-neighbour", "drop no-neighbour"]
    ((_, wanted),) = routes.wanted()
    assert wanted == udp(b"", **ends(version, dst=absent))[14:][24 if six else 16 :][: 16 if six else 4]
    assert routes.wanted() == set()
    assert outcome(dst=unknown) == ["punt no-route", "drop no-route"]
    assert outcome(**{"hop_limit" if six else "ttl": 1}) == ["punt ttl-expired", "drop ttl-expired"]
    assert outcome(dst=PORT6 if six else PORT4) == ["punt local", "drop local"]
    assert outcome(dst="2001:db8::9" if six else "192.0.2.9") == ["punt redirect", "forward"], "back where it came from"
    assert outcome(src="2001:db8:1::1" if six else "198.51.100.1") == (
        ["forward", "forward"] if six else ["punt rp-filter", "forward"]
    ), "a decrypted packet has no way back that could be looked at"


def test_only_what_we_made_has_our_own_source(pipeline: Pipeline) -> None:
    frames = [udp(b"", eth_dst=to(what), **ends(4, src=PORT4)) for what in (NOTHING, KEEP, MADE)]
    assert pipeline.run_once(frames) == ["drop martian-source", "drop martian-source", "forward"]


def test_what_is_undecided_does_not_get_to_linux_either(pipeline: Pipeline) -> None:
    other = b"\2\0\0\0\0" + bytes([KEEP]) + bytes(6) + b"\x08\x06" + bytes(46)
    assert pipeline.run_once([other, b"\2\0\0\0\0" + bytes([NOTHING]) + other[6:]]) == ["drop not-ip", "punt not-ip"]


def test_a_frame_grows_and_shrinks_within_its_room_and_no_further(pipeline: Pipeline) -> None:
    frame = udp(b"y" * 58, **ends(4))  # 100 bytes
    assert len(frame) == 100

    def changed(what: int, n: int, guard: str = "") -> bytes | None:
        (outcome,) = pipeline.run_once([frame[:4] + bytes([n, what]) + frame[6:]], guard=guard)
        assert outcome in ("forward", "drop no-room")
        return outcome.frame if outcome == "forward" else None

    for n in (1, 4, 32):
        for guard in ("", "end"):
            grown = changed(PREPEND, n, guard)
            assert grown is not None
            assert grown[8 * n + 6 :] == frame[6:]
            assert len(grown) == 100 + 8 * n
        for guard in ("", "start"):
            grown = changed(APPEND, n, guard)
            assert grown is not None
            assert grown[6:100] == frame[6:]
            assert len(grown) == 100 + 8 * n
    assert changed(PREPEND, 33) is None, "256 bytes of headroom"
    assert changed(PREPEND, 1, "start") is None
    assert changed(APPEND, 1, "end") is None
    assert (changed(ADJ, 3) or b"") == frame[24:]
    assert (changed(TRIM, 3) or b"")[6:] == frame[6:76]
    assert changed(ADJ, 13) is None, "more than there is"
    assert changed(TRIM, 13) is None
    for what in (PREPEND, ADJ, APPEND, TRIM):
        assert changed(what, 255) is None, "a negative number is no number of bytes"


def test_headers_are_found_again_and_what_was_said_holds(pipeline: Pipeline) -> None:
    frame = udp(b"", eth_dst=to(BOTH_WAYS), ttl=1, **ends(4))
    assert pipeline.run_once([frame]) == ["drop ttl-expired"]
