"""From the kernel's state to forwarding tables, without a kernel: decisions, host entries, order of writes."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.errors import TableFull
from libfp.linux import rtnetlink as rt
from libfp.linux.fib import Fib
from libfp.linux.netlink import NLM_F_APPEND
from libfp.linux.rtnetlink import Hop, Link, Neighbour, Prefix, Route
from libfp.linux.state import Changes, State
from libfp.stages.next_hops import Drop, Forward, Multipath, Punt
from libfp.testing.plain_routes import Action, PlainRoutes

PORTS = {2: 0, 3: 1}  # link 4 is no port
UP = rt.IFF_UP | rt.IFF_LOWER_UP


def mac(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, number])


def link(index: int, flags: int = UP, mtu: int = 1500) -> Link:
    return Link(index, f"r{index}", flags, mtu, mac(index), rt.ARPHRD_ETHER, "veth", 0, "")


def packed(address: str) -> bytes:
    return ipaddress.IPv4Address(address).packed


def prefix(text: str) -> Prefix:
    network = ipaddress.IPv4Network(text)
    return Prefix(int(network.network_address), network.prefixlen)


def unicast(*hops: Hop, metric: int = 0, **more: Any) -> Route:
    return Route(254, 0, metric, rt.UNICAST, 0, hops, **more)


class Net:
    """A state with three links, and the tables made of it."""

    def __init__(self, capacity: int = 1000) -> None:
        self.state = State()
        self.state.links = {index: link(index) for index in (2, 3, 4)}
        self.routes = PlainRoutes(capacity)
        self.fib = Fib(self.routes, PORTS)  # type: ignore[arg-type]

    def route(self, text: str, *routes: Route) -> None:
        for route in routes:
            self.state.rib.add(prefix(text), route, NLM_F_APPEND)
        self.update(prefixes={prefix(text)})

    def unroute(self, text: str) -> None:
        for route in self.state.rib.routes[prefix(text)]:
            self.state.rib.remove(prefix(text), route)
        self.update(prefixes={prefix(text)})

    def neighbour(self, index: int, address: str, state: int = rt.NUD_REACHABLE, number: int = 9) -> None:
        key = index, packed(address)
        self.state.neighbours[key] = Neighbour(*key, state, mac(number))
        self.update(neighbours={key})

    def update(self, **changes: Any) -> None:
        self.fib.update(self.state, Changes(**changes))

    def action(self, address: str) -> Action:
        return self.routes.action(int(ipaddress.IPv4Address(address)))


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        (rt.LOCAL, Punt("local")),
        (rt.BROADCAST, Punt("broadcast")),
        (rt.ANYCAST, Punt("local")),
        (rt.MULTICAST, Punt("multicast")),
        (rt.BLACKHOLE, Drop("blackhole")),
        (rt.UNREACHABLE, Punt("unreachable")),
        (rt.PROHIBIT, Punt("prohibit")),
        (rt.THROW, Punt("no-route")),
        (77, Punt("via-linux")),
    ],
)
def test_types(kind: int, action: Action) -> None:
    net = Net()
    net.route("10.9.0.0/16", unicast(Hop(2))._replace(type=kind))
    assert net.action("10.9.0.1") == action


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        (rt.NUD_PERMANENT, True),
        (rt.NUD_NOARP, True),
        (rt.NUD_REACHABLE, True),
        (rt.NUD_PROBE, True),
        (rt.NUD_STALE, True),
        (rt.NUD_DELAY, True),
        (rt.NUD_INCOMPLETE, False),
        (rt.NUD_FAILED, False),
        (0, False),
    ],
)
def test_neighbour_states(state: int, usable: bool) -> None:
    net = Net()
    net.route("10.9.0.0/16", unicast(Hop(3, packed("10.0.2.9"))))
    net.neighbour(3, "10.0.2.9", state)
    assert net.action("10.9.0.1") == (Forward(1, mac(9), mac(3), 1500) if usable else Punt("no-neighbour"))


def test_lowest_metric_then_the_next_that_holds() -> None:
    net = Net()
    net.route("0.0.0.0/0", unicast(Hop(4), metric=20), unicast(Hop(2, dead=True), Hop(3, packed("10.0.2.9"))))
    net.neighbour(3, "10.0.2.9")
    assert net.action("192.0.2.1") == Forward(1, mac(9), mac(3), 1500)
    net.state.links.pop(3)
    net.update(prefixes={prefix("0.0.0.0/0")})
    assert net.action("192.0.2.1") == Punt("via-linux")


def test_routes_that_only_linux_can_follow() -> None:
    net = Net()
    net.route("10.1.0.0/16", unicast(Hop(4, packed("10.0.3.9"))))
    net.route("10.2.0.0/16", unicast(Hop(3, packed("10.0.2.9"), encapsulated=True)))
    net.route("10.3.0.0/16", unicast(Hop(3, packed("10.0.2.9")))._replace(tos=8))
    net.neighbour(3, "10.0.2.9")
    assert {net.action(f"10.{number}.0.1") for number in (1, 2, 3)} == {Punt("via-linux")}


def test_a_link_that_is_down_or_without_carrier_sends_nothing() -> None:
    net = Net()
    net.route("10.9.0.0/16", unicast(Hop(3, packed("10.0.2.9"))))
    net.neighbour(3, "10.0.2.9")
    for flags in (rt.IFF_UP, 0):
        net.state.links[3] = link(3, flags)
        net.update(links={3})
        assert net.action("10.9.0.1") == Punt("no-neighbour")
    net.state.links[3] = link(3, mtu=9000)
    net.update(links={3})
    assert net.action("10.9.0.1") == Forward(1, mac(9), mac(3), 9000)


def test_used_neighbours() -> None:
    net = Net()
    net.route("10.0.2.0/24", unicast(Hop(3)))
    net.neighbour(3, "10.0.2.9")
    net.routes.next_hops.touch(net.routes.fib.lookup(int(ipaddress.IPv4Address("10.0.2.9"))))
    net.routes.next_hops.touch(net.routes.fib.lookup(int(ipaddress.IPv4Address("10.0.2.77"))))
    assert [(via.link, via.gateway) for via in net.fib.publisher.used()] == [(3, packed("10.0.2.9"))]
    assert net.fib.publisher.used() == []


def test_suspended() -> None:
    net = Net()
    net.route("10.9.0.0/16", unicast(Hop(3, packed("10.0.2.9"))))
    net.route("10.8.0.0/16", unicast()._replace(type=rt.BLACKHOLE))
    net.neighbour(3, "10.0.2.9")
    net.fib.publisher.suspend(True)
    net.route("10.7.0.0/16", unicast(Hop(3, packed("10.0.2.9")), mtu=1400))
    assert {net.action(f"10.{number}.0.1") for number in (7, 8, 9)} == {Punt("via-linux")}
    net.fib.publisher.suspend(False)
    assert net.action("10.9.0.1") == Forward(1, mac(9), mac(3), 1500)
    assert net.action("10.7.0.1") == Forward(1, mac(9), mac(3), 1400)
    assert net.action("10.8.0.1") == Drop("blackhole")


def test_what_did_not_fit_is_written_when_there_is_room() -> None:
    net = Net(capacity=2)
    net.route("10.1.0.0/16", unicast()._replace(type=rt.BLACKHOLE))
    net.route("10.2.0.0/16", unicast()._replace(type=rt.BLACKHOLE))
    with pytest.raises(TableFull):
        net.route("10.3.0.0/16", unicast()._replace(type=rt.PROHIBIT))
    with pytest.raises(TableFull):
        net.route("10.4.0.0/16", unicast()._replace(type=rt.PROHIBIT))
    with pytest.raises(TableFull):
        net.unroute("10.1.0.0/16")
    net.unroute("10.4.0.0/16")
    assert net.action("10.1.0.1") == Punt("no-route")
    assert net.action("10.3.0.1") == Punt("prohibit")


# -- whatever happens in whatever order, the tables are those that the final state alone would make

addresses = st.sampled_from([f"10.0.{net}.{host}" for net in (0, 1, 2) for host in (0, 1, 2, 9, 128)])
prefixes = st.builds(
    lambda address, length: Prefix(int(ipaddress.IPv4Address(address)) >> (32 - length) << (32 - length), length),
    addresses,
    st.sampled_from((0, 8, 16, 22, 24, 25, 30, 32)),
)
hops = st.builds(
    Hop,
    st.sampled_from((2, 3, 4, 5)),
    st.one_of(st.just(b""), addresses.map(packed)),
    weight=st.integers(1, 256),
)
routes = st.builds(
    Route,
    table=st.sampled_from((254, 254, 255)),
    tos=st.sampled_from((0, 0, 0, 4)),
    metric=st.sampled_from((0, 10)),
    type=st.sampled_from((rt.UNICAST,) * 6 + (rt.LOCAL, rt.BLACKHOLE, rt.THROW, rt.BROADCAST)),
    scope=st.just(0),
    hops=st.lists(hops, min_size=1, max_size=2).map(tuple),
    mtu=st.sampled_from((0, 0, 1400)),
)
Step = Callable[[State, Changes], None]


@st.composite
def add_route(draw: st.DrawFn) -> Step:
    where, route = draw(prefixes), draw(routes)

    def step(state: State, changes: Changes) -> None:
        if state.rib.add(where, route, draw_flags):
            changes.prefixes.add(where)

    draw_flags = draw(st.sampled_from((0, 0x100, 0x400, 0x800)))
    return step


@st.composite
def remove_routes(draw: st.DrawFn) -> Step:
    where = draw(prefixes)

    def step(state: State, changes: Changes) -> None:
        for route in state.rib.routes.get(where, ()):
            if state.rib.remove(where, route):
                changes.prefixes.add(where)

    return step


@st.composite
def change_neighbour(draw: st.DrawFn) -> Step:
    key = draw(st.sampled_from((2, 3, 4))), packed(draw(addresses))
    state_now = draw(st.sampled_from((rt.NUD_REACHABLE, rt.NUD_STALE, rt.NUD_FAILED, None)))
    number = draw(st.integers(1, 3))

    def step(state: State, changes: Changes) -> None:
        if state_now is None:
            state.neighbours.pop(key, None)
        else:
            state.neighbours[key] = Neighbour(*key, state_now, mac(number))
        changes.neighbours.add(key)

    return step


@st.composite
def change_link(draw: st.DrawFn) -> Step:
    index, what = draw(st.sampled_from((2, 3, 4))), draw(st.sampled_from(("down", "up", "mtu")))

    def step(state: State, changes: Changes) -> None:
        if what == "mtu":
            state.links[index] = link(index, state.links[index].flags, 1300)
        else:
            state.links[index] = link(index, UP if what == "up" else 0)
            changes.add_rows(32, state.rib.link_down(index) if what == "down" else state.rib.link_up(index))
        changes.links.add(index)

    return step


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.one_of(add_route(), remove_routes(), change_neighbour(), change_link()), max_size=5)))
def test_tables_depend_on_the_state_alone(batches: list[list[Step]]) -> None:
    net = Net()
    for batch in batches:
        changes = Changes()
        for step in batch:
            step(net.state, changes)
        net.fib.update(net.state, changes)
    the_same_as_afresh(net)


def what(routes: PlainRoutes, action: Action) -> object:
    """An action without the numbers that next hops happen to have."""
    if isinstance(action, Multipath):
        return frozenset((what(routes, routes.next_hops[path]), weight) for path, weight in action.paths)
    return action


def the_same_as_afresh(net: Net) -> None:
    fresh_routes = PlainRoutes()
    Fib(fresh_routes, PORTS).update(net.state, net.state.differences(State()))  # type: ignore[arg-type]

    def contents(routes: PlainRoutes) -> dict[tuple[int, int], object]:
        return {key: what(routes, routes.next_hops[index]) for key, index in routes.fib.entries.items()}

    assert contents(net.routes) == contents(fresh_routes)
    assert len(net.routes.next_hops.actions) == len(fresh_routes.next_hops.actions), "next hops that nothing uses"


PLACES = [int(ipaddress.IPv4Address(f"10.0.{net}.{host}")) for net in (0, 1, 2, 3) for host in (0, 1, 2, 9, 128, 255)]
PLACES += [0, 10 << 24, 0xC0000201]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(add_route(), change_neighbour(), change_link()), min_size=5, max_size=40), st.integers(1, 3))
def test_after_each_step_whatever_finds_a_route_finds_its_own(changes: list[Step], chunk: int) -> None:
    net = Net()
    for step in changes:
        step(net.state, Changes())
    whole = PlainRoutes()
    Fib(whole, PORTS).update(net.state, net.state.differences(State()))  # type: ignore[arg-type]
    due = [what(whole, whole.action(place)) for place in PLACES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("libfp.linux.fib.CHUNK", chunk)
        net.fib.begin(net.state, net.state.differences(State()))
        total, left = net.fib.left, 1
        while left:
            net.fib.step()
            left = net.fib.left
            found = [what(net.routes, net.routes.action(place)) for place in PLACES]
            assert all(one in (expected, Punt("via-linux")) for one, expected in zip(found, due, strict=True)), left
    assert net.fib.done == total
    assert found == due
    assert net.routes.complete
    the_same_as_afresh(net)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.one_of(add_route(), remove_routes(), change_neighbour(), change_link()), max_size=8)),
    st.lists(st.integers(0, 3), min_size=1),
)
def test_what_changes_between_steps_is_not_forgotten(batches: list[list[Step]], steps: list[int]) -> None:
    net = Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("libfp.linux.fib.CHUNK", 1)
        for number, batch in enumerate(batches):
            changes = Changes()
            for step in batch:
                step(net.state, changes)
            net.fib.begin(net.state, changes)
            for _ in range(steps[number % len(steps)]):
                net.fib.step()
        net.fib.update(net.state, Changes())
    the_same_as_afresh(net)


def test_without_room_for_a_next_hop_there_is_no_going_on_until_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, refusing = Net(), [True]
    real = net.routes.next_hops.add

    def add(action: Action) -> int:
        if refusing[0]:
            raise TableFull("no room for more next hops")
        return real(action)

    monkeypatch.setattr(net.routes.next_hops, "add", add)
    with pytest.raises(TableFull):
        net.route("10.9.0.0/16", unicast(Hop(3, packed("10.0.2.9"))))
    assert (net.fib.left, net.fib.busy) == (1, False)
    assert net.action("192.0.2.1") == Punt("via-linux")
    refusing[0] = False
    net.neighbour(3, "10.0.2.9")
    assert net.action("10.9.0.1") == Forward(1, mac(9), mac(3), 1500)
    assert net.action("192.0.2.1") == Punt("no-route")
