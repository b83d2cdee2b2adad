"""Rulesets that the real nft has loaded, read back: each form of match, and what is refused, with the rule quoted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.apps.firewall import ruleset
from libfp.apps.firewall.ranges import Ranges, members
from libfp.apps.firewall.ruleset import Interfaces, Rule
from libfp.errors import BadInput
from libfp.testing.netns import Host, Lab

BLOCKED = '10.9.0.0/16, 10.8.0.1-10.8.0.9, 192.0.2.7 comment "printer"'
TABLE = """
table inet filter {
  set blocked { type ipv4_addr; flags interval; elements = { %s } }
  set few { type inet_service; elements = { 53, 80 } }
  set soon { type ipv4_addr; timeout 1h; elements = { 10.0.0.1 } }
  set met { type ipv4_addr; flags dynamic; }
  set both { type ipv4_addr . inet_service; }
  counter seen { }
  chain away { tcp dport 99 drop; }
  chain input { type filter hook input priority 0; tcp dport 22 limit rate 3/minute accept; }
  chain forward {
    type filter hook forward priority 0; policy drop;
    %s
  }
}
"""


def one(*numbers: int) -> Ranges:
    return tuple((number, number) for number in numbers)


def ipv4(first: int, low: int, high: int) -> tuple[int, int]:
    return first << 24 | low, first << 24 | high


TCP, UDP, ICMP, ICMPV6 = one(6), one(17), one(1), one(58)
EVERY, FOUR, SIX = {4, 6}, {4}, {6}
EST, REL = 1, 2


def flags(test: Any) -> Any:
    return [number for number in range(256) if test(number)]


# the rule, its verdict, IP versions, fields, interfaces
FORMS: list[tuple[str, str, set[int], dict[str, Any], tuple[Interfaces, ...]]] = [
    ("accept", "accept", EVERY, {}, ()),
    ("counter drop", "drop", EVERY, {}, ()),
    ('counter name "seen" accept comment "all of it"', "accept", EVERY, {}, ()),
    ("counter", "", EVERY, {}, ()),
    ("tcp dport 22 continue", "", EVERY, {"protocol": TCP, "dport": one(22)}, ()),
    ("tcp dport 22 return", "return", EVERY, {"protocol": TCP, "dport": one(22)}, ()),
    ("reject", "punt", EVERY, {}, ()),
    ("meta l4proto tcp reject with tcp reset", "punt", EVERY, {"protocol": TCP}, ()),
    ("reject with icmp host-unreachable", "punt", FOUR, {}, ()),
    ("reject with icmpv6 no-route", "punt", SIX, {}, ()),
    ("reject with icmpx admin-prohibited", "punt", EVERY, {}, ()),
    ("ct state established,related accept", "accept", EVERY, {"state": {EST, REL}}, ()),
    ("ct state { established, related } accept", "accept", EVERY, {"state": {EST, REL}}, ()),
    ("ct state established accept", "accept", EVERY, {"state": {EST}}, ()),
    ("ct state == invalid drop", "drop", EVERY, {"state": {3}}, ()),
    ("ct state != established accept", "accept", EVERY, {"state": {0, 2, 3, 4}}, ()),
    ("ct state != { established, related } drop", "drop", EVERY, {"state": {0, 3, 4}}, ()),
    ("ct state ! established,related accept", "accept", EVERY, {"state": {0, 3, 4}}, ()),
    ("ct state & (new | untracked) == 0 accept", "accept", EVERY, {"state": {1, 2, 3}}, ()),
    ('iif "lo" accept', "accept", EVERY, {}, (Interfaces(False, frozenset(["lo"])),)),
    ('iifname "r0" accept', "accept", EVERY, {}, (Interfaces(False, frozenset(["r0"])),)),
    ('oifname != "r1" accept', "accept", EVERY, {}, (Interfaces(True, frozenset(["r1"]), True),)),
    ('iifname { "r0", "eth*" } accept', "accept", EVERY, {}, (Interfaces(False, frozenset(["r0", "eth*"])),)),
    ("ip saddr 10.0.0.7 accept", "accept", FOUR, {"source": (ipv4(10, 7, 7),)}, ()),
    ("ip saddr 10.0.0.0/8 accept", "accept", FOUR, {"source": (ipv4(10, 0, 0xFFFFFF),)}, ()),
    ("ip daddr 10.0.0.1-10.0.0.7 accept", "accept", FOUR, {"destination": (ipv4(10, 1, 7),)}, ()),
    ("ip daddr { 10.0.0.4/30, 10.0.0.8, 11.0.0.1-11.0.0.3 } accept", "accept", FOUR,
     {"destination": (ipv4(10, 4, 8), ipv4(11, 1, 3))}, ()),
    ("ip daddr != 10.0.0.0/8 accept", "accept", FOUR,
     {"destination": ((0, (10 << 24) - 1), (11 << 24, (1 << 32) - 1))}, ()),
    ("ip saddr @blocked drop", "drop", FOUR,
     {"source": (ipv4(10, 8 << 16 | 1, 8 << 16 | 9), ipv4(10, 9 << 16, 9 << 16 | 0xFFFF), ipv4(192, 519, 519))}, ()),
    ("ip6 saddr 2001:db8::/32 accept", "accept", SIX,
     {"source": ((0x20010DB8 << 96, (0x20010DB8 + 1 << 96) - 1),)}, ()),
    ("ip6 daddr { ::1, fe80::/10 } accept", "accept", SIX,
     {"destination": (*one(1), (0x3FA << 118, (0x3FB << 118) - 1))}, ()),
    ("meta nfproto ipv4 accept", "accept", FOUR, {}, ()),
    ("meta nfproto != ipv4 accept", "accept", SIX, {}, ()),
    ("meta protocol ip6 accept", "accept", SIX, {}, ()),
    ("meta l4proto { tcp, udp } th dport 53 accept", "accept", EVERY,
     {"protocol": (*TCP, *UDP), "dport": one(53)}, ()),
    ("ip protocol icmp accept", "accept", FOUR, {"protocol": ICMP}, ()),
    ("ip6 nexthdr icmpv6 accept", "accept", SIX, {"protocol": ICMPV6}, ()),
    ("meta l4proto != tcp accept", "accept", EVERY, {"protocol": ((0, 5), (7, 255))}, ()),
    ("tcp dport { 22, 80-90 } accept", "accept", EVERY, {"protocol": TCP, "dport": (*one(22), (80, 90))}, ()),
    ("tcp dport @few accept", "accept", EVERY, {"protocol": TCP, "dport": one(53, 80)}, ()),
    ("tcp dport != 22 accept", "accept", EVERY, {"protocol": TCP, "dport": ((0, 21), (23, 65535))}, ()),
    ("udp sport 1000-2000 udp dport 53 accept", "accept", EVERY,
     {"protocol": UDP, "sport": ((1000, 2000),), "dport": one(53)}, ()),
    ("tcp dport > 1023 accept", "accept", EVERY, {"protocol": TCP, "dport": ((1024, 65535),)}, ()),
    ("sctp dport 5 accept", "accept", EVERY, {"protocol": one(132), "dport": one(5)}, ()),
    ("tcp flags syn accept", "accept", EVERY, {"protocol": TCP, "flags": flags(lambda f: f & 2)}, ()),
    ("tcp flags syn,ack accept", "accept", EVERY, {"protocol": TCP, "flags": flags(lambda f: f & 0x12)}, ()),
    ("tcp flags == syn accept", "accept", EVERY, {"protocol": TCP, "flags": [2]}, ()),
    ("tcp flags != syn accept", "accept", EVERY, {"protocol": TCP, "flags": flags(lambda f: f != 2)}, ()),
    ("tcp flags { syn, syn | ack } accept", "accept", EVERY, {"protocol": TCP, "flags": [2, 0x12]}, ()),
    ("tcp flags & (syn | ack) == syn accept", "accept", EVERY,
     {"protocol": TCP, "flags": flags(lambda f: f & 0x12 == 2)}, ()),
    ("tcp flags syn / syn,ack accept", "accept", EVERY,
     {"protocol": TCP, "flags": flags(lambda f: f & 0x12 == 2)}, ()),
    ("tcp flags != syn / syn,ack accept", "accept", EVERY,
     {"protocol": TCP, "flags": flags(lambda f: f & 0x12 != 2)}, ()),
    ("tcp flags ! fin,rst accept", "accept", EVERY, {"protocol": TCP, "flags": flags(lambda f: f & 5 == 0)}, ()),
    ("tcp flags & (fin|syn|rst|psh|ack|urg) == fin|psh|urg drop", "drop", EVERY,
     {"protocol": TCP, "flags": flags(lambda f: f & 0x3F == 0x29)}, ()),
    ("icmp type echo-request accept", "accept", FOUR, {"protocol": ICMP, "sport": ((0x800, 0x8FF),)}, ()),
    ("icmp type destination-unreachable icmp code 4 accept", "accept", FOUR,
     {"protocol": ICMP, "sport": one(0x304)}, ()),
    ("icmpv6 type { packet-too-big, echo-request } accept", "accept", SIX,
     {"protocol": ICMPV6, "sport": ((0x200, 0x2FF), (0x8000, 0x80FF))}, ()),
]  # fmt: skip

REFUSED = [
    ("ip ttl 4 accept", "it asks for ip ttl"),
    ("ip saddr & 255.0.0.255 == 10.0.0.1 accept", "it masks a field"),
    ("ip saddr @soon accept", "the set @soon is no plain one"),
    ("ip saddr @met accept", "the set @met is no plain one"),
    ("ip daddr . tcp dport @both accept", "it asks for concat"),
    ("ct mark 0x00000005 accept", "it asks for ct mark"),
    ("limit rate 5/second accept", "it has the statement 'limit'"),
    ('log prefix "x" accept', "it has the statement 'log'"),
    ("meta mark set 0x00000005", "it has the statement 'mangle'"),
    ("jump away", "it has the statement 'jump'"),
    ("goto away", "it has the statement 'goto'"),
    ("ct state vmap { new : jump away }", "its verdict map has the statement 'jump'"),
    ('iifname "r0" counter tcp sport 5 accept', "it asks more after a counter"),
    ("udp length 20 accept", "it asks for udp length"),
    ("iifgroup 5 accept", "it asks for meta iifgroup"),
]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Lab() as lab:
        yield lab.host("filter")


def load(host: Host, text: str) -> None:
    command = ["nft", "-f", "-"]
    done = host.call(subprocess.run, command, input="flush ruleset\n" + text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def read(host: Host, *rules: str) -> list[Rule]:
    load(host, TABLE % (BLOCKED, "\n    ".join(rules)))
    return list(host.call(ruleset.read).rules)


def test_each_form_of_match(host: Host) -> None:
    found = read(host, *(form[0] for form in FORMS))
    assert len(found) == len(FORMS)
    for rule, (text, verdict, versions, fields, interfaces) in zip(found, FORMS, strict=True):
        assert (rule.verdict, rule.versions, rule.interfaces) == (verdict, versions, interfaces), text
        assert rule.fields.keys() == fields.keys(), text
        for name, wanted in fields.items():
            same = rule.fields[name] if isinstance(wanted, tuple) else members(rule.fields[name])
            assert same == (wanted if isinstance(wanted, tuple) else set(wanted)), text
        assert rule.handle > 0


def test_rules_are_quoted_as_nft_writes_them(host: Host) -> None:
    many = "ip saddr { " + ", ".join(f"10.0.{number}.1" for number in range(40)) + " } drop"
    first, second, third = read(host, "tcp dport 22 counter accept", many, 'udp dport 53 accept comment "a b"')
    assert first.text == "tcp dport 22 counter accept", "without what it has counted"
    assert (second.text.count("10.0."), second.text[-6:]) == (40, "} drop"), "nft writes it in many lines"
    assert third.text == 'udp dport 53 accept comment "a b"'
    assert second.quoted.endswith(f"drop` (handle {second.handle} of inet filter forward)")


def test_a_map_of_verdicts_is_a_rule_for_each_element(host: Host) -> None:
    found = read(host, "ct state vmap { established : accept, related : accept, invalid : drop }", "counter")
    assert [(rule.verdict, dict(rule.fields)) for rule in found if rule.fields] == [
        ("drop", {"state": one(3)}), ("accept", {"state": one(1)}), ("accept", {"state": one(2)}),
    ]  # fmt: skip
    assert len({rule.key for rule in found}) == 2
    [only] = read(host, "tcp dport vmap { 22 : drop, 80-90 : accept }")[1:]
    assert (only.verdict, only.fields["dport"], only.fields["protocol"]) == ("accept", ((80, 90),), TCP)


@pytest.mark.parametrize(("rule", "what"), REFUSED)
def test_what_cannot_be_applied_is_refused_with_the_rule_quoted(host: Host, rule: str, what: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(host, rule)
    said = str(caught.value)
    assert said.startswith(f"nftables rule `{rule}` (handle ")
    assert f"of inet filter forward) cannot be applied by libfp: {what}" in said
    assert caught.value.remedy
    assert "\n" not in said


def test_chains(host: Host) -> None:
    """One on the way of each IP version; what is not on the way of a forwarded packet does not matter."""

    def chain(table: str, policy: str, rule: str = "") -> str:
        return f"table {table} {{\nchain c {{\ntype filter hook forward priority 0; policy {policy};\n{rule}\n}}\n}}\n"

    load(host, chain("ip a", "drop") + chain("ip6 a", "accept", "drop"))
    found = host.call(ruleset.read)
    assert [str(found.of(version)[0]) for version in (4, 6)] == ["ip a c", "ip6 a c"]
    assert [[rule.verdict for rule in found.of(version)[1]] for version in (4, 6)] == [["drop"], ["drop", "accept"]]
    load(host, chain("ip a", "accept") + chain("inet b", "drop"))
    found = host.call(ruleset.read)
    assert str(found.of(4)[0]) == "inet b c", "a chain that decides nothing is none"
    load(host, chain("ip a", "accept", "accept") + chain("inet b", "drop"))
    with pytest.raises(BadInput, match="IPv4 meets 2 nftables chains on the hook forward: ip a c and inet b c"):
        host.call(ruleset.read)
    load(host, "table ip a { chain c { type filter hook input priority 0; tcp dport 22 log; }\n}")
    assert host.call(ruleset.read).of(4) == (None, [])
