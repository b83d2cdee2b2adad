"""The firewall's rules before any packet: what is read, what is refused, what a reload keeps; and its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import pytest

from libfp.apps.firewall import policy as fw
from libfp.apps.firewall import ruleset
from libfp.apps.firewall.cli import firewall
from libfp.apps.firewall.ranges import complement, cubes, meet, members, prefixes, union
from libfp.cli import config, main
from libfp.errors import BadInput, MissingCapability, Unsupported
from libfp.jit import load64

PORTS = ("eth0", "eth1", "lan0")
EST = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}


def payload(protocol: str, name: str, right: Any, op: str = "==") -> Any:
    return {"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": name}}, "right": right}}


def listing(*rules: Any, policy: str = "drop", family: str = "inet", **chain: Any) -> str:
    """As nft prints it; a rule is (handle, statements...)."""
    place = {"family": family, "table": "t"}
    told = {"name": "c", "handle": 1, "type": "filter", "hook": "forward", "prio": 0, "policy": policy} | chain
    made: list[Any] = [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": family, "name": "t", "handle": 1}}]
    made += [{"chain": {**place, **told}}]
    made += [{"rule": {**place, "chain": "c", "handle": one[0], "expr": list(one[1:])}} for one in rules]
    return json.dumps({"nftables": made})


ACCEPT, DROP, COUNT = {"accept": None}, {"drop": None}, {"counter": {"packets": 0, "bytes": 0}}


def test_ranges() -> None:
    assert union([(5, 9), (1, 2), (3, 3), (8, 12)]) == ((1, 3), (5, 12))
    assert complement(((0, 0), (5, 6)), 3) == ((1, 4), (7, 7))
    assert complement((), 1) == ((0, 1),)
    assert complement(((0, 255),), 8) == ()
    assert meet(((0, 5), (8, 9)), ((4, 8),)) == ((4, 5), (8, 8))
    assert members(((1, 2), (5, 5))) == {1, 2, 5}
    assert prefixes(((1, 6),), 3) == [(1, 7), (2, 6), (4, 6), (6, 7)]
    assert prefixes(((0, 255),), 8) == [(0, 0)]
    assert cubes(frozenset((1, 2)), 3, frozenset(range(5))) == ((1, 3), (2, 3)), "what is not possible may match too"
    assert cubes(frozenset(), 3, frozenset(range(5))) == ()
    assert cubes(frozenset(range(5)), 3, frozenset(range(5))) == ((0, 0),)


def test_names_and_numbers_are_the_same() -> None:
    """Without -n, nft writes names, and so does a file that somebody has saved."""
    named = ruleset.parse(listing((1, payload("icmp", "type", "echo-request"), EST, ACCEPT))).rules[0]
    state = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": [2, 4]}}
    numbers = ruleset.parse(listing((1, payload("icmp", "type", 8), state, ACCEPT))).rules[0]
    assert named.fields == numbers.fields == {"protocol": ((1, 1),), "sport": ((0x800, 0x8FF),), "state": ((1, 2),)}


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"nftables": [[]]}', '{"nftables": 5}'])
def test_what_nft_never_printed(text: str) -> None:
    with pytest.raises(BadInput, match="no output of nft -j list ruleset"):
        ruleset.parse(text)


@pytest.mark.parametrize(
    "statement",
    [
        {"match": {}}, {"match": {"op": "==", "left": "x", "right": 5}}, payload("ip", "saddr", "x"),
        payload("tcp", "dport", 65536), payload("tcp", "dport", "smtp"), payload("tcp", "dport", {"range": [1]}),
        payload("tcp", "dport", "@none"), payload("tcp", "flags", "x"), payload("tcp", "flags", 2, "<"),
        payload("ip", "saddr", {"prefix": {"addr": "10.0.0.0"}}), {"xt": None}, {"vmap": {"key": {}, "data": "@m"}},
        {"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "arp"}},
        {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": {"range": ["a", "b"]}}},
    ],
)  # fmt: skip
def test_rules_that_say_something_else_are_refused(statement: Any) -> None:
    with pytest.raises(BadInput, match=r"^nftables rule `.*` \(handle 7 of inet t c\) cannot be applied by libfp: "):
        ruleset.parse(listing((7, statement, ACCEPT)))


def test_a_chain_of_another_type_is_refused() -> None:
    with pytest.raises(BadInput, match="chain inet t c is of type route"):
        ruleset.parse(listing(type="route"))


def test_what_is_not_on_the_way_does_not_matter() -> None:
    for other in ({"hook": "input"}, {"hook": None}):
        assert ruleset.parse(listing((1, {"limit": {}}), **other)) == ruleset.Ruleset()
    assert ruleset.parse(listing((1, {"limit": {}}), family="bridge")).chains == ()


def rules_of(policy: fw.Policy, version: int) -> list[Any]:
    acl = policy.acl if version == 4 else policy.acl6
    return [acl[one] for one in acl]


def test_interfaces_that_are_no_ports_never_match() -> None:
    policy = fw.Policy(PORTS)

    def match(name: str, op: str) -> Any:
        return {"match": {"op": op, "left": {"meta": {"key": "oifname"}}, "right": name}}

    policy.load(ruleset.parse(listing((1, match("wan0", "=="), ACCEPT), (2, match("wan0", "!="), COUNT, ACCEPT))))
    [only] = [one for one in rules_of(policy, 4) if one.value & fw.ACTION == fw.ACCEPT]
    assert only.interface is None, "that any packet leaves by none of that name needs no asking"
    policy.load(ruleset.parse(listing((1, match("eth*", "=="), ACCEPT))))
    [only] = [one for one in rules_of(policy, 6) if one.value & fw.ACTION == fw.ACCEPT]
    assert only.interface == (0, 2 << fw.OUT_AT), "eth0 and eth1 are 0 and 1, lan0 is 2"


def test_more_ports_than_can_be_told_apart() -> None:
    with pytest.raises(BadInput, match="65 interfaces; rules tell 64 apart"):
        fw.Policy([f"p{number}" for number in range(65)])


def test_without_a_chain_everything_is_accepted() -> None:
    policy = fw.Policy(PORTS)
    for version in (4, 6):
        assert [one.value for one in rules_of(policy, version)] == [fw.ACCEPT]
    policy.load(ruleset.parse(listing(family="ip6")))
    assert [one.value & fw.ACTION for one in rules_of(policy, 4)] == [fw.ACCEPT]
    assert [one.value & fw.ACTION for one in rules_of(policy, 6)] == [fw.DROP]


def test_a_reload_keeps_the_hits_of_rules_that_stay() -> None:
    policy = fw.Policy(PORTS)
    ssh, web = payload("tcp", "dport", 22), payload("tcp", "dport", 80)
    policy.load(ruleset.parse(listing((1, EST, ACCEPT), (2, COUNT), (3, ssh, ACCEPT), policy="drop")))
    part, other = policy.hits.join(0), policy.hits.join(1)
    for one in rules_of(policy, 4):
        part.view.count(one.value >> fw.NUMBER, 100)
        other.view.count(one.value >> fw.NUMBER, 50)

    def hits() -> list[tuple[int, int, int]]:
        return [(rule.handle, packets, size) for rule, packets, size in policy.counted()]

    once = [(1, 4, 300), (2, 4, 300), (3, 2, 150), (0, 2, 150)]
    assert hits() == once, "two states are two entries of the table; what decides otherwise, handle 2 has counted"
    policy.load(ruleset.parse(listing((1, EST, ACCEPT), (2, COUNT), (3, ssh, DROP), policy="drop")))
    assert hits() == [(1, 4, 300), (2, 4, 300), (3, 0, 0), (0, 2, 150)], "rule 3 is another one"
    policy.hits.leave(other)
    policy.load(ruleset.parse(listing((1, EST, ACCEPT), (2, COUNT), (5, web, ACCEPT), (3, ssh, ACCEPT), policy="drop")))
    assert hits() == [*once[:2], (5, 0, 0), *once[2:]], "and a worker that has ended still counts"
    assert load64(part.view.at + 16 * (rules_of(policy, 4)[0].value >> fw.NUMBER)) == 2
    policy.hits.leave(part)


def test_outcomes_may_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for so many; what the first of them have counted stays with the rules that still are."""
    monkeypatch.setattr(fw, "NUMBERS", 8)
    policy = fw.Policy(PORTS)
    monkeypatch.setattr(policy, "_before", policy._before[:8])
    monkeypatch.setattr(policy.hits, "counted", lambda: counted)
    import numpy as np

    counted = np.zeros((8, 2), np.int64)
    for number in range(1, 30):
        policy.load(ruleset.parse(listing((1, COUNT), (2, payload("tcp", "dport", number), ACCEPT), (3, DROP))))
        for one in rules_of(policy, 4):
            counted[one.value >> fw.NUMBER] += 1, 10
        told = {rule.handle: (packets, size) for rule, packets, size in policy.counted()}
        assert told == {1: (3 * number, 30 * number), 2: (1, 10), 3: (number, 10 * number), 0: (number, 10 * number)}
    with pytest.raises(BadInput, match="more than 8 outcomes"):
        policy.load(ruleset.parse(listing(*((n, payload("udp", "dport", n), ACCEPT) for n in range(1, 10)))))


def test_a_failed_load_changes_nothing() -> None:
    policy = fw.Policy(PORTS)
    policy.load(ruleset.parse(listing((1, payload("tcp", "dport", 22), ACCEPT))))
    before = [rules_of(policy, version) for version in (4, 6)], policy.counted()
    twice = [payload("ip", side, {"set": ["10.0.0.1", "10.9.0.1", "10.99.7.7"]}, "!=") for side in ("saddr", "daddr")]
    with pytest.raises(BadInput, match=r"\(handle 5 of inet t c\) cannot be applied by libfp: it takes 5,041 entries"):
        policy.load(ruleset.parse(listing((4, DROP), (5, *twice, ACCEPT))))
    many = [(number, payload("ip", "saddr", "10.0.0.1", "!="), COUNT, ACCEPT) for number in range(1, 600)]
    with pytest.raises(BadInput, match="rules for IPv4 take more than 16,384 entries"):
        policy.load(ruleset.parse(listing(*many)))
    assert ([rules_of(policy, version) for version in (4, 6)], policy.counted()) == before


# -- nft, the program


@pytest.fixture
def fake_nft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that does what the test writes into it, in the place of nft."""
    path = tmp_path / "bin" / "nft"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_complaints_of_nft(fake_nft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nft.write_text("#!/bin/sh\necho; echo 'x.nft:3:1-4: Error: syntax error' >&2; echo more >&2; exit 1\n")
    with pytest.raises(BadInput, match=r"^nft: x.nft:3:1-4: Error: syntax error; try it yourself: nft list"):
        ruleset.nft("list")
    fake_nft.write_text(
        "#!/bin/sh\necho 'netlink: Error: cache initialization failed: Operation not permitted' >&2; exit 1\n"
    )
    with pytest.raises(MissingCapability, match="run as root"):
        ruleset.read()
    monkeypatch.setattr(ruleset, "NFT_LIMIT", 0.05)
    fake_nft.write_text("#!/bin/sh\nexec sleep 5\n")
    with pytest.raises(Unsupported, match="nft says nothing"):
        ruleset.nft("list")
    monkeypatch.setenv("PATH", str(fake_nft.parent.parent))
    with pytest.raises(Unsupported, match="install the package nftables"):
        ruleset.nft("list")


# -- the command line


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["firewall", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    error = said.err.splitlines()[-1]
    assert error.startswith("fp: ")
    return error


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no interface named" in refused(capsys)
    assert "named twice in a a" in refused(capsys, "a", "a")
    for some in (["--rules", "x"], ["--pcap", "x", "--routes", "y"], ["--pcap", "x", "--rules", "y"],
                 ["a", "--pcap", "x", "--routes", "y", "--rules", "z"]):  # fmt: skip
        assert "--pcap, --routes, --rules and --out go together" in refused(capsys, *some)


def test_without_root(capsys: pytest.CaptureFixture[str], fake_nft: Path) -> None:
    fake_nft.write_text("#!/bin/sh\necho 'Operation not permitted (you must be root)' >&2; exit 1\n")
    assert "run as root" in refused(capsys, "eth0")


def test_without_a_chain_it_does_not_start(capsys: pytest.CaptureFixture[str], fake_nft: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(listing(hook="input"))
    fake_nft.write_text(f"#!/bin/sh\nexec cat {tmp_path}/empty.json\n")
    said = refused(capsys, "eth0")
    assert said.startswith("fp: the kernel has no nftables chain on the hook forward; make one (type filter hook")


def test_files_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    offline = ["--pcap", "x", "--routes", "y", "--rules"]
    for option in (["eth0", "--load"], offline):
        assert "cannot read /nonexistent: No such file" in refused(capsys, *option, "/nonexistent")
        (tmp_path / "binary").write_bytes(b"\xff\xfe")
        assert "is no text" in refused(capsys, *option, str(tmp_path / "binary"))


def test_every_option_has_a_key_of_the_same_name(tmp_path: Path) -> None:
    options = {option.removeprefix("--") for p in firewall.params for option in p.opts if option.startswith("--")}
    assert set(config.keys(firewall)) == options - {*config.WITHOUT_KEY} | {"interfaces"}
    path = tmp_path / "firewall.toml"
    path.write_text('interfaces = ["a"]\nload = "x.nft"\nconnections = 5000\n')
    told = config.read(str(path), firewall, click.Context(firewall))
    assert told == {"interfaces": ("a",), "load": "x.nft", "connections": 5000}
    path.write_text("\nconnections = 5\n")
    with pytest.raises(BadInput, match=r"firewall.toml, line 2: connections: 5 is not in the range"):
        config.read(str(path), firewall, click.Context(firewall))
