"""What pipelines do with packets, through `run_once`: no thread, no root, no interface."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from libfp import BadInput, NotCacheable, Pipeline, stage
from libfp.engine.pipeline import Outcome
from libfp.jit import BOUNDSCHECK, INTERPRETED
from libfp.stages import parse
from libfp.testing import ethernet, icmp_echo, ipv4, ipv6, tcp, udp

pytestmark = pytest.mark.timeout(300)  # compiling takes long on a busy machine


def told(outcome: Outcome) -> tuple[int, int, int]:
    """What the stage `tell` wrote: place in the burst, packets in the burst, mark and 1000."""
    return struct.unpack("!HHH", outcome.frame[6:12])


@pytest.fixture(autouse=True)
def _nobody_is_blocked(probe: SimpleNamespace) -> Iterator[None]:
    yield
    probe.blocked.clear()


def test_three_lines_are_a_unit_test() -> None:
    @stage
    def deny(packet, port):  # type: ignore[no-untyped-def]
        if packet.is_udp and packet.udp.dport == port:
            packet.drop("denied")

    assert Pipeline(parse, deny(53)).run_once([udp(dport=53), udp(dport=54)]) == ["drop denied", "pass"]


CASES = {
    "TO_DROP": "drop denied",
    "TO_PUNT": "punt ask-linux",
    "TO_FORWARD": "forward",
    "TO_CONSUME": "consume",
    "TO_NO_PORT": "drop bad-port",
    "TWICE": "drop denied",  # the first verdict wins
    "BY_HELPER": "drop by-a-helper",
    "BY_GLOBAL": "drop from-a-global",
    "BY_TUPLE": "drop second-of-two",
    "BY_BOUND": "drop from-outside",
    "UNNAMED": "drop other",
    "MARKED": "pass",
    "LATER": "forward",
}


def test_verdicts(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    packets = [udp(dport=getattr(actions, name)) for name in CASES]
    assert dict(zip(CASES, probe.pipeline.run_once(packets), strict=True)) == CASES


def test_outcomes_say_more(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    dropped, forwarded, no_port = probe.pipeline.run_once(
        [udp(dport=n) for n in (actions.TO_DROP, actions.TO_FORWARD, actions.TO_NO_PORT)]
    )
    assert (dropped.reason, dropped.port, dropped.next_hop) == ("denied", None, 0)
    assert (forwarded.reason, forwarded.port) == ("", 1)
    assert (no_port.reason, no_port.port) == ("bad-port", None)
    assert forwarded.frame == udp(dport=actions.TO_FORWARD)
    assert isinstance(dropped, str)


def test_later_stages_see_live_packets_only_and_in_order(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    order = [actions.MARKED, actions.TO_DROP, actions.LATER, actions.TO_CONSUME, actions.MARKED, actions.TO_PUNT]
    outcomes = probe.pipeline.run_once([udp(dport=n, sport=k) for k, n in enumerate(order)])
    assert outcomes == ["pass", "drop denied", "forward", "consume", "pass", "punt ask-linux"]
    assert [told(outcomes[k]) for k in (0, 2, 4)] == [(0, 3, 1000), (1, 3, 1000), (2, 3, 1004)]
    for k in (1, 3, 5):
        assert outcomes[k].frame == udp(dport=order[k], sport=k), "what has a verdict is not touched any more"


def test_what_belongs_to_a_packet_moves_with_it(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    """Length, mark, kind: when packets before it leave the burst, and in every combination of seven."""
    for leaving in range(1 << 7):
        packets, kept = [], []
        for k in range(7):
            leaves = leaving >> k & 1
            packets.append(udp(bytes(k), sport=100 + k, dport=actions.TO_DROP if leaves else actions.MARKED))
            if not leaves:
                kept.append(k)
        outcomes = probe.pipeline.run_once(packets)
        for place, k in enumerate(kept):
            assert outcomes[k] == "pass"
            assert told(outcomes[k]) == (place, len(kept), 1100 + k)
            assert outcomes[k].frame[12:] == packets[k][12:]


def test_a_mark_is_0_at_first(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    probe.pipeline.run_once([udp(dport=actions.MARKED, sport=7)] * 64)
    assert {told(one)[2] for one in probe.pipeline.run_once([udp(dport=999)] * 64)} == {1000}


def test_bound_constants(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    packets = [udp(bytes(n), dport=actions.IF_LONG) for n in (100 - 42, 101 - 42)]
    assert probe.pipeline.run_once(packets) == ["pass", "drop too-long"]


def test_bound_tables(probe: SimpleNamespace) -> None:
    packets = [udp(src="192.0.2.7"), udp(src="192.0.2.8"), icmp_echo(src="192.0.2.7"), ethernet(b"", 0x88B5)]
    assert probe.pipeline.run_once(packets) == ["pass"] * 4
    probe.blocked["192.0.2.7"] = True
    assert probe.pipeline.run_once(packets) == ["drop blocked", "pass", "drop blocked", "pass"]
    del probe.blocked["192.0.2.7"]
    assert probe.pipeline.run_once(packets) == ["pass"] * 4


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 1000])
def test_any_number_of_packets(probe: SimpleNamespace, actions: SimpleNamespace, count: int) -> None:
    cycle = [actions.TO_DROP, actions.TO_FORWARD, actions.MARKED]
    outcomes = probe.pipeline.run_once(udp(dport=cycle[k % 3], sport=k) for k in range(count))
    assert outcomes == [["drop denied", "forward", "pass"][k % 3] for k in range(count)]
    assert [struct.unpack_from("!H", one.frame, 34)[0] for one in outcomes] == list(range(count))


def test_frames_come_back_whatever_happens(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    """More packets of each kind than there are frames."""
    for name, expected in CASES.items():
        many = 64 if INTERPRETED else 2000
        assert set(probe.pipeline.run_once([udp(dport=getattr(actions, name))] * many)) == {expected}


def test_sizes(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    room = 16384
    largest = udp(bytes(room - 42))
    assert probe.pipeline.run_once([largest])[0].frame[12:] == largest[12:]
    with pytest.raises(BadInput, match="a packet of 16385 bytes; a frame holds 16384"):
        probe.pipeline.run_once([udp(), udp(bytes(room - 41))])
    assert probe.pipeline.run_once([udp(dport=actions.TO_DROP)]) == ["drop denied"], (
        "nothing of the refused call is left"
    )
    assert probe.pipeline.run_once([b""]) == ["drop ethernet-truncated"]


def test_ports(probe: SimpleNamespace, actions: SimpleNamespace) -> None:
    packet = udp(dport=actions.TO_NO_PORT)
    assert [one.port for one in probe.pipeline.run_once([packet], port=2, ports=8)] == [7]
    for port in (2, -1):
        with pytest.raises(BadInput, match=f"packets for port {port} of 2"):
            probe.pipeline.run_once([packet], port=port)


MALFORMED = {
    "nothing": (b"", "drop ethernet-truncated"),
    "13 bytes": (bytes(13), "drop ethernet-truncated"),
    "ethernet header alone": (ethernet(b"", 0x88B5), "pass"),
    "no IPv4 header": (ethernet(b""), "drop ipv4-truncated"),
    "19 bytes of IPv4": (udp()[:33], "drop ipv4-truncated"),
    "whole": (udp(), "pass"),
    "padded": (udp(pad=60), "pass"),
    "one byte missing": (udp(bytes(100))[:-1], "drop ipv4-truncated"),
    "version 6 in an IPv4 frame": (ipv4(version=6), "drop ipv4-version"),
    "version 0": (ipv4(version=0), "drop ipv4-version"),
    "header of 16 bytes": (ipv4(header_words=4), "drop ipv4-header-length"),
    "header of 0 bytes": (ipv4(header_words=0), "drop ipv4-header-length"),
    "header longer than the packet": (ipv4(header_words=6), "drop ipv4-header-length"),
    "options": (ipv4(options=b"\1\1\1\1"), "pass"),
    "options outside the packet": (ipv4(options=b"\1" * 40, total_length=40), "drop ipv4-header-length"),
    "options outside the frame": (ipv4(options=b"\1" * 40)[:50], "drop ipv4-truncated"),
    "total length 0": (ipv4(total_length=0), "drop ipv4-header-length"),
    "total length 19": (ipv4(total_length=19), "drop ipv4-header-length"),
    "total length beyond the frame": (ipv4(total_length=21), "drop ipv4-truncated"),
    "total length 65535": (ipv4(total_length=65535), "drop ipv4-truncated"),
    "IPv6": (ipv6(), "pass"),
    "IPv6 of another version": (ipv6(version=5), "drop ipv6-version"),
    "IPv6 cut": (ipv6()[:-1], "drop ipv6-truncated"),
    "another protocol": (ethernet(bytes(40), 0x88B5), "pass"),
    "ARP": (ethernet(bytes(28), 0x0806), "pass"),
    "tagged": (udp(vlan=5), "pass"),
    "length field below 1536": (ethernet(bytes(50), 46), "pass"),
}


@pytest.mark.parametrize("guard", ["", "end", "start"])
def test_parse(probe: SimpleNamespace, guard: Any) -> None:
    outcomes = probe.pipeline.run_once([packet for packet, _ in MALFORMED.values()], guard=guard)
    assert dict(zip(MALFORMED, outcomes, strict=True)) == {name: expected for name, (_, expected) in MALFORMED.items()}


L4 = {
    "udp": (udp(), "udp"),
    "udp, no payload": (udp(pad=60), "udp"),
    "udp of 7 bytes": (ipv4(bytes(7), protocol=17), ""),
    "udp of 7 bytes, padded": (ipv4(bytes(7), protocol=17, pad=60), ""),
    "udp behind options": (ipv4(bytes(8), protocol=17, options=b"\1" * 8), "udp"),
    "first fragment": (ipv4(bytes(8), protocol=17, more_fragments=True), "udp"),
    "later fragment": (ipv4(bytes(8), protocol=17, fragment_offset=8), ""),
    "last fragment at the end": (ipv4(bytes(8), protocol=17, fragment_offset=65528), ""),
    "tcp": (tcp(), "tcp"),
    "tcp of 19 bytes": (ipv4(bytes(19), protocol=6, pad=60), ""),
    "icmp": (icmp_echo(), "icmp"),
    "icmp of 7 bytes": (ipv4(bytes(7), protocol=1), ""),
    "other": (ipv4(bytes(40), protocol=47), ""),
    "neither": (ethernet(bytes(60), 0x88B5), ""),
    "IPv6 udp": (udp(src="2001:db8::1", dst="2001:db8::2"), "udp"),
    "IPv6 udp of 7 bytes, padded": (ipv6(bytes(7), next_header=17, pad=90), ""),
    "IPv6 tcp": (tcp(src="2001:db8::1", dst="2001:db8::2"), "tcp"),
    "IPv6 fragment": (ipv6(bytes(20), next_header=44), ""),
}


def test_transport_headers() -> None:
    @stage
    def name(packet) -> None:  # type: ignore[no-untyped-def]
        if packet.is_udp:
            packet.drop("udp")
        elif packet.is_tcp:
            packet.drop("tcp")
        elif packet.is_icmp:
            packet.drop("icmp")

    outcomes = Pipeline(parse, name).run_once([packet for packet, _ in L4.values()], guard="end")
    found = {kind: one.reason for kind, one in zip(L4, outcomes, strict=True)}
    assert found == {kind: expected for kind, (_, expected) in L4.items()}


def test_what_is_no_pipeline() -> None:
    def plain(packet: Any) -> None:
        pass

    @stage
    def needs(packet: Any, thing: Any) -> None:
        pass

    with pytest.raises(BadInput, match="without stages"):
        Pipeline()
    with pytest.raises(NotCacheable, match="decorate the function"):
        Pipeline(plain)  # type: ignore[arg-type]
    with pytest.raises(NotCacheable, match="stage 'needs' in the pipeline"):
        Pipeline(needs)
    with pytest.raises(TypeError, match="thing"):
        needs(other=1)
    with pytest.raises(NotCacheable, match="takes no parameter"):

        @stage
        def nothing() -> None:
            pass


def test_reasons(probe: SimpleNamespace) -> None:
    names = probe.pipeline.reasons.names
    assert names[0] == ("drop", "other")
    assert len(set(names)) == len(names)
    for name in ("denied", "by-a-helper", "from-a-global", "from-outside", "blocked", "ipv4-truncated", "punt-rate"):
        assert ("drop", name) in names
        assert ("punt", name) in names


def test_reasons_of_one_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from libfp.engine import reasons

    monkeypatch.setattr(reasons, "reason_code", lambda name: len(name))
    with pytest.raises(BadInput, match=r"'b.' and 'a.' have the same hash"):
        reasons.Reasons(["a1", "b1"])


@pytest.mark.skipif(INTERPRETED or BOUNDSCHECK, reason="this is that run")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("variable", ["NUMBA_DISABLE_JIT", "LIBFP_BOUNDSCHECK"])
def test_the_same_in_the_other_worlds(variable: str) -> None:
    """Every test of this file, and of the primitives, interpreted; and this one with every access checked."""
    here = os.path.dirname(__file__)
    files = ["test_pipeline.py"]
    if variable == "NUMBA_DISABLE_JIT":
        files += ["test_jit_raw.py", "test_jit_native.py", "test_jit_memory.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{here}/{name}" for name in files)]
    done = subprocess.run(command, env={**os.environ, variable: "1"}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
