"""`fp router` under load while Linux changes its mind: routes, links, settings, policies, neighbours."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.testing import udp
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.probe import Arrivals, Trickle, Wire
from libfp.testing.router import Crossroads, RouterProcess
from libfp.testing.traffic import UdpStream

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, OTHER, EITHER = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.OTHER, "198.51.100.7"
SOON = 0.1  # seconds: how long a change may take to be acted on
RATE = 3000  # datagrams a second on a route that does not change


class Net(Crossroads):
    """`EITHER` is an address of the server and of the other host: routes decide who gets its packets."""

    def __init__(self, lab: Lab, workers: int = 1) -> None:
        super().__init__(lab, workers)
        for host in (self.server, self.other):
            host.address("lo", f"{EITHER}/32")

    def ends(self) -> list[tuple[str, Host]]:
        return [(SERVER, self.server), (OTHER, self.other)]

    def normal(self) -> None:
        """The configuration that every test begins with; what is there already stays as it is."""
        for number, port in enumerate(self.PORTS):
            self.router.up(port)
            with contextlib.suppress(Exception):
                self.router.address(port, f"10.0.{number + 1}.1/24")
        wait_until(lambda: all(self.router.has_carrier(port) for port in self.PORTS))


def two_or_full(workers: int) -> None:
    """With two workers there is all that there is with one, twice."""
    if workers == 1 and len(os.sched_getaffinity(0)) > 1 and not os.environ.get("LIBFP_FULL"):
        pytest.skip("with two workers, and with one only if LIBFP_FULL is set")


@pytest.fixture(scope="module")
def running(workers: int) -> Iterator[tuple[Net, RouterProcess]]:
    two_or_full(workers)
    with Lab() as lab:
        net = Net(lab, workers)
        with RouterProcess(net.router, *net.PORTS, *net.options) as process:
            yield net, process


@pytest.fixture
def net(running: tuple[Net, RouterProcess]) -> Net:
    net, _ = running
    net.normal()
    for address in (SERVER, OTHER):  # a watchdog that the scheduler has set off may cost a packet
        wait_until(lambda: net.client.ping(address).received == 3, timeout=20)  # noqa: B023
    return net


@pytest.fixture
def router(running: tuple[Net, RouterProcess]) -> RouterProcess:
    return running[1]


@contextlib.contextmanager
def route(net: Net, prefix: str, via: str, **kwargs: Any) -> Iterator[None]:
    """A route of the router's for the length of the block, wherever it may lead at its end."""
    net.router.route(prefix, via=via, **kwargs)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # a test, or a link that went down, may have been first
            net.router.unroute(prefix, **kwargs)


def in_fast_path(net: Net, router: RouterProcess, address: str = SERVER) -> bool:
    """Whether ten pings to `address` and back are all forwarded by `fp router` (and answered)."""
    before = router.counters().forwarded
    answered = net.client.ping(address, count=10, interval=0.001, timeout=0.2).received
    return answered == 10 and router.counters().forwarded - before >= 20


def test_a_changed_route_moves_traffic_and_no_other(net: Net, router: RouterProcess) -> None:
    """Make before break: the flow that moves loses nothing either."""
    with (
        route(net, "198.51.100.0/24", SERVER),
        UdpStream(net.client, net.server, SERVER, rate=RATE) as steady,
        Arrivals(net.server) as at_server,
        Arrivals(net.other) as at_other,
        Trickle(net.client, EITHER) as moving,
    ):
        arrivals = {SERVER: at_server, OTHER: at_other}
        wait_until(lambda: steady.received > 100 and len(at_server.take()) > 50, timeout=20)
        late = []
        for old, new in [(SERVER, OTHER), (OTHER, SERVER)] * 3:
            changed = time.time()
            net.router.route("198.51.100.0/24", via=new, command="replace")
            seen = len(arrivals[new].take())
            wait_until(lambda: len(arrivals[new].take()) > seen + 150)  # noqa: B023
            late.append(max(arrivals[old].take().values()) - changed)
        moving.stop()
        wait_until(lambda: len(at_server.take()) + len(at_other.take()) >= moving.sent, what="the last to arrive")
    assert max(late) < SOON, late
    assert steady.result.lost == 0


def test_default_routes_fail_over_by_metric(net: Net, router: RouterProcess) -> None:
    with (
        route(net, "default", SERVER, metric=10),
        route(net, "default", OTHER, metric=20),
        UdpStream(net.client, net.other, OTHER, rate=RATE) as steady,
        Arrivals(net.server) as at_server,
        Arrivals(net.other) as at_other,
        Trickle(net.client, EITHER) as flow,
    ):
        wait_until(lambda: steady.received > 100 and len(at_server.take()) > 50, timeout=20)
        assert not at_other.take()
        withdrawn = time.time()
        net.router.unroute("default", metric=10)
        wait_until(lambda: len(at_other.take()) > 50)
        assert max(at_server.take().values()) - withdrawn < SOON
        count = len(at_server.take())
        net.router.route("default", via=SERVER, metric=10)
        wait_until(lambda: len(at_server.take()) > count + 50)
        # A link that goes down takes its routes with it, and Linux does not say so.
        downed = time.time()
        net.router.down("r1")
        before = len(at_other.take())
        wait_until(lambda: len(at_other.take()) > before + 50)
        after = [when for when in at_other.take().values() if when > downed]
        assert min(after) - downed < SOON
        assert flow.errors == 0
    net.normal()
    assert steady.result.lost == 0


@pytest.mark.parametrize("port", ["r0", "r1"])
def test_link_down_and_up_again(net: Net, router: RouterProcess, port: str) -> None:
    """Where the flow comes in, and where it leaves: the ring of a port that is down fills with what cannot leave."""
    to, address = (net.server, SERVER) if port == "r0" else (net.client, CLIENT)
    with (
        UdpStream(net.other, to, address, rate=RATE) as steady,
        UdpStream(net.client, net.server, SERVER, rate=RATE, port=5009) as stopped,
    ):
        wait_until(lambda: steady.received > 500 and stopped.received > 500, timeout=20)
        for _ in range(3):
            net.router.down(port)
            sent = stopped.sent
            wait_until(lambda: stopped.sent > sent + RATE // 4)  # noqa: B023
            net.normal()
            received = stopped.received
            wait_until(lambda: stopped.received > received + RATE // 10)  # noqa: B023
    assert steady.result.lost == 0
    wait_until(lambda: in_fast_path(net, router))


def test_many_changes_disturb_nobody(net: Net, router: RouterProcess) -> None:
    """Hundreds of routes come and go, while a flow on another one loses nothing and the last of them is in force."""
    prefixes = [f"198.18.{number // 4}.{number % 4 * 64}/26" for number in range(400)]
    with UdpStream(net.client, net.server, SERVER, rate=RATE) as steady:
        wait_until(lambda: steady.received > 100, timeout=20)
        for prefix in prefixes:
            net.router.route(prefix, via=OTHER)
        with Arrivals(net.other) as at_other, Trickle(net.client, EITHER), route(net, "198.51.100.0/24", OTHER):
            wait_until(at_other.take)
        for prefix in prefixes:
            net.router.unroute(prefix)
    assert steady.result.lost == 0
    wait_until(lambda: in_fast_path(net, router))


def test_address_removed_and_added(net: Net, router: RouterProcess) -> None:
    net.router.address("r1", "10.0.2.1/24", command="del")
    wait_until(lambda: net.client.ping(SERVER, count=1, timeout=0.1).received == 0, timeout=SOON + 0.2)
    assert net.client.ping(SERVER, count=3, timeout=0.1).received == 0
    net.router.address("r1", "10.0.2.1/24")
    wait_until(lambda: in_fast_path(net, router))


def test_forwarding_switched_off(net: Net, router: RouterProcess) -> None:
    """Off means off at once, while the host itself goes on answering; on means the fast path again."""
    net.router.sysctl("net.ipv4.ip_forward", 0)
    try:
        wait_until(lambda: net.client.ping(SERVER, count=1, timeout=0.1).received == 0, timeout=SOON + 0.2)
        assert net.client.ping("10.0.1.1").received == 3
        assert net.client.ping(SERVER, count=3, timeout=0.1).received == 0
    finally:
        net.router.sysctl("net.ipv4.ip_forward", 1)
    wait_until(lambda: in_fast_path(net, router))


def test_forwarding_switched_off_for_one_interface(net: Net, router: RouterProcess) -> None:
    """The setting of the interface that packets arrive on is the one that counts."""
    net.router.sysctl("net.ipv4.conf.r0.forwarding", 0)
    try:
        with Wire(net.client, "c0") as client:
            wait_until(lambda: net.client.ping(SERVER, count=1, timeout=0.1).received == 0)
            assert net.server.ping(OTHER).received == 3
            with net.server.socket() as sender:
                sender.sendto(b"the other way", (CLIENT, 9))
            assert client.receive(lambda frame: b"the other way" in frame)
    finally:
        net.router.sysctl("net.ipv4.conf.r0.forwarding", 1)
    wait_until(lambda: in_fast_path(net, router))


def test_a_policy_that_appears_is_obeyed(net: Net, router: RouterProcess) -> None:
    """Without --bypass the fast path stands back while Linux has a policy rule, and comes back afterwards."""
    net.router.route("default", via=OTHER, table=100)
    with (
        route(net, "198.51.100.0/24", SERVER),
        Arrivals(net.server) as at_server,
        Arrivals(net.other) as at_other,
        Trickle(net.client, EITHER),
    ):
        wait_until(lambda: len(at_server.take()) > 50)
        appeared = time.time()
        net.router.netlink("rule", "add", iifname="r0", table=100, priority=100)
        try:
            wait_until(lambda: len(at_other.take()) > 50)
            assert max(at_server.take().values()) - appeared < 2 * SOON
            router.wait_said("Linux forwards alone")
            assert "policy rule" in router.said()
        finally:
            net.router.netlink("rule", "del", iifname="r0", table=100, priority=100)
            net.router.unroute("default", table=100)
        count = len(at_server.take())
        wait_until(lambda: len(at_server.take()) > count + 50)
    wait_until(lambda: in_fast_path(net, router))


def test_a_new_mac_address_of_a_port(net: Net, router: RouterProcess) -> None:
    old, new = net.router.mac("r0"), "02:fb:ff:ff:ff:01"
    net.router.netlink("link", "set", index=net.router.index("r0"), address=new)
    try:
        net.client.neighbour("c0", "10.0.1.1", new)
        wait_until(lambda: in_fast_path(net, router))
        with Wire(net.client, "c0") as client, Wire(net.server, "s0") as server:
            client.send(udp(b"to the old one", eth_dst=old, eth_src=client.mac))
            client.send(udp(b"to the new one", eth_dst=new, eth_src=client.mac))
            first = server.receive(lambda frame: b"to the" in frame)
            assert first is not None
            assert b"to the new one" in first
    finally:
        net.router.netlink("link", "set", index=net.router.index("r0"), address=old)
        net.client.neighbour("c0", "10.0.1.1", None)
    wait_until(lambda: in_fast_path(net, router))


def test_a_port_that_vanishes(net: Net) -> None:
    """A second router, for itself: the ports that remain go on, and so does the process."""
    with Lab() as lab:
        other = Net(lab, net.workers)
        with RouterProcess(other.router, *other.PORTS, *other.options) as router:
            assert other.client.ping(OTHER).received == 3
            with UdpStream(other.client, other.server, SERVER, rate=RATE) as steady:
                wait_until(lambda: steady.received > 500, timeout=20)
                other.router.netlink("link", "del", index=other.router.index("r2"))
                router.wait_said("port r2 is gone")
                assert other.client.ping(OTHER, count=1, timeout=0.2).received == 0
                received = steady.received
                wait_until(lambda: steady.received > received + 500)
            assert steady.result.lost == 0
            assert in_fast_path(other, router)
            assert router.stop() == 0


class Neighbours:
    """The states that one neighbour of the router has been seen in, in order."""

    def __init__(self, host: Host, interface: str, address: str) -> None:
        self._host, self._index, self._address = host, host.index(interface), address
        self.seen: list[int] = []

    def look(self) -> list[int]:
        for entry in self._host.netlink("get_neighbours", ifindex=self._index):
            state = entry["state"]
            if entry.get_attr("NDA_DST") == self._address and self.seen[-1:] != [state]:
                self.seen.append(state)
        return self.seen


REACHABLE, STALE, FAILED, INCOMPLETE = 2, 4, 0x20, 1


@pytest.fixture
def impatient(workers: int) -> Iterator[tuple[Net, RouterProcess]]:
    """A router whose neighbours grow old in one to three seconds.

    Not in less than delay_first_probe_time: Linux would then go on probing on its own.
    """
    two_or_full(workers)
    with Lab() as lab:
        net = Net(lab, workers)
        for port in net.PORTS:
            for name, value in (
                ("base_reachable_time_ms", 2000),
                ("delay_first_probe_time", 1),
                ("gc_stale_time", 1),
                ("retrans_time_ms", 200),
            ):
                net.router.sysctl(f"net.ipv4.neigh.{port}.{name}", value)
        with RouterProcess(net.router, *net.PORTS, *net.options) as process:
            yield net, process


def test_used_neighbours_stay_fresh(impatient: tuple[Net, RouterProcess]) -> None:
    """Only the fast path uses the server, and it never answers: what Linux knows of it comes from hit marks.

    Seen from outside as STALE turning REACHABLE again and again, while the neighbour that nobody uses stays STALE.
    """
    net, router = impatient
    assert net.client.ping(OTHER, count=1).received == 1
    used, unused = Neighbours(net.router, "r1", SERVER), Neighbours(net.router, "r2", OTHER)

    def rounds() -> int:
        unused.look()
        return used.look().count(REACHABLE)

    with UdpStream(net.client, net.server, SERVER, rate=500) as stream:
        wait_until(lambda: stream.received > 100, timeout=20)
        before = router.counters()
        wait_until(lambda: rounds() >= 3 and unused.seen[-1] == STALE, timeout=30, interval=0.01)
        after = router.counters()
    assert not {FAILED, INCOMPLETE} & set(used.seen), used.seen
    assert after.punted == before.punted, "the server never left the fast path"
    assert after.forwarded - before.forwarded >= 500
    assert unused.seen.count(REACHABLE) <= 2, unused.seen
    assert stream.result.lost == 0


def test_a_neighbour_with_another_mac_address_is_found(impatient: tuple[Net, RouterProcess]) -> None:
    """The server says nothing about its new address, and sends nothing: Linux finds out because we use it."""
    net, router = impatient
    with Arrivals(net.server) as arrivals, Trickle(net.client, SERVER, rate=200):
        wait_until(lambda: len(arrivals.take()) > 50)
        net.server.netlink("link", "set", index=net.server.index("s0"), address="02:fb:ff:ff:ff:02")
        count = len(arrivals.take())
        wait_until(lambda: len(arrivals.take()) > count + 50, timeout=20)
        before = router.counters()
        count = len(arrivals.take())
        wait_until(lambda: len(arrivals.take()) > count + 50)
        assert router.counters().forwarded - before.forwarded >= 50, "by the fast path again"
