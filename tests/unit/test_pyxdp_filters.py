"""The pin-hole grammar: what parses, and which token is named when it does not."""

from __future__ import annotations

import ipaddress

import pytest

from libfp.errors import BadInput
from libfp.pyxdp import Steer, emit, program
from libfp.pyxdp.filters import Filter, parse_filter

net = ipaddress.ip_network


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("ip", Filter(family=4)),
        ("ip6", Filter(family=6)),
        ("udp", Filter(protocol=17)),
        ("udp dport 4789", Filter(protocol=17, dport=(4789, 4789))),
        ("tcp sport 1-1023 dport 80", Filter(protocol=6, sport=(1, 1023), dport=(80, 80))),
        ("proto icmp", Filter(protocol=1)),
        ("proto 89", Filter(protocol=89)),
        ("src 10.0.0.0/8 and dst 192.0.2.1", Filter(src=net("10.0.0.0/8"), dst=net("192.0.2.1/32"), family=4)),
        ("dst 2001:db8::/32", Filter(dst=net("2001:db8::/32"), family=6)),
        ("ip6 and src ::1 and dst ::/0", Filter(src=net("::1/128"), dst=net("::/0"), family=6)),
        ("ip6 and udp dport 53 and ip6", Filter(protocol=17, dport=(53, 53), family=6)),
        ("proto icmp6", Filter(protocol=58)),
        ("udp dport 0-65535 and udp sport 53", Filter(protocol=17, sport=(53, 53), dport=(0, 65535))),
        ("  proto   udp and udp dport 7 ", Filter(protocol=17, dport=(7, 7))),
    ],
)
def test_filters_that_parse(text, meaning):
    assert parse_filter(text) == meaning


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "ends where a condition"),
        ("udp dport", "ends where a port"),
        ("udp dport 65536", "'65536'"),
        ("udp dport 20-10", "'20-10'"),
        ("udp dport -5", "'-5'"),
        ("udp dport 5-", "'5-'"),
        ("udp dport x", "'x'"),
        ("udp dport ²", "'²'"),
        ("dport 80", "'dport'"),
        ("udp or tcp", "'or'"),
        ("udp and", "ends where a condition"),
        ("udp and tcp", "'tcp'"),
        ("proto wat", "'wat'"),
        ("proto 256", "'256'"),
        ("src 10.0.0.1/8", "'10.0.0.1/8'"),
        ("src 2001:db8::1/32", "'2001:db8::1/32' at character 5 is not an IPv4 or IPv6 prefix"),
        ("dst fe80::1%eth0", "'fe80::1%eth0' at character 5"),
        ("dst 2001:db8:::", "'2001:db8:::' at character 5"),
        ("src 10.0.0.0/8 and dst 2001:db8::1", "'2001:db8::1' at character 24 is not possible here"),
        ("ip and ip6", "'ip6' at character 8"),
        ("ip6 and src 10.0.0.1", "'10.0.0.1' at character 13"),
        ("udp  dport\tx", "'x' at character 12"),
        ("udp dport ", "ends where a port should be, at character 10"),
        ("udp dport " + "1" * 5000, "is not a port"),
        ("proto " + "1" * 5000, "is not a protocol"),
        ("dst 10.0.0.1 and dst 10.0.0.2", "'dst'"),
        ("udp dport 1 dport 2", "'dport'"),
        ("frob", "'frob'"),
    ],
)
def test_a_syntax_error_names_its_token(text, named):
    with pytest.raises(BadInput) as caught:
        Steer(text)
    assert named in str(caught.value)


def test_only_narrows_the_router_and_no_filter():
    with pytest.raises(BadInput):
        Steer("ip", only=["198.51.100.0/24"])


def test_a_router_is_for_ipv4_unless_told_and_a_pinhole_for_both():
    assert Steer().families == ("ipv4",)
    assert Steer("udp").families == ("ipv4", "ipv6")
    assert Steer(families=["ipv6", "ipv4", "ipv6"]).families == ("ipv4", "ipv6")
    assert Steer("udp", families=["ipv6"]).families == ("ipv6",)
    with pytest.raises(BadInput, match="no address family 'ipv5'; use ipv4 and ipv6"):
        Steer(families=["ipv4", "ipv5"])


@pytest.mark.parametrize(
    ("text", "group"), [("dst 239.1.1.1", True), ("dst 255.255.255.255", True), ("dst ff02::/16", True), ("ip", False)]
)
def test_a_filter_that_names_a_group_is_told_apart(text, group):
    assert parse_filter(text).group is group


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize(
    "steer",
    [
        Steer(),
        Steer(only=["198.51.100.0/24", "2001:db8::/32"]),
        Steer("udp dport 1-2", "src 10.0.0.0/8", "dst 2001:db8::/32"),
    ],
)
def test_every_steering_compiles_to_bpf(steer, generic):
    code = emit.compile_bpf(steer.text(generic))
    assert code
    assert len(code) % 8 == 0


def test_linking_changes_map_numbers_and_nothing_else():
    code = emit.compile_bpf(program.router(generic=True, only=True))
    linked = emit.link(code, [101, 102, 103, 104, 105, 106])
    changed = [i // 8 for i in range(0, len(code), 8) if code[i : i + 8] != linked[i : i + 8]]
    loads = {linked[i * 8 + 4] for i in changed}
    assert loads == {101, 102, 103, 104, 105, 106}
    assert all(linked[i * 8] == emit.LOAD_64 for i in changed)
    assert emit.link(code, range(6)) == code
