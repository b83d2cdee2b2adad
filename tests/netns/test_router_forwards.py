"""`fp router` between namespaces, one packet at a time and 20 MB at a time: what is forwarded, and what Linux does."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from libfp.testing import icmp_echo, ipv4, udp
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.probe import Arrivals, IcmpError, Trickle, Wire, udp_probe
from libfp.testing.router import Crossroads, RouterProcess
from libfp.testing.traffic import UdpStream, tcp_transfer

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, OTHER, FAR = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.OTHER, "10.0.4.2"
MEGABYTE = 1_000_000
IP = 14  # where the IP header begins


class Net(Crossroads):
    """With a link that is no port of `fp router`: r3, to the host `far`."""

    def __init__(self, lab: Lab, workers: int) -> None:
        super().__init__(lab, workers)
        self.far = self._neighbour(3, "far")


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab, workers)


@pytest.fixture(scope="module")
def router(net: Net) -> Iterator[RouterProcess]:
    with RouterProcess(net.router, *net.PORTS, *net.options) as process:
        assert net.client.ping(SERVER).received == 3  # neighbours are known from here on
        assert net.client.ping(OTHER).received == 3
        yield process


@pytest.fixture
def client(net: Net, router: RouterProcess) -> Iterator[Wire]:
    with Wire(net.client, "c0") as wire:
        yield wire


@pytest.fixture
def server(net: Net, router: RouterProcess) -> Iterator[Wire]:
    with Wire(net.server, "s0") as wire:
        yield wire


def to_router(net: Net, client: Wire) -> dict[str, Any]:
    return {"eth_dst": net.router.mac("r0"), "eth_src": client.mac}


def has(payload: bytes) -> Callable[[bytes], bool]:
    return lambda frame: payload in frame


def counted(router: RouterProcess, reason: str, number: int) -> None:
    """A punt is counted just after it is on its way, so Linux may have answered before."""
    wait_until(lambda: router.counters()[reason] >= number, what=f"{number} {reason}")
    assert router.counters()[reason] == number


# -- what forwarding is for


def test_ping_goes_by_the_fast_path(net: Net, router: RouterProcess) -> None:
    before = router.counters()
    result = net.client.ping(SERVER, count=20, interval=0.001)
    assert result.received == 20
    after = router.counters()
    assert after.forwarded - before.forwarded == 40
    assert after.punted == before.punted


def test_every_worker_carries_traffic_both_ways(net: Net, router: RouterProcess) -> None:
    """64 flows each way, spread by the senders' kernels: all arrives, whichever queue it came by."""
    before = router.counters()
    for sender, receiver, address in ((net.client, net.server, SERVER), (net.server, net.client, CLIENT)):
        with Arrivals(receiver, port=5016) as arrivals, contextlib.ExitStack() as stack:
            socks = [stack.enter_context(sender.socket()) for _ in range(64)]
            for number in range(640):
                socks[number % 64].sendto(number.to_bytes(8, "big"), (address, 5016))
            wait_until(lambda: len(arrivals.take()) == 640, what="every datagram")
    after = router.counters()
    assert after.forwarded - before.forwarded == 1280
    assert len(after.workers) == net.workers
    for now, then in zip(after.workers, before.workers, strict=True):
        assert now["received"] - then["received"] > 1280 // net.workers // 4
        assert now["forwarded"] - then["forwarded"] == now["received"] - then["received"]


def test_traceroute_shows_the_router(net: Net, router: RouterProcess) -> None:
    before = router.counters()["ttl-expired"]
    assert udp_probe(net.client, SERVER, ttl=1) == IcmpError(11, 0, "10.0.1.1")
    assert udp_probe(net.client, SERVER, ttl=2) == IcmpError(3, 3, SERVER)
    assert udp_probe(net.server, CLIENT, ttl=1) == IcmpError(11, 0, "10.0.2.1")
    counted(router, "ttl-expired", before + 2)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_tcp_arrives_intact(net: Net, router: RouterProcess, direction: str) -> None:
    before = router.counters()
    ends = [(net.client, CLIENT), (net.server, SERVER)]
    (sender, _), (receiver, address) = ends if direction == "up" else reversed(ends)
    result = tcp_transfer(sender, receiver, address, 20 * MEGABYTE, timeout=60)
    assert result.intact
    after = router.counters()
    assert after.forwarded - before.forwarded > 20 * MEGABYTE / 1448
    assert after.punted == before.punted


def test_headers_leave_as_they_should(net: Net, router: RouterProcess, client: Wire, server: Wire) -> None:
    client.send(udp(b"as it should", ttl=17, tos=0x28, identification=0x1234, **to_router(net, client)))
    frame = server.receive(has(b"as it should"))
    assert frame is not None
    macs: dict[str, Any] = {"eth_dst": net.server.mac("s0"), "eth_src": net.router.mac("r1")}
    assert frame[:14] == bytes.fromhex("".join(macs.values()).replace(":", "")) + b"\x08\0"
    assert frame == udp(b"as it should", ttl=16, tos=0x28, identification=0x1234, **macs)


def test_fragments_are_forwarded(net: Net, router: RouterProcess, client: Wire) -> None:
    whole = udp(bytes(range(200)), dport=5011)[IP + 20 :]
    before = router.counters()
    with net.server.socket() as sink:
        sink.settimeout(2)
        sink.bind((SERVER, 5011))
        common = {"protocol": 17, "identification": 7, **to_router(net, client)}
        client.send(
            ipv4(whole[:104], more_fragments=True, **common),
            ipv4(whole[104:], fragment_offset=104, **common),
        )
        assert sink.recv(2048) == bytes(range(200))
    assert router.counters().forwarded == before.forwarded + 2


# -- what Linux finishes


def test_path_mtu_is_discovered(net: Net, router: RouterProcess) -> None:
    """The next hop takes 1,300 bytes: those who forbid fragments are told so, and TCP adapts."""
    net.router.set_mtu("r2", 1300)
    try:
        before = router.counters()
        assert tcp_transfer(net.client, net.other, OTHER, 2 * MEGABYTE).intact
        after = router.counters()
        assert after["fragment-needed"] > before["fragment-needed"]
        assert after.forwarded - before.forwarded > 2 * MEGABYTE / 1300
        too_long = udp_probe(net.client, OTHER, size=1300 - 28 + 1, dont_fragment=True)
        assert too_long == IcmpError(3, 4, "10.0.1.1", 1300)
        assert udp_probe(net.client, OTHER, size=1300 - 28, dont_fragment=True) == IcmpError(3, 3, OTHER)
    finally:
        net.router.set_mtu("r2", 1500)


def test_mtu_of_a_route_is_kept(net: Net, router: RouterProcess) -> None:
    with route(net, "198.51.100.0/24", via=SERVER, metrics={"mtu": 1280}):
        expected = IcmpError(3, 4, "10.0.1.1", 1280)
        wait_until(lambda: udp_probe(net.client, "198.51.100.1", size=1400, dont_fragment=True) == expected)


def test_linux_fragments_what_may_be_fragmented(net: Net, router: RouterProcess, client: Wire) -> None:
    net.router.set_mtu("r2", 1300)
    try:
        payload = bytes(i & 0xFF for i in range(1400))
        with net.other.socket() as sink, Wire(net.other, "o0") as other:
            sink.bind((OTHER, 5012))
            sink.settimeout(2)

            # The MTU may take a moment to be known, so this may be asked for more than once.
            def fragmented() -> bool:
                client.send(udp(payload, dst=OTHER, dport=5012, identification=99, **to_router(net, client)))
                first = other.receive(lambda frame: frame[IP + 4 : IP + 6] == b"\0\x63")
                return first is not None and bool(first[IP + 6] & 0x20)

            wait_until(fragmented)
            assert sink.recv(2048) == payload
    finally:
        net.router.set_mtu("r2", 1500)


def test_routes_that_refuse(net: Net, router: RouterProcess) -> None:
    kinds = {"203.0.113.0/26": "unreachable", "203.0.113.64/26": "prohibit", "203.0.113.128/26": "blackhole"}
    with contextlib.ExitStack() as stack:
        for prefix, kind in kinds.items():
            stack.enter_context(route(net, prefix, type=kind))
        wait_until(lambda: udp_probe(net.client, "203.0.113.1") == IcmpError(3, 1, "10.0.1.1"))
        assert udp_probe(net.client, "203.0.113.65") == IcmpError(3, 13, "10.0.1.1")
        assert udp_probe(net.client, "192.0.2.1") == IcmpError(3, 0, "10.0.1.1"), "no route at all"
        before = router.counters()
        assert udp_probe(net.client, "203.0.113.129", timeout=0.2) is None, "a black hole does not answer"
        wait_until(lambda: router.counters().drops.get("blackhole", 0) == before.drops.get("blackhole", 0) + 1)


def test_options_are_for_linux(net: Net, router: RouterProcess, client: Wire, server: Wire) -> None:
    """Record route: a router that ignored the option would not leave its address in it."""
    before = router.counters()["ip-options"]
    record_route = bytes([7, 7, 4, 0, 0, 0, 0])
    client.send(udp(b"with options", options=record_route, **to_router(net, client)))
    frame = server.receive(has(b"with options"))
    assert frame is not None
    assert frame[IP + 20 : IP + 27] == bytes([7, 7, 8]) + socket.inet_aton("10.0.2.1")
    counted(router, "ip-options", before + 1)


def test_linux_redirects_who_could_go_straight(net: Net, router: RouterProcess) -> None:
    """A packet that would leave by the port it came in by: Linux tells its sender of the shorter way."""
    before = router.counters()["redirect"]
    with route(net, "198.51.101.0/24", via=CLIENT):

        def redirected() -> bool:
            told = udp_probe(net.client, "198.51.101.1", timeout=0.5) == IcmpError(5, 1, "10.0.1.1")
            return told and router.counters()["redirect"] > before

        wait_until(redirected)


def test_other_devices_are_for_linux_unthrottled(net: Net, router: RouterProcess) -> None:
    assert "out of r3, which is not a port: via Linux" in router.said()
    assert net.client.ping(FAR).received == 3
    assert net.far.ping(CLIENT).received == 3
    before = router.counters()
    with UdpStream(net.client, net.far, FAR, rate=3000, seconds=1.0) as stream:
        result = stream.wait()
    after = router.counters()
    assert result.lost == 0
    assert after["via-linux"] - before["via-linux"] > 1000, "what other punts may have in a second"
    assert after["punt-rate"] == before["punt-rate"]


# -- what must not be forwarded


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("martian-source", {"src": "127.0.0.1"}),
        ("martian-source", {"src": "0.0.0.1"}),
        ("martian-source", {"src": "224.0.0.1"}),
        ("martian-source", {"src": "255.255.255.255"}),
        ("martian-source", {"src": "10.0.2.1"}),  # the router's own
        ("martian-destination", {"dst": "0.0.0.1"}),
        ("ipv4-checksum", {"checksum": 0x1234}),
        ("ipv4-version", {"version": 5}),
        ("ipv4-header-length", {"header_words": 4}),
        ("ipv4-truncated", {"total_length": 1000}),
    ],
)
def test_bad_packets_are_dropped_by_name(
    net: Net, router: RouterProcess, client: Wire, server: Wire, reason: str, fields: dict[str, Any]
) -> None:
    before = router.counters()
    client.send(ipv4(b"bad packet", **to_router(net, client), **fields))
    client.send(udp(b"good packet", **to_router(net, client)))
    first = server.receive(lambda frame: b"bad packet" in frame or b"good packet" in frame)
    assert first is not None
    assert b"good packet" in first
    wait_until(lambda: router.counters().drops.get(reason, 0) > before.drops.get(reason, 0))  # by another worker
    after = router.counters()
    assert after.drops[reason] == before.drops.get(reason, 0) + 1
    assert after.dropped == before.dropped + 1


def test_loopback_destinations_are_not_forwarded(net: Net, router: RouterProcess, client: Wire, server: Wire) -> None:
    client.send(ipv4(b"bad packet", dst="127.0.0.1", **to_router(net, client)))
    client.send(udp(b"good packet", **to_router(net, client)))
    first = server.receive(lambda frame: b"bad packet" in frame or b"good packet" in frame)
    assert first is not None
    assert b"good packet" in first


def test_frames_for_others_are_left_alone(net: Net, router: RouterProcess, client: Wire, server: Wire) -> None:
    """A promiscuous port sees them. Routing them would send what a neighbour got already a second time."""
    net.router.netlink("link", "set", index=net.router.index("r0"), flags=0x100, change=0x100)
    try:
        foreign = to_router(net, client) | {"eth_dst": "02:de:ad:00:00:01"}
        with Wire(net.router, "r0") as port:
            client.send(udp(b"for somebody else", **foreign))
            assert port.receive(has(b"for somebody else")), "the port is promiscuous"
        client.send(udp(b"for the router", **to_router(net, client)))
        first = server.receive(lambda frame: b"for somebody" in frame or b"for the" in frame)
        assert first is not None
        assert b"for the router" in first
    finally:
        net.router.netlink("link", "set", index=net.router.index("r0"), flags=0, change=0x100)


def test_strict_reverse_path_filter_holds(net: Net, router: RouterProcess, client: Wire, server: Wire) -> None:
    """No --bypass needed: the filter is Linux's, and what may fail it is Linux's to decide."""
    spoofed = udp(b"spoofed", src="10.0.2.77", **to_router(net, client))
    fair = udp(b"fair", **to_router(net, client))

    def arrives(*frames: bytes) -> bytes | None:
        client.send(*frames)
        return server.receive(lambda frame: b"spoofed" in frame or b"fair" in frame)

    assert b"spoofed" in (arrives(spoofed) or b"")
    try:
        net.router.sysctl("net.ipv4.conf.r0.rp_filter", 1)

        def filtered() -> bool:
            first = arrives(spoofed, fair)
            assert first is not None
            return b"fair" in first or server.receive(has(b"fair")) is None

        wait_until(filtered)
        before = router.counters()
        assert b"fair" in (arrives(spoofed, fair) or b"")
        wait_until(lambda: router.counters()["rp-filter"] > before["rp-filter"])  # by another worker
        after = router.counters()
        assert after["rp-filter"] == before["rp-filter"] + 1, "the spoofed one; the fair one is not a question"
        assert after.ports["r1"]["tx_packets"] == before.ports["r1"]["tx_packets"] + 1
        net.router.sysctl("net.ipv4.conf.r0.rp_filter", 2)
        wait_until(lambda: b"spoofed" in (arrives(spoofed) or b""))
    finally:
        net.router.sysctl("net.ipv4.conf.r0.rp_filter", 0)


# -- what is the host's own


@pytest.mark.parametrize("address", ["10.0.1.1", "10.0.2.1"])
def test_the_hosts_own_services(net: Net, router: RouterProcess, address: str) -> None:
    assert net.client.ping(address).received == 3
    assert tcp_transfer(net.client, net.router, address, MEGABYTE).intact
    assert tcp_transfer(net.router, net.client, CLIENT, MEGABYTE).intact
    with net.router.socket() as service, net.client.socket() as asking:
        service.bind((address, 5013))
        for sock in (service, asking):
            sock.settimeout(2)
        asking.sendto(b"question", (address, 5013))
        data, sender = service.recvfrom(100)
        service.sendto(data + b": answer", sender)
        assert asking.recvfrom(100) == (b"question: answer", (address, 5013))


def test_broadcast_and_multicast_reach_linux(net: Net, router: RouterProcess) -> None:
    group = socket.inet_aton("224.0.0.251")
    with net.router.socket() as listener, net.client.socket() as sender:
        listener.settimeout(2)
        listener.bind(("", 5014))
        member = struct.pack("=4s4si", group, bytes(4), net.router.index("r0"))
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"c0")
        for address in ("255.255.255.255", "10.0.1.255", "224.0.0.251"):
            sender.sendto(address.encode(), (address, 5014))
            assert listener.recv(100) == address.encode()


def test_dhcp_is_for_linux(net: Net, router: RouterProcess, client: Wire) -> None:
    """A discover (broadcast), a renewal (to the router's address), and answers to and from a relay (forwarded)."""
    received = router.counters().received
    with net.router.socket() as daemon:
        daemon.settimeout(2)
        daemon.bind(("", 67))
        common: dict[str, Any] = {"eth_src": client.mac, "sport": 68, "dport": 67}
        client.send(udp(b"discover", src="0.0.0.0", dst="255.255.255.255", eth_dst="ff:" * 5 + "ff", **common))
        assert daemon.recv(100) == b"discover"
        client.send(udp(b"renew", dst="10.0.1.1", eth_dst=net.router.mac("r0"), **common))
        assert daemon.recv(100) == b"renew"
    for sender, receiver, address, port in (
        (net.client, net.server, SERVER, 67),
        (net.server, net.client, CLIENT, 68),
    ):
        with receiver.socket() as sink, sender.socket() as source:
            sink.settimeout(2)
            sink.bind((address, port))
            source.sendto(b"relayed", (address, port))
            assert sink.recv(100) == b"relayed"
    assert router.counters().received == received, "none of it came to the fast path"


# -- what follows the routes and the neighbours


@contextlib.contextmanager
def route(net: Net, prefix: str, **kwargs: Any) -> Iterator[None]:
    """A route of the router's, for the length of the block."""
    net.router.route(prefix, **kwargs)
    try:
        yield
    finally:
        net.router.unroute(prefix, **{k: v for k, v in kwargs.items() if k in ("via", "type")})


def address_on_loopback(host: Host, address: str) -> None:
    host.address("lo", f"{address}/32")


def test_an_added_route_is_used_within_100_ms(net: Net, router: RouterProcess) -> None:
    """Where there was none; and where a shorter one led elsewhere, so that only the fast path can be late."""
    for host in (net.server, net.other):
        address_on_loopback(host, "198.51.100.7")
    with (
        Arrivals(net.server) as by_server,
        Arrivals(net.other) as by_other,
        Trickle(net.client, "198.51.100.7") as flow,
    ):
        wait_until(lambda: flow.sent > 50)
        added = time.time()
        with route(net, "198.51.100.0/24", via=SERVER):
            wait_until(by_server.take)
            before = router.counters().forwarded
            wait_until(lambda: router.counters().forwarded > before + 50)
            diverted = time.time()
            with route(net, "198.51.100.7/32", via=OTHER):
                wait_until(lambda: len(by_other.take()) > 50)
                arrived, moved = list(by_server.take().values()), list(by_other.take().values())
    assert min(arrived) - added < 0.1
    assert max(arrived) - diverted < 0.1
    assert min(moved) - diverted < 0.1


def test_first_packets_are_not_lost(net: Net, router: RouterProcess) -> None:
    """A hundred new destinations in a second, three datagrams at once to each: Linux resolves, nothing is lost."""
    addresses = [f"10.0.2.{100 + n}" for n in range(100)]
    for address in addresses:
        net.server.address("s0", f"{address}/24")
    before = router.counters()
    with Arrivals(net.server, port=5015) as arrivals, net.client.socket() as sender:
        began = time.monotonic()
        for number, address in enumerate(addresses):
            for part in range(3):
                sender.sendto((3 * number + part).to_bytes(8, "big"), (address, 5015))
            wait_until(lambda: time.monotonic() - began > number / 100, interval=0.001)  # noqa: B023
        wait_until(lambda: len(arrivals.take()) == 300)
    after = router.counters()
    assert after["no-neighbour"] - before["no-neighbour"] >= 100
    assert after["punt-rate"] == before["punt-rate"]
    with UdpStream(net.client, net.server, addresses[50], rate=1000, count=200) as stream:
        assert stream.wait().lost == 0
    assert router.counters()["no-neighbour"] == after["no-neighbour"], "known by now"


# -- what can be seen from outside


def test_stats_from_outside(net: Net, router: RouterProcess) -> None:
    net.client.ping(SERVER)
    done = subprocess.run(
        [sys.executable, "-m", "libfp", "stats", router.ready["name"], "--json"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["pid"] == router.process.pid
    assert set(told["ports"]) == set(net.PORTS)
    assert told["forwarded"] == router.counters().forwarded > 0
    assert told["punts"] == router.counters().punts


def test_icmp_errors_of_others_pass_through(net: Net, router: RouterProcess, client: Wire, server: Wire) -> None:
    """An echo reply whose sender is behind the router: ICMP itself is routed like anything else."""
    client.send(icmp_echo(b"through", reply=True, **to_router(net, client)))
    assert server.receive(has(b"through"))
