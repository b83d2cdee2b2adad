"""`libfp.tables.Flow`: what stages do with flows, how flows end, who makes room, and what Python sees of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.errors import BadInput
from libfp.jit import BOUNDSCHECK, INTERPRETED, kernel, load64
from libfp.stages import parse
from libfp.tables import Flow, FlowKey, FlowPart
from libfp.tables import flow_record as record
from libfp.tables.flow_wheel import LOOKS, turn
from libfp.testing import icmp_echo, ipv4, tcp, udp

UDP = 17


@kernel
def _enter(view, src, sport, dst, dport, assured, seconds):  # type: ignore[no-untyped-def]
    """Find or make a UDP flow: 1 found, 2 the answer's direction, 4 new."""
    flow = view.enter4(src, sport, dst, dport, UDP)
    if assured != 0:
        flow.assured = True
    if seconds != 0:
        flow.keep(seconds)
    return flow.bits


@kernel
def _find(view, src, sport, dst, dport):  # type: ignore[no-untyped-def]
    return view.find4(src, sport, dst, dport, UDP).bits


@kernel
def _flood(view, first, count):  # type: ignore[no-untyped-def]
    """So many new flows, each from another source; how many were refused."""
    refused = 0
    for i in range(first, first + count):
        refused += not view.enter4(i, 1024 + i & 0xFFFF, 1 << 31, 80, 6).found
    return refused


@kernel
def _turn(view, now):  # type: ignore[no-untyped-def]
    return turn(view.four, now)


@stage
def track(packet: Any, flows: Any) -> None:
    """What most tests need: counts packets and bytes, assures what is answered, tells what it saw by the verdict."""
    flow = flows.enter(packet)
    if not flow.found:
        packet.drop("none")
        return
    flow.add(0, 1)
    flow.add(1, packet.length)
    if flow.reply:
        flow.state = 1
        flow.assured = True
    flow.touch()
    if packet.is_udp and packet.udp.dport == 9:
        flow.remove()
        packet.drop("removed")
    elif flow.new:
        packet.drop("new")
    elif flow.reply:
        packet.drop("reply")
    else:
        packet.drop("known")


@pytest.fixture(scope="module")
def tracked() -> tuple[Pipeline, Flow]:
    flows = Flow(capacity=100)
    return Pipeline(parse, track(flows)), flows


@pytest.fixture
def part() -> Iterator[FlowPart]:
    """Room for 1000 IPv4 flows, by hand: time is what `_turn` says."""
    flows = Flow(capacity=1000, value=None, timeouts=[1], capacity6=0)
    made = flows.join(3)
    yield made
    flows.leave(made)


def settle(part: FlowPart, now: int) -> None:
    """Turns of the loop at tick `now` until there is nothing to do."""
    while _turn(part.view, now):
        pass


def test_two_directions_are_one_flow(tracked: tuple[Pipeline, Flow]) -> None:
    pipeline, flows = tracked
    there = {"src": "10.0.0.9", "dst": "10.0.0.1", "sport": 1000, "dport": 53}
    back = {"src": "10.0.0.1", "dst": "10.0.0.9", "sport": 53, "dport": 1000}
    assert pipeline.run_once([udp(**there), udp(**there), udp(**back), udp(**there), tcp(**back), tcp(**there)]) == [
        "drop new", "drop known", "drop reply", "drop known", "drop new", "drop reply",
    ]  # fmt: skip
    [part] = flows.parts
    key = FlowKey("10.0.0.9", 1000, "10.0.0.1", 53, UDP)
    assert sorted(part) == sorted([key, FlowKey("10.0.0.1", 53, "10.0.0.9", 1000, 6)])
    seen = part[key]
    assert (seen.state, seen.assured, seen.value) == (1, True, (4, 4 * len(udp(**there))))
    assert 0 <= seen.age < 60
    assert 120 < seen.left <= 180
    assert part[key.dst, key.dport, key.src, key.sport, key.protocol].value[0] == 4
    assert dict(part.items())[FlowKey("10.0.0.1", 53, "10.0.0.9", 1000, 6)].value[0] == 2
    with pytest.raises(KeyError):
        part[key._replace(protocol=132)]


PAIRS = {
    "IPv6": (udp(src="fd00::9", dst="fd00::1", sport=5, dport=6), udp(src="fd00::1", dst="fd00::9", sport=6, dport=5)),
    "IPv6, high words": (
        tcp(src="fd01::1", dst="fd00::9", sport=5, dport=5),
        tcp(src="fd00::9", dst="fd01::1", sport=5, dport=5),
    ),
    "IPv6, ports decide": (
        tcp(src="fd01::1", dst="fd01::1", sport=7, dport=5),
        tcp(src="fd01::1", dst="fd01::1", sport=5, dport=7),
    ),
    "addresses above 2**31": (
        udp(src="250.0.0.1", dst="10.0.0.1", sport=1, dport=2),
        udp(src="10.0.0.1", dst="250.0.0.1", sport=2, dport=1),
    ),
    "no ports": (
        ipv4(b"", protocol=47, src="1.1.1.1", dst="2.2.2.2"),
        ipv4(b"", protocol=47, src="2.2.2.2", dst="1.1.1.1"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_answers(tracked: tuple[Pipeline, Flow], name: str) -> None:
    there, back = PAIRS[name]
    assert tracked[0].run_once([there, back, there]) == ["drop new", "drop reply", "drop known"]


def test_ping_has_an_identifier_for_ports(tracked: tuple[Pipeline, Flow]) -> None:
    pipeline, flows = tracked
    request = icmp_echo(src="10.1.0.1", dst="10.1.0.2", identifier=77)
    other = icmp_echo(src="10.1.0.1", dst="10.1.0.2", identifier=78)
    assert pipeline.run_once([request, request, other]) == ["drop new", "drop known", "drop new"]
    assert ("10.1.0.1", 77, "10.1.0.2", 77, 1) in flows.parts[0]


def test_what_is_no_flow(tracked: tuple[Pipeline, Flow]) -> None:
    arp = b"\xff" * 6 + b"\x02" * 6 + b"\x08\x06" + bytes(46)
    assert tracked[0].run_once([arp]) == ["drop none"]


def test_remove_and_the_next_of_that_key(tracked: tuple[Pipeline, Flow]) -> None:
    pipeline, flows = tracked
    before = flows.counts
    assert pipeline.run_once([udp(dport=9, src="10.9.0.1"), udp(dport=9, src="10.9.0.1")]) == ["drop removed"] * 2
    assert (flows.counts.created, flows.counts.removed) == (before.created + 2, before.removed + 2)


def test_time_in_a_pipeline(tracked: tuple[Pipeline, Flow]) -> None:
    pipeline, flows = tracked
    packet = udp(src="10.7.0.1", sport=7, dport=7)
    [part] = flows.parts
    assert pipeline.run_once([packet]) == ["drop new"]
    part.pass_time(29)
    assert pipeline.run_once([packet]) == ["drop known"]
    part.pass_time(29)
    assert pipeline.run_once([packet]) == ["drop known"]
    part.pass_time(31)
    assert pipeline.run_once([packet]) == ["drop new"]
    part.pass_time(3600)
    for _ in range(4096 // LOOKS + 3):  # packets or not
        pipeline.run_once([])
    assert len(part) == len(flows) == 0
    assert list(part) == []


@stage.burst
def track_burst(burst: Any, flows: Any) -> None:
    flows.find_burst(burst)
    for i in range(burst.count):
        flow = flows.at(i)
        if flow.found and burst.packet(i).udp.dport == 9:
            flow.remove()
            burst.drop(i, "removed")
        elif flow.found:
            flow.touch()
            burst.drop(i, "known")
    for i in range(burst.count):
        if burst.is_live(i):
            flow = flows.enter_at(i)
            flow.add(0, 1)
            if not flow.found:
                burst.drop(i, "none")
            elif flow.new:
                burst.drop(i, "new")
            elif flow.reply:
                burst.drop(i, "reply")
            else:
                burst.drop(i, "again")


def test_bursts() -> None:
    flows = Flow(capacity=100, value="u64")
    pipeline = Pipeline(parse, track_burst(flows))
    one, two = udp(src="10.0.0.1", sport=1, dport=5), udp(src="fd00::1", dst="fd00::2", sport=1, dport=5)
    bye, arp = udp(src="10.0.0.3", dport=9), b"\xff" * 12 + b"\x08\x06" + bytes(46)
    told = ["new", "new", "again", "none", "new"]  # the second of two in one burst finds what the first made
    assert pipeline.run_once([one, two, one, arp, bye]) == [f"drop {word}" for word in told]
    told = ["known", "removed", "known", "new", "none"]  # what the first removed is gone
    assert pipeline.run_once([two, bye, one, bye, arp]) == [f"drop {word}" for word in told]
    many = [udp(src=f"10.1.0.{i % 50}", sport=i % 50, dport=5) for i in range(64)]
    assert pipeline.run_once(many) == ["drop new"] * 50 + ["drop again"] * 14
    assert pipeline.run_once(many[::-1]) == ["drop known"] * 64
    assert len(flows) == 53


def test_without_room_for_ipv6() -> None:
    flows = Flow(capacity=10, capacity6=0)
    part = flows.join(0)
    assert part.view.six == 0
    assert ("::1", 1, "::2", 2, UDP) not in part
    flows.leave(part)


def test_flows_expire_at_their_deadline_and_their_slots_are_given_back(part: FlowPart) -> None:
    view = part.view
    for i in range(100):
        assert _enter(view, i, 1, 1 << 31, 2, 0, i % 50 + 1) & record.NEW
    for second in range(1, 52):
        settle(part, 100 * second - 1)
        assert sum(_find(view, i, 1, 1 << 31, 2) & 1 for i in range(100)) == 2 * (51 - second)
        assert len(part) == 2 * (51 - second), "the wheel is on time"
        settle(part, 100 * second)
        assert sum(_find(view, i, 1, 1 << 31, 2) & 1 for i in range(100)) == 2 * (50 - second if second < 51 else 0)
    assert part.counts.expired == 100


def test_a_deadline_may_move_either_way(part: FlowPart) -> None:
    view = part.view
    _enter(view, 1, 1, 2, 2, 0, 20)
    settle(part, 1000)
    _enter(view, 1, 1, 2, 2, 0, 200)  # later: the wheel finds it alive after 20 s, and again once a revolution
    settle(part, 10_000)
    assert _find(view, 1, 1, 2, 2)
    _enter(view, 1, 1, 2, 2, 0, 1)  # sooner: the wheel is late, nobody else is
    settle(part, 10_100)
    assert _find(view, 1, 1, 2, 2) == 0
    assert len(part) == 1
    settle(part, 10_100 + record.WHEEL_SLOTS)
    assert len(part) == 0
    assert part.counts.expired == 1


def test_ten_years(part: FlowPart) -> None:
    """Ticks pass 2**32 on the way. A flow that is touched in time stays, one with the longest timeout too."""
    view, longest = part.view, record.LONGEST // 100
    _enter(view, 1, 1, 2, 2, 0, longest)
    _enter(view, 3, 1, 4, 2, 0, longest)
    now = 0
    for _ in range(20):
        now += 100 * (longest - 1)
        settle(part, now)
        assert _enter(view, 1, 1, 2, 2, 0, longest) == record.FOUND
    assert _find(view, 3, 1, 4, 2) == 0
    assert len(part) == 1


def test_however_many_expire_at_once_a_turn_is_short(part: FlowPart) -> None:
    assert _flood(part.view, 0, 900) == 0
    made = len(part)
    turns = 0
    while _turn(part.view, 3000):
        turns += 1
        left = len(part)
        assert made - left <= LOOKS * turns
    assert len(part) == 0
    assert turns >= made // LOOKS
    assert _turn(part.view, 3000) == 0


def test_a_worker_that_stood_still_looks_at_each_list_once(part: FlowPart) -> None:
    _flood(part.view, 0, 500)
    now, turns = 10**9, 1
    while _turn(part.view, now):
        turns += 1
    assert len(part) == 0
    assert turns <= (record.WHEEL_SLOTS + 500) // LOOKS + 2


def test_a_flood_pushes_out_what_is_not_assured_alone(part: FlowPart) -> None:
    view, count = part.view, 20_000 if INTERPRETED else 1_000_000
    for i in range(400):
        assert _enter(view, 1 << 30 | i, 1, 1 << 31, 2, 1, 86_400) & record.NEW
    settle(part, 1)
    _flood(view, 0, count)
    assert all(_find(view, 1 << 30 | i, 1, 1 << 31, 2) & 1 for i in range(400))
    counts = part.counts
    assert counts.created + counts.refused == count + 400
    assert counts.refused < count // 1000, "beside 400 of 1000, hardly any 16 slots are all assured"
    assert counts.expired == counts.removed == 0
    assert counts.created - counts.evicted == len(part) > 1000


def test_the_one_that_has_least_to_live_makes_room(part: FlowPart) -> None:
    """... and one that has expired before all others, assured or not."""
    view = part.view
    for i in range(300):
        _enter(view, i, 1, 1 << 31, 2, 0, 1000)
    for i in range(300, 4000):
        _enter(view, i, 1, 1 << 31, 2, 0, 10)
    full, evicted = len(part), part.counts.evicted
    for i in range(4000, 4200):
        assert _enter(view, i, 1, 1 << 31, 2, 1, 500) & record.NEW
    assert len(part) > full - 10, "it was nearly full"
    assert all(_find(view, i, 1, 1 << 31, 2) for i in [*range(300), *range(4000, 4200)])
    assert evicted + 190 < part.counts.evicted <= evicted + 200
    full, evicted = len(part), part.counts.evicted
    assert _turn(view, 60_000), "all but the first 300 have expired, and the wheel has seen a few of them"
    expired = part.counts.expired
    for i in range(4200, 4300):
        assert _enter(view, i, 1, 1 << 31, 2, 0, 10) & record.NEW
    assert part.counts.evicted == evicted
    assert part.counts.expired > expired + 50
    assert all(_find(view, i, 1, 1 << 31, 2) for i in range(300))


def test_where_all_are_assured_the_new_one_is_refused(part: FlowPart) -> None:
    view = part.view
    for i in range(3000):
        _enter(view, i, 1, 1 << 31, 2, 1, 10)
    full, before = len(part), part.counts
    assert full == 8 * (1000 * 10 // 64 + 1), "every slot"
    assert before.refused >= 3000 - full
    assert _enter(view, 9999, 1, 1 << 31, 2, 0, 0) == 0
    assert part.counts.refused == before.refused + 1
    assert len(part) == full


def test_no_two_tables_have_the_same_hash() -> None:
    flows = Flow(capacity=10)
    one, two = flows.join(0), flows.join(1)
    assert one.view.four != two.view.four
    assert load64(one.view.four + record.SECRETS) != load64(two.view.four + record.SECRETS)
    flows.leave(one)
    flows.leave(two)


def test_memory() -> None:
    flows = Flow(capacity=1_000_000, capacity6=0)
    assert 60e6 < flows.memory < 62e6
    assert 90e6 < Flow(capacity=1_000_000).memory - flows.memory < 92e6
    part = flows.join(0)
    assert part._tables[0].arena.size in range(flows.memory, flows.memory + 64)
    flows.leave(part)


def test_parts_end_and_counts_stay() -> None:
    flows = Flow(capacity=10, capacity6=0)
    part = flows.join(5)
    _enter(part.view, 1, 1, 2, 2, 0, 0)
    assert (part.worker, len(part), len(flows), flows.parts) == (5, 1, 1, [part])
    walk = iter(part)
    flows.leave(part)
    assert list(walk) == []
    assert (len(part), len(flows), flows.parts, flows.counts.created) == (0, 0, [], 1)
    with pytest.raises(KeyError):
        part["0.0.0.1", 1, "0.0.0.2", 2, UDP]


@pytest.mark.parametrize(
    "given",
    [{"capacity": 0}, {"capacity": 1 << 40}, {"capacity6": -1}, {"value": "f8"}, {"value": ("u64",) * 9},
     {"timeouts": []}, {"timeouts": [0]}, {"timeouts": [30] * 17}, {"timeouts": [1 << 30]}],
)  # fmt: skip
def test_refuses(given: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Flow(**given)


@pytest.mark.parametrize(
    "key", [1, (1, 2), ("10.0.0.1", 1, "::1", 2, 6), ("x", 1, "y", 2, 6), ("::1", 65536, "::2", 1, 6),
            ("10.0.0.1", 1, "10.0.0.2", 2, 256), ("10.0.0.1", "1", "10.0.0.2", 2, 6)],
)  # fmt: skip
def test_refuses_keys(part: FlowPart, key: Any) -> None:
    with pytest.raises(BadInput):
        part[key]


@pytest.mark.skipif(not INTERPRETED or BOUNDSCHECK, reason="unchecked when compiled: it is nobody's word then")
def test_a_value_it_has_not_is_nobodys(part: FlowPart) -> None:
    with pytest.raises(IndexError):
        part.view.enter4(1, 2, 3, 4, 5).add(0, 1)
