"""Filters and headers as `fp trace` and `fp capture` read them, against packets that scapy makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.all import ARP, ICMP, IP, TCP, UDP, Dot1Q, Ether, ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, Raw

from libfp.engine.dissect import dissect
from libfp.engine.expression import compile_filter
from libfp.errors import BadInput

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
PACKETS = {
    "dns": ETHER / IP(src="192.0.2.1", dst="198.51.100.7", ttl=9) / UDP(sport=4000, dport=53) / b"x",
    "web": ETHER / IP(src="10.1.2.3", dst="192.0.2.1") / TCP(sport=80, dport=5001, flags="SA"),
    "ping": ETHER / IP(src="192.0.2.1", dst="10.9.9.9") / ICMP(),
    "arp": ETHER / ARP(psrc="192.0.2.1", pdst="192.0.2.2"),
    "six": ETHER / IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(sport=53, dport=4000),
    "ping6": ETHER / IPv6(src="2001:db8::1", dst="2001:db9::2") / ICMPv6EchoRequest(),
    "tagged": ETHER / Dot1Q(vlan=7) / IP(src="192.0.2.9", dst="192.0.2.1") / UDP(sport=1, dport=2),
    "fragment": ETHER / IP(src="192.0.2.1", dst="192.0.2.2", frag=100, proto=17) / Raw(b"\0\65\0\65" * 4),
    "other": ETHER / Raw(b"hello"),
}
DATA = {name: bytes(packet) for name, packet in PACKETS.items()}
IPV4 = {"dns", "web", "ping", "tagged", "fragment"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", set(DATA)),
        ("ip", IPV4),
        ("ip6", {"six", "ping6"}),
        ("arp", {"arp"}),
        ("vlan", {"tagged"}),
        ("icmp", {"ping"}),
        ("icmp6", {"ping6"}),
        ("udp", {"dns", "six", "tagged", "fragment"}),
        ("udp dport 53", {"dns"}),
        ("udp and port 53", {"dns", "six"}),
        ("port 50-80", {"dns", "web", "six"}),
        ("src port 80 or dport 2", {"web", "tagged"}),
        ("tcp sport 80 dport 5001", {"web"}),
        ("proto 17 and not udp", set()),
        ("proto icmp", {"ping"}),
        ("host 192.0.2.1", {"dns", "web", "ping", "arp", "tagged", "fragment"}),
        ("src host 192.0.2.1", {"dns", "ping", "arp", "fragment"}),
        ("dst 192.0.2.0/24 and ip", {"web", "tagged", "fragment"}),
        ("net 10.0.0.0/8", {"web", "ping"}),
        ("src net 0.0.0.0/0", IPV4 | {"arp"}),
        ("dst net 2001:db9::/32", {"ping6"}),
        ("src 2001:db8::1", {"six", "ping6"}),
        ("not ip", set(DATA) - IPV4),
        ("not ip and not ip6", {"arp", "other"}),
        ("arp or icmp and host 10.9.9.9", {"arp", "ping"}),
        ("(arp or icmp) and host 10.9.9.9", {"ping"}),
        ("not (udp or tcp or icmp)", {"arp", "ping6", "other"}),
        ("udp src 192.0.2.0/24 and proto udp", {"dns", "tagged", "fragment"}),
    ],
)
def test_which_packets_match(text: str, names: set[str]) -> None:
    test = compile_filter(text)
    assert {name for name, data in DATA.items() if test(dissect(data))} == names


@pytest.mark.parametrize(
    ("text", "position", "what"),
    [
        ("nonsense", 1, "'nonsense' is not a condition"),
        ("udp and", 8, "ends where a condition should be"),
        ("udp dport", 10, "ends where a port should be"),
        ("udp dport 70000", 11, "'70000' is not a port"),
        ("port 9-5", 6, "'9-5' is not a port"),
        ("src host 300.1.1.1", 10, "'300.1.1.1' is not an address"),
        ("host 10.0.0.0/8", 6, "is not an address"),
        ("net 10.0.0.1/8", 5, "host bits set"),
        ("udp icmp", 5, "'icmp' is not 'and' or 'or'"),
        ("(udp", 5, "ends where '\\)' should be"),
        ("udp )", 5, "is not 'and' or 'or'"),
        ("proto quic", 7, "is not a protocol"),
        ("not", 4, "ends where a condition"),
        ("not " * 200 + "udp", 401, "more than 100 words deep"),
    ],
)
def test_errors_name_the_position(text: str, position: int, what: str) -> None:
    with pytest.raises(BadInput, match=f"position {position}: .*{what}") as caught:
        compile_filter(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("dns", "IPv4 192.0.2.1:4000 > 198.51.100.7:53, UDP, TTL 9, 02:00:00:00:00:01 > 02:00:00:00:00:02"),
        ("web", "IPv4 10.1.2.3:80 > 192.0.2.1:5001, TCP SYN ACK, TTL 64, 02:00:00:00:00:01 > 02:00:00:00:00:02"),
        ("ping6", "IPv6 2001:db8::1 > 2001:db9::2, ICMPv6 echo request, hop limit 64, "),
        ("six", r"IPv6 [2001:db8::1]:53 > [2001:db8::2]:4000, UDP, "),
        ("arp", "ARP request 192.0.2.1 > 192.0.2.2, "),
        ("tagged", "VLAN 7, IPv4 192.0.2.9:1 > 192.0.2.1:2, UDP"),
        ("fragment", "IPv4 192.0.2.1 > 192.0.2.2, UDP, fragment, TTL 64"),
    ],
)
def test_a_packet_in_one_line(name: str, summary: str) -> None:
    assert dissect(DATA[name]).summary().startswith(summary)


def test_a_later_fragment_of_ipv6_has_no_ports() -> None:
    packet = ETHER / IPv6() / IPv6ExtHdrFragment(nh=17, offset=100) / Raw(b"\0\65\0\65" * 4)
    headers = dissect(bytes(packet))
    assert (headers.proto, headers.sport, headers.fragment) == (17, None, True)


@given(st.sampled_from(sorted(DATA)), st.data())
def test_whatever_the_bytes_are_there_is_an_answer(name: str, data: st.DataObject) -> None:
    frame = bytearray(DATA[name])
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    headers = dissect(cut)
    assert headers.summary()
    compile_filter("udp port 53 or host 192.0.2.1 or src net 2001:db8::/32")(headers)
