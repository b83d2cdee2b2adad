"""The probes see IPv6 as they see IPv4: through a router that is Linux itself."""

from __future__ import annotations

import pytest

from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import Arrivals, IcmpError, Trickle, udp_probe

NO_DAD = 0x02
ROUTER, SERVER = "2001:db8:1::1", "2001:db8:2::2"


@pytest.fixture
def net():
    """client - c0 r0 - router - r1 s0 - server, the second link with an MTU of 1,300."""
    with Lab(ipv6=True) as lab:
        client, router, server = lab.host("client"), lab.host("router"), lab.host("server")
        lab.link(client, "c0", router, "r0")
        lab.link(router, "r1", server, "s0", mtu=1300)
        for host, name, address in (
            (client, "c0", "2001:db8:1::2/64"),
            (router, "r0", f"{ROUTER}/64"),
            (router, "r1", "2001:db8:2::1/64"),
            (server, "s0", f"{SERVER}/64"),
        ):
            host.address(name, address, flags=NO_DAD)
        router.sysctl("net.ipv6.conf.all.forwarding", 1)
        for host in (router, server):
            host.sysctl("net.ipv6.icmp.ratelimit", 0)
        for host, via in ((client, ROUTER), (server, "2001:db8:2::1")):
            host.run(["ip", "-6", "route", "add", "default", "via", via], check=True)
        wait_until(lambda: udp_probe(client, SERVER, timeout=0.2), timeout=10, what="the path to the server")
        yield client, server


def test_each_icmpv6_error_is_told(net):
    client, _ = net
    assert udp_probe(client, SERVER) == IcmpError(1, 4, SERVER), "port unreachable"
    assert udp_probe(client, SERVER, ttl=1) == IcmpError(3, 0, ROUTER), "hop limit exceeded"
    fits = 1300 - 40 - 8
    assert udp_probe(client, SERVER, size=fits + 1, dont_fragment=True) == IcmpError(2, 0, ROUTER, 1300), "too big"
    assert udp_probe(client, SERVER, size=fits, dont_fragment=True) == IcmpError(1, 4, SERVER)
    assert udp_probe(client, "2001:db8:2::99", timeout=10) == IcmpError(1, 3, ROUTER), "no such neighbour"


def test_numbered_datagrams_arrive(net):
    client, server = net
    with Arrivals(server, "::") as arrivals:
        with Trickle(client, SERVER) as trickle:
            wait_until(lambda: len(arrivals.take()) >= 20, what="datagrams")
        wait_until(lambda: len(arrivals.take()) == trickle.sent)
        assert sorted(arrivals.take()) == list(range(trickle.sent))
        assert trickle.errors == 0
