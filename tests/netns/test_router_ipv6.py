"""`fp router` and IPv6 (RFC 8200): what is forwarded, what Linux does, and that neighbour discovery stays Linux's."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from libfp.testing import ipv6, tcp, udp
from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import Arrivals, IcmpError, Trickle, Wire, udp_probe
from libfp.testing.router import Crossroads, RouterProcess
from libfp.testing.traffic import tcp_transfer

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, OTHER = Crossroads.CLIENT6, Crossroads.SERVER6, Crossroads.OTHER6
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Crossroads]:
    with Lab(ipv6=True) as lab:
        yield Crossroads(lab, workers)


@pytest.fixture(scope="module")
def router(net: Crossroads) -> Iterator[RouterProcess]:
    with RouterProcess(net.router, *net.PORTS, *net.options) as process:
        wait_until(lambda: net.client.ping(SERVER, count=1).received and net.client.ping(OTHER, count=1).received)
        wait_until(lambda: net.client.ping(Crossroads.SERVER, count=1).received)
        yield process


def settled(router: RouterProcess) -> tuple[int, int]:
    counters = router.counters()
    return counters.forwarded, counters.punted


def test_ping_goes_by_the_fast_path_both_families(net: Crossroads, router: RouterProcess) -> None:
    before = settled(router)
    assert net.client.ping(SERVER, count=20, interval=0.001).received == 20
    assert net.client.ping(Crossroads.SERVER, count=20, interval=0.001).received == 20
    after = settled(router)
    assert (after[0] - before[0], after[1] - before[1]) == (80, 0)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_tcp_arrives_intact(net: Crossroads, router: RouterProcess, direction: str) -> None:
    before = settled(router)
    ends = [(net.client, CLIENT), (net.server, SERVER)]
    (sender, _), (receiver, address) = ends if direction == "up" else reversed(ends)
    assert tcp_transfer(sender, receiver, address, 20 * MEGABYTE, timeout=60).intact
    after = settled(router)
    assert after[0] - before[0] > 20 * MEGABYTE / 1428
    assert after[1] == before[1]


def test_traceroute_shows_the_router(net: Crossroads, router: RouterProcess) -> None:
    assert udp_probe(net.client, SERVER, ttl=1) == IcmpError(3, 0, "2001:db8:1::1")
    assert udp_probe(net.client, SERVER, ttl=2) == IcmpError(1, 4, SERVER)


def test_headers_leave_as_they_should(net: Crossroads, router: RouterProcess) -> None:
    """Byte for byte: MAC addresses and hop limit, and nothing else."""
    with Wire(net.client, "c0") as client, Wire(net.server, "s0") as server:
        below = {"eth_dst": net.router.mac("r0"), "eth_src": client.mac, "src": CLIENT, "dst": SERVER}
        frame = udp(b"as it is", flow_label=0x12345, traffic_class=0xB8, hop_limit=9, **below)
        client.send(frame)
        arrived = server.receive(lambda one: b"as it is" in one)
        assert arrived is not None
        assert arrived[14:21] + arrived[22:] == frame[14:21] + frame[22:]
        assert arrived[21] == 8
        assert arrived[:12].hex() == (net.server.mac("s0") + net.router.mac("r1")).replace(":", "")


def test_a_packet_too_big_for_the_next_link(net: Crossroads, router: RouterProcess) -> None:
    """RFC 8201: the answer names the MTU; what fits goes on past Linux."""
    for host, end in ((net.router, "r2"), (net.other, "o0")):
        host.set_mtu(end, 1280)
    try:
        wait_until(
            lambda: (
                udp_probe(net.client, OTHER, size=1300, dont_fragment=True) == IcmpError(2, 0, "2001:db8:1::1", 1280)
            )
        )
        assert udp_probe(net.client, OTHER, size=1280 - 48) == IcmpError(1, 4, OTHER)
        assert tcp_transfer(net.client, net.other, OTHER, MEGABYTE).intact
    finally:
        for host, end in ((net.router, "r2"), (net.other, "o0")):
            host.set_mtu(end, 1500)


def test_routes_are_followed(net: Crossroads, router: RouterProcess) -> None:
    with Arrivals(net.server, "::", 5003) as at_server, Arrivals(net.other, "::", 5003) as at_other:
        for host, end in ((net.server, "s0"), (net.other, "o0")):
            host.address(end, "2001:db8:77::7/128")
        net.router.route("2001:db8:77::/48", via=SERVER)
        try:
            with Trickle(net.client, "2001:db8:77::7") as trickle:
                wait_until(lambda: at_server.take())
                net.router.route("2001:db8:77::/48", via=OTHER, command="replace")
                wait_until(lambda: at_other.take())
            wait_until(lambda: len(at_server.take()) + len(at_other.take()) == trickle.sent, what="every datagram")
            net.router.unroute("2001:db8:77::/48")
            wait_until(lambda: udp_probe(net.client, "2001:db8:77::7") == IcmpError(1, 0, "2001:db8:1::1"))
            net.router.route("2001:db8:77::/48", command="add", type="blackhole")
            wait_until(lambda: udp_probe(net.client, "2001:db8:77::7", timeout=0.2) is None)
        finally:
            net.router.unroute("2001:db8:77::/48", type="blackhole")


def test_ipv4_over_an_ipv6_next_hop(net: Crossroads, router: RouterProcess) -> None:
    """RFC 8950: the neighbour's MAC address is that of an IPv6 address."""
    net.server.address("s0", "10.8.0.8/32")
    gateway = {"family": socket.AF_INET6, "addr": SERVER}
    net.router.netlink("route", "add", dst="10.8.0.0/16", via=gateway, oif=net.router.index("r1"))
    try:
        wait_until(lambda: net.client.ping("10.8.0.8", count=1, timeout=0.2).received)
        before = settled(router)
        assert net.client.ping("10.8.0.8", count=10, interval=0.001).received == 10
        assert settled(router) == (before[0] + 20, before[1])
    finally:
        net.router.unroute("10.8.0.0/16")


def test_the_first_packet_of_a_flow_waits_for_its_neighbour(net: Crossroads, router: RouterProcess) -> None:
    net.server.address("s0", "2001:db8:2::99/64")
    with Arrivals(net.server, "::", 5004) as arrivals, net.client.socket(socket.AF_INET6) as sock:
        sock.sendto((7).to_bytes(8, "big"), ("2001:db8:2::99", 5004))
        wait_until(lambda: arrivals.take())
        assert set(arrivals.take()) == {7}


def test_link_local_and_multicast_stay_with_linux(net: Crossroads, router: RouterProcess) -> None:
    """Neighbour discovery, router solicitations, and pings to link-local addresses work past the port."""
    before = router.counters()
    local = next(
        str(dict(one["attrs"])["IFA_ADDRESS"])
        for one in net.router.netlink("get_addr", index=net.router.index("r0"))
        if dict(one["attrs"])["IFA_ADDRESS"].startswith("fe80")
    )
    with net.client.socket(socket.AF_INET6) as sock:
        sock.connect((local, 9, 0, net.client.index("c0")))
        sock.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            wait_until(lambda: sock.send(b"x") and False, timeout=2)
    assert router.counters().forwarded == before.forwarded
    assert net.client.ping("2001:db8:1::1").received == 3, "and the router's own addresses"


def test_what_linux_would_not_forward(net: Crossroads, router: RouterProcess) -> None:
    """Each beside one that is forwarded, so that nothing is waited for in vain."""
    frames = {
        "loopback source": udp(b"bad", src="::1", dst=SERVER),
        "multicast source": udp(b"bad", src="ff05::1", dst=SERVER),
        "no source": udp(b"bad", src="::", dst=SERVER),
        "link-local source": udp(b"bad", src="fe80::9", dst=SERVER),
        "hop limit 1": udp(b"bad", src=CLIENT, dst=SERVER, hop_limit=1),
        "longer than it is": ipv6(b"bad" * 20, src=CLIENT, dst=SERVER, payload_length=100),
        "another version": ipv6(b"bad" * 20, src=CLIENT, dst=SERVER, version=5),
        "another host's": udp(b"bad", src=CLIENT, dst=SERVER),
    }
    with Wire(net.client, "c0") as client, Wire(net.server, "s0") as server:
        macs = {"eth_dst": net.router.mac("r0"), "eth_src": client.mac}
        for name, frame in frames.items():
            to = bytes.fromhex(macs["eth_dst"].replace(":", "")) if name != "another host's" else b"\2\0\0\0\0\x63"
            client.send(to + bytes.fromhex(client.mac.replace(":", "")) + frame[12:])
            client.send(tcp(b"good:" + name.encode(), src=CLIENT, dst=SERVER, **macs))
            seen = server.receive(lambda one: b"bad" in one or b"good:" in one)
            assert seen is not None
            assert b"good:" + name.encode() in seen, name
            assert b"bad" not in seen, name


def test_forwarding_switched_off_is_followed(net: Crossroads, router: RouterProcess) -> None:
    """IPv4 goes on by the fast path; IPv6 is Linux's, which drops it."""
    net.router.sysctl("net.ipv6.conf.all.forwarding", 0)
    try:
        wait_until(lambda: net.client.ping(SERVER, count=1, timeout=0.1).received == 0)
        before = settled(router)
        assert net.client.ping(Crossroads.SERVER, count=5, interval=0.001).received == 5
        assert settled(router)[0] - before[0] == 10
    finally:
        net.router.sysctl("net.ipv6.conf.all.forwarding", 1)
    wait_until(lambda: net.client.ping(SERVER, count=1, timeout=0.2).received == 1)
    before = settled(router)
    wait_until(lambda: net.client.ping(SERVER, count=1).received and settled(router)[0] > before[0])


def test_a_policy_for_ipv6_alone_is_respected(net: Crossroads, router: RouterProcess) -> None:
    """An IPv6 policy rule that appears gives the traffic to Linux until it is gone."""
    net.router.netlink("rule", "add", family=socket.AF_INET6, priority=100, table=100, src="2001:db8:99::/48")
    try:
        router.wait_said("Linux forwards alone", 10)
        wait_until(lambda: net.client.ping(SERVER, count=1).received)
        before = settled(router)
        assert net.client.ping(SERVER, count=3).received == 3
        assert settled(router)[0] == before[0]
    finally:
        net.router.netlink("rule", "del", family=socket.AF_INET6, priority=100, table=100, src="2001:db8:99::/48")
    router.wait_said("forwarding again", 10)
