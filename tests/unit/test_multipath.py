"""Multipath routes: flows spread by weight, stay where they are, and move only when they must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from libfp import Pipeline
from libfp.errors import BadInput, TableFull
from libfp.jit import INTERPRETED, Arena, kernel, load64, mul64
from libfp.jit.primitive import signed64
from libfp.stages import Drop, Forward, Multipath, Punt, Routes, forward, parse
from libfp.stages.multipath import mix
from libfp.stages.next_hops import BUCKETS, share
from libfp.stages.routes import FIELD_DPORT, FIELD_DST, FIELD_LABEL, FIELD_PROTOCOL, FIELD_SPORT, FIELD_SRC
from libfp.testing import icmp_error, ipv4, ipv6, udp

pytestmark = pytest.mark.timeout(300)

L4 = FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_SPORT | FIELD_DPORT


class Router:
    """A default route over four paths, by ports 0 to 3."""

    def __init__(self) -> None:
        self.routes = Routes(routes=100, next_hops=256)
        self.hops = [self.routes.next_hops.add(self.path(port)) for port in range(4)]
        self.group = self.routes.next_hops.add(Multipath(tuple((hop, 1) for hop in self.hops)))
        self.routes.fib["0.0.0.0/0"] = self.routes.fib6["::/0"] = self.group
        self.pipeline = Pipeline(parse, forward(self.routes))

    @staticmethod
    def path(port: int) -> Forward:
        return Forward(port, bytes([2, 0, 0, 0, 1, port]), bytes([2, 0, 0, 0, 2, port]), 1500)

    def spread(self, *weights: int) -> None:
        paths = tuple((hop, weight) for hop, weight in zip(self.hops, weights, strict=False) if weight)
        self.routes.next_hops[self.group] = Multipath(paths)

    def ports(self, frames: Iterable[bytes]) -> list[Any]:
        """Where packets that come by a fifth port leave."""
        return [one.port for one in self.pipeline.run_once(list(frames), port=4, ports=5)]


@pytest.fixture(scope="module")
def shared() -> Router:
    return Router()


@pytest.fixture
def router(shared: Router) -> Router:
    shared.spread(1, 1, 1, 1)
    shared.routes.set_hashing(FIELD_SRC | FIELD_DST)
    shared.routes.set_hashing(FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_LABEL, version=6)
    shared.routes.set_port(0)
    return shared


def by_port(count: int) -> list[bytes]:
    return [udp(b"x", sport=10_000 + k, dport=53) for k in range(count)]


def by_label(count: int) -> list[bytes]:
    return [ipv6(flow_label=k) for k in range(count)]


def by_address(count: int) -> list[bytes]:
    return [udp(b"x", src=f"10.1.{k >> 8}.{k & 255}") for k in range(count)]


def test_flows_between_two_hosts_spread_by_ports_and_keep_their_path(router: Router) -> None:
    assert len(set(router.ports(by_port(1000)))) == 1, "the default policy: addresses alone"
    router.routes.set_hashing(L4)
    first = router.ports(by_port(1000))
    assert first == router.ports(by_port(1000))
    assert all(190 < count < 310 for count in Counter(first).values()), Counter(first)


def test_shares_are_as_weights(router: Router) -> None:
    router.spread(1, 3)
    counts = Counter(router.ports(by_address(1000)))
    assert set(counts) == {0, 1}
    assert 190 < counts[0] < 310


def test_both_directions_of_a_flow_hash_alike(router: Router) -> None:
    router.routes.set_hashing(L4)
    there = [udp(b"x", src="10.0.1.2", dst="10.0.2.2", sport=k, dport=443) for k in range(1, 200)]
    back = [udp(b"x", src="10.0.2.2", dst="10.0.1.2", sport=443, dport=k) for k in range(1, 200)]
    assert router.ports(there) == router.ports(back)


def test_all_fragments_of_a_datagram_take_one_path(router: Router) -> None:
    router.routes.set_hashing(L4)
    for k in range(50):
        whole = udp(bytes(64), src=f"10.1.0.{k}", sport=k + 1)[34:]
        pieces = [
            ipv4(whole[:32], src=f"10.1.0.{k}", protocol=17, more_fragments=True),
            ipv4(whole[32:], src=f"10.1.0.{k}", protocol=17, fragment_offset=32),
        ]
        assert len(set(router.ports(pieces))) == 1
    ports = [udp(bytes(8), src="10.1.0.1", sport=k + 1, more_fragments=True) for k in range(50)]
    assert len(set(router.ports(ports))) == 1, "not even the first fragment hashes on its ports"


def test_an_error_goes_the_way_of_the_flow_it_is_about(router: Router) -> None:
    flows = by_address(100)
    errors = [icmp_error(flow, src="203.0.113.7", dst="10.0.2.2") for flow in flows]
    assert router.ports(errors) == router.ports(flows)


@pytest.mark.parametrize("gone", range(4))
def test_only_flows_of_a_path_that_fails_move(router: Router, gone: int) -> None:
    before = router.ports(by_address(1000))
    router.spread(*(int(port != gone) for port in range(4)))
    during = router.ports(by_address(1000))
    moved = [k for k in range(1000) if before[k] != during[k]]
    assert moved == [k for k in range(1000) if before[k] == gone]
    assert all(250 < count < 420 for count in Counter(during).values())
    router.spread(1, 1, 1, 1)
    after = router.ports(by_address(1000))
    assert {after[k] for k in range(1000) if after[k] != during[k]} == {gone}, "what moves, moves to the new path"
    assert 180 < after.count(gone) < 320


def test_what_a_path_does_is_done_to_its_packets(router: Router) -> None:
    hops = router.routes.next_hops
    try:
        hops[router.hops[1]] = Punt("no-neighbour")
        hops[router.hops[2]] = Drop("blackhole")
        hops[router.hops[3]] = Forward(3, b"a" * 6, b"b" * 6, 68)
        outcomes = router.pipeline.run_once(by_address(200), ports=4)
        assert set(outcomes) == {"forward", "punt no-neighbour", "drop blackhole"}
        assert {one.next_hop for one in outcomes} == set(router.hops), "the path that decided"
        large = {*router.pipeline.run_once([udp(bytes(60), src=f"10.1.0.{k}") for k in range(200)], ports=4)}
        assert large == {"forward", "punt no-neighbour", "drop blackhole", "punt fragment-needed"}
    finally:
        for port in (1, 2, 3):
            hops[router.hops[port]] = router.path(port)


def test_the_way_back_may_be_any_path(router: Router) -> None:
    router.routes.set_port(0, rp_filter=1)
    assert set(router.pipeline.run_once(by_address(50), ports=4)) == {"forward"}
    router.spread(0, 1, 1)
    assert set(router.pipeline.run_once(by_address(50), ports=4)) == {"punt rp-filter"}
    router.routes.set_port(0, rp_filter=2)
    assert set(router.pipeline.run_once(by_address(50), ports=4)) == {"forward"}
    router.routes.set_port(0, rp_filter=1)
    router.spread(1, 1)
    router.routes.next_hops[router.hops[0]] = Punt("no-neighbour")
    assert set(router.pipeline.run_once(by_address(50), ports=4)) == {"punt rp-filter"}, "Linux knows better"
    router.routes.next_hops[router.hops[0]] = router.path(0)
    assert set(router.pipeline.run_once(by_address(50), ports=4)) == {"forward"}


def test_tables_that_are_not_complete(router: Router) -> None:
    """What has a route follows it. Of anything else nothing is concluded: Linux is asked, as often as need be."""
    routes = router.routes
    del routes.fib["0.0.0.0/0"], routes.fib6["::/0"]
    routes.fib["10.0.2.0/24"] = router.hops[1]
    routes.set_local([(0x0A070007, 32)])
    there, elsewhere = udp(src="10.9.0.1", dst="10.0.2.2"), udp(src="10.9.0.1", dst="192.0.2.1")
    both, ours = [there, elsewhere, udp(src="2001:db8::1", dst="2001:db8::2")], udp(src="10.7.0.7", dst="10.0.2.2")
    try:
        assert router.pipeline.run_once(both, ports=4) == ["forward", "punt no-route", "punt no-route"]
        routes.set_complete(False)
        assert router.pipeline.run_once(both, ports=4) == ["forward", "punt via-linux", "punt via-linux"]
        assert router.pipeline.run_once([ours], ports=4) == ["punt via-linux"], "perhaps our own address"
        routes.set_port(0, rp_filter=2)
        assert router.pipeline.run_once([there], ports=4) == ["punt via-linux"], "no route back yet"
    finally:
        routes.set_complete(True)
        routes.set_local(())
        del routes.fib["10.0.2.0/24"]
        routes.fib["0.0.0.0/0"] = routes.fib6["::/0"] = router.group


def test_what_cannot_be_a_group() -> None:
    routes = Routes(routes=10, next_hops=64)
    hop = routes.next_hops.add(Forward(0, b"a" * 6, b"b" * 6, 1500))
    for paths in ((), ((hop, 0),), ((hop + 1, 1),), ((0, 1),), tuple((hop, 1) for _ in range(BUCKETS + 1))):
        with pytest.raises(BadInput):
            routes.next_hops.add(Multipath(paths))
    group = routes.next_hops.add(Multipath(((hop, 1),)))
    with pytest.raises(BadInput):
        routes.next_hops.add(Multipath(((group, 1),)))
    with pytest.raises(BadInput):
        routes.next_hops[group + 1] = Drop("blackhole")  # where its buckets are
    with pytest.raises(TableFull):
        routes.next_hops.add(Multipath(((hop, 1),)))
    routes.next_hops.remove(group)
    assert routes.next_hops.add(Multipath(((hop, 2),))) == group


def test_shares_move_no_more_than_they_must() -> None:
    before = share([(1, 1), (2, 1), (3, 1)])
    after = share([(1, 1), (2, 1), (3, 1), (4, 1)], before)
    assert sum(before != after) == BUCKETS // 4
    assert share([(7, 1)])[0] == 7
    assert sorted(Counter(share([(1, 1), (2, 65536)]).tolist()).values()) == [BUCKETS], "a weight too small to show"


@kernel
def _furthest(keys, count, seeds):  # type: ignore[no-untyped-def]
    """Of the flows at `keys`, spread over four paths with each of so many seeds: how far from its share one gets."""
    furthest = 0
    for seed in range(seeds):
        a = b = c = 0
        for i in range(count):
            path = mix(load64(keys + 8 * i), mul64(seed + 1, 0x1E3779B97F4A7C15)) & BUCKETS - 1
            a, b, c = a + int(path < 64), b + int(path < 128), c + int(path < 192)
        for share_of in (a, b - a, c - b, count - c):
            furthest = max(furthest, abs(share_of - count // 4))
    return furthest


@pytest.mark.skipif(INTERPRETED, reason="millions of products")
@pytest.mark.parametrize("shift", [0, 24, 40, 48])
def test_a_path_has_its_share_whatever_bits_tell_flows_apart(shift: int) -> None:
    """With each of 3,000 seeds; a share is 250 flows, its standard deviation 14."""
    keys = Arena(8 * 1000)
    keys.words[:] = [signed64(k << shift) for k in range(1000)]
    assert _furthest(keys.address, 1000, 3000) < 75


def test_ipv6_flows_spread_by_label_and_by_ports(router: Router) -> None:
    found = router.ports(by_label(1000))
    assert all(190 < count < 310 for count in Counter(found).values()), Counter(found)
    flows = [udp(src=f"2001:db8::{k:x}", dst="2001:db8:2::2") for k in range(1, 100)]
    about = [ipv6(b"\2\0" + bytes(6) + flow[14:], src="2001:db8:7::1", next_header=58) for flow in flows]
    assert router.ports(flows) == router.ports(about), "an error goes the way of the flow it is about"
    router.routes.set_hashing(L4, version=6)
    assert len(set(router.ports(by_label(100)))) == 1
    there = [udp(src="2001:db8::1", dst="2001:db8::2", sport=k, dport=443) for k in range(1, 1001)]
    back = [udp(src="2001:db8::2", dst="2001:db8::1", sport=443, dport=k) for k in range(1, 1001)]
    found = router.ports(there)
    assert found == router.ports(back)
    assert all(190 < count < 310 for count in Counter(found).values()), Counter(found)
    pieces = [ipv6(bytes([17, 0, 0, k]) + bytes(range(k, k + 60)), next_header=44) for k in range(100)]
    assert len(set(router.ports(pieces))) == 1, "fragments hash on addresses"
