"""`Linux` whole: ports, tables, punts and guard around a running pipeline, and nothing left behind without one."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from libfp import Linux, Pipeline
from libfp.errors import (
    AlreadyRunning,
    BadInput,
    FrameTooSmall,
    InterfaceDown,
    NoSuchInterface,
    PolicyConflict,
    UnsuitableInterface,
)
from libfp.linux import PortPolicy, xfrm
from libfp.linux import rtnetlink as rt
from libfp.linux.conflict import Conflict
from libfp.linux.decide import Via
from libfp.linux.neighbours import HitMarks
from libfp.stages import Forward, Punt, forward, parse
from libfp.testing.netns import Lab, wait_until

LINKS = ["lo", "r0", "r1"]


class Net:
    """client (10.0.1.2) - r0 router r1 - server (10.0.2.2)."""

    def __init__(self, lab: Lab) -> None:
        self.client, self.router, self.server = lab.routed()
        self.router.sysctl("net.ipv4.conf.all.send_redirects", 0)

    @contextlib.contextmanager
    def linux(self, *names: str, **options: Any) -> Iterator[Linux]:
        with self.router.enter(), Linux(*(names or ("r0", "r1")), **options) as linux:
            yield linux

    @contextlib.contextmanager
    def running(self, **options: Any) -> Iterator[tuple[Linux, Any]]:
        with self.linux(**options) as linux, Pipeline(parse, forward(linux)).start(linux.ports, idle="park") as app:
            yield linux, app


@pytest.fixture
def net() -> Iterator[Net]:
    with Lab() as lab:
        net = Net(lab)
        yield net
        assert net.router.interfaces() == LINKS, "something was left behind"


@pytest.mark.parametrize("mode", ["native", "skb"])
def test_first_packet_of_a_flow_is_not_lost(net: Net, mode: str) -> None:
    with net.running(mode=mode) as (_, app):
        assert net.client.ping("10.0.2.2", count=10, interval=0.01).received == 10
        assert app.counters.punts["no-neighbour"] >= 1
        assert app.counters.forwarded >= 18


def test_used_neighbour_never_fails(net: Net) -> None:
    """With timers of a second or so, neighbours that only we use are confirmed again and again, and never lost."""
    for name in ("r0", "r1"):
        net.router.sysctl(f"net.ipv4.neigh.{name}.base_reachable_time_ms", 600)
        net.router.sysctl(f"net.ipv4.neigh.{name}.delay_first_probe_time", 1)
        net.router.sysctl(f"net.ipv4.neigh.{name}.gc_stale_time", 2)
    with net.running() as (_, app):
        assert net.client.ping("10.0.2.2", count=3, interval=0.01).received == 3
        punts = app.counters.punts["no-neighbour"]
        last, renewed = dict.fromkeys(("10.0.1.2", "10.0.2.2"), 0), {"10.0.1.2": 0, "10.0.2.2": 0}

        def confirmed() -> bool:
            assert net.client.ping("10.0.2.2", count=1).received == 1
            for neighbour in net.router.netlink("get_neighbours", family=socket.AF_INET):
                address, state = neighbour.get_attr("NDA_DST"), neighbour["state"]
                assert not state & (rt.NUD_FAILED | rt.NUD_INCOMPLETE), address
                renewed[address] += state == rt.NUD_REACHABLE != last[address]
                last[address] = state
            return min(renewed.values()) >= 4

        wait_until(confirmed, timeout=50, interval=0.05, what="both neighbours to be confirmed four times")
        assert app.counters.punts["no-neighbour"] == punts


def test_use_makes_linux_confirm(net: Net) -> None:
    """An idle STALE neighbour stays STALE; told that it is used, Linux asks it, and it is REACHABLE."""
    net.router.sysctl("net.ipv4.neigh.r1.delay_first_probe_time", 1)
    net.router.neighbour("r1", "10.0.2.2", net.server.mac("s0"), state="stale")
    with net.linux() as linux:
        via = Via(net.router.index("r1"), bytes([10, 0, 2, 2]))

        def state() -> int:
            linux.wait_synced()
            return linux.mirror.state.neighbours[via[:2]].state

        assert state() == rt.NUD_STALE
        marks = HitMarks()
        try:
            marks.mark([via, Via(via.link, bytes([10, 0, 2, 99]))], linux.mirror.state)
            assert marks.sent == 1
            wait_until(lambda: state() == rt.NUD_REACHABLE, timeout=20, what="an answer")
            marks.mark([via], linux.mirror.state)
            assert marks.sent == 1, "a neighbour that Linux knows to be there needs none"
        finally:
            marks.close()


def test_neighbour_that_is_gone_is_found_again(net: Net) -> None:
    with net.running() as (linux, _):
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2
        net.router.neighbour("r1", "10.0.2.2", None)
        linux.wait_synced()
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2


def test_forwarding_switched_off(net: Net) -> None:
    with net.running() as (linux, app):
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2
        net.router.sysctl("net.ipv4.conf.r0.forwarding", 0)
        linux.wait_synced()
        assert [port.paused for port in linux.ports] == [True, False]
        before = app.counters.received
        assert net.client.ping("10.0.2.2", count=2, interval=0.01, timeout=0.3).received == 0
        assert app.counters.received == before, "Linux had them"
        net.router.sysctl("net.ipv4.conf.r0.forwarding", 1)
        linux.wait_synced()
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2
        assert app.counters.received > before


def test_policy_that_appears_has_the_last_word(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    with net.running() as (linux, app):
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2
        net.router.netlink("rule", "add", src="10.0.1.2", action="FR_ACT_BLACKHOLE", priority=5)
        linux.wait_synced()
        assert all(port.paused for port in linux.ports)
        assert net.client.ping("10.0.2.2", count=2, interval=0.01, timeout=0.3).received == 0
        assert "policy rule 5: from 10.0.1.2/32" in caplog.text
        net.router.netlink("rule", "del", src="10.0.1.2", action="FR_ACT_BLACKHOLE", priority=5)
        linux.wait_synced()
        before = app.counters.forwarded
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2
        assert app.counters.forwarded > before


def test_policy_that_the_application_applies_is_none(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """At the start, and when it appears later; another has the last word as ever, until it is gone."""
    ours, other = (
        xfrm.Policy(rt.AF_INET, "10.0.1.0/24", prefix, "fwd", "block", 77) for prefix in ("10.77.0.0/16", "10.0.2.0/24")
    )

    def applies(conflict: Conflict) -> bool:
        return conflict.kind == "xfrm" and conflict.destination == ours.destination

    try:
        net.router.call(xfrm.add, ours)
    except OSError as error:
        pytest.skip(f"this kernel has no XFRM: {error}")
    with pytest.raises(PolicyConflict, match="1 XFRM policy for IPv4"), net.linux():
        pass
    told: list[str] = []
    with net.running(applies=applies, policy_changed=lambda: told.append(threading.current_thread().name)) as (
        linux,
        _,
    ):
        assert net.client.ping("10.0.2.2", count=2, interval=0.01).received == 2
        assert not told
        net.router.call(xfrm.add, ours._replace(direction="out"))
        linux.wait_synced()
        assert told == ["libfp-mirror"]
        assert not any(port.paused for port in linux.ports)
        net.router.call(xfrm.add, other)
        linux.wait_synced()
        assert len(told) == 2
        assert all(port.paused for port in linux.ports)
        assert net.client.ping("10.0.2.2", count=1, timeout=0.3).received == 0
        assert "Linux forwards alone: Linux would decide otherwise than libfp: 1 XFRM policy" in caplog.text
        (found,) = (one for one in net.router.call(xfrm.policies) if one.destination == other.destination)
        net.router.call(xfrm.remove, found)
        linux.wait_synced()
        assert not any(port.paused for port in linux.ports)


@pytest.mark.parametrize("bypass", [False, True])
def test_what_policy_changed_raises_leaves_all_to_linux(net: Net, bypass: bool) -> None:
    wrong = [BadInput("the rules cannot be read", "mend them")]

    def changed() -> None:
        if wrong:
            raise wrong.pop()

    one = xfrm.Policy(rt.AF_INET, "10.76.0.0/16", "10.77.0.0/16", "fwd", "block", 77)
    with net.linux(policy_changed=changed, applies=lambda conflict: True, bypass=bypass) as linux:
        try:
            net.router.call(xfrm.add, one)
        except OSError as error:
            pytest.skip(f"this kernel has no XFRM: {error}")
        linux.wait_synced()
        assert linux.mirror.suspended
        net.router.call(xfrm.add, one._replace(direction="out"))
        linux.wait_synced()
        assert not linux.mirror.suspended


def test_bypass(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    net.router.netlink("rule", "add", src="10.77.0.0/16", table=7, priority=100)
    with pytest.raises(PolicyConflict, match=r"policy rule 100: from 10\.77\.0\.0/16 lookup 7"), net.linux():
        pass
    with net.linux(bypass=True) as linux:
        assert "bypassed: policy rule 100: from 10.77.0.0/16 lookup 7" in caplog.text
        net.router.netlink("rule", "add", src="10.78.0.0/16", table=7, priority=101)
        linux.wait_synced()
        assert not linux.mirror.suspended


def test_settings_of_ports(net: Net) -> None:
    net.router.sysctl("net.ipv4.conf.r0.rp_filter", 1)
    net.router.sysctl("net.ipv4.conf.r1.send_redirects", 0)
    with net.linux() as linux:
        assert linux.policies == [PortPolicy(rp_filter=1, redirects=True), PortPolicy(redirects=False)]
        net.router.sysctl("net.ipv4.conf.all.rp_filter", 2)
        linux.wait_synced()
        assert [one.rp_filter for one in linux.policies] == [2, 2]


def test_ports_own_addresses() -> None:
    """What ICMP errors come from: the primary address of the port, without one another's."""
    with Lab(ipv6=True) as lab, (net := Net(lab)).linux() as linux:
        told: dict[int, tuple[str, str]] = {}

        def set_address(number: int, four: bytes, six: bytes) -> None:
            told[number] = str(ip_address(four)), str(ip_address(six)) if six else ""

        linux.routes.set_address = set_address

        def now() -> dict[int, tuple[str, str]]:
            linux.wait_synced()
            return told

        net.router.address("r1", "10.0.2.3/24")  # in the same subnet: secondary
        net.router.address("r1", "10.0.1.3/24")  # another primary one
        assert now() == {}
        net.router.address("r1", "2001:db8:2::1/64")  # of which Linux tells later, from its work queue
        wait_until(lambda: len(now()) == 2)
        assert told == {0: ("10.0.1.1", "2001:db8:2::1"), 1: ("10.0.2.1", "2001:db8:2::1")}, "r0 has none of IPv6"
        told.clear()
        net.router.address("r1", "10.0.2.1/24", command="del")
        assert now() == {1: ("10.0.1.3", "2001:db8:2::1")}, "its secondary one has gone with it"
        told.clear()
        net.router.address("r1", "10.0.1.3/24", command="del")
        assert now() == {1: ("10.0.1.1", "2001:db8:2::1")}, "r0's"


def test_kept_packets_have_their_neighbours_resolved(net: Net) -> None:
    """Of packets that Linux never sees, it is told which neighbours they need."""
    with net.linux(take=["proto esp and dst 10.0.1.1"]) as linux:
        wanted = {(0, ip_address("10.0.2.2").packed)}  # by a next hop that names no neighbour
        linux.routes.wanted = lambda: wanted
        linux.wait_synced()

        def found() -> bool:
            linux.wait_synced()
            return linux.mirror.state.usable(net.router.index("r1"), ip_address("10.0.2.2").packed) is not None

        wait_until(found, what="the server's address")


def test_take(net: Net) -> None:
    """ESP to this host comes to the ports, also beside `only`; without it, Linux answers."""
    esp = net.client.socket(socket.AF_INET, socket.SOCK_RAW, 50)
    with esp, net.running(take=["proto esp and dst 10.0.1.1"], only=["10.99.0.0/16"]) as (_, app):
        for address in ("10.0.1.1", "10.0.2.1"):
            esp.sendto(b"spi!" + b"\0\0\0\1", (address, 0))
        assert net.client.ping("10.0.1.1").received == 3
        assert net.client.ping("10.0.2.2").received == 3
        wait_until(lambda: app.counters.received == 1, what="the one to 10.0.1.1")


def test_own_addresses_stay_with_linux(net: Net) -> None:
    with net.linux() as linux:
        assert linux.local.covers("10.0.1.1")
        assert linux.local.covers("10.0.1.255")
        assert linux.local.covers("127.1.2.3")
        assert not linux.local.covers("10.0.1.2")
        net.router.address("r0", "10.55.0.1/24")
        linux.wait_synced()
        assert linux.local.covers("10.55.0.1")
        net.router.address("r0", "10.55.0.1/24", command="del")
        linux.wait_synced()
        assert not linux.local.covers("10.55.0.1")


def test_port_s_mac_and_mtu_change(net: Net) -> None:
    with net.running() as (linux, app):
        net.router.netlink("link", "set", index=net.router.index("r0"), address="02:00:00:00:77:77")
        net.router.set_mtu("r0", 1400)
        linux.wait_synced()
        assert linux.punt.taps[0].mtu == 1400
        before = app.counters.forwarded
        assert net.client.ping("10.0.2.2", count=5, interval=0.01).received == 5
        assert app.counters.forwarded > before


def test_routes_out_of_other_devices_are_named(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "libfp.linux")
    net.router.route("10.88.0.0/16", via="10.0.2.2")
    with net.linux("r0") as linux:
        assert "2 routes out of r1, which is not a port: via Linux" in caplog.text
        assert linux.routes.next_hops[linux.routes.fib["10.88.0.0/16"]] == Punt("via-linux")


def test_tables_are_the_real_ones(net: Net) -> None:
    net.router.neighbour("r1", "10.0.2.9", "02:00:00:00:00:09")
    net.router.route("10.9.0.0/16", via="10.0.2.9")
    with net.linux() as linux:
        index = linux.routes.fib.lookup((10 << 24) + (9 << 16) + 1)
        source = bytes.fromhex(net.router.mac("r1").replace(":", ""))
        assert linux.routes.next_hops[index] == Forward(1, bytes.fromhex("020000000009"), source, 1500)
        net.router.unroute("10.9.0.0/16")
        linux.wait_synced()
        assert linux.routes.fib.lookup((10 << 24) + (9 << 16) + 1) == 0


def test_port_that_is_removed(net: Net) -> None:
    with net.linux() as linux:
        net.router.netlink("link", "del", index=net.router.index("r1"))
        linux.wait_synced()
        assert linux.routes.fib.lookup((10 << 24) + (2 << 8) + 2) == 0
    assert net.router.interfaces() == ["lo", "r0"]
    net.router.netlink("link", "add", ifname="r1", kind="bridge")  # for the fixture's last look


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        ((), {}, BadInput, "no interface named"),
        (("r0", "r0"), {}, BadInput, "named twice"),
        (("r0", "nope"), {}, NoSuchInterface, "nope"),
        (("lo",), {}, UnsuitableInterface, "loopback"),
        (("r0", "r1"), {"only": ["10.0.0.0/33"]}, BadInput, "10.0.0.0/33"),
    ],
)
def test_errors(net: Net, names: tuple[str, ...], options: dict[str, Any], error: type, words: str) -> None:
    with net.router.enter(), pytest.raises(error, match=words), Linux(*names, **options):
        pass


def test_interface_down(net: Net) -> None:
    net.router.down("r1")
    with pytest.raises(InterfaceDown, match="r1 is down"), net.linux():
        pass


def test_frames(net: Net) -> None:
    with net.linux() as linux:
        assert linux.frame_size == 2048
    net.router.set_mtu("r1", 3000)
    with net.linux() as linux:
        assert linux.frame_size == 4096
    with pytest.raises(FrameTooSmall, match="r1 has an MTU of 3000"), net.linux(frame_size=2048):
        pass


def test_second_instance(net: Net) -> None:
    with net.running(), pytest.raises(AlreadyRunning, match="r0"), net.linux():
        pass


def test_progress(net: Net) -> None:
    told: list[tuple[str, int, int]] = []
    with net.linux(progress=lambda *what: told.append(what)):
        assert {what for what, _, _ in told} == {"links", "addresses", "settings", "neighbours", "routes"}
