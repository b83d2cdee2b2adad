"""`libfp.tables.Acl`: its rules, its errors, what packets match, and rule sets that no tree can cut."""

from __future__ import annotations

import ipaddress
import random

import pytest

from libfp import Pipeline, stage
from libfp.errors import BadInput, TableFull
from libfp.jit import INTERPRETED, Arena, kernel
from libfp.stages import parse
from libfp.tables import Acl, Rule
from libfp.testing.packets import icmp_echo, tcp, udp
from libfp.testing.plain_rules import Header, first

TCP, UDP = 6, 17


@kernel
def _burst(view, headers, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(headers, results, count)


def found(acl: Acl, headers: list[Header], view=None) -> list[int]:
    """What a burst finds. Headers and results end at the end of their arenas: an access beyond them faults."""
    given = b"".join(one.bytes(4 if acl.family == "ipv4" else 6) for one in headers)
    keys, results = Arena(len(given), flush_end=True), Arena(-(-len(headers) // 2) * 8, flush_end=True)
    keys.buffer[:] = given
    _burst(view or acl.view(), keys.address, results.address, len(headers))
    out = results.buffer.cast("I")[: len(headers)].tolist()
    keys.close()
    results.close()
    return out


def ip(text: str) -> int:
    return int(ipaddress.ip_address(text))


def test_the_first_rule_by_priority_is_the_answer():
    acl = Acl(capacity=10)
    header = Header(ip("192.0.2.7"), ip("198.51.100.1"), TCP, (1234, 80))
    assert found(acl, [header]) == [0]
    acl[20] = Rule(2)
    acl[10] = Rule(1, source="192.0.2.0/24", dport=80, protocol="tcp")
    acl[15] = Rule(3, source=ipaddress.ip_network("192.0.0.0/16"))
    others = [Header(ip("192.0.3.7"), 0, TCP, (1234, 80)), Header(0, 0, UDP, None)]
    assert found(acl, [header, *others]) == [1, 3, 2]
    del acl[10]
    assert found(acl, [header]) == [3]
    acl[15] = Rule(4, destination="10.0.0.0/8")
    assert found(acl, [header]) == [2]
    acl.clear()
    assert found(acl, [header]) == [0]


@pytest.mark.parametrize(
    ("rule", "yes", "no"),
    [
        (Rule(1, sport=(10, 20)), Header(ports=(10, 0)), Header(ports=(9, 0))),
        (Rule(1, sport=(10, 20)), Header(ports=(20, 0)), Header(ports=(21, 0))),
        (Rule(1, dport=0), Header(ports=(7, 0)), Header(ports=None)),
        (Rule(1, dport=(0, 65535)), Header(ports=(7, 9)), Header(ports=None)),
        (Rule(1, dport=65535), Header(ports=(0, 65535)), Header(ports=(65535, 0))),
        (Rule(1, protocol="udp"), Header(protocol=17, ports=None), Header(protocol=6)),
        (Rule(1, protocol=(0x10, 0xF0)), Header(protocol=17), Header(protocol=33)),
        (Rule(1, tcp_flags=(2, 0x12)), Header(protocol=6, flags=3), Header(protocol=6, flags=0x12)),
        (Rule(1, tcp_flags=(2, 2)), Header(protocol=6, flags=2), Header(protocol=17, flags=2)),
        (Rule(1, tcp_flags=(0, 2)), Header(protocol=6), Header(protocol=6, ports=None)),
        (Rule(1, interface=3), Header(interface=3), Header(interface=2)),
        (Rule(1, interface=(5, 0x7)), Header(interface=0x7FFD), Header(interface=0x7FFC)),
        (Rule(1, interface=(0, 0x7FFF)), Header(interface=0), Header(interface=0x4000)),
        (Rule(1, interface=0), Header(interface=0, ports=None), Header(interface=0x7FFF)),
        (Rule(1, source="255.255.255.255/32"), Header(source=0xFFFFFFFF), Header(source=0xFFFFFFFE)),
        (Rule(1, destination="0.0.0.0/1"), Header(destination=0x7FFFFFFF), Header(destination=0x80000000)),
    ],
)
def test_what_rules_ask(rule: Rule, yes: Header, no: Header):
    acl = Acl(capacity=4)
    acl[1] = rule
    assert found(acl, [yes, no]) == [1, 0] == [first(acl, one) for one in (yes, no)]


def test_ipv6():
    acl = Acl(capacity=4, family="ipv6")
    acl[1] = Rule(7, source="2001:db8::/33", destination="ff02::1", protocol="icmpv6")
    acl[2] = Rule(8, source="2001:db8::/32")
    at = ip("2001:db8:7fff::1"), ip("2001:db8:8000::1")
    headers = [Header(at[0], ip("ff02::1"), 58, None), Header(at[0], ip("ff02::2"), 58, None), Header(at[1], 0, 58)]
    assert found(acl, [*headers, Header(ip("2001:db9::"))]) == [7, 8, 8, 0]


@stage
def sort(packet, acl, acl6):
    value = acl.classify(packet) + acl6.classify(packet)
    if value == 1:
        packet.drop("one")
    elif value == 2:
        packet.drop("two")
    elif value == 3:
        packet.drop("three")


def test_packets_in_a_stage():
    acl, acl6 = Acl(capacity=10), Acl(capacity=10, family="ipv6")
    acl[1] = Rule(1, source="192.0.2.0/24", dport=53)
    acl[2] = Rule(2, tcp_flags=(2, 0x12), interface=0)
    acl6[1] = Rule(3, destination="2001:db8::/32", dport=53)
    pipeline = Pipeline(parse, sort(acl, acl6))
    fragment = bytearray(udp(src="192.0.2.1", dport=53))
    fragment[14 + 6 : 14 + 8] = b"\0\1"  # a later fragment: what is there are no ports
    packets = [
        udp(src="192.0.2.1", dport=53),
        udp(src="192.0.3.1", dport=53),
        bytes(fragment),
        tcp(src="192.0.2.1", dport=53),
        tcp(dport=80, flags="S"),
        tcp(dport=80, flags="SA"),
        icmp_echo(src="192.0.2.1"),
        udp(src="2001:db8::1", dst="2001:db8::2", dport=53),
        udp(src="2001:db8::1", dst="2001:db9::2", dport=53),
    ]
    outcome = [one.removeprefix("drop ") if one.startswith("drop") else "" for one in pipeline.run_once(packets)]
    assert outcome == ["one", "", "", "one", "two", "", "", "three", ""]


BAD = [
    (1, Rule(0), "1 to 2"),
    (1, Rule(1 << 32), "1 to 2"),
    (-1, Rule(1), "priority"),
    (1 << 31, Rule(1), "priority"),
    ("1", Rule(1), "priority"),
    (1, Rule(1, source="192.0.2.1/24"), "host bits"),
    (1, Rule(1, destination="2001:db8::/32"), "not an IPv4 prefix"),
    (1, Rule(1, sport=(20, 10)), "lowest first"),
    (1, Rule(1, dport=65536), "no ports"),
    (1, Rule(1, dport=(1, 2, 3)), "no ports"),
    (1, Rule(1, protocol="ospf"), "no protocol"),
    (1, Rule(1, protocol=256), "0 to 255"),
    (1, Rule(1, protocol=(3, 2)), "beyond the mask"),
    (1, Rule(1, protocol="udp", tcp_flags=(2, 2)), "TCP flags"),
    (1, Rule(1, tcp_flags=(4, 2)), "beyond the mask"),
    (1, Rule(1, tcp_flags=2), "value, mask"),
    (1, Rule(1, interface=1 << 15), "interface"),
    (1, Rule(1, interface=(0, 1 << 15)), "interface"),
    (1, Rule(1, interface=(2, 1)), "interface"),
    (1, "drop", "not a rule"),
]


@pytest.mark.parametrize(("priority", "rule", "why"), BAD)
def test_what_is_no_rule_changes_nothing(priority, rule, why):
    acl = Acl(capacity=4)
    acl[1] = Rule(5)
    for change in (lambda: acl.__setitem__(priority, rule), lambda: acl.load({2: Rule(6), priority: rule})):
        with pytest.raises(BadInput, match=why) as caught:
            change()
        assert "\n" not in str(caught.value)
    assert dict(acl) == {1: Rule(5)}
    assert found(acl, [Header()]) == [5]


def test_a_full_table_changes_nothing():
    acl = Acl(capacity=2)
    acl.load([Rule(1, dport=1), Rule(2, dport=2)])
    with pytest.raises(TableFull, match="2 rules is full"):
        acl[7] = Rule(3)
    with pytest.raises(TableFull, match="3 rules for a table of 2"):
        acl.load([Rule(3)] * 3)
    acl[1] = Rule(9)
    assert found(acl, [Header(ports=(0, port)) for port in (1, 2, 3)]) == [1, 9, 9]
    assert repr(acl) == "<Acl of 2 ipv4 rules, at most 2>"
    with pytest.raises(KeyError):
        del acl[7]


@pytest.mark.parametrize(("capacity", "family"), [(0, "ipv4"), (1 << 40, "ipv4"), (4, "both")])
def test_refuses(capacity, family):
    with pytest.raises(BadInput):
        Acl(capacity=capacity, family=family)


MANY = 40 if INTERPRETED else 10_000


def test_rules_that_no_cut_tells_apart_take_little_memory():
    """All of them overlap: wildcards with bits that differ, and the same rule again and again."""
    acl = Acl(capacity=MANY + 10)
    acl.load([Rule(i + 1, protocol=(i & 0x55, 0x55), interface=7) for i in range(MANY)])
    assert acl.replica_bytes < 4096 * (MANY + 1000)
    assert found(acl, [Header(protocol=0x15, interface=7), Header(protocol=0x15)]) == [0x16 if MANY > 0x15 else 0, 0]
    acl.load([Rule(i + 1, source="10.0.0.0/8", dport=(i % 100, 60_000)) for i in range(MANY)])
    assert acl.replica_bytes < 4096 * (MANY + 1000)
    assert found(acl, [Header(10 << 24, ports=(0, 99)), Header(10 << 24, ports=(0, 61_000)), Header()]) == [1, 0, 0]
    del acl[0]
    assert found(acl, [Header(10 << 24, ports=(0, 0)), Header(10 << 24, ports=(0, 9))]) == [0 if MANY < 101 else 101, 2]


def test_the_same_rule_with_many_priorities():
    acl = Acl(capacity=MANY)
    for i in range(min(MANY, 500)):
        acl[i] = Rule(i + 1)
    assert acl.replica_bytes < 100_000
    assert found(acl, [Header()]) == [1]
    for i in range(min(MANY, 500) - 1):
        del acl[i]
        assert found(acl, [Header()]) == [i + 2]


def test_a_table_made_by_single_changes_is_made_anew_as_it_grows():
    rng = random.Random(1)
    acl, model = Acl(capacity=400), {}
    for i in range(20 if INTERPRETED else 400):
        priority = rng.randrange(1 << 31)
        prefix = f"{rng.randrange(20)}.{rng.randrange(20)}.0.0/16"
        acl[priority] = model[priority] = Rule(i + 1, source=prefix, dport=(i, 65535))
    assert dict(acl) == model
    sources = [rng.randrange(20) << 24 | rng.randrange(20) << 16 for _ in range(200)]
    headers = [Header(source, 0, TCP, (0, rng.randrange(500))) for source in sources]
    assert found(acl, headers) == [first(model, one) for one in headers]
