"""The mirror against a real kernel: each thing that changes routes, told or untold, arrives in the tables."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.errors import TableFull
from libfp.linux import mirror as mirror_module
from libfp.linux import rtnetlink as rt
from libfp.linux.mirror import LIVE, Mirror
from libfp.linux.netlink import NLM_F_CREATE, Interrupted, Netlink, attribute
from libfp.linux.state import Changes, State
from libfp.stages.next_hops import Drop, Forward, Multipath, Punt
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.plain_routes import Action, PlainRoutes

SERVER_MAC, SERVER = "02:00:00:00:00:99", "10.0.2.9"


class Net:
    """A router with two ports (r0: 10.0.1.0/24, r1: 10.0.2.0/24) and a link that is none (r2: 10.0.3.0/24)."""

    def __init__(self, lab: Lab) -> None:
        self.far, self.router = lab.host("far"), lab.host("router")
        for number, name in enumerate(("r0", "r1", "r2")):
            lab.link(self.far, "far" + name, self.router, name)
            self.router.address(name, f"10.0.{number + 1}.1/24")
        self.router.sysctl("net.ipv4.ip_forward", 1)
        self.router.neighbour("r1", SERVER, SERVER_MAC)
        self.ports = {self.router.index("r0"): 0, self.router.index("r1"): 1}
        self.routes = PlainRoutes()
        self.mirrors: list[Mirror] = []
        self.mirror = self.start(self.routes)

    def start(self, routes: PlainRoutes, **kwargs: Any) -> Mirror:
        mirror: Mirror = self.router.call(Mirror, routes, self.ports, **kwargs)  # type: ignore[arg-type]
        self.mirrors.append(mirror)
        self.router.call(mirror.start)
        return mirror

    def action(self, address: str) -> Action:
        self.mirror.barrier()
        return self.routes.action(int(ipaddress.IPv4Address(address)))

    def paths(self, address: str) -> list[tuple[int | None, str]]:
        """The port and the kind of each path of a multipath route."""
        group = self.action(address)
        assert isinstance(group, Multipath)
        actions = [self.routes.next_hops[path] for path, _ in group.paths]
        return sorted(
            ((getattr(one, "port", None), type(one).__name__) for one in actions), key=lambda one: str(one[::-1])
        )

    def forward(self, mac: str = SERVER_MAC, mtu: int = 1500) -> Forward:
        """What a next hop by r1 does."""

        def raw(text: str) -> bytes:
            return bytes.fromhex(text.replace(":", ""))

        return Forward(1, raw(mac), raw(self.router.mac("r1")), mtu)


@pytest.fixture
def net() -> Iterator[Net]:
    with Lab() as lab:
        net = Net(lab)
        try:
            net.mirror.wait_synced(10)
            yield net
        finally:
            for mirror in net.mirrors:
                mirror.close()


def test_routes_by_type(net: Net) -> None:
    router = net.router
    router.route("10.9.0.0/16", via=SERVER)
    for number, kind in enumerate(("blackhole", "unreachable", "prohibit", "throw")):
        router.route(f"10.9.{number}.0/24", type=kind)
    router.route("10.10.0.0/16", via="10.0.3.9")
    assert net.action("10.9.200.1") == net.forward()
    assert net.action("10.9.0.1") == Drop("blackhole")
    assert net.action("10.9.1.1") == Punt("unreachable")
    assert net.action("10.9.2.1") == Punt("prohibit")
    assert net.action("10.9.3.1") == Punt("no-route")
    assert net.action("10.10.0.1") == Punt("via-linux")
    assert net.action("10.0.2.1") == Punt("local")
    assert net.action("10.0.2.255") == Punt("broadcast")
    assert net.action("192.0.2.1") == Punt("no-route")


def test_neighbours_of_a_connected_prefix(net: Net) -> None:
    assert net.action("10.0.2.8") == Punt("no-neighbour")
    net.router.neighbour("r1", "10.0.2.8", "02:00:00:00:00:08")
    assert net.action("10.0.2.8") == net.forward("02:00:00:00:00:08")
    net.router.neighbour("r1", "10.0.2.8", "02:00:00:00:00:18")
    assert net.action("10.0.2.8") == net.forward("02:00:00:00:00:18")
    net.router.route("10.0.2.8/31", via=SERVER)
    assert net.action("10.0.2.8") == net.forward(), "a longer prefix of the kernel's goes before the neighbour"
    net.router.unroute("10.0.2.8/31")
    net.router.route("10.0.2.8/32", type="blackhole")
    assert net.action("10.0.2.8") == Drop("blackhole")
    net.router.unroute("10.0.2.8/32", type="blackhole")
    assert net.action("10.0.2.8") == net.forward("02:00:00:00:00:18")
    net.router.neighbour("r0", "10.0.2.9", "02:00:00:00:00:19")
    assert net.action("10.0.2.9") == net.forward(), "an entry on another link has no say"
    net.router.neighbour("r1", "10.0.2.8", None)
    assert net.action("10.0.2.8") == Punt("no-neighbour")


def test_routes_by_one_gateway_share_a_next_hop(net: Net) -> None:
    before = len(net.routes.next_hops.actions)
    for number in range(20):
        net.router.route(f"10.20.{number}.0/24", via=SERVER)
    assert net.action("10.20.7.1") == net.forward()
    assert len(net.routes.next_hops.actions) == before, "the neighbour's own entry has it too"
    net.router.neighbour("r1", SERVER, None)
    assert {net.action(f"10.20.{number}.1") for number in range(20)} == {Punt("no-neighbour")}


def test_metrics_fail_over(net: Net) -> None:
    router = net.router
    router.neighbour("r0", "10.0.1.9", "02:00:00:00:00:10")
    router.route("default", via="10.0.1.9", metric=10)
    router.route("default", via=SERVER, metric=20)
    first = net.action("192.0.2.1")
    assert isinstance(first, Forward)
    assert first.port == 0
    router.down("r0")
    assert net.action("192.0.2.1") == net.forward()
    router.up("r0")
    router.route("default", via="10.0.1.9", metric=10)  # gone with the link: Linux does not bring it back either
    assert net.action("192.0.2.1") == Punt("no-neighbour")


def test_link_down_takes_routes_without_a_word(net: Net) -> None:
    router = net.router
    router.route("10.9.0.0/16", via=SERVER)
    router.route("10.9.9.0/24", multipath=[{"gateway": SERVER}, {"gateway": "10.0.1.9"}])
    router.neighbour("r0", "10.0.1.9", "02:00:00:00:00:10")
    assert net.paths("10.9.9.1") == [(0, "Forward"), (1, "Forward")]
    router.down("r1")
    assert net.action("10.9.1.1") == Punt("no-route")
    other = net.action("10.9.9.1")
    assert isinstance(other, Forward), "one path is left"
    assert other.port == 0
    assert net.action("10.0.2.1") == Punt("local"), "the address itself stays"
    router.up("r1")
    assert net.action("10.9.1.1") == Punt("no-route")
    assert net.paths("10.9.9.1") == [(0, "Forward"), (None, "Punt")], "the first hop lives again, and is to be resolved"


def test_source_address_gone_takes_routes_without_a_word(net: Net) -> None:
    net.router.address("r1", "10.0.2.66/32")
    net.router.route("10.9.0.0/16", via=SERVER, prefsrc="10.0.2.66")
    assert net.action("10.9.0.1") == net.forward()
    net.router.address("r1", "10.0.2.66/32", command="del")
    assert net.action("10.9.0.1") == Punt("no-route")


def test_link_removed(net: Net) -> None:
    net.router.route("10.9.0.0/16", via="10.0.3.9")
    net.router.route("10.9.9.0/24", multipath=[{"gateway": SERVER}, {"gateway": "10.0.3.9"}])
    assert net.action("10.9.0.1") == Punt("via-linux")
    net.router.netlink("link", "del", index=net.router.index("r2"))
    assert net.action("10.9.0.1") == Punt("no-route")
    assert net.action("10.9.9.1") == Punt("no-route"), "a multipath route goes whole"


def test_port_removed(net: Net) -> None:
    net.router.route("10.9.0.0/16", via=SERVER)
    net.router.netlink("link", "del", index=net.router.index("r1"))
    assert net.action("10.9.0.1") == Punt("no-route")
    assert net.action(SERVER) == Punt("no-route")


def test_mtu_and_mac_of_the_port(net: Net) -> None:
    net.router.route("10.9.0.0/16", via=SERVER)
    net.router.route("10.9.1.0/24", via=SERVER, metrics={"mtu": 1280})
    net.router.route("10.9.2.0/24", via=SERVER, metrics={"mtu": 9000})
    assert net.action("10.9.0.1") == net.forward()
    assert net.action("10.9.1.1") == net.forward(mtu=1280)
    assert net.action("10.9.2.1") == net.forward()
    net.router.set_mtu("r1", 1400)
    assert net.action("10.9.0.1") == net.forward(mtu=1400)
    net.router.netlink("link", "set", index=net.router.index("r1"), address="02:00:00:00:0a:0a")
    net.router.neighbour("r1", SERVER, SERVER_MAC)  # Linux has forgotten its neighbours there
    moved = net.action("10.9.0.1")
    assert isinstance(moved, Forward)
    assert moved.src == bytes.fromhex("020000000a0a")


def test_carrier(net: Net) -> None:
    net.router.route("10.9.0.0/16", via=SERVER, metric=10)
    net.router.route("10.9.0.0/16", via="10.0.3.9", metric=20)
    assert net.action("10.9.0.1") == net.forward()
    net.far.down("farr1")
    wait_until(lambda: net.action("10.9.0.1") == Punt("no-neighbour"), what="the loss of carrier")
    net.router.sysctl("net.ipv4.conf.r1.ignore_routes_with_linkdown", 1)
    wait_until(lambda: net.action("10.9.0.1") == Punt("via-linux"), what="the second route")
    net.far.up("farr1")
    net.router.neighbour("r1", SERVER, SERVER_MAC)
    wait_until(lambda: net.action("10.9.0.1") == net.forward(), what="the first route again")


def test_tos_routes_are_left_to_linux(net: Net) -> None:
    net.router.route("10.9.0.0/16", via=SERVER)
    net.router.route("10.9.0.0/16", via="10.0.1.9", tos=0x10)
    assert net.action("10.9.0.1") == Punt("via-linux")


def test_routes_under_a_local_prefix_are_left_to_linux(net: Net) -> None:
    net.router.route("10.9.1.0/24", via=SERVER)
    assert net.action("10.9.1.1") == net.forward()
    net.router.route("10.9.0.0/16", dev="lo", type="local", table=255, scope=254)
    assert net.action("10.9.2.1") == Punt("local")
    assert net.action("10.9.1.1") == Punt("via-linux")
    net.router.unroute("10.9.0.0/16", dev="lo", type="local", table=255, scope=254)
    assert net.action("10.9.1.1") == net.forward()


def test_nexthop_objects(net: Net) -> None:
    def ask(kind: int, body: bytes) -> None:
        with Netlink() as netlink:
            netlink.ask(kind, body, 4 | NLM_F_CREATE)

    index = net.router.index("r1")

    def nexthop(kind: int, gateway: str, flags: int = NLM_F_CREATE) -> None:
        body = struct.pack("=BBBxI", rt.AF_INET, 0, 0, 0) + attribute(1, struct.pack("=I", 7))
        if kind == rt.RTM_NEWNEXTHOP:
            body += attribute(5, struct.pack("=I", index))
            body += attribute(6, ipaddress.IPv4Address(gateway).packed)
        with Netlink() as netlink:
            netlink.ask(kind, body, 4 | flags)

    net.router.neighbour("r1", "10.0.2.8", "02:00:00:00:00:08")
    net.router.call(nexthop, rt.RTM_NEWNEXTHOP, SERVER)
    body = struct.pack("=BBBBBBBBI", rt.AF_INET, 16, 0, 0, 254, 4, 0, rt.UNICAST, 0)
    body += attribute(1, bytes([10, 9, 0, 0])) + attribute(30, struct.pack("=I", 7))
    net.router.call(ask, rt.RTM_NEWROUTE, body)
    assert net.action("10.9.0.1") == net.forward()
    net.router.call(nexthop, rt.RTM_NEWNEXTHOP, "10.0.2.8", NLM_F_CREATE | 0x100)
    wait_until(lambda: net.action("10.9.0.1") == net.forward("02:00:00:00:00:08"), what="the replaced next hop")
    net.router.call(nexthop, rt.RTM_DELNEXTHOP, SERVER, 0)
    assert net.action("10.9.0.1") == Punt("no-route")


def test_gateway_of_the_other_family(net: Net) -> None:
    """RFC 5549: an IPv4 route by way of an IPv6 neighbour."""
    net.router.sysctl("net.ipv6.conf.r1.disable_ipv6", 0)
    index, gateway = net.router.index("r1"), ipaddress.IPv6Address("fe80::9").packed

    def add() -> None:
        with Netlink() as netlink:
            body = struct.pack("=B3xiHBB", rt.AF_INET6, index, rt.NUD_PERMANENT, 0, 0) + attribute(1, gateway)
            netlink.ask(rt.RTM_NEWNEIGH, body + attribute(2, bytes.fromhex("020000000066")), 4 | NLM_F_CREATE)
            body = struct.pack("=BBBBBBBBI", rt.AF_INET, 16, 0, 0, 254, 4, 0, rt.UNICAST, 0)
            body += attribute(1, bytes([10, 9, 0, 0])) + attribute(4, struct.pack("=I", index))
            body += attribute(18, struct.pack("=H", rt.AF_INET6) + gateway)
            netlink.ask(rt.RTM_NEWROUTE, body, 4 | NLM_F_CREATE)

    net.router.call(add)
    assert net.action("10.9.0.1") == net.forward("02:00:00:00:00:66")


def test_settings(net: Net) -> None:
    index = net.router.index("r0")
    assert net.mirror.state.forwarding(index)
    net.router.sysctl("net.ipv4.conf.r0.forwarding", 0)
    net.router.sysctl("net.ipv4.conf.r0.rp_filter", 1)
    net.mirror.barrier()
    assert not net.mirror.state.forwarding(index)
    assert net.mirror.state.rp_filter(index) == 1
    net.router.sysctl("net.ipv4.conf.all.rp_filter", 2)
    net.mirror.barrier()
    assert net.mirror.state.rp_filter(index) == 2


def test_overrun_is_followed_by_a_dump(net: Net) -> None:
    """A receive buffer of a few messages, and a mirror whose listener does not let it read meanwhile."""
    import threading

    go, held = threading.Event(), threading.Event()

    def listener(state: State, changes: Changes) -> None:
        if any(str(prefix) == "10.30.0.0/24" for prefix in changes.prefixes):
            held.set()
            assert go.wait(20)

    routes = PlainRoutes()
    mirror = net.start(routes, listener=listener, buffer=4096)
    mirror.wait_synced(10)
    net.router.route("10.30.0.0/24", via=SERVER)
    assert held.wait(10)
    for number in range(1, 200):
        net.router.route(f"10.30.{number}.0/24", via=SERVER)
        if number % 2:
            net.router.unroute(f"10.30.{number}.0/24")
    go.set()
    net.mirror.barrier()
    wait_until(lambda: (mirror.barrier(), mirror.phase == LIVE)[1] and mirror.resyncs > 1, what="a second dump")
    mirror.barrier()
    assert routes.fib.entries.keys() == net.routes.fib.entries.keys()


def test_resync_disturbs_nothing(net: Net) -> None:
    net.router.route("10.9.0.0/16", via=SERVER)
    net.mirror.barrier()
    writes: list[object] = []
    net.routes.fib.apply = lambda *changes: writes.append(changes)  # type: ignore[method-assign]
    dumps = net.mirror.resyncs
    net.mirror.resync()
    net.mirror.barrier()
    assert net.mirror.resyncs == dumps + 1
    assert not writes


def test_interrupted_dumps_are_asked_for_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = Netlink.dump_into, [3]

    def dump(self: Netlink, take: Any, kind: int, body: bytes, timeout: float = 10.0) -> Iterator[None]:
        yield from real(self, take, kind, body, timeout)
        if kind == rt.RTM_GETROUTE and left[0]:
            left[0] -= 1
            raise Interrupted("as if routes had changed meanwhile")

    monkeypatch.setattr(mirror_module.Netlink, "dump_into", dump)
    routes = PlainRoutes()
    net.start(routes).wait_synced(10)
    assert not left[0]
    assert routes.fib.entries.keys() == net.routes.fib.entries.keys()


def test_full_table(net: Net) -> None:
    """At start it is an error. Later, Linux forwards alone until there is room again."""
    with pytest.raises(TableFull):
        net.start(PlainRoutes(capacity=3)).wait_synced(10)
    routes = PlainRoutes(capacity=len(net.routes.fib.entries) + 1)
    mirror = net.start(routes)
    mirror.wait_synced(10)

    def action(address: str) -> Action:
        mirror.barrier()
        return routes.action(int(ipaddress.IPv4Address(address)))

    net.router.route("10.9.0.0/16", via=SERVER)
    assert action("10.9.0.1") == net.forward()
    net.router.route("10.9.1.0/24", type="blackhole")
    net.router.route("10.9.2.0/24", type="blackhole")
    assert action("10.9.1.1") == action("10.9.0.1") == Punt("via-linux")
    net.router.unroute("10.9.2.0/24", type="blackhole")
    assert action("10.9.0.1") == Punt("via-linux")
    net.router.unroute("10.9.0.0/16")
    assert action("10.9.1.1") == Drop("blackhole")
    assert action(SERVER) == net.forward()


def test_changes_arrive_within_100_ms(net: Net) -> None:
    import time

    worst = 0.0
    for number in range(20):
        net.router.route(f"10.40.{number}.0/24", via=SERVER)
        began = time.monotonic()
        wait_until(lambda: net.routes.action((10 << 24) + (40 << 16) + (number << 8)) == net.forward(), interval=0.001)  # noqa: B023
        worst = max(worst, time.monotonic() - began)
    assert worst < 0.1


def test_namespace_of_the_caller(net: Net) -> None:
    """The mirror belongs to the namespace of the thread that makes it, whatever thread does what later."""
    other = PlainRoutes()
    host: Host = net.far
    mirror: Mirror = host.call(Mirror, other, {})  # type: ignore[arg-type]
    net.mirrors.append(mirror)
    host.call(mirror.start)
    mirror.wait_synced(10)
    assert {link.name for link in mirror.state.links.values()} == {"lo", "farr0", "farr1", "farr2"}
