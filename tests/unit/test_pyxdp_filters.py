"""The pin-hole grammar: what parses, and which token is named when it does not."""

from __future__ import annotations

import ipaddress

import pytest

from libfp.errors import BadInput
from libfp.pyxdp import Steer, emit, program
from libfp.pyxdp.filters import Filter, parse_filter

net = ipaddress.IPv4Network


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("ip", Filter()),
        ("udp", Filter(protocol=17)),
        ("udp dport 4789", Filter(protocol=17, dport=(4789, 4789))),
        ("tcp sport 1-1023 dport 80", Filter(protocol=6, sport=(1, 1023), dport=(80, 80))),
        ("proto icmp", Filter(protocol=1)),
        ("proto 89", Filter(protocol=89)),
        ("src 10.0.0.0/8 and dst 192.0.2.1", Filter(src=net("10.0.0.0/8"), dst=net("192.0.2.1/32"))),
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
        ("src 2001:db8::/32", "'2001:db8::/32'"),
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


@pytest.mark.parametrize(("text", "group"), [("dst 239.1.1.1", True), ("dst 255.255.255.255", True), ("ip", False)])
def test_a_filter_that_names_a_group_is_told_apart(text, group):
    assert parse_filter(text).group is group


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("steer", [Steer(), Steer(only=["198.51.100.0/24"]), Steer("udp dport 1-2", "src 10.0.0.0/8")])
def test_every_steering_compiles_to_bpf(steer, generic):
    code = emit.compile_bpf(steer.text(generic))
    assert code
    assert len(code) % 8 == 0


def test_linking_changes_map_numbers_and_nothing_else():
    code = emit.compile_bpf(program.router(generic=True, only=True))
    linked = emit.link(code, [101, 102, 103, 104])
    changed = [i // 8 for i in range(0, len(code), 8) if code[i : i + 8] != linked[i : i + 8]]
    loads = {linked[i * 8 + 4] for i in changed}
    assert loads == {101, 102, 103, 104}
    assert all(linked[i * 8] == emit.LOAD_64 for i in changed)
    assert emit.link(code, [0, 1, 2, 3]) == code
