"""Two `fp ipsec` gateways between two hosts: traffic goes through, and the wire between them carries nothing but ESP.

    a 10.1.0.2 -- l1 10.1.0.1 gw1 198.51.100.1 w1 -- wire (a bridge) -- w2 198.51.100.2 gw2 10.2.0.1 l2 -- 10.2.0.2 b

The same with IPv6, 2001:db8:1::2 and so on, through a tunnel of its own over IPv6. Linux has all routes: without the
gateways, and without what they leave in the kernel, everything goes in clear.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libfp.cli import main
from libfp.linux import xfrm
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.packets import internet_checksum
from libfp.testing.probe import IcmpError, udp_probe
from libfp.testing.router import AppProcess
from libfp.testing.traffic import UdpStream, tcp_transfer

pytestmark = pytest.mark.timeout(180)

A, B, A6, B6 = "10.1.0.2", "10.2.0.2", "2001:db8:1::2", "2001:db8:2::2"
GW1, GW2, GW16, GW26 = "10.1.0.1", "10.2.0.1", "2001:db8:1::1", "2001:db8:2::1"
OUTER = {4: ("198.51.100.1", "198.51.100.2"), 6: ("2001:db8:ff::1", "2001:db8:ff::2")}
NETS = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("2001:db8:1::/48", "2001:db8:2::/48")}
CROSS = ("10.1.88.0/24", "10.2.88.0/24")  # IPv4 through the tunnel over IPv6
CLEAR = ("10.1.99.0/24", "10.2.99.0/24")  # of what is to be bypassed
SPIS = {4: (0x1004, 0x2004), 6: (0x1006, 0x2006)}  # to gw2, to gw1
ESP, MARKER = 50, b"nobody should be able to read this"
#: With two, SAs belong to one or the other, and most packets are handed off.
WORKERS = ([1] if os.environ.get("LIBFP_FULL") else []) + [min(2, len(os.sched_getaffinity(0)))]
BOTH = pytest.mark.parametrize("version", [4, 6])


def keys(generation: int = 0) -> dict[int, str]:
    """By SPI."""
    return {
        spi: bytes([spi >> 8 & 0xFF, spi & 0xFF, generation, 7] * 9).hex() for pair in SPIS.values() for spi in pair
    }


class Wire:
    """A bridge between the gateways, and what passes it. AF_XDP's own ends see neither what it sends nor takes."""

    def __init__(self, host: Host, first: str, second: str) -> None:
        host.netlink("link", "add", ifname="br0", kind="bridge")
        for name in (first, second):
            host.netlink("link", "set", index=host.index(name), master=host.index("br0"))
        host.up("br0")
        self.index = {name: host.index(name) for name in (first, second)}
        self.all = self._sniffer(host, ())
        self.others = self._sniffer(host, _NO_ESP)
        self.host, self.injector = host, host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)

    def _sniffer(self, host: Host, program: tuple[tuple[int, int, int, int], ...]) -> socket.socket:
        sniffer = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL, of all interfaces
        if program:
            code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
            sniffer.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
        sniffer.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        sniffer.setblocking(False)
        return sniffer

    def frames(self, sniffer: socket.socket) -> list[bytes]:
        """What has come in since the last call; each frame once."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (name, _, kind, *_) = sniffer.recvfrom(1 << 16)
                if name in self.index and kind != socket.PACKET_OUTGOING:
                    found.append(frame)
        return found

    def esp(self) -> list[bytes]:
        return [frame for frame in self.frames(self.all) if is_esp(frame)]

    def leaks(self) -> list[str]:
        """What should not have been there."""
        return [f"{frame[:60].hex()} ({len(frame)} bytes)" for frame in self.frames(self.others) if not harmless(frame)]

    def send(self, frame: bytes, to: str) -> None:
        """Out of the port `to` of the bridge."""
        self.injector.sendto(frame, (to, 0))


# Classic BPF: IPv4 and IPv6 with ESP as the protocol are not for this socket.
_NO_ESP = (
    (0x28, 0, 0, 12), (0x15, 0, 2, 0x0800), (0x30, 0, 0, 23), (0x15, 4, 3, ESP),
    (0x15, 0, 2, 0x86DD), (0x30, 0, 0, 20), (0x15, 1, 0, ESP), (0x06, 0, 0, 0x40000), (0x06, 0, 0, 0),
)  # fmt: skip


def is_esp(frame: bytes) -> bool:
    kind = frame[12:14]
    return (kind == b"\x08\0" and frame[23] == ESP) or (kind == b"\x86\xdd" and frame[20] == ESP)


def harmless(frame: bytes) -> bool:
    """ARP, and ICMPv6 between neighbours: nothing that a host behind a gateway has said."""
    if MARKER in frame:
        return False
    if frame[12:14] == b"\x08\x06":
        return True
    if frame[12:14] == b"\x86\xdd":
        at = 54 + (8 if frame[20] == 0 else 0)  # a hop-by-hop header: of MLD
        return 58 in (frame[20], frame[54]) and frame[at] in (130, 131, 132, 133, 134, 135, 136, 143)
    if frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[34:36] == b"\x03\x02":
        return frame[42 + 9] == ESP  # a kernel without IPsec says so to the other gateway, about its ESP
    return False


class Site:
    """The hosts, the wire, the files and the running gateways."""

    def __init__(self, lab: Lab, folder: Path, workers: int) -> None:
        self.folder = folder
        cores = sorted(os.sched_getaffinity(0))[:workers]
        self.options = ("--cores", ",".join(map(str, cores)), "--kick", "inline")
        self.a, self.gw1, wire, self.gw2, self.b = (lab.host(name) for name in ("a", "gw1", "wire", "gw2", "b"))
        for scope in ("all", "default"):
            wire.sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 1)
        for host, name, other, other_name in (
            (self.a, "a0", self.gw1, "l1"),
            (self.gw1, "w1", wire, "x1"),
            (self.gw2, "w2", wire, "x2"),
            (self.b, "b0", self.gw2, "l2"),
        ):
            for scope in ("all", "default"):
                host.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 0)
            host.sysctl("net.ipv6.conf.all.accept_dad", 0)
            host.sysctl("net.ipv4.icmp_ratemask", 0)
            host.sysctl("net.ipv6.icmp.ratelimit", 0)
            lab.link(host, name, other, other_name, queues=workers)
        for number, (host, end, gateway, inside, outside) in enumerate(
            ((self.a, "a0", self.gw1, "l1", "w1"), (self.b, "b0", self.gw2, "l2", "w2"))
        ):
            here, there = number + 1, 2 - number
            host.address(end, f"10.{here}.0.2/24")
            host.address(end, f"2001:db8:{here}::2/64")
            for more in (88, 99):
                host.address(end, f"10.{here}.{more}.2/24")
                gateway.address(inside, f"10.{here}.{more}.1/24")
            gateway.address(inside, f"10.{here}.0.1/24")
            gateway.address(inside, f"2001:db8:{here}::1/64")
            gateway.address(outside, f"{OUTER[4][number]}/24")
            gateway.address(outside, f"{OUTER[6][number]}/64")
            host.route("default", via=f"10.{here}.0.1")
            host.route("::/0", via=f"2001:db8:{here}::1")
            gateway.route(f"10.{there}.0.0/16", via=OUTER[4][1 - number])
            gateway.route(f"2001:db8:{there}::/48", via=OUTER[6][1 - number])
            gateway.sysctl("net.ipv4.ip_forward", 1)
            gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
        self.wire = Wire(wire, "x1", "x2")
        self.files = [folder / f"gw{number + 1}.toml" for number in range(2)]
        self.gateways: list[AppProcess] = []
        for number in range(2):
            self.write(number)

    def write(self, number: int, sas: dict[int, str] | None = None, default: str = "bypass", extra: str = "") -> None:
        """The file of gateway `number`; `sas` are keys by SPI, an odd thousand to gw2."""
        text = f'default = "{default}"\nstate = "{self.folder}/gw{number + 1}.json"\n'
        for spi, key in (sas or keys()).items():
            version = spi & 0xF
            local, remote = OUTER[version][number], OUTER[version][1 - number]
            text += f'[[sa]]\ntunnel = "six{version}"\ndirection = "{"in" if (spi >> 12) % 2 == number else "out"}"\n'
            text += f'spi = {spi:#x}\nlocal = "{local}"\nremote = "{remote}"\ncipher = "aes-256-gcm"\nkey = "{key}"\n'
        here, there = (number, 1 - number)
        text += f'[[policy]]\naction = "bypass"\nsource = "{CLEAR[here]}"\ndestination = "{CLEAR[there]}"\n'
        for version, nets in ((6, CROSS), *NETS.items()):
            text += f'[[policy]]\naction = "protect"\nsource = "{nets[here]}"\ndestination = "{nets[there]}"\n'
            text += f'tunnel = "six{version}"\n'
        self.files[number].touch(mode=0o600)
        self.files[number].write_text(text + extra)

    def start(self, number: int) -> AppProcess:
        ports = (f"l{number + 1}", f"w{number + 1}")
        name = f"gw{number + 1}-{os.getpid()}"
        options = (*self.options, "--name", name, "--config", str(self.files[number]))
        return AppProcess((self.gw1, self.gw2)[number], "ipsec", *ports, *options)

    def reach(self, version: int = 4) -> None:
        """Until a packet comes through: both gateways know their neighbours then."""
        target = B if version == 4 else B6
        wait_until(lambda: self.a.ping(target, count=1, timeout=0.5).received, 20, f"{target} to answer")

    def drops(self, number: int) -> dict[str, int]:
        return dict(self.gateways[number].counters().drops)

    def sas(self, number: int) -> dict[int, dict[str, Any]]:
        command = ["ipsec", "sas", self.gateways[number].ready["name"], "--json"]
        return {sa["spi"]: sa for sa in json.loads(fp(*command))["sas"]}


def fp(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(arguments)) == 0
    return out.getvalue()


@pytest.fixture(scope="module", params=WORKERS, ids=lambda count: f"workers{count}")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Lab(ipv6=True) as lab:
        site = Site(lab, tmp_path_factory.mktemp("ipsec"), request.param)
        try:
            site.gw1.call(xfrm.policies)
        except OSError as error:
            pytest.skip(f"this kernel has no XFRM: {error}")
        for version in (4, 6):
            site.reach(version)
        assert len(site.wire.leaks()) >= 4, "Linux forwards in clear, and the capture sees it"
        for gateway, name, neighbour in ((site.gw1, "w1", 1), (site.gw2, "w2", 0)):
            for version in (4, 6):
                gateway.neighbour(name, OUTER[version][neighbour], None)  # to be found by the first packets
        with contextlib.ExitStack() as stack:
            for number in (0, 1):
                site.gateways.append(stack.enter_context(site.start(number)))
            site.wire.leaks()
            yield site


@pytest.fixture(autouse=True)
def sealed(site: Site) -> Iterator[None]:
    """Whatever the test does, nothing but ESP is on the wire, and nothing of it can be read."""
    site.wire.esp()
    yield
    assert site.wire.leaks() == []


@BOTH
def test_neighbours_of_packets_that_linux_never_sees_are_found(site: Site, version: int) -> None:
    """The first test: neither gateway knows the other's address."""
    site.reach(version)


@BOTH
def test_ping(site: Site, version: int) -> None:
    assert site.a.ping(B if version == 4 else B6, count=5, interval=0.01).received == 5
    assert site.b.ping(A if version == 4 else A6, count=5, interval=0.01).received == 5
    spis = set()
    for frame in site.wire.esp():
        at = 14 + (20 if version == 4 else 40)
        spis.add(int.from_bytes(frame[at : at + 4], "big"))
    assert spis == set(SPIS[version])
    assert MARKER not in b"".join(site.wire.esp())
    for number, direction in ((0, "out"), (1, "in")):
        sa = site.sas(number)[SPIS[version][0]]
        assert sa["direction"] == direction
        assert sa["sequence"] >= 10
        assert sa["counters"]["packets"] >= 10


@BOTH
def test_payload_is_not_readable_and_arrives(site: Site, version: int) -> None:
    family, address = (socket.AF_INET, B) if version == 4 else (socket.AF_INET6, B6)
    with site.b.socket(family) as receiver, site.a.socket(family) as sender:
        receiver.settimeout(5)
        receiver.bind((address, 7777))
        sender.sendto(MARKER, (address, 7777))
        assert receiver.recv(100) == MARKER
    (frame,) = site.wire.esp()
    assert MARKER not in frame


@BOTH
def test_tcp_transfer_of_20_megabytes(site: Site, version: int) -> None:
    """Its first large segments do not fit: path MTU discovery makes it work."""
    result = tcp_transfer(site.a, site.b, B if version == 4 else B6, 20 << 20 if version == 4 else 4 << 20)
    assert result.intact


@BOTH
def test_traceroute_names_the_gateways(site: Site, version: int) -> None:
    """The first gateway answers in clear, the second from its inner address, through the tunnel."""
    target, first = (B, GW1) if version == 4 else (B6, GW16)
    kind = 11 if version == 4 else 3
    assert udp_probe(site.a, target, ttl=1) == IcmpError(kind, 0, first)
    second = udp_probe(site.a, target, ttl=2)
    assert second is not None
    assert (second.kind, second.code) == (kind, 0)
    last = udp_probe(site.a, target, ttl=3)
    assert last == IcmpError(*((3, 3) if version == 4 else (1, 4)), target)


@BOTH
def test_oversize_packets_are_answered_with_the_right_mtu(site: Site, version: int) -> None:
    target, first = (B, GW1) if version == 4 else (B6, GW16)
    answer = udp_probe(site.a, target, size=1500 - (28 if version == 4 else 48), dont_fragment=True)
    assert answer is not None
    assert (answer.kind, answer.code, answer.sender) == ((3, 4, first) if version == 4 else (2, 0, first))
    header = 20 if version == 4 else 40
    # header, SPI and sequence, IV, a multiple of four of packet, padding and two bytes of trailer, ICV
    room = (1500 - header - 8 - 8 - 16) // 4 * 4 - 2
    assert answer.mtu == room
    site.wire.esp()
    fits = udp_probe(site.a, target, size=room - (28 if version == 4 else 48), dont_fragment=True)
    assert fits is not None
    assert fits.sender == target, "what fits exactly comes through"
    largest = max(map(len, site.wire.esp()))
    assert 1500 - 3 <= largest - 14 <= 1500
    peer = OUTER[version][1] + ("/32" if version == 4 else "/128")
    site.gw1.route(peer, dev="w1", metrics={"mtu": 1400})
    try:
        room -= 100
        wait_until(lambda: (udp_probe(site.a, target, size=1400, dont_fragment=True) or answer).mtu == room, 5)
    finally:
        site.gw1.unroute(peer, dev="w1")


def test_what_the_policies_bypass_goes_in_clear(site: Site) -> None:
    assert site.a.ping(CLEAR[1].replace("0/24", "2"), source=CLEAR[0].replace("0/24", "2"), count=2).received == 2
    clear = site.wire.leaks()
    assert len(clear) == 4
    assert site.wire.esp() == []


def test_ipv4_through_a_tunnel_over_ipv6(site: Site) -> None:
    ends = {"address": "10.2.88.2", "source": "10.1.88.2"}
    wait_until(lambda: site.a.ping(**ends, count=1, timeout=0.5).received, 20, "an answer")
    assert site.a.ping(**ends, count=3, interval=0.01).received == 3
    assert {frame[12:14] for frame in site.wire.esp()} == {b"\x86\xdd"}


def test_packets_that_a_router_would_punt(site: Site) -> None:
    """Options, fragments, odd protocols, extension headers, malformed: whatever becomes of them, not in clear."""
    from scapy.layers.inet import IP, UDP, IPOption_Router_Alert, fragment
    from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    ether = Ether(dst=site.gw1.mac("l1"), src=site.a.mac("a0"))
    load = UDP(sport=9, dport=9) / Raw(MARKER)
    four, six = IP(src=A, dst=B), IPv6(src=A6, dst=B6)
    packets = [
        IP(src=A, dst=B, options=[IPOption_Router_Alert()]) / load,
        *fragment(four / UDP(sport=9, dport=9) / Raw(MARKER * 60), 600),
        IP(src=A, dst=B, ttl=1) / load,
        IP(src=A, dst=B, proto=253) / Raw(MARKER),
        IP(src=A, dst="10.2.255.255") / load,
        IP(src=A, dst=GW2) / load,
        IP(src=A, dst="10.2.0.255") / load,
        IP(src="10.1.0.255", dst=B) / load,
        IP(src=GW1, dst=B) / load,
        IP(src=A, dst=B, len=20) / load,
        IP(src=A, dst=B, chksum=1) / load,
        IP(src=A, dst=B, ihl=15) / load,
        six / IPv6ExtHdrHopByHop() / load,
        six / IPv6ExtHdrDestOpt() / load,
        six / IPv6ExtHdrFragment(offset=0, m=1, id=7) / Raw(MARKER + bytes(6)),
        six / IPv6ExtHdrFragment(offset=5, m=0, id=7) / Raw(MARKER),
        IPv6(src=A6, dst=B6, hlim=1) / load,
        IPv6(src=A6, dst=GW26) / load,
        IPv6(src=GW16, dst=B6) / load,
        IPv6(src=A6, dst=B6, plen=1000) / load,
    ]
    with site.a.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        out.bind(("a0", 0))
        for packet in packets:
            out.send(bytes(ether / packet))
            vlan = bytes(ether)[:12] + b"\x81\0\0\5" + bytes(ether / packet)[12:]
            out.send(vlan)
    site.reach()
    assert site.wire.leaks() == []


def test_the_gateway_s_own_traffic_is_kept_in(site: Site) -> None:
    """What the kernel of a gateway sends by itself, to hosts behind the other, meets the policies there."""
    with site.gw1.socket() as sender, pytest.raises(PermissionError):
        sender.bind((GW1, 0))
        for _ in range(3):
            sender.sendto(MARKER, (B, 9))
    assert site.wire.leaks() == []


def replayed(site: Site, version: int, count: int) -> list[bytes]:
    site.reach(version)
    site.wire.esp()
    assert site.a.ping(B if version == 4 else B6, count=count, interval=0.001).received == count
    spi = SPIS[version][0].to_bytes(4, "big")
    at = 14 + (20 if version == 4 else 40)
    return [frame for frame in site.wire.esp() if frame[at : at + 4] == spi]


@BOTH
def test_a_lying_peer(site: Site, version: int) -> None:
    """Replays, bit flips, cuts, foreign SPIs: each is dropped under its name, and no window moves."""
    frames = replayed(site, version, 20)
    at = 14 + (20 if version == 4 else 40)
    before, sequence = site.drops(1), site.sas(1)[SPIS[version][0]]["sequence"]

    def flipped(frame: bytes, position: int) -> bytes:
        return frame[:position] + bytes([frame[position] ^ 1]) + frame[position + 1 :]

    def cut(frame: bytes, size: int) -> bytes:
        """As IP says, too."""
        made = bytearray(frame[: at + size])
        if version == 6:
            struct.pack_into("!H", made, 18, size)
        else:
            struct.pack_into("!HHH", made, 16, 20 + size, 0, 0)
            struct.pack_into("!H", made, 24, 0)
            struct.pack_into("!H", made, 24, internet_checksum(bytes(made[14:34])))
        return bytes(made)

    def ahead(frame: bytes, by: int) -> bytes:
        number = int.from_bytes(frame[at + 4 : at + 8], "big") + by
        return frame[: at + 4] + number.to_bytes(4, "big") + frame[at + 8 :]

    last = frames[-1]
    lies = {
        "esp-replayed": frames,
        "esp-bad-icv": [ahead(last, 1 + n) for n in range(10)] + [flipped(ahead(last, 5), len(last) - 1)],
        "esp-unknown-spi": [flipped(last, at), flipped(last, at + 3)],
        "esp-truncated": [cut(last, size) for size in (0, 4, 8, 20)],
    }
    for some in lies.values():
        for frame in some:
            site.wire.send(frame, "x2")
    expected = {name: len(some) for name, some in lies.items()}

    def found() -> dict[str, int]:
        after = site.drops(1)
        return {name: after.get(name, 0) - before.get(name, 0) for name in lies}

    wait_until(lambda: sum(found().values()) >= sum(expected.values()), 10, "all lies to be dropped")
    assert found() == expected
    assert site.sas(1)[SPIS[version][0]]["sequence"] == sequence
    site.reach(version)
    wait_until(lambda: not site.wire.leaks(), 1)


def test_clear_packets_from_outside_do_not_get_in(site: Site) -> None:
    """Whoever is on the wire may not speak as a host behind the peer."""
    from libfp.testing.packets import udp

    frame = udp(MARKER, src=B, dst=A, dport=9, eth_dst=site.gw1.mac("w1"), eth_src=site.gw2.mac("w2"))
    before = site.drops(0).get("policy-clear", 0)
    with site.a.socket() as receiver:
        receiver.bind((A, 9))
        site.wire.send(frame, "x1")
        wait_until(lambda: site.drops(0).get("policy-clear", 0) == before + 1, 5, "the drop")
        assert not select.select([receiver], [], [], 0)[0]
    site.wire.frames(site.wire.others)


def test_rekeyed_under_load(site: Site) -> None:
    """New SAs beside the old ones, then without those: nothing is lost. A bad file changes nothing."""
    new = {spi + 0x100: key for spi, key in keys(1).items()}
    with UdpStream(site.a, site.b, B, rate=500) as stream:
        wait_until(lambda: stream.received > 50, 20)
        for number in (1, 0):
            site.write(number, {**keys(), **new})
            said = len(site.gateways[number].said())
            site.gateways[number].process.send_signal(signal.SIGHUP)
            wait_until(lambda: "4 SAs new, 0 gone" in site.gateways[number].said()[said:], 10)  # noqa: B023
        wait_until(lambda: site.sas(1)[0x1104]["counters"]["packets"] > 50, 10, "the new SA to be used")
        for number in (0, 1):
            site.write(number, new)
            said = len(site.gateways[number].said())
            site.gateways[number].process.send_signal(signal.SIGHUP)
            wait_until(lambda: "0 SAs new, 4 gone" in site.gateways[number].said()[said:], 10)  # noqa: B023
        received = stream.received
        wait_until(lambda: stream.received > received + 50, 10)
    assert stream.result.lost <= 2
    assert set(site.sas(0)) == set(new)

    for change, words in (
        ({"sas": {spi: keys(2)[spi - 0x100] for spi in new}}, "the SA with SPI 0x1104 has changed; a new key"),
        ({"sas": new, "default": "discard"}, "default has changed; that takes a restart"),
        ({"sas": new, "extra": 'what = "?"\n'}, "there is no 'what' in [[policy]]"),
    ):
        site.write(0, **change)
        said = len(site.gateways[0].said())
        site.gateways[0].process.send_signal(signal.SIGHUP)
        wait_until(lambda: words in site.gateways[0].said()[said:], 10, words)  # noqa: B023
        assert "as it was" in site.gateways[0].said()[said:] or "as they were" in site.gateways[0].said()[said:]
    assert set(site.sas(0)) == set(new)
    site.reach()
    site.write(0, new)


def test_keys_are_nowhere_to_be_seen(site: Site) -> None:
    """Not in what it says, not in its arguments, not in what others can ask it, not in the state it keeps."""
    places = []
    for number in (0, 1):
        gateway = site.gateways[number]
        places += [gateway.said().encode(), Path(f"/proc/{gateway.process.pid}/cmdline").read_bytes()]
        places += [Path(f"/proc/{gateway.process.pid}/environ").read_bytes(), json.dumps(site.sas(number)).encode()]
        places += [
            fp("ipsec", "sas", gateway.ready["name"]).encode(),
            (site.folder / f"gw{number + 1}.json").read_bytes(),
        ]
    for generation in range(3):
        for key in keys(generation).values():
            for place in places:
                assert key.encode() not in place
                assert bytes.fromhex(key)[:8] not in place


def test_policies_that_somebody_removes_are_put_back(site: Site) -> None:
    def flush() -> int:
        ours = [policy for policy in xfrm.policies() if policy.direction in ("out", "fwd")]
        return sum(map(xfrm.remove, ours))

    before = len(site.gw1.call(xfrm.policies))
    assert site.gw1.call(flush)
    wait_until(lambda: len(site.gw1.call(xfrm.policies)) == before, 5, "the policies to be back")
    site.reach()


def test_another_policy_of_linux_s_suspends_and_nothing_goes_in_clear(site: Site) -> None:
    """Linux alone forwards then, and blocks what is to be protected."""
    rule = {"src": "10.66.0.0/16", "table": 7, "priority": 100}
    gateway = site.gateways[0]
    said = len(gateway.said())
    site.gw1.netlink("rule", "add", **rule)
    wait_until(lambda: "Linux forwards alone" in gateway.said()[said:], 10)
    assert site.a.ping(B, count=3, interval=0.01, timeout=0.2).received == 0
    assert site.a.ping(B6, count=3, interval=0.01, timeout=0.2).received == 0
    assert site.wire.leaks() == []
    site.gw1.netlink("rule", "del", **rule)
    site.reach()


def test_killed_under_load_nothing_goes_in_clear_and_a_restart_takes_over(site: Site) -> None:
    """Last: the kernel drops what would be in clear; the next start goes on with the sequence numbers."""
    with UdpStream(site.a, site.b, B, rate=500) as stream:
        wait_until(lambda: stream.received > 50, 20)
        spi = next(spi for spi, sa in site.sas(1).items() if sa["direction"] == "in" and ":" not in sa["local"])
        used = site.sas(1)[spi]["sequence"]
        site.gateways[0].stop(signal.SIGKILL)
        received, sent = stream.received, stream.sent
        wait_until(lambda: stream.sent > sent + 500, 10)
        assert stream.received <= received + 50
        assert site.wire.leaks() == [], "the kernel forwards nothing of it"
        assert site.a.ping(B6, count=2, timeout=0.3).received == 0
        with site.start(0) as gateway:
            site.gateways[0] = gateway
            received = stream.received
            wait_until(lambda: stream.received > received + 100, 10, "the stream to go on")
            assert site.sas(0)[spi]["sequence"] > used
            site.reach(6)
            assert gateway.stop() == 0
            assert "the XFRM policies stay in the kernel, nothing goes in clear; fp ipsec release" in gateway.said()
        sent = stream.sent
        wait_until(lambda: stream.sent > sent + 100, 10)
        assert site.wire.leaks() == []
    with site.gw1.enter():
        assert fp("ipsec", "release", "--config", str(site.files[0])) == ""
        assert xfrm.policies() == []
