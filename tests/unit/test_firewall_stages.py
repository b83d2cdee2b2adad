"""The firewall's stages on single packets: what begins a flow, what is refused, what Linux has to decide; and that
nothing is read beyond a frame.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from libfp import Pipeline
from libfp.apps.firewall.conntrack import STATES, Connections, Settings
from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.hits import Hits
from libfp.apps.firewall.policy import ESTABLISHED, INVALID, NEW, RELATED
from libfp.errors import BadInput, Unsupported
from libfp.jit import INTERPRETED
from libfp.stages import Forward, Routes, by_flow, parse, rewrite, route
from libfp.tables import Acl, Rule
from libfp.tables.flow_wheel import LOOKS
from libfp.testing import icmp_echo, icmp_error, ipv4, ipv6, tcp, udp
from libfp.testing.packets import _pseudo, internet_checksum

pytestmark = pytest.mark.timeout(240)

CLIENT, SERVER = {4: "10.0.1.2", 6: "2001:db8:1::2"}, {4: "10.0.2.2", 6: "2001:db8:2::2"}


def by_state(state: int, action: int, **asks: Any) -> Rule:
    return Rule((state + 1) << 2 | action, interface=(state << 12, 7 << 12), **asks)


STATEFUL = [by_state(ESTABLISHED, 1), by_state(RELATED, 1), by_state(INVALID, 2), by_state(NEW, 1, dport=80),
            by_state(NEW, 1, dport=53, protocol="udp"), by_state(NEW, 1, protocol="icmp"),
            by_state(NEW, 1, protocol="icmpv6"), Rule(40 | 3, dport=113), Rule(44 | 2)]  # fmt: skip
FORWARDED = "forward"


class Bed:
    def __init__(self) -> None:
        routes = Routes(routes=1024, routes6=1024, next_hops=4096)
        for n in (0, 1):
            hop = routes.next_hops.add(Forward(n, bytes(6), bytes(6), 9000))
            routes.fib[f"10.0.{n + 1}.0/24"] = routes.fib6[f"2001:db8:{n + 1}::/64"] = hop
        self.acl, self.acl6, self.hits = Acl(100), Acl(100, "ipv6"), Hits()
        self.connections = Connections(capacity=1000)
        stage = filtering(routes, self.acl, self.acl6, self.hits, self.connections)
        self.pipeline = Pipeline(parse, by_flow, route(routes), stage, rewrite(routes))

    def load(self, rules: list[Rule]) -> None:
        self.acl.load(rules)
        self.acl6.load(rules)

    def one(self, frame: bytes, port: int = 0, guard: str = "") -> str:
        return str(self.pipeline.run_once([frame], port=port, guard=guard)[0])

    @property
    def flows(self) -> dict[Any, Any]:
        return {key: flow for part in self.connections.parts for key, flow in part.items()}


@pytest.fixture(scope="module")
def made() -> Bed:
    return Bed()


@pytest.fixture
def bed(made: Bed) -> Bed:
    """Without flows, with `STATEFUL` rules and Linux's settings."""
    made.load(STATEFUL)
    made.connections.apply(Settings())
    made.pipeline.run_once([])
    made.connections.parts[0].pass_time(500_000)
    for _ in range(4096 // LOOKS + 20):
        made.pipeline.run_once([])
    assert len(made.connections) == 0
    return made


def ends(version: int, back: bool = False, sport: int = 1000, dport: int = 80) -> dict[str, Any]:
    if back:
        return {"src": SERVER[version], "dst": CLIENT[version], "sport": dport, "dport": sport}
    return {"src": CLIENT[version], "dst": SERVER[version], "sport": sport, "dport": dport}


def ping(version: int, kind: int, identifier: int = 7, code: int = 0) -> bytes:
    back = kind in (0, 129)
    at = {"src": SERVER[version], "dst": CLIENT[version]} if back else {"src": CLIENT[version], "dst": SERVER[version]}
    return icmp(version, struct.pack("!BBHHH", kind, code, 0, identifier, 1) + b"payload", **at)


def icmp(version: int, message: bytes, **at: Any) -> bytes:
    pseudo = b"" if version == 4 else _pseudo(at, 58, len(message))
    message = message[:2] + struct.pack("!H", internet_checksum(pseudo + message)) + message[4:]
    return ipv4(message, protocol=1, **at) if version == 4 else ipv6(message, next_header=58, **at)


def about(version: int, frame: bytes, size: int = 1000, **at: Any) -> bytes:
    """An ICMP error to the client about a frame it sent."""
    kind = 3 if version == 4 else 1
    return icmp(version, bytes([kind, 0]) + bytes(6) + frame[14 : 14 + size],
                **{"src": SERVER[version] + "9", "dst": CLIENT[version], **at})  # fmt: skip


@pytest.mark.parametrize("version", [4, 6])
def test_the_life_of_a_tcp_connection(bed: Bed, version: int) -> None:
    there, back = ends(version), ends(version, back=True)
    steps = [
        (1, tcp(flags="SA", seq=500, ack=101, **back), "punt flow-unknown", None),
        (0, tcp(flags="S", seq=100, **there), FORWARDED, "SYN_SENT"),
        (1, tcp(flags="SA", seq=500, ack=101, **back), FORWARDED, "SYN_RECV"),
        (0, tcp(flags="A", seq=101, ack=501, **there), FORWARDED, "ESTABLISHED"),
        (0, tcp(b"question", flags="PA", seq=101, ack=501, **there), FORWARDED, "ESTABLISHED"),
        (1, tcp(b"answer", flags="PA", seq=501, ack=109, **back), FORWARDED, "ESTABLISHED"),
        (1, tcp(flags="", seq=501, ack=109, **back), "drop filtered", "ESTABLISHED"),
        (1, tcp(flags="SFA", seq=501, ack=109, **back), "drop filtered", "ESTABLISHED"),
        (1, tcp(flags="R", seq=400, **back), "drop filtered", "ESTABLISHED"),
        (0, tcp(flags="FA", seq=109, ack=507, **there), FORWARDED, "FIN_WAIT"),
        (1, tcp(flags="A", seq=507, ack=110, **back), FORWARDED, "CLOSE_WAIT"),
        (1, tcp(flags="FA", seq=507, ack=110, **back), FORWARDED, "LAST_ACK"),
        (0, tcp(flags="A", seq=110, ack=508, **there), FORWARDED, "TIME_WAIT"),
        (0, tcp(flags="S", seq=9000, **there), FORWARDED, "SYN_SENT"),  # it was closed: another one
        (1, tcp(flags="RA", seq=0, ack=9001, **back), FORWARDED, None),
    ]
    for port, frame, verdict, state in steps:
        assert bed.one(frame, port) == verdict
        assert [STATES[flow.state] for flow in bed.flows.values()] == ([state] if state else [])
    assert bed.connections.counts.removed == 0


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_live_longer_when_they_are_answered_for_a_while(bed: Bed, version: int) -> None:
    there, back = udp(**ends(version, dport=53)), udp(**ends(version, True, dport=53))
    [part] = bed.connections.parts
    assert bed.one(udp(**ends(version, True, dport=53)), 1) == "punt flow-unknown"
    for frame, port, seconds, left, assured in (
        (there, 0, 0, 30, False), (there, 0, 20, 30, False), (back, 1, 20, 30, False), (there, 0, 20, 120, True)
    ):  # fmt: skip
        part.pass_time(seconds)
        assert bed.one(frame, port) == FORWARDED
        [flow] = bed.flows.values()
        assert (round(flow.left), flow.assured) == (left, assured)
    part.pass_time(121)
    assert bed.one(back, 1) == "punt flow-unknown"


@pytest.mark.parametrize("version", [4, 6])
def test_pings_and_errors_about_them(bed: Bed, version: int) -> None:
    ask, answer = (8, 0) if version == 4 else (128, 129)
    assert bed.one(ping(version, answer), 1) == "punt flow-unknown"
    assert bed.one(about(version, ping(version, ask)), 1) == "punt flow-unknown"
    assert bed.one(ping(version, ask)) == FORWARDED
    assert bed.one(ping(version, answer), 1) == FORWARDED
    assert bed.one(about(version, ping(version, ask)), 1) == FORWARDED
    assert bed.one(about(version, ping(version, answer)), 1) == "drop filtered", "somebody else sent that"
    assert bed.one(about(version, ping(version, ask, identifier=8)), 1) == "punt flow-unknown"
    assert bed.one(about(version, ping(version, ask), dst=CLIENT[version] + "7"), 1) == "drop filtered", "to a third"
    back = {"src": SERVER[version], "dst": CLIENT[version]}
    other = icmp(version, struct.pack("!BBHHH", ask, 0, 0, 7, 1), **back)
    assert bed.one(other, 1) == "punt crossed-echo", "Linux has a flow for each direction"
    crossed = about(version, other, src=CLIENT[version] + "9", dst=SERVER[version])
    assert bed.one(crossed) == "punt flow-unknown", "and may know the other"
    assert len(bed.flows) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_errors_about_tcp_and_udp_cut_anywhere(bed: Bed, version: int) -> None:
    header = 20 if version == 4 else 40
    for frame in (tcp(b"data", flags="S", **ends(version)), udp(b"data", **ends(version, dport=53))):
        assert bed.one(about(version, frame), 1, guard="end") == "punt flow-unknown"
        assert bed.one(frame, guard="end") == FORWARDED
        for size in range(60):
            verdict = FORWARDED if size >= header + 4 else "drop filtered"
            assert bed.one(about(version, frame, size), 1, guard="end") == verdict
    later = ipv4(b"12345678", protocol=17, fragment_offset=8, src=CLIENT[4], dst=SERVER[4])
    assert bed.one(icmp_error(later, src="10.0.2.9", dst=CLIENT[4]), 1, guard="end") == "drop filtered"
    assert len(bed.flows) == 2, "of which no error makes one"


def test_two_of_a_burst(bed: Bed) -> None:
    """The first may make the flow that the second belongs to, or end it."""
    there, other = ends(4), ends(4, sport=1001)
    burst = [tcp(flags="S", seq=1, **there), tcp(flags="R", seq=2, **there), tcp(flags="R", seq=2, **there),
             tcp(flags="S", seq=1, **there), tcp(flags="SA", **there), tcp(flags="FA", **other),
             tcp(flags="A", seq=1, **other), tcp(flags="FA", seq=2, **other)]  # fmt: skip
    told = [FORWARDED, FORWARDED, "punt flow-unknown", FORWARDED, "drop filtered", "punt flow-unknown"]
    # new, new; no flow any more; new; no SYN/ACK from there; no flow; picked up; and new still, which no rule accepts
    assert [str(one) for one in bed.pipeline.run_once(burst)] == [*told, FORWARDED, FORWARDED]


def test_what_linux_decides(bed: Bed) -> None:
    at, at6 = {"src": CLIENT[4], "dst": SERVER[4]}, {"src": CLIENT[6], "dst": SERVER[6]}
    for frame, reason in {
        udp(more_fragments=True, **at): "fragment",
        ipv4(b"12345678", protocol=17, fragment_offset=800, **at): "fragment",
        ipv4(b"12345678", protocol=47, **at): "untracked-protocol",
        ipv6(b"12345678", next_header=44, **at6): "ipv6-extension",
        ipv6(b"12345678", next_header=132, **at6): "untracked-protocol",
        icmp(6, bytes([135]) + bytes(23), **at6): "neighbour-discovery",
        icmp(6, bytes([139]) + bytes(23), **at6): "untracked-icmp",
        icmp(4, bytes([13]) + bytes(19), **at): "untracked-icmp",
        ping(4, 8, code=1): "untracked-icmp",
        ipv4(b"1234567", protocol=17, **at): "truncated",
        ipv4(bytes(19), protocol=6, **at): "truncated",
        ipv6(bytes(7), next_header=58, **at6): "truncated",
        tcp(dport=113, **at): "reject",
    }.items():
        assert bed.one(frame) == f"punt {reason}"
    assert bed.flows == {}


def test_what_is_not_sound_is_invalid(bed: Bed) -> None:
    good, at = tcp(b"1234567", flags="S", **ends(4)), ends(4, dport=53)
    for frame in (
        good[:-1] + b"8", good[:46] + b"\x40" + good[47:], good[:46] + b"\xf0" + good[47:],
        udp(b"1234567", udp_checksum=1, **at), icmp(4, bytes([19]) + bytes(11), src=CLIENT[4], dst=SERVER[4]),
        ipv4(bytes(8), protocol=1, src=CLIENT[4], dst=SERVER[4]), udp(b"1234567", **at)[:-1] + b"8",
    ):  # fmt: skip
        assert bed.one(frame) == "drop filtered"
    assert bed.one(udp(b"1234567", udp_checksum=0, **at)) == FORWARDED
    bed.connections.apply(Settings(checksum=False))
    assert bed.one(good[:-1] + b"8") == FORWARDED
    assert bed.one(udp(b"1234567", udp_checksum=1, **at)) == FORWARDED


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("make", [tcp, udp])
def test_checksums_of_every_length(bed: Bed, make: Any, version: int) -> None:
    dice = random.Random(1)
    for size in [*range(40), 1000, 1001, 1460]:
        frame = make(dice.randbytes(size), **ends(version, dport=80 if make is tcp else 53))
        assert bed.one(frame, guard="end") == FORWARDED
        at = dice.randrange(34 if version == 4 else 54, len(frame))
        wrong = frame[:at] + bytes([frame[at] ^ 1 << dice.randrange(8)]) + frame[at + 1 :]
        if make is tcp or wrong[-size - 2 :][:2] != b"\0\0":
            assert bed.one(wrong, guard="end") in ("drop filtered", "punt flow-unknown")


def test_settings_are_followed(bed: Bed) -> None:
    middle = tcp(flags="A", seq=1, ack=2, **ends(4))
    bed.connections.apply(Settings(tcp_loose=False))
    assert bed.one(middle) == "punt flow-unknown"
    bed.connections.apply(Settings(timeouts=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)))
    assert bed.one(middle) == FORWARDED
    assert bed.one(udp(**ends(4, dport=53))) == FORWARDED
    assert sorted(round(one.left) for one in bed.flows.values()) == [3, 12]


def test_hits_are_counted_once(bed: Bed) -> None:
    before = bed.hits.counted().copy()
    frame, back = tcp(b"12345", flags="S", **ends(4)), tcp(flags="SA", **ends(4, back=True))
    bed.one(frame)
    bed.one(back, 1)
    bed.one(tcp(flags="SA", **ends(4, back=True, dport=81)), 1)  # left to Linux, who counts it
    bed.one(tcp(flags="S", **ends(6, dport=81)))
    made = bed.hits.counted() - before
    counted = {number: tuple(made[number].tolist()) for number in range(20) if made[number].any()}
    assert counted == {NEW + 1: (1, 45), ESTABLISHED + 1: (1, 40), 11: (1, 60)}


def test_a_flood_of_new_connections_leaves_known_ones_alone(bed: Bed) -> None:
    sports = range(1000, 1100)
    for sport in sports:
        for back, flags, seq, ack in ((0, "S", 100, 0), (1, "SA", 500, 101), (0, "A", 101, 501)):
            frame = tcp(flags=flags, seq=seq, ack=ack, **ends(4, bool(back), sport))
            assert bed.one(frame, back) == FORWARDED
    dice, before = random.Random(2), bed.connections.counts
    count = 2_000 if INTERPRETED else 20_000
    for _ in range(0, count, 64):
        sources = [f"{dice.randrange(1, 100)}.{dice.randrange(256)}.{dice.randrange(256)}.9" for _ in range(64)]
        bed.pipeline.run_once([tcp(flags="S", src=one, dst=SERVER[4], sport=dice.randrange(65536)) for one in sources])
    assert bed.connections.counts.evicted > before.evicted + count // 2
    for sport in sports:
        assert bed.one(tcp(flags="A", seq=101, ack=501, **ends(4, False, sport))) == FORWARDED
        assert bed.one(tcp(flags="A", seq=501, ack=101, **ends(4, True, sport)), 1) == FORWARDED


@pytest.mark.parametrize("guard", ["end", "start"])
def test_garbage(bed: Bed, guard: str) -> None:
    """Any bytes, cut anywhere, beside memory that may not be touched."""
    dice = random.Random(guard)
    seeds = [make(b"data", **ends(version)) for make in (tcp, udp) for version in (4, 6)]
    seeds += [about(version, udp(**ends(version))) for version in (4, 6)]
    seeds += [icmp_echo(b"data", src=CLIENT[4], dst=SERVER[4])]
    for _ in range(100 if INTERPRETED else 1500):
        frame = bytearray(dice.choice(seeds))
        for _ in range(dice.randrange(4)):
            frame[dice.randrange(14, len(frame))] = dice.randrange(256)
        if dice.random() < 0.5:
            del frame[dice.randrange(14, len(frame)) :]
            if len(frame) > 34 and frame[12] == 8:
                frame[16:18] = struct.pack("!H", len(frame) - 14)
                frame[24:26] = bytes(2)
                frame[24:26] = struct.pack("!H", internet_checksum(bytes(frame[14:34])))
            elif len(frame) > 54:
                frame[18:20] = struct.pack("!H", len(frame) - 54)
        assert bed.one(bytes(frame), dice.randrange(2), guard)


def test_settings_are_read(tmp_path: Path) -> None:
    assert Settings.read(tmp_path) == Settings()
    values = {"tcp_loose": 0, "tcp_be_liberal": 1, "udp_timeout": 7, "tcp_timeout_established": 1 << 40, "checksum": 0}
    for name, value in values.items():
        (tmp_path / f"nf_conntrack_{name}").write_text(f"{value}\n")
    told = Settings.read(tmp_path)
    assert (told.tcp_loose, told.tcp_be_liberal, told.checksum, told.timeouts[12]) == (False, True, False, 7)
    assert told.seconds[0] == min(told.seconds) == 7
    assert Connections(told, capacity=10).timeouts == told.seconds
    told.check(depends=True)
    (tmp_path / "nf_conntrack_udp_timeout").write_text("soon")
    with pytest.raises(BadInput, match="nf_conntrack_udp_timeout"):
        Settings.read(tmp_path)


def test_settings_that_cannot_be_followed_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"sysctl -w net\.netfilter\.nf_conntrack_tcp_be_liberal=1"):
        Settings().check(depends=True)
    Settings().check(depends=False)
    with pytest.raises(Unsupported, match="nf_conntrack_helper=0"):
        Settings(helper=True).check(depends=False)
