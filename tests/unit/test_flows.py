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
from libfp.testing import icmp_echo, ipv4, ipv6, tcp, udp

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
