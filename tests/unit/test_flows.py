"""`by_flow`'s hash: the same in both directions of a flow, spread over the workers, and of addresses for fragments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.jit import store32be
from libfp.stages import by_flow, flow_owner, parse, symmetric_hash
from libfp.testing import icmp_echo, ipv4, ipv6, tcp, udp

pytestmark = pytest.mark.timeout(120)


@stage
def tell(packet, workers):  # type: ignore[no-untyped-def]
    """The hash, and the worker for it, in place of the MAC addresses."""
    store32be(packet.data, symmetric_hash(packet))
    store32be(packet.data + 4, flow_owner(packet, workers))


WORKERS = 5


@pytest.fixture(scope="module")
def told() -> Callable[[Iterable[bytes]], list[tuple[int, int]]]:
    """(hash, worker) of each frame."""
    pipeline = Pipeline(parse, tell(WORKERS))

    def run(frames: Iterable[bytes]) -> list[tuple[int, int]]:
        outcomes = pipeline.run_once(list(frames))
        return [(int.from_bytes(one.frame[:4]), int.from_bytes(one.frame[4:8])) for one in outcomes]

    return run


def flow(dice: random.Random, version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Addresses and ports of a flow, there and back."""
    a, b = (f"10.{dice.randrange(256)}.{dice.randrange(256)}.{n}" for n in (1, 2))
    if version == 6:
        a, b = (f"2001:db8:{dice.randrange(65536):x}::{n}" for n in (1, 2))
    p, q = dice.randrange(65536), dice.randrange(65536)
    return {"src": a, "dst": b, "sport": p, "dport": q}, {"src": b, "dst": a, "sport": q, "dport": p}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("make", [udp, tcp])
def test_both_directions_of_many_flows_evenly(told: Any, make: Any, version: int) -> None:
    dice = random.Random(version)
    flows = [flow(dice, version) for _ in range(500)]
    there = told(make(**one) for one, _ in flows)
    assert there == told(make(b"longer", **back) for _, back in flows)
    assert len(set(there)) == 500
    each = Counter(worker for _, worker in there)
    assert sorted(each) == list(range(WORKERS))
    assert min(each.values()) > 60


def test_what_has_no_ports_goes_by_addresses_and_protocol(told: Any) -> None:
    ends, back = {"src": "10.0.0.1", "dst": "10.0.0.2"}, {"src": "10.0.0.2", "dst": "10.0.0.1"}
    request, reply, other, udp_there = told(
        [icmp_echo(identifier=7, **ends), icmp_echo(identifier=9, reply=True, **back), ipv4(protocol=47, **ends),
         udp(**ends)]
    )  # fmt: skip
    assert request == reply
    assert len({request, other, udp_there}) == 3


def test_fragments_go_by_addresses_only(told: Any) -> None:
    ends, back = {"src": "10.0.0.1", "dst": "10.0.0.2"}, {"src": "10.0.0.2", "dst": "10.0.0.1"}
    first, again, later, answer = told(
        [udp(sport=1, dport=2, more_fragments=True, **ends), udp(sport=3, dport=4, more_fragments=True, **ends),
         ipv4(b"rest of it", protocol=17, fragment_offset=8, **ends), udp(more_fragments=True, **back)]
    )  # fmt: skip
    assert first == again == later == answer


def test_what_is_not_ip_has_no_flow(told: Any) -> None:
    assert told([bytes(12) + b"\x08\x06" + bytes(46)]) == [(0, 0)]
    assert told([ipv6(b"", next_header=59)])[0][0] != 0


def test_alone_a_worker_has_every_flow() -> None:
    assert set(Pipeline(parse, by_flow).run_once([udp(sport=n) for n in range(20)])) == {"pass"}
