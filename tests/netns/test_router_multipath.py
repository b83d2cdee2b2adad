"""`fp router` and multipath routes: flows spread as the kernel's policy says, and keep their path until it fails."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.linux.netlink import NLM_F_ACK, NLM_F_CREATE, Netlink, attribute
from libfp.linux.rtnetlink import RTM_DELNEXTHOP, RTM_NEWNEXTHOP, RTM_NEWROUTE
from libfp.testing import ipv4, udp
from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import Arrivals, Wire
from libfp.testing.router import Crossroads, RouterProcess

pytestmark = pytest.mark.timeout(120)

ANYCAST, ANYCAST6, FLOWS, PORT = "10.9.9.9", "2001:db8:9::9", 400, 5003
HALF = range(140, 261)  # of FLOWS: six standard deviations
PREFIX, PREFIX6 = "10.9.9.0/24", "2001:db8:9::/48"


class Net(Crossroads):
    """An address that both `server` and `other` have."""

    def __init__(self, lab: Lab, workers: int) -> None:
        super().__init__(lab, workers)
        for host, end in ((self.server, "s0"), (self.other, "o0")):
            host.address(end, f"{ANYCAST}/32")
            host.address(end, f"{ANYCAST6}/128")
        self.router.sysctl("net.ipv4.fib_multipath_hash_policy", 1)
        self.router.sysctl("net.ipv6.fib_multipath_hash_policy", 1)

    def multipath(self, *weights: int, command: str = "add", six: bool = False) -> None:
        gateways = (self.SERVER6, self.OTHER6) if six else (self.SERVER, self.OTHER)
        hops = [{"gateway": via, "hops": weight - 1} for via, weight in zip(gateways, weights, strict=True) if weight]
        self.router.route(PREFIX6 if six else PREFIX, command=command, multipath=hops)


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Net]:
    with Lab(ipv6=True) as lab:
        yield Net(lab, workers)


@pytest.fixture(scope="module")
def router(net: Net) -> Iterator[RouterProcess]:
    with RouterProcess(net.router, *net.PORTS, *net.options) as process:
        yield process


class Spread:
    """Sends numbered flows and tells where each arrived."""

    def __init__(self, net: Net, six: bool = False) -> None:
        self.net, self.six = net, six
        self._wire = Wire(net.client, "c0")
        self._ends = [Arrivals(host, "::", PORT) for host in (net.server, net.other)]

    def _frame(self, flow: int, number: int, **fields: Any) -> bytes:
        client, to = (self.net.CLIENT6, ANYCAST6) if self.six else (self.net.CLIENT, ANYCAST)
        fields = {"sport": 10_000 + flow, "dport": PORT, "src": client, "dst": to} | fields
        fields |= {"eth_dst": self.net.router.mac("r0"), "eth_src": self._wire.mac}
        return udp(number.to_bytes(8, "big"), **fields)

    def __call__(self, flows: int = FLOWS, timeout: float = 5.0) -> tuple[set[int], set[int]]:
        """The flows that the server and the other host have received a packet of."""
        self._first = getattr(self, "_first", 0) + FLOWS
        first, found = self._first, [set[int](), set[int]()]
        for flow in range(flows):
            self._wire.send(self._frame(flow, first + flow))
            if flow % 50 == 49:  # as far as a socket's buffer and two cores go
                self._wait(first, flow + 1)
        self._wait(first, flows, timeout)
        for end, arrivals in enumerate(self._ends):
            found[end] = {number - first for number in arrivals.take() if first <= number < first + FLOWS}
        return found[0], found[1]

    def few(self) -> tuple[set[int], set[int]]:
        """Where 20 flows arrive, if they do, at a time when packets may be lost."""
        with contextlib.suppress(TimeoutError):
            return self(20, timeout=0.2)
        return set(), set()

    def _wait(self, first: int, count: int, timeout: float = 5.0) -> None:
        numbers = range(first, first + count)

        def arrived() -> bool:
            taken = [end.take() for end in self._ends]
            return sum(n in one for one in taken for n in numbers) == count

        wait_until(arrived, timeout, f"{count} packets")

    def close(self) -> None:
        self._wire.close()
        for arrivals in self._ends:
            arrivals.close()


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def spread(net: Net, router: RouterProcess, request: Any) -> Iterator[Spread]:
    one = Spread(net, request.param)
    net.multipath(1, 1, six=one.six)
    try:
        wait_until(lambda: all(one.few()) and _fast(router, one), what="both paths to be forwarded by")
        yield one
    finally:
        net.router.unroute(PREFIX6 if one.six else PREFIX)
        one.close()


def _fast(router: RouterProcess, spread: Spread) -> bool:
    """Whether flows go by the fast path now."""
    before = router.counters()
    spread.few()
    after = router.counters()
    return after.forwarded - before.forwarded == 20


def test_flows_between_two_hosts_spread_by_ports_and_keep_their_path(router: RouterProcess, spread: Spread) -> None:
    before = router.counters()
    server, other = spread()
    assert server | other == set(range(FLOWS))
    assert not server & other
    assert len(server) in HALF
    assert spread() == (server, other)
    wait_until(lambda: router.counters().forwarded - before.forwarded == 2 * FLOWS, what="all by the fast path")
    assert router.counters().punted == before.punted


def test_only_the_flows_of_a_path_that_fails_move(net: Net, router: RouterProcess, spread: Spread) -> None:
    """The link goes down and comes back: those of the other path never move."""
    server, other = spread()
    net.router.down("r2")
    try:
        wait_until(lambda: (seen := spread.few())[0] and not seen[1])
        assert spread() == (server | other, set())
    finally:
        net.router.up("r2")
        net.router.address("r2", "2001:db8:3::1/64")  # which the link took with it, and with it the route
        if spread.six:
            net.multipath(1, 1, command="replace", six=True)
    wait_until(lambda: all(spread.few()) and _fast(router, spread))
    assert len(spread()[0]) in HALF


def test_weights_are_followed(net: Net, router: RouterProcess, spread: Spread) -> None:
    before, _ = spread()
    net.multipath(3, 1, command="replace", six=spread.six)
    wait_until(lambda: len(spread()[0]) > 245)
    server, _ = spread()
    assert 245 < len(server) < 355
    assert before <= server, "the smaller share only loses flows"


def test_a_path_that_is_taken_out_moves_no_other_flow(net: Net, router: RouterProcess, spread: Spread) -> None:
    """A routing daemon replaces the whole route."""
    server, other = spread()
    net.multipath(1, 0, command="replace", six=spread.six)
    wait_until(lambda: (seen := spread.few())[0] and not seen[1])
    assert spread()[0] == server | other
    net.multipath(1, 1, command="replace", six=spread.six)
    wait_until(lambda: all(spread.few()) and _fast(router, spread))
    back = spread()
    assert len(back[1]) in HALF


def test_neighbours_of_all_paths_are_resolved(net: Net, router: RouterProcess, spread: Spread) -> None:
    """Linux would resolve only the path that it takes itself for what is handed to it."""
    for port, via in (
        ("r1", net.SERVER6 if spread.six else net.SERVER),
        ("r2", net.OTHER6 if spread.six else net.OTHER),
    ):
        net.router.neighbour(port, via, None)
    wait_until(lambda: _fast(router, spread), what="both paths to be resolved again")


def test_fragments_take_one_path(net: Net, router: RouterProcess) -> None:
    net.multipath(1, 1)
    try:
        with Wire(net.client, "c0") as wire, Wire(net.server, "s0") as server, Wire(net.other, "o0") as other:
            below = {"eth_dst": net.router.mac("r0"), "eth_src": wire.mac, "dst": ANYCAST, "protocol": 17}
            payload = udp(bytes(32), sport=7, dport=PORT)[34:]
            for k in range(30):
                tag = b"frag%04d" % k
                whole = payload[:8] + tag + payload[8:24] + tag
                first = ipv4(whole[:32], src=f"10.0.1.{100 + k}", more_fragments=True, identification=k, **below)
                last = ipv4(tag, src=f"10.0.1.{100 + k}", fragment_offset=32, identification=k, **below)
                wire.send(first, last)
                seen = list[Wire]()

                def arrived(tag: bytes = tag, seen: list[Wire] = seen) -> bool:
                    for end in (server, other):
                        while end.receive(lambda one: tag in one, timeout=0) is not None:
                            seen.append(end)
                    return len(seen) == 2

                wait_until(arrived, what=f"both pieces of datagram {k}")
                assert seen[0] is seen[1], "both at one host"
    finally:
        net.router.unroute(PREFIX)


def _nexthop(kind: int, number: int, **attributes: bytes) -> None:
    """RTM_NEWNEXTHOP or RTM_DELNEXTHOP, in the calling thread's namespace."""
    kinds = {"group": 2, "link": 5, "gateway": 6}
    body = struct.pack("=BBBBI", socket.AF_INET if "gateway" in attributes else 0, 0, 0, 0, 0)
    body += attribute(1, struct.pack("=I", number))
    for name, value in attributes.items():
        body += attribute(kinds[name], value)
    with Netlink() as netlink:
        netlink.ask(kind, body, NLM_F_ACK | (NLM_F_CREATE if kind == RTM_NEWNEXTHOP else 0))


def _route_by(number: int) -> None:
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 24, 0, 0, 254, 4, 0, 1, 0)
    body += attribute(1, socket.inet_aton("10.9.9.0")) + attribute(30, struct.pack("=I", number))
    with Netlink() as netlink:
        netlink.ask(RTM_NEWROUTE, body, NLM_F_ACK | NLM_F_CREATE)


def test_nexthop_objects_and_groups(net: Net, router: RouterProcess) -> None:
    """`ip nexthop`: a group of two; a member that goes takes only its flows with it."""
    for number, port, via in ((1, "r1", net.SERVER), (2, "r2", net.OTHER)):
        link = struct.pack("=I", net.router.index(port))
        net.router.call(_nexthop, RTM_NEWNEXTHOP, number, link=link, gateway=socket.inet_aton(via))
    members = struct.pack("=IBBH", 1, 0, 0, 0) + struct.pack("=IBBH", 2, 0, 0, 0)
    net.router.call(_nexthop, RTM_NEWNEXTHOP, 10, group=members)
    net.router.call(_route_by, 10)
    spread = Spread(net)
    try:
        wait_until(lambda: all(spread.few()) and _fast(router, spread))
        server, other = spread()
        assert len(server) in HALF
        net.router.call(_nexthop, RTM_DELNEXTHOP, 2)
        wait_until(lambda: (seen := spread.few())[0] and not seen[1])
        assert spread()[0] == server | other
        net.router.call(_nexthop, RTM_DELNEXTHOP, 1)  # the group has no member any more, and no route
        wait_until(lambda: net.router.call(_has_no_route), what="the kernel to drop the route")
    finally:
        spread.close()


def _has_no_route() -> bool:
    with open("/proc/thread-self/net/route") as file:
        return "0009090A" not in file.read()
