"""Two `fp ipsec` gateways between two hosts: traffic goes through, and the wire between them carries nothing but ESP.

The first has one worker, the other two: see `ipsec_sites` for the network. One pair of gateways serves all tests, in
this order; the last ones kill and restart them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from libfp.apps.ipsec import xfrm as ours
from libfp.apps.ipsec.config import read
from libfp.cli import main
from libfp.engine.control import connect
from libfp.errors import Error
from libfp.linux import xfrm
from libfp.testing.netns import Lab, wait_until
from libfp.testing.packets import internet_checksum
from libfp.testing.probe import IcmpError, udp_probe
from libfp.testing.traffic import UdpStream, tcp_transfer
from tests.netns.ipsec_sites import (
    A6,
    B6,
    CLEAR,
    GW1,
    GW2,
    GW16,
    GW26,
    MARKER,
    OUTER,
    SPIS,
    A,
    B,
    Site,
    fp,
    keys,
)  # fmt: skip

pytestmark = pytest.mark.timeout(240)

#: Of each gateway. With two, SAs belong to one or the other, and most packets are handed off.
WORKERS = [(1, min(2, len(os.sched_getaffinity(0))))]
if os.environ.get("LIBFP_FULL"):
    WORKERS = [(1, 1), (1, 2), (2, 2)]
BOTH = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture(scope="module", params=WORKERS, ids=lambda counts: "-".join(map(str, counts)))
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
        with site:
            for number in (0, 1):
                site.gateways.append(site.start(number))
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
    with site.b.socket() as receiver, site.a.socket() as sender:
        receiver.settimeout(5)
        receiver.bind((CLEAR[1].replace("0/24", "2"), 7778))
        sender.bind((CLEAR[0].replace("0/24", "2"), 0))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x94\4\0\0")  # router alert: for Linux to forward
        sender.sendto(b"by Linux", (CLEAR[1].replace("0/24", "2"), 7778))
        assert receiver.recv(100) == b"by Linux", "the kernel's policies are in the same order"
    assert len(site.wire.leaks()) == 1


def test_ipv4_through_a_tunnel_over_ipv6(site: Site) -> None:
    ends = {"address": "10.2.88.2", "source": "10.1.88.2"}
    wait_until(lambda: site.a.ping(**ends, count=1, timeout=0.2).received, 20, "an answer")
    assert site.a.ping(**ends, count=3, interval=0.01).received == 3
    assert {frame[12:14] for frame in site.wire.esp()} == {b"\x86\xdd"}


def send_odd_packets(site: Site) -> None:
    """What a router would punt or drop: options, fragments, odd protocols, extension headers, malformed, too big."""
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
        IP(src=A, dst=B, flags=0) / UDP(sport=9, dport=9) / Raw(MARKER * 42),
        IP(src=A, dst=B, flags="DF") / UDP(sport=9, dport=9) / Raw(MARKER * 42),
        IP(src=A, dst=B, len=20) / load,
        IP(src=A, dst=B, chksum=1) / load,
        IP(src=A, dst=B, ihl=15) / load,
        six / IPv6ExtHdrHopByHop() / load,
        six / IPv6ExtHdrDestOpt() / load,
        six / IPv6ExtHdrFragment(offset=0, m=1, id=7) / Raw(MARKER + bytes(6)),
        six / IPv6ExtHdrFragment(offset=5, m=0, id=7) / Raw(MARKER),
        six / UDP(sport=9, dport=9) / Raw(MARKER * 41),
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


def test_packets_that_a_router_would_punt(site: Site) -> None:
    """Whatever becomes of them: not in clear."""
    send_odd_packets(site)
    site.reach()
    assert site.wire.leaks() == []


def test_neighbours_that_linux_forgets_under_traffic_are_found_again(site: Site) -> None:
    """By Linux, on behalf of packets that it does not get: of ESP, and of what was in it."""

    def lost() -> list[int]:
        return [site.drops(number).get("no-neighbour", 0) for number in (0, 1)]

    site.reach(6)
    with UdpStream(site.a, site.b, B, rate=500) as stream:
        wait_until(lambda: stream.received > 50, 20)
        punted, before = site.punted(), lost()
        site.flush()
        wait_until(lambda: all(after > one for one, after in zip(before, lost(), strict=True)), 10, "drops")
        received = stream.received
        wait_until(lambda: stream.received > received + 100, 10, "the stream to go on")
    for version in (4, 6):
        site.reach(version)
    assert site.punted() == punted


@BOTH
def test_errors_are_rate_limited(site: Site, version: int) -> None:
    """Of packets that come too fast, few are told about; the others are dropped by name, none is Linux's."""
    target, count = (B if version == 4 else B6), 1500
    site.reach(version)
    before, punted = site.drops(0).get("esp-ttl", 0), site.punted()
    family, protocol = (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, 58)
    with site.a.socket(family, socket.SOCK_RAW, protocol) as errors, site.a.socket(family) as sender:
        errors.setblocking(False)
        errors.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        option = (socket.IPPROTO_IP, socket.IP_TTL) if version == 4 else (socket.IPPROTO_IPV6, 16)  # hops
        sender.setsockopt(*option, 1)
        for _ in range(count):
            with contextlib.suppress(OSError):  # the errors about those before
                sender.sendto(MARKER, (target, 9))
        told = 0

        def more() -> bool:
            nonlocal told
            with contextlib.suppress(BlockingIOError):
                while found := errors.recv(2048):
                    told += found[20 if version == 4 else 0] == (11 if version == 4 else 3)
            return told > 0 and site.drops(0).get("esp-ttl", 0) > before

        wait_until(more, 5, "errors, and the limit")
    assert site.punted() == punted


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


def test_an_interface_that_comes_later_and_is_not_ours(site: Site) -> None:
    """What Linux forwards between it and the gateway's ports meets the policies there."""
    other = site.lab.host("other")
    site.lab.link(other, "o0", site.gw1, "l3")
    other.address("o0", "10.1.77.2/24")
    site.gw1.address("l3", "10.1.77.1/24")
    other.route("default", via="10.1.77.1")
    assert other.ping(B, count=2, interval=0.01, timeout=0.2).received == 0
    assert site.b.ping("10.1.77.2", count=2, interval=0.01, timeout=0.2).received == 0
    assert site.wire.leaks() == []
    site.gw1.netlink("link", "del", index=site.gw1.index("l3"))
    site.reach()


def test_a_second_gateway_is_refused(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same namespace, whatever its file says; and elsewhere with the same state. The first carries on."""
    before = site.gw1.call(xfrm.policies)
    with site.gw1.enter():
        assert main(["ipsec", "l1", "w1", "--config", str(site.files[1])]) == 2
        holder = f"process {site.gateways[0].process.pid} of user 0"
        assert f"fp: fp ipsec runs already in this network namespace ({holder}); end it" in capsys.readouterr().err
        assert main(["ipsec", "release", "--config", str(site.files[0])]) == 2
    assert site.gw1.call(xfrm.policies) == before
    host = site.wire.host
    host.sysctl("net.ipv4.ip_forward", 1)
    host.sysctl("net.ipv6.conf.all.forwarding", 1)
    with host.enter():
        assert main(["ipsec", "x1", "x2", "--config", str(site.files[0])]) == 2
        assert "gw1.json is in use by another process; end that one" in capsys.readouterr().err
        assert xfrm.policies() == []
    site.reach()


def test_rekeyed_under_load(site: Site) -> None:
    """New SAs beside the old ones, then without those: nothing is lost. A bad file changes nothing."""
    new = {spi + 0x100: key for spi, key in keys(1).items()}
    site.reach()
    with UdpStream(site.a, site.b, B, rate=500) as stream:
        wait_until(lambda: stream.received > 50, 20)
        for number in (1, 0):
            site.reload(number, "4 SAs new, 0 gone", sas={**keys(), **new})
        wait_until(lambda: site.sas(1)[0x1104]["counters"]["packets"] > 50, 10, "the new SA to be used")
        for number in (0, 1):
            site.reload(number, "0 SAs new, 4 gone", sas=new)
        received = stream.received
        wait_until(lambda: stream.received > received + 50, 10)
    assert stream.result.lost <= 2
    assert set(site.sas(0)) == set(new)


def test_a_bad_file_changes_nothing(site: Site) -> None:
    """One line, with its place and the remedy; SAs and policies stay."""
    new, policies = {spi + 0x100: key for spi, key in keys(1).items()}, site.gw1.call(xfrm.policies)
    other, policy = keys(2)[0x1004], "[[policy]]\naction = {}\nsource = {}\ndestination = {}\n"
    for words, written in (
        ("the SA with SPI 0x1104 has changed; a new key", {"sas": {spi: keys(2)[spi - 0x100] for spi in new}}),
        ("default has changed; that takes a restart", {"sas": new, "default": "discard"}),
        ("there is no 'what' in [[policy]]; there are action", {"sas": new, "last": 'what = "?"\n'}),
        ("has keys, and others may use it (mode 0644); chmod 600", {"sas": new, "mode": 0o644}),
        ("; it is TOML: name = value", {"sas": new, "last": f'key = "{other}\n'}),
        ("10.1.0.1/16, which has bits beyond its length; write", {
            "sas": new, "last": policy.format('"discard"', '"10.1.0.1/16"', '"10.2.0.0/16"')}),
    ):  # fmt: skip
        said = site.reload(0, words, **written)
        (line,) = [line for line in said.splitlines() if words in line]
        assert "as it was: " in line or "as they were: " in line
        assert str(site.files[0]) in line
    assert set(site.sas(0)) == set(new)
    assert site.gw1.call(xfrm.policies) == policies
    site.reach()


def test_policies_come_and_go_with_the_file(site: Site) -> None:
    """Here and in the kernel: a policy in front, and away again; and what was bypassed is protected for a while."""
    new, ends = {spi + 0x100: key for spi, key in keys(1).items()}, {"address": B, "source": "10.1.88.2"}
    policy = "[[policy]]\naction = {}\nsource = {}\ndestination = {}\n"
    before = site.gw1.call(xfrm.policies)
    wait_until(lambda: site.a.ping(**ends, count=1, timeout=0.2).received, 20, "an answer")
    first = policy.format('"discard"', '"10.1.88.0/24"', '"10.2.0.0/24"')
    first += policy.format('"protect"', f'"{CLEAR[0]}"', '"10.2.0.0/16"') + 'tunnel = "six4"\n'
    site.reload(0, "0 SAs new, 0 gone, 6 policies in force", sas=new, first=first)
    assert site.a.ping(**ends, count=1, timeout=0.2).received == 0
    assert site.drops(0)["policy-discard"] >= 1
    assert set(site.gw1.call(held)) == set(ours.wanted(read(str(site.files[0]))))
    clear = {name: CLEAR[i].replace("0/24", "2") for i, name in enumerate(("source", "address"))}
    assert site.a.ping(**clear, count=1, timeout=0.2).received == 0, "the other gateway wants that in clear"
    assert site.wire.leaks() == []
    site.reload(0, "0 SAs new, 0 gone, 4 policies in force", sas=new)
    wait_until(lambda: site.a.ping(**ends, count=1, timeout=0.2).received, 20, "an answer again")
    assert {one._replace(number=0) for one in before} == set(site.gw1.call(held))


def held() -> list[xfrm.Policy]:
    return [policy._replace(number=0) for policy in xfrm.policies()]


def test_keys_are_nowhere_to_be_seen(site: Site) -> None:
    """Not in what it says and logs (everything), not in its arguments and files of /proc, not in what others can ask
    it, not in the state it keeps."""
    for gateway, number in zip(site.gateways, (0, 1), strict=True):
        name = gateway.ready["name"]
        assert "fp: " in gateway.said()
        places = [gateway.said(), json.dumps([gateway.forwarding, gateway.ready, site.sas(number)])]
        places += [fp("ipsec", "sas", name), fp("ipsec", "sas", name, "--json"), fp("stats", name, "--json")]
        with connect(name) as instance:
            for command in ("ping", "sas", "verify", "key", *map(hex, site.sas(number))):
                try:
                    places.append(json.dumps(instance.ask(command)))
                except Error as error:
                    places.append(repr(error))
        found = [place.encode() for place in places]
        process = Path(f"/proc/{gateway.process.pid}")
        files = ("cmdline", "comm", "environ", "maps", "mountinfo", "stat", "status", "wchan")
        found += [(process / file).read_bytes() for file in files]
        found += [file.read_bytes() for file in (process / "task").glob("*/comm")]
        found += [os.readlink(file).encode() for file in (process / "fd").iterdir()]
        found += [file.read_bytes() for file in site.folder.glob("*.json*")]
        assert_without_keys(found)


def assert_without_keys(places: list[bytes]) -> None:
    for generation in range(3):
        for key in keys(generation).values():
            material = bytes.fromhex(key)
            for place in places:
                assert key[:16].encode() not in place
                assert key[:16].upper().encode() not in place
                assert material[:8] not in place
                assert repr(material)[2:34].encode() not in place


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
    send_odd_packets(site)
    assert site.wire.leaks() == []
    site.gw1.netlink("rule", "del", **rule)
    site.reach()


def test_killed_under_load_nothing_goes_in_clear_and_a_restart_takes_over(site: Site) -> None:
    """The kernel drops what would be in clear, and the peer's ESP; the next start goes on with the sequence numbers."""
    with UdpStream(site.a, site.b, B, rate=500) as stream, UdpStream(site.b, site.a, A, rate=500) as back:
        wait_until(lambda: min(stream.received, back.received) > 50, 20)
        spi = next(spi for spi, sa in site.sas(1).items() if sa["direction"] == "in" and ":" not in sa["local"])
        used = site.sas(1)[spi]["sequence"]
        site.gateways[0].stop(signal.SIGKILL)
        site.wire.esp()
        received, sent = stream.received, stream.sent
        send_odd_packets(site)
        wait_until(lambda: stream.sent > sent + 200, 10)
        assert stream.received <= received + 50
        assert site.wire.leaks() == [], "the kernel forwards nothing of it"
        assert site.wire.esp(), "the other gateway does not know"
        assert site.a.ping(B6, count=2, timeout=0.3).received == 0
        clear = {name: CLEAR[i].replace("0/24", "2") for i, name in enumerate(("source", "address"))}
        assert site.a.ping(**clear, count=2).received == 2, "what is to be bypassed goes on"
        assert len(site.wire.leaks()) == 4
        with site.start(0, wait=False) as gateway:
            gateway.wait_said("compiling")
            gateway.stop(signal.SIGKILL)
        assert site.wire.leaks() == [], "nor while it starts"
        received, came = stream.received, back.received
        site.start_again(0)
        wait_until(lambda: stream.received > received + 100, 10, "the stream to go on")
        wait_until(lambda: back.received > came + 100, 10, "the other one to go on")
        assert site.sas(0)[spi]["sequence"] > used
        site.reach(6)


def test_a_start_with_another_file_and_an_sa_that_is_used_up(site: Site) -> None:
    """Policies that its file has not any more go; without a successor the exhausted SA's tunnel is closed."""
    gateway, number, spi = site.gateways[0], 0, 0x1106
    used = site.sas(0)[spi]["sequence"]
    assert gateway.stop() == 0
    state = site.folder / "gw1.json"
    told = json.loads(state.read_text())
    (entry,) = [one for one in told["sas"].values() if one["sequence"] == used and one["iv"]]
    entry["sequence"] = 2**32 - 6
    state.write_text(json.dumps(told))
    new = {spi + 0x100: key for spi, key in keys(1).items()}
    policy = "[[policy]]\naction = {}\nsource = {}\ndestination = {}\n"
    site.write(0, new, first=policy.format('"discard"', '"10.1.88.0/24"', '"10.2.0.0/16"'))
    gateway = site.start_again(0)
    assert set(site.gw1.call(held)) == set(ours.wanted(read(str(site.files[0]))))
    with site.a.socket(socket.AF_INET6) as sender:
        for _ in range(20):
            sender.sendto(MARKER, (B6, 9))
    wait_until(lambda: site.drops(0).get("sa-exhausted", 0) >= 15, 5, "the drops")
    assert site.sas(0)[spi]["exhausted"]
    assert (site.sas(0)[spi]["sequence"], site.sas(0)[spi]["remaining"]) == (2**32 - 1, 0)
    assert "0x1106 has used all its sequence numbers: it sends nothing more" in fp(
        "ipsec", "sas", gateway.ready["name"]
    )
    assert site.a.ping(B6, count=2, interval=0.01, timeout=0.2).received == 0
    assert site.wire.leaks() == []
    more = {**new, 0x1206: keys(2)[0x1006]}
    for number in (1, 0):
        site.reload(number, "1 SAs new, 0 gone", sas=more)
    site.reach(6)
    assert site.sas(0)[0x1206]["sequence"] > 0


def test_stopped_nothing_goes_in_clear_until_the_policies_are_released(site: Site) -> None:
    gateway = site.gateways[0]
    with UdpStream(site.a, site.b, B, rate=500) as stream:
        wait_until(lambda: stream.received > 50, 20)
        assert gateway.stop() == 0
        assert "the XFRM policies stay in the kernel, nothing goes in clear; fp ipsec release" in gateway.said()
        assert_without_keys([gateway.said().encode(), json.dumps(gateway.end).encode()])
        sent = stream.sent
        wait_until(lambda: stream.sent > sent + 100, 10)
        assert site.wire.leaks() == []
    with site.gw1.enter():
        assert fp("ipsec", "release", "--config", str(site.files[0])) == ""
        assert xfrm.policies() == []


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("reading Linux's links", signal.SIGINT),
        ("compiling the pipeline", signal.SIGTERM),
        ("forwarding between", signal.SIGINT),
    ],
    ids=["reading", "compiling", "forwarding"],
)
def test_interrupted(site: Site, stage: str, number: signal.Signals) -> None:
    """A start that has come to nothing leaves nothing; once it forwards, the policies stay."""
    with site.start(0, wait=False) as gateway:
        gateway.wait_said(stage)
        status = gateway.stop(number)
        said = gateway.said()
    assert "Traceback" not in said
    if stage == "forwarding between":
        assert status in (0, 130), "the latter if it has just said so"
        assert set(site.gw1.call(held)) == set(ours.wanted(read(str(site.files[0]))))
        with site.gw1.enter():
            fp("ipsec", "release", "--config", str(site.files[0]))
    else:
        assert status == 130
    assert site.gw1.call(xfrm.policies) == []
