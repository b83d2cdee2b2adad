"""`by_flow`'s hash: the same in both directions of a flow, spread over the workers, and of addresses for fragments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from libfp.jit import Arena, load32, store32, store64
from libfp.packet.burst import FRAME, LENGTH, VERDICT, WORKER, WORKERS, BurstMemory
from libfp.packet.verdict import HAND_OFF, KIND_SHIFT
from libfp.stages import by_flow, flow_owner, parse, symmetric_hash
from libfp.testing import icmp_echo, icmp_error, ipv4, ipv6, tcp, udp

pytestmark = pytest.mark.timeout(120)

COUNT = 5  # workers


class Told:
    """A burst of one frame after the other."""

    def __init__(self) -> None:
        self.memory, self.frame = BurstMemory(), Arena(2048)
        self.burst = self.memory.burst
        self.burst.base = self.frame.address
        store64(self.burst.at + WORKERS, COUNT)

    def packet(self, frame: bytes) -> Any:
        """It, parsed, where worker 0 has it."""
        self.frame.buffer[: len(frame)] = frame
        store64(self.burst.at + FRAME, 0)
        store32(self.burst.at + LENGTH, len(frame))
        store64(self.burst.at + WORKER, 0)
        self.burst.begin(1)
        parse.kernel(self.burst)
        return self.burst.packet(0)

    def __call__(self, frames: Iterable[bytes]) -> list[tuple[int, int]]:
        """(hash, worker) of each frame."""
        packets = map(self.packet, frames)
        return [(symmetric_hash(one), flow_owner(one, COUNT)) for one in packets]

    def verdict(self, frame: bytes, worker: int, workers: int = COUNT) -> int:
        """What `by_flow` says at `worker`."""
        packet = self.packet(frame)
        store64(self.burst.at + WORKER, worker)
        store64(self.burst.at + WORKERS, workers)
        by_flow.kernel(packet)
        store64(self.burst.at + WORKERS, COUNT)
        return int(load32(self.burst.at + VERDICT))


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    one = Told()
    yield one
    one.memory.arena.close()
    one.frame.close()


def flow(dice: random.Random, version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Addresses and ports of a flow, there and back."""
    a, b = (f"10.{dice.randrange(256)}.{dice.randrange(256)}.{n}" for n in (1, 2))
    if version == 6:
        a, b = (f"2001:db8:{dice.randrange(65536):x}::{n}" for n in (1, 2))
    p, q = dice.randrange(65536), dice.randrange(65536)
    return {"src": a, "dst": b, "sport": p, "dport": q}, {"src": b, "dst": a, "sport": q, "dport": p}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("make", [udp, tcp])
def test_both_directions_of_many_flows_evenly(told: Told, make: Any, version: int) -> None:
    dice = random.Random(version)
    flows = [flow(dice, version) for _ in range(500)]
    there = told(make(**one) for one, _ in flows)
    assert there == told(make(b"longer", **back) for _, back in flows)
    assert len(set(there)) == 500
    each = Counter(worker for _, worker in there)
    assert sorted(each) == list(range(COUNT))
    assert min(each.values()) > 60


def test_what_has_no_ports_goes_by_addresses_and_protocol(told: Told) -> None:
    ends, back = {"src": "10.0.0.1", "dst": "10.0.0.2"}, {"src": "10.0.0.2", "dst": "10.0.0.1"}
    request, reply, other, udp_there = told(
        [icmp_echo(identifier=7, **ends), icmp_echo(identifier=9, reply=True, **back), ipv4(protocol=47, **ends),
         udp(**ends)]
    )  # fmt: skip
    assert request == reply
    assert len({request, other, udp_there}) == 3


def test_fragments_go_by_addresses_only(told: Told) -> None:
    ends, back = {"src": "10.0.0.1", "dst": "10.0.0.2"}, {"src": "10.0.0.2", "dst": "10.0.0.1"}
    first, again, later, answer = told(
        [udp(sport=1, dport=2, more_fragments=True, **ends), udp(sport=3, dport=4, more_fragments=True, **ends),
         ipv4(b"rest of it", protocol=17, fragment_offset=8, **ends), udp(more_fragments=True, **back)]
    )  # fmt: skip
    assert first == again == later == answer


def about(frame: bytes, kind: int, size: int, code: int = 0) -> bytes:
    """A router's ICMP error of that type about a frame's packet, of which it quotes `size` bytes at most."""
    message = bytes([kind, code]) + bytes(6) + frame[14 : 14 + size]
    if frame[12:14] == b"\x86\xdd":
        return ipv6(message, next_header=58, src="2001:db8:99::1", dst="2001:db8::1")
    return ipv4(message, protocol=1, src="192.0.2.99", dst="10.0.0.1")


@pytest.mark.parametrize("version", [4, 6])
def test_errors_go_where_the_flow_goes_that_they_are_about(told: Told, version: int) -> None:
    dice = random.Random(version)
    kinds, header = ([3, 4, 5, 11, 12], 20) if version == 4 else ([1, 2, 3, 4], 40)
    for make in (udp, tcp):
        for _ in range(20):
            there, back = (make(b"payload", **one) for one in flow(dice, version))
            frames = [about(one, kind, size) for one in (there, back) for kind in kinds for size in (header + 4, 100)]
            assert set(told(frames)) == set(told([there])) == set(told([back]))
    whole, cut = told([there, about(there, kinds[0], header + 3)])
    assert cut[0] not in (whole[0], 0), "without ports, by what there is"
    for size in range(header):
        assert told([about(there, kinds[0], size)]) == told([about(back, kinds[0], size)]), "by their own addresses"


def test_what_errors_quote_may_be_any_packet(told: Told) -> None:
    ends = {"src": "10.0.0.1", "dst": "10.0.0.2"}
    ping, pinged, other = told(
        [icmp_echo(identifier=7, **ends), icmp_error(icmp_echo(identifier=7, **ends)), icmp_error(udp(**ends))]
    )
    assert ping == pinged != other
    first, cut, later, quoted = told(
        [udp(sport=1, dport=2, **ends), icmp_error(udp(sport=1, dport=2, more_fragments=True, **ends)),
         ipv4(b"rest of it", protocol=17, fragment_offset=8, **ends),
         icmp_error(ipv4(b"rest of it", protocol=17, fragment_offset=8, **ends))]
    )  # fmt: skip
    assert (first, later) == (cut, quoted)
    strange = ipv4(b"", protocol=17, header_words=2, checksum=0, **ends)
    assert told([icmp_error(strange)]) != told([icmp_error(udp(**ends))])


ARP = bytes(12) + b"\x08\x06" + bytes(46)


def test_what_is_not_ip_has_no_flow(told: Told) -> None:
    assert told([ARP]) == [(0, 0)]
    assert told([ipv6(b"", next_header=59)])[0][0] != 0


def test_each_packet_is_handed_to_the_worker_of_its_flow(told: Told) -> None:
    for frame in (udp(sport=5), tcp(sport=6), ipv6(), ipv4()):
        ((_, owner),) = told([frame])
        for worker in range(COUNT):
            expected = 0 if worker == owner else (HAND_OFF << KIND_SHIFT) + owner
            assert told.verdict(frame, worker) == expected
        assert told.verdict(frame, 0, workers=1) == 0, "a worker that is alone has every flow"
    assert told.verdict(ARP, 3) == 0
