"""Each class of frame goes where it must: seen at the AF_XDP socket and, by a packet socket, in Linux."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys

import pytest

from libfp.errors import AlreadyRunning, BadInput, InterfaceBusy, TableFull, Unsupported
from libfp.pyxdp import LocalAddresses, Socket, Steer, bpf, emit, look
from libfp.testing.netns import Lab, wait_until
from libfp.testing.packets import ethernet, icmp_echo, ipv4, tcp, udp
from libfp.testing.probe import IcmpError, udp_probe

MODES = ["native", "skb"]
TAKEN, LINUX = "xdp", "linux"
ALL = socket.htons(3)


class Port:
    """A port under test and the wire to it. Every look ends with a frame whose way is known, so nothing sleeps."""

    def __init__(self, lab):
        self.host, self.wire = lab.host("port"), lab.host("wire")
        lab.link(self.host, "p0", self.wire, "w0")
        self.host.address("p0", "10.0.1.1/24")
        self.mac, self.other = self.host.mac("p0"), self.wire.mac("w0")
        self.tx = self.wire.socket(socket.AF_PACKET, socket.SOCK_RAW, ALL)
        self.tx.bind(("w0", 0))
        self.linux = self.host.socket(socket.AF_PACKET, socket.SOCK_RAW, ALL)
        self.linux.bind(("p0", 0))
        self.linux.settimeout(5)

    def send(self, frame):
        self.tx.send(frame)

    def drain(self):
        self.linux.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.linux.recv(1 << 16)
        self.linux.settimeout(5)

    def way(self, frame, sock, known):
        """Where `frame` went. `known` is a frame that comes to the AF_XDP socket for sure."""
        self.drain()
        end_linux = ethernet(b"the end".ljust(46), ethertype=0x88B6, eth_dst=self.mac)
        for one in (frame, known, end_linux):
            self.send(one)
        tagged = frame[12:14] in (b"\x81\x00", b"\x88\xa8")
        in_linux = (
            frame[:12] + frame[16:] if tagged else frame
        )  # the stack takes a tag off before packet sockets see it
        ways = []
        while (got := sock.recv(5)) != known:
            assert got == frame, "something else came"
            ways.append(TAKEN)
        while (got := self.linux.recv(1 << 16)) != end_linux:
            if got == in_linux:
                ways.append(LINUX)
        assert len(ways) == 1, f"seen {ways}"
        return ways[0]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def port():
    with Lab() as lab:
        port = Port(lab)
        with port.tx, port.linux:
            yield port


def to(port, build=udp, **fields):
    """A frame to the port's MAC; by default from 10.0.1.2 to 203.0.113.5, which the port's host does not own."""
    fields = {"eth_dst": port.mac, "eth_src": port.other, "dst": "203.0.113.5", **fields}
    return build(**fields)


ROUTED = {
    "udp": lambda p: to(p),
    "tcp": lambda p: to(p, tcp),
    "icmp": lambda p: to(p, icmp_echo),
    "any protocol": lambda p: to(p, ipv4, protocol=253, payload=b"x"),
    "only a header": lambda p: to(p, ipv4),
    "options": lambda p: to(p, options=b"\x94\x04\0\0"),
    "TTL 1": lambda p: to(p, ttl=1),
    "a fragment": lambda p: to(p, ipv4, protocol=17, fragment_offset=1480, payload=b"\0\x43\0\x43" * 8),
    "a bad checksum": lambda p: to(p, checksum=1),
    "a bad version": lambda p: to(p, version=6),
    "a bad header length": lambda p: to(p, header_words=2),
    "a full frame": lambda p: to(p, payload=bytes(1472)),
    "broadcast of a foreign network": lambda p: to(p, dst="203.0.113.255"),
    "class E": lambda p: to(p, dst="240.0.0.1"),
    "a port beside DHCP's": lambda p: to(p, dport=69),
    "TCP port 67": lambda p: to(p, tcp, dport=67),
}
STACK = {
    "foreign MAC": lambda p: to(p, eth_dst="02:00:00:00:00:99"),
    "foreign MAC by its last byte": lambda p: to(p, eth_dst=p.mac[:-2] + "fe"),
    "broadcast MAC": lambda p: to(p, eth_dst="ff:ff:ff:ff:ff:ff"),
    "multicast MAC": lambda p: to(p, eth_dst="01:00:5e:01:01:01"),
    "ARP": lambda p: ethernet(bytes(46), 0x0806, eth_dst=p.mac),
    "IPv6": lambda p: ethernet(b"\x60" + bytes(60), 0x86DD, eth_dst=p.mac),
    "802.1Q": lambda p: to(p, vlan=5),
    "802.1ad": lambda p: ethernet(b"\0\5\x08\0" + bytes(46), 0x88A8, eth_dst=p.mac),
    "too short for IPv4": lambda p: ethernet(b"\x45" + bytes(10), eth_dst=p.mac),
    "to this host": lambda p: to(p, dst="10.0.1.1"),
    "to this network's broadcast": lambda p: to(p, dst="10.0.1.255"),
    "broadcast": lambda p: to(p, dst="255.255.255.255"),
    "multicast": lambda p: to(p, dst="224.0.0.5"),
    "the last multicast": lambda p: to(p, dst="239.255.255.255"),
    "to link-local": lambda p: to(p, dst="169.254.3.4"),
    "from link-local": lambda p: to(p, src="169.254.3.4"),
    "DHCP to a server": lambda p: to(p, dport=67),
    "DHCP to a client": lambda p: to(p, sport=67, dport=68),
    "DHCP behind options": lambda p: to(p, dport=68, options=b"\x94\x04\0\0"),
}


def known(port):
    return to(port, payload=b"known way")


def ipv6(payload=b"", next_header=59, src="2001:db8:1::2", dst="2001:db8:2::2", hops=64, length=None, version=6, **eth):
    """An IPv6 packet in a frame; `length` and `version` are for malformed ones."""
    length = len(payload) if length is None else length
    header = struct.pack("!IHBB", version << 28, length, next_header, hops)
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, one) for one in (src, dst))
    return ethernet(header + addresses + payload, 0x86DD, **eth)


def udp6(payload=b"", sport=40000, dport=9, **below):
    return ipv6(struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload, 17, **below)


def tcp6(sport=40000, dport=80, **below):
    return ipv6(struct.pack("!HH16x", sport, dport), 6, **below)


def icmp6(kind=128, hops=255, **below):
    return ipv6(struct.pack("!B23x", kind), 58, hops=hops, **below)


OPTIONS = b"\x11\0\5\2\0\0\1\0"  # an extension header: UDP is next, a router alert
ROUTED6 = {
    "udp": lambda p: to6(p, udp6),
    "tcp": lambda p: to6(p, tcp6),
    "an echo request from one hop away": lambda p: to6(p, icmp6),
    "an ICMPv6 error": lambda p: to6(p, icmp6, kind=1, hops=63),
    "what precedes neighbour discovery": lambda p: to6(p, icmp6, kind=132),
    "what follows neighbour discovery": lambda p: to6(p, icmp6, kind=138),
    "a redirect from further than this link": lambda p: to6(p, icmp6, kind=137, hops=254),
    "ICMPv6 without a type": lambda p: to6(p, ipv6, next_header=58, hops=255),
    "any protocol": lambda p: to6(p, ipv6, next_header=253, payload=b"x"),
    "only a header": lambda p: to6(p, ipv6),
    "hop limit 1": lambda p: to6(p, udp6, hops=1),
    "hop limit 0": lambda p: to6(p, udp6, hops=0),
    "destination options": lambda p: to6(p, ipv6, next_header=60, payload=OPTIONS + b"\0\0\2\x22\0\x08\0\0"),
    "a routing header": lambda p: to6(p, ipv6, next_header=43, payload=OPTIONS),
    "a fragment": lambda p: to6(p, ipv6, next_header=44, payload=OPTIONS),
    "a bad version": lambda p: to6(p, udp6, version=4),
    "a full frame": lambda p: to6(p, udp6, payload=bytes(1452)),
    "padding behind the packet": lambda p: to6(p, udp6, pad=100),
    "DHCP's ports of IPv4": lambda p: to6(p, udp6, dport=67),
    "a port below DHCP's": lambda p: to6(p, udp6, dport=545),
    "a port above DHCP's": lambda p: to6(p, udp6, dport=548),
    "from a DHCP port": lambda p: to6(p, udp6, sport=547),
    "TCP port 547": lambda p: to6(p, tcp6, dport=547),
    "UDP that ends in its ports": lambda p: to6(p, ipv6, next_header=17, payload=b"\0\1\2"),
    "unique local": lambda p: to6(p, udp6, src="fd00::1", dst="fc00::2"),
    "site-local": lambda p: to6(p, udp6, dst="fec0::1"),
    "below link-local": lambda p: to6(p, udp6, dst="fe7f:ffff::1"),
    "NAT64": lambda p: to6(p, udp6, dst="64:ff9b::10.0.0.1"),
    "zeros only in front": lambda p: to6(p, udp6, src="0:0:0:1::1", dst="0:0:0:1::2"),
}
STACK6 = {
    "foreign MAC": lambda p: to6(p, udp6, eth_dst="02:00:00:00:00:99"),
    "foreign MAC by its last byte": lambda p: to6(p, udp6, eth_dst=p.mac[:-2] + "fe"),
    "broadcast MAC": lambda p: to6(p, udp6, eth_dst="ff:ff:ff:ff:ff:ff"),
    "multicast MAC": lambda p: to6(p, udp6, eth_dst="33:33:00:00:00:01"),
    "802.1Q": lambda p: to6(p, udp6, vlan=5),
    "802.1ad": lambda p: ethernet(b"\0\5\x86\xdd" + to6(p, udp6)[14:], 0x88A8, eth_dst=p.mac),
    "MPLS": lambda p: ethernet(to6(p, udp6)[14:], 0x8847, eth_dst=p.mac),
    "too short for IPv6": lambda p: to6(p, ipv6)[:53],
    "a payload that is cut": lambda p: to6(p, udp6, payload=b"12345")[:-1],
    "the largest length": lambda p: to6(p, ipv6, length=65535),
    "longer than the frame by one": lambda p: to6(p, ipv6, length=1),
    "multicast on the link": lambda p: to6(p, udp6, dst="ff02::1"),
    "multicast everywhere": lambda p: to6(p, udp6, dst="ff0e::1"),
    "multicast of no flags": lambda p: to6(p, udp6, dst="ff00::"),
    "from multicast": lambda p: to6(p, udp6, src="ff02::1"),
    "to link-local": lambda p: to6(p, udp6, dst="fe80::1"),
    "to the last link-local": lambda p: to6(p, udp6, dst="febf:ffff:ffff::1"),
    "from link-local": lambda p: to6(p, udp6, src="fe80::1"),
    "from the last link-local": lambda p: to6(p, udp6, src="febf::1"),
    "to unspecified": lambda p: to6(p, udp6, dst="::"),
    "from unspecified": lambda p: to6(p, udp6, src="::"),
    "to loopback": lambda p: to6(p, udp6, dst="::1"),
    "from loopback": lambda p: to6(p, udp6, src="::1"),
    "to a mapped address": lambda p: to6(p, udp6, dst="::ffff:203.0.113.5"),
    "from a mapped address": lambda p: to6(p, udp6, src="::ffff:203.0.113.5"),
    "a router solicitation": lambda p: to6(p, icmp6, kind=133),
    "a router advertisement": lambda p: to6(p, icmp6, kind=134),
    "a neighbour solicitation": lambda p: to6(p, icmp6, kind=135),
    "a neighbour advertisement": lambda p: to6(p, icmp6, kind=136),
    "a redirect": lambda p: to6(p, icmp6, kind=137),
    "DHCP to a client": lambda p: to6(p, udp6, sport=547, dport=546),
    "DHCP to a server": lambda p: to6(p, udp6, dport=547),
    "hop-by-hop options": lambda p: to6(p, ipv6, next_header=0, payload=OPTIONS + bytes(8)),
    "a jumbogram": lambda p: to6(p, ipv6, next_header=0, length=0, payload=OPTIONS),
}


def to6(port, build=udp6, **fields):
    """A frame to the port's MAC; by default from 2001:db8:1::2 to 2001:db8:2::2, which the port's host does not own."""
    return build(**{"eth_dst": port.mac, "eth_src": port.other, **fields})


def test_the_router_takes_what_linux_would_forward_and_leaves_the_rest(port, mode):
    cases = [(name, make(port), TAKEN) for name, make in ROUTED.items()]
    cases += [(name, make(port), LINUX) for name, make in STACK.items()]
    with port.host.enter(), Steer().attach("p0", mode=mode) as attachment, Socket("p0", steer=attachment) as sock:
        port.host.run(["ip", "link", "set", "p0", "promisc", "on"])
        ways = {name: port.way(frame, sock, known(port)) for name, frame, _ in cases}
    assert ways == {name: way for name, _, way in cases}


def test_the_router_takes_both_families_when_asked(port, mode):
    cases = [(name, make(port), TAKEN) for name, make in (ROUTED | ROUTED6).items()]
    stack = {f"IPv4 {name}": make for name, make in STACK.items()} | STACK6
    cases += [(name, make(port), LINUX) for name, make in stack.items() if name != "IPv4 IPv6"]
    with (
        port.host.enter(),
        Steer(families=["ipv4", "ipv6"]).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        port.host.run(["ip", "link", "set", "p0", "promisc", "on"])
        ways = {name: port.way(frame, sock, known(port)) for name, frame, _ in cases}
    assert ways == {name: way for name, _, way in cases}


@pytest.mark.parametrize("steer", [(), ("udp dport 9",)], ids=["router", "pinhole"])
def test_the_families_to_take_change_while_attached(port, mode, steer):
    with (
        port.host.enter(),
        Steer(*steer).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        four, six = to(port, payload=b"as known"), to6(port, payload=b"as known")
        assert attachment.families == (("ipv4", "ipv6") if steer else ("ipv4",))
        attachment.update(families=["ipv6", "ipv4"])
        assert (port.way(to(port), sock, six), port.way(to6(port), sock, four)) == (TAKEN, TAKEN)
        attachment.update(families=["ipv4"])
        assert (port.way(to(port), sock, four), port.way(to6(port), sock, four)) == (TAKEN, LINUX)
        attachment.update(mtu=1400)  # changes nothing else
        assert port.way(to6(port), sock, four) == LINUX
        attachment.update(families=["ipv6"])
        assert (port.way(to(port), sock, six), port.way(to6(port), sock, six)) == (LINUX, TAKEN)
        with pytest.raises(BadInput, match="no address family 'inet6'"):
            attachment.update(families=["inet6"])
        assert attachment.families == ("ipv6",)
        attachment.update(families=[])
        port.drain()
        for frame in (four, six):
            port.send(frame)
            assert port.linux.recv(1 << 16) == frame
        assert sock.recv(0) is None


def test_the_addresses_of_this_host_at_the_time_of_attach(mode):
    """What the kernel's local table has, the subnet-router anycast address of a forwarding host included."""
    with Lab(ipv6=True) as lab:
        port = Port(lab)
        port.host.sysctl("net.ipv6.conf.all.forwarding", 1)
        port.host.address("p0", "2001:db8:2::1/64", flags=0x02)  # no duplicate address detection
        port.host.run(["ip", "-6", "route", "add", "local", "2001:db8:3::/48", "dev", "lo"], check=True)
        with (
            port.tx,
            port.linux,
            port.host.enter(),
            Steer(families=["ipv4", "ipv6"]).attach("p0", mode=mode) as attachment,
            Socket("p0", steer=attachment) as sock,
        ):
            for dst, way in (
                ("2001:db8:2::1", LINUX),
                ("2001:db8:2::", LINUX),
                ("2001:db8:2::2", TAKEN),
                ("2001:db8:3:4::5", LINUX),
                ("2001:db8:4::", TAKEN),
            ):
                assert port.way(to6(port, dst=dst), sock, known(port)) == way, dst
            assert port.way(to(port, dst="10.0.1.1"), sock, known(port)) == LINUX
            # Neighbour discovery in both directions, and what Linux itself answers:
            port.wire.address("w0", "2001:db8:2::9/64", flags=0x02)
            assert udp_probe(port.wire, "2001:db8:2::1") == IcmpError(1, 4, "2001:db8:2::1")


def test_a_canary_takes_its_prefixes_only(port, mode):
    with (
        port.host.enter(),
        Steer(only=["198.51.100.0/24", "203.0.113.5"]).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        for dst, way in (
            ("198.51.100.0", TAKEN),
            ("198.51.100.255", TAKEN),
            ("198.51.101.0", LINUX),
            ("203.0.113.4", LINUX),
            ("10.0.1.1", LINUX),
        ):
            assert port.way(to(port, dst=dst), sock, known(port)) == way, dst


@pytest.mark.parametrize("only", [["2001:db8:2::/48", "2001:db8:5::5", "203.0.113.5"], ["203.0.113.5"]])
def test_a_canary_is_for_each_family_alone(port, mode, only):
    with (
        port.host.enter(),
        Steer(only=only, families=["ipv4", "ipv6"]).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        narrow = TAKEN if len(only) > 1 else LINUX
        for dst, way in (
            ("2001:db8:2::", narrow),
            ("2001:db8:2:ffff:ffff:ffff:ffff:ffff", narrow),
            ("2001:db8:3::", LINUX),
            ("2001:db8:5::5", narrow),
            ("2001:db8:5::4", LINUX),
        ):
            assert port.way(to6(port, dst=dst), sock, known(port)) == way, dst
        assert port.way(to(port, dst="203.0.113.6"), sock, known(port)) == LINUX


PINHOLES = [
    (("udp dport 4789",), {"dport": 4789}, TAKEN),
    (("udp dport 4789",), {"dport": 4789, "dst": "10.0.1.1"}, TAKEN),
    (("udp dport 4789",), {"dport": 4790}, LINUX),
    (("udp dport 4789",), {"sport": 4789}, LINUX),
    (("udp dport 4789",), {"build": tcp, "dport": 4789}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "options": b"\x94\x04\0\0"}, TAKEN),
    (("udp dport 4789",), {"dport": 4789, "more_fragments": True}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "vlan": 7}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "eth_dst": "02:00:00:00:00:99"}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "header_words": 4}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "version": 5}, LINUX),
    (("tcp sport 1-1023",), {"build": tcp, "sport": 1023}, TAKEN),
    (("tcp sport 1-1023",), {"build": tcp, "sport": 1024}, LINUX),
    (("tcp sport 1-1023",), {"build": tcp, "sport": 0}, LINUX),
    (("udp dport 65535 and src 10.0.0.0/8",), {"dport": 65535}, TAKEN),
    (("udp dport 65535 and src 10.0.2.0/24",), {"dport": 65535}, LINUX),
    (("proto icmp",), {"build": icmp_echo}, TAKEN),
    (("proto icmp",), {"build": icmp_echo, "fragment_offset": 8}, TAKEN),
    (("proto icmp",), {}, LINUX),
    (("dst 10.0.1.1",), {"dst": "10.0.1.1"}, TAKEN),
    (("dst 10.0.1.1",), {"dst": "10.0.1.2"}, LINUX),
    (("dst 239.1.1.1",), {"dst": "239.1.1.1", "eth_dst": "01:00:5e:01:01:01"}, TAKEN),
    (("dst 239.1.1.1",), {"dst": "239.1.1.2", "eth_dst": "01:00:5e:01:01:02"}, LINUX),
    (("ip",), {}, TAKEN),
    (("ip",), {"eth_dst": "ff:ff:ff:ff:ff:ff", "dst": "255.255.255.255"}, LINUX),
    (("udp dport 1", "udp dport 2"), {"dport": 2}, TAKEN),
    (("udp dport 1", "udp dport 2"), {"dport": 3}, LINUX),
]


PINHOLES6 = [
    (("udp dport 4789",), {"dport": 4789}, TAKEN),
    (("udp dport 4789",), {"dport": 4789, "src": "fe80::1", "dst": "fe80::2"}, TAKEN),
    (("udp dport 4789",), {"dport": 4790}, LINUX),
    (("udp dport 4789",), {"sport": 4789}, LINUX),
    (("udp dport 4789",), {"build": tcp6, "dport": 4789}, LINUX),
    (("udp dport 4789",), {"build": ipv6, "next_header": 60, "payload": OPTIONS + b"\0\x07\x12\xb5\0\x08"}, LINUX),
    (("udp dport 4789",), {"build": ipv6, "next_header": 44, "payload": OPTIONS + b"\0\x07\x12\xb5\0\x08"}, LINUX),
    (("udp dport 4789",), {"build": ipv6, "next_header": 17, "payload": b"\0\x07\x12"}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "length": 9}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "version": 4}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "vlan": 7}, LINUX),
    (("udp dport 4789",), {"dport": 4789, "eth_dst": "02:00:00:00:00:99"}, LINUX),
    (("ip6 and udp dport 4789",), {"dport": 4789}, TAKEN),
    (("ip6 and udp dport 4789",), {"four": True, "dport": 4789}, LINUX),
    (("ip and udp dport 4789",), {"dport": 4789}, LINUX),
    (("ip and udp dport 4789",), {"four": True, "dport": 4789}, TAKEN),
    (("tcp sport 1-1023",), {"build": tcp6, "sport": 1023}, TAKEN),
    (("tcp sport 1-1023",), {"build": tcp6, "sport": 1024}, LINUX),
    (("proto icmp6",), {"build": icmp6}, TAKEN),
    (("proto icmp6",), {"build": icmp6, "kind": 135}, TAKEN),
    (("proto icmp6",), {}, LINUX),
    (("proto icmp",), {"build": icmp6}, LINUX),
    (("ip6",), {}, TAKEN),
    (("ip6",), {"build": icmp6}, TAKEN),
    (("ip6",), {"build": icmp6, "kind": 136}, LINUX),
    (("ip6",), {"build": icmp6, "kind": 136, "hops": 64}, TAKEN),
    (("ip6",), {"build": ipv6, "next_header": 0, "payload": OPTIONS}, TAKEN),
    (("ip6",), {"four": True}, LINUX),
    (("ip6",), {"eth_dst": "33:33:00:00:00:01", "dst": "ff02::1"}, LINUX),
    (("ip",), {}, LINUX),
    (("src 2001:db8::/32",), {"src": "2001:db8:ffff::1"}, TAKEN),
    (("src 2001:db8::/32",), {"src": "2001:db9::1"}, LINUX),
    (("src 2001:db8::/32",), {"four": True}, LINUX),
    (("dst 2001:db8:1::1",), {"dst": "2001:db8:1::1"}, TAKEN),
    (("dst 2001:db8:1::1",), {"dst": "2001:db8:1::2"}, LINUX),
    (("dst 2001:db8:1::1",), {"dst": "2001:db8:2::1"}, LINUX),
    (("dst 2001:db8:1:2:8000::/65",), {"dst": "2001:db8:1:2:8000::9"}, TAKEN),
    (("dst 2001:db8:1:2:8000::/65",), {"dst": "2001:db8:1:2:7000::9"}, LINUX),
    (("dst ff02::5",), {"dst": "ff02::5", "eth_dst": "33:33:00:00:00:05"}, TAKEN),
    (("dst ff02::5",), {"dst": "ff02::6", "eth_dst": "33:33:00:00:00:06"}, LINUX),
    (("src 10.0.0.0/8", "dst 2001:db8::/32 and tcp"), {"build": tcp6}, TAKEN),
    (("src 10.0.0.0/8", "dst 2001:db8::/32 and tcp"), {"four": True}, TAKEN),
    (("src 10.0.0.0/8", "dst 2001:db8::/32 and tcp"), {}, LINUX),
]


@pytest.mark.parametrize("filters", sorted({case[0] for case in PINHOLES6}))
def test_a_pinhole_takes_ipv6_too(port, mode, filters):
    sure = "udp dport 9999"
    with (
        port.host.enter(),
        Steer(*filters, sure).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        for one, fields, way in PINHOLES6:
            if one == filters:
                make = to if fields.get("four") else to6
                frame = make(port, **{name: value for name, value in fields.items() if name != "four"})
                assert port.way(frame, sock, to6(port, dport=9999)) == way, fields


@pytest.mark.parametrize("filters", sorted({case[0] for case in PINHOLES}))
def test_a_pinhole_takes_what_it_names_even_from_this_host(port, mode, filters):
    sure = "udp dport 9999"
    with (
        port.host.enter(),
        Steer(*filters, sure).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        for one, fields, way in PINHOLES:
            if one == filters:
                frame = to(port, **fields)
                assert port.way(frame, sock, to(port, dport=9999)) == way, fields


def test_local_addresses_are_seen_by_every_port_at_once(port):
    with (
        port.host.enter(),
        LocalAddresses(["10.0.1.1"]) as local,
        Steer(local=local).attach("p0") as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        frame = to(port, dst="198.51.100.1")
        assert port.way(frame, sock, known(port)) == TAKEN
        local.add("198.51.100.0/24")
        assert port.way(frame, sock, known(port)) == LINUX
        assert local.covers("198.51.100.77")
        local.replace(["10.0.1.1", "198.51.100.2/32"])
        assert list(local) == ["10.0.1.1/32", "198.51.100.2/32"]
        assert port.way(frame, sock, known(port)) == TAKEN
        local.remove("10.0.1.1/32")
        assert "10.0.1.1" not in local
        assert port.way(to(port, dst="10.0.1.1"), sock, known(port)) == TAKEN


def test_local_addresses_of_ipv6_are_a_set_of_their_own(port):
    with (
        port.host.enter(),
        LocalAddresses(["10.0.1.1"], capacity=2) as local,
        Steer(local=local, families=["ipv4", "ipv6"]).attach("p0") as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        frame = to6(port, dst="2001:db8:7::1")
        assert port.way(frame, sock, known(port)) == TAKEN
        local.add("2001:db8:7::/48")
        assert port.way(frame, sock, known(port)) == LINUX
        assert local.covers("2001:db8:7::99")
        assert not local.covers("2001:db8:8::1")
        assert "2001:DB8:7:0::/48" in local
        local.add("::/0")
        assert port.way(to6(port), sock, known(port)) == LINUX
        assert port.way(to(port), sock, known(port)) == TAKEN  # of the other family nothing has changed
        with pytest.raises(TableFull, match="2 IPv6 prefixes"):
            local.add("2001:db8:9::1")
        assert "2001:db8:9::1" not in local
        local.add("10.0.1.3")
        local.remove("::/0")
        local.replace(["10.0.1.1", "2001:db8:7::2"])
        assert list(local) == ["10.0.1.1/32", "2001:db8:7::2/128"]
        assert port.way(frame, sock, known(port)) == TAKEN
        local.remove("2001:db8:7::2")
        assert port.way(to6(port, dst="2001:db8:7::2"), sock, known(port)) == TAKEN
        assert len(local) == 1


def test_a_queue_without_a_socket_belongs_to_linux(port, mode):
    with port.host.enter(), Steer().attach("p0", mode=mode) as attachment, Socket("p0", steer=attachment) as sock:
        frame, wait = known(port), port.linux.recv
        for leave in (lambda: attachment.clear(0), sock.close):
            assert port.way(to(port), sock, frame) == TAKEN
            leave()
            port.drain()
            port.send(to(port))
            assert wait(1 << 16) == to(port)
            if sock.fd >= 0:
                attachment.set_socket(0, sock.fd)
        attachment.clear(0)  # nothing there any more: no error


def test_a_changed_mac_or_mtu_can_be_told(port):
    with (
        port.host.enter(),
        Steer(families=["ipv4", "ipv6"]).attach("p0") as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        before = to(port)
        attachment.update(mac=bytes.fromhex("02ab00000001"))
        after = to(port, eth_dst="02:ab:00:00:00:01")
        assert port.way(before, sock, after) == LINUX
        assert port.way(to6(port), sock, after) == LINUX
        assert port.way(to6(port, eth_dst="02:ab:00:00:00:01"), sock, after) == TAKEN
        attachment.update(mtu=100)
        assert port.way(to6(port, eth_dst="02:ab:00:00:00:01", payload=bytes(52)), sock, after) == TAKEN
        assert port.way(to6(port, eth_dst="02:ab:00:00:00:01", payload=bytes(53)), sock, after) == LINUX
        assert port.way(to(port, eth_dst="02:ab:00:00:00:01", payload=bytes(200)), sock, after) == LINUX
        attachment.update(mtu=1500)
        assert port.way(to(port, eth_dst="02:ab:00:00:00:01", payload=bytes(200)), sock, after) == TAKEN


def test_merged_segments_are_never_lost_at_the_socket(port, mode):
    """A peer with segmentation offload: in native mode veth stops it, in generic mode the large frames go to Linux."""
    server = port.host.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.bind(("10.0.1.1", 5001))
    server.listen()
    port.wire.address("w0", "10.0.1.2/24")
    client = port.wire.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.connect(("10.0.1.1", 5001))
    connection = server.accept()[0]
    with server, client, connection, port.host.enter():
        for feature in ("tx", "sg", "tso", "gso"):
            port.wire.offload("w0", feature, True)
        with Steer("tcp dport 5001").attach("p0", mode=mode) as attachment, Socket("p0", steer=attachment) as sock:
            client.sendall(bytes(50_000))
            if mode == "native":
                assert len(sock.recv(5)) == 1514
            else:
                connection.settimeout(5)
                received = 0
                while received < 50_000:
                    received += len(connection.recv(1 << 16))
            assert sock.statistics.rx_dropped == 0


REDIRECT = """
define i32 @to_ingress(ptr %context) section "program" {{
  %bpf_redirect = inttoptr i64 23 to ptr
  %action = call i64 %bpf_redirect(i32 {index}, i64 1)
  %action32 = trunc i64 %action to i32
  ret i32 %action32
}}"""


@contextlib.contextmanager
def tap(host, name, onto):
    """A TAP whose frames arrive at `onto`, as the punt path makes it. Yields its file descriptor."""
    with host.enter(), contextlib.ExitStack() as stack:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF: TAP, no header
        host.up(name)
        code = emit.compile_bpf(REDIRECT.format(index=host.index(onto)))
        loaded = stack.enter_context(bpf.Program(code, "libfp_punt", bpf.ATTACH_TCX_INGRESS))
        stack.enter_context(bpf.Link(loaded, host.index(name)))
        yield fd


def test_reinjected_frames_reach_linux_and_never_come_back(port, mode):
    with (
        tap(port.host, "t0", "p0") as fd,
        port.host.enter(),
        Steer(families=["ipv4", "ipv6"]).attach("p0", mode=mode) as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        assert len(attachment.marker) == (14 if mode == "skb" else 0)
        port.drain()
        for frame in (to(port, payload=b"punted", ttl=1), to6(port, payload=b"punted", hops=1), to6(port, ipv6)):
            os.write(fd, attachment.marker + frame)
            assert port.linux.recv(1 << 16) == frame  # unchanged, at the port's own ingress
        assert port.way(to(port), sock, known(port)) == TAKEN  # nothing else had come to the socket
        # What the wire brings with a wrong mark, or the mark's Ethertype alone, is not taken for ours.
        forged = ethernet(frame, 0x88B5, eth_dst=port.mac)
        assert port.way(forged, sock, known(port)) == LINUX


def test_in_generic_mode_a_frame_without_the_marker_does_come_back(port):
    """Why there is a marker: the kernel runs generic XDP again on what tcx redirects to ingress."""
    with (
        tap(port.host, "t0", "p0") as fd,
        port.host.enter(),
        Steer().attach("p0", mode="skb") as attachment,
        Socket("p0", steer=attachment) as sock,
    ):
        os.write(fd, to(port))
        assert sock.recv(5) == to(port)


def test_a_foreign_program_is_refused_by_name_and_id(port):
    text = 'define i32 @alien(ptr %c) section "program" {\n  ret i32 2\n}'
    with port.host.enter():
        with bpf.Program(emit.compile_bpf(text), "alien") as alien, bpf.Link(alien, look("p0").index):
            with pytest.raises(InterfaceBusy, match=rf"alien \(id {alien.id} held by process {os.getpid()}\)"):
                Steer().attach("p0")
            assert look("p0").programs == (alien.id,)
        assert look("p0").programs == ()
        Steer().attach("p0").close()


HOLD = """
import sys
from libfp.pyxdp import Socket
sock = Socket("p0", steer="udp dport 9")
print(sock.attachment.program_id, flush=True)
for frame in sock:
    pass
"""


def test_another_libfp_is_named_with_its_pid_and_gone_after_kill_9(port):
    other = port.host.popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    number = int(other.stdout.readline())
    with port.host.enter():
        with pytest.raises(AlreadyRunning, match=rf"p0 .*libfp_steer, id {number} held by process {other.pid}\b"):
            Steer().attach("p0")
        os.kill(other.pid, signal.SIGKILL)
        other.wait(5)
        wait_until(lambda: look("p0").programs == (), what="the program to go")
        wait_until(lambda: not bpf.program_info(number).name, what="the program to be unloaded")
        with Socket("p0", steer="udp dport 9") as sock:
            assert sock.attachment.attached


def test_a_link_ends_with_its_interface(port):
    with port.host.enter(), Steer().attach("p0") as attachment:
        assert attachment.attached
        port.host.netlink("link", "del", index=port.host.index("p0"))
        assert not attachment.attached


def test_native_mode_is_demanded_or_replaced_with_the_reason(port):
    """veth refuses native XDP for a peer with an MTU that does not fit a page."""
    port.host.set_mtu("p0", 1500)
    port.wire.set_mtu("w0", 9000)
    with port.host.enter():
        with pytest.raises(Unsupported, match="no native XDP program: its MTU, or its peer's, is too large"):
            Steer().attach("p0", mode="native")
        with Steer().attach("p0") as attachment:
            assert attachment.mode == "skb"
            assert "too large" in attachment.reason
            assert attachment.marker
        assert look("p0").programs == ()


def test_waiting_for_both_sides_needs_no_busy_loop(port):
    with port.host.enter(), Socket("p0", steer="udp dport 9") as sock:
        poller = select.poll()
        poller.register(sock.fd, select.POLLIN)
        assert poller.poll(0) == []
        port.send(to(port, dport=9))
        assert poller.poll(5000) == [(sock.fd, select.POLLIN)]
