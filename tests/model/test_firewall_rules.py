"""Rules of nftables as the firewall's two Acls, against their JSON read one rule after the other."""

from __future__ import annotations

import ipaddress
import json
import random
from dataclasses import dataclass
from typing import Any

from hypothesis import given, reject, settings
from hypothesis import strategies as st

from libfp.apps.firewall import policy as fw
from libfp.apps.firewall import ruleset
from libfp.errors import BadInput
from libfp.jit import INTERPRETED, Arena, kernel, store32
from libfp.testing.plain_rules import Header

NAMES = ("eth0", "eth1", "lan0")
STATES = ("new", "established", "related", "invalid", "untracked")
STATE_BITS = dict(zip(STATES, (8, 2, 4, 1, 64), strict=True))
FLAG_BITS = {name: 1 << i for i, name in enumerate(("fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"))}
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "ipv6-icmp": 58, "sctp": 132}


@dataclass(frozen=True)
class Packet:
    version: int
    source: int
    destination: int
    protocol: int
    word: tuple[int, int]  # the transport header's first four bytes
    flags: int
    inp: int
    out: int
    state: str

    @property
    def header(self) -> bytes:
        where = int(fw.where(self.inp, self.out, STATES.index(self.state))) & 0x7FFF
        flags = self.flags if self.protocol == 6 else 0
        one = Header(self.source, self.destination, self.protocol, self.word, flags, where)
        return one.bytes(self.version)


# -- what the JSON means, with no use of what is tested


def value(left: Any, p: Packet) -> int | str | None:
    """Of what a match asks for; None where the packet has no such thing."""
    if "&" in left:
        found, mask = value(left["&"][0], p), left["&"][1]
        return None if found is None else int(found) & bits(mask)
    kind, key = next(iter(left.items()))
    if kind == "meta":
        asked = key["key"]
        if asked in ("iif", "iifname"):
            return NAMES[p.inp]
        if asked in ("oif", "oifname"):
            return NAMES[p.out]
        return f"ipv{p.version}" if asked == "nfproto" else p.protocol
    if kind == "ct":
        return STATE_BITS[p.state]
    protocol, name = key["protocol"], key["field"]
    if protocol in ("ip", "ip6"):
        if p.version != {"ip": 4, "ip6": 6}[protocol]:
            return None
        return {"saddr": p.source, "daddr": p.destination}.get(name, p.protocol)
    if protocol in ("icmp", "icmpv6"):
        wanted = (4, 1) if protocol == "icmp" else (6, 58)
        if (p.version, p.protocol) != wanted:
            return None
        return p.word[0] >> 8 if name == "type" else p.word[0] & 0xFF
    if protocol != "th" and PROTOCOLS[protocol] != p.protocol:
        return None
    return p.flags if name == "flags" else p.word[name == "dport"]


def bits(told: Any) -> int:
    if isinstance(told, dict):
        told = told["|"]
    if isinstance(told, list):
        found = 0
        for one in told:
            found |= bits(one)
        return found
    return told if isinstance(told, int) else (STATE_BITS | FLAG_BITS)[told]


def number(told: Any) -> int | str:
    if isinstance(told, list) or (isinstance(told, dict) and "|" in told):
        return bits(told)
    if isinstance(told, str):
        every = STATE_BITS | FLAG_BITS | PROTOCOLS
        return (
            every[told]
            if told in every
            else int(ipaddress.ip_address(told))
            if told[0].isdigit() or ":" in told
            else told
        )
    return int(told)


def among(found: int | str, told: Any, sets: dict[str, Any]) -> bool:
    if isinstance(told, str) and told.startswith("@"):
        return any(among(found, one, sets) for one in sets[told[1:]])
    if isinstance(told, dict) and "set" in told:
        return any(among(found, one, sets) for one in told["set"])
    if isinstance(told, dict) and "range" in told:
        low, high = (number(one) for one in told["range"])
        return low <= found <= high  # type: ignore[operator]
    if isinstance(told, dict) and "prefix" in told:
        network = ipaddress.ip_network(f"{told['prefix']['addr']}/{told['prefix']['len']}")
        return int(network[0]) <= found <= int(network[-1])  # type: ignore[operator]
    if isinstance(told, str) and told.endswith("*"):
        return str(found).startswith(told[:-1])
    return found == number(told)


def holds(match: Any, p: Packet, sets: dict[str, Any]) -> bool:
    found = value(match["left"], p)
    if found is None:
        return False
    op, right = match["op"], match["right"]
    if op in ("in", "!"):
        return (int(found) & bits(right) != 0) == (op == "in")
    if op in ("==", "!="):
        return among(found, right, sets) == (op == "==")
    return {"<": found < number(right), ">=": found >= number(right)}[op]  # type: ignore[operator]


def decide(document: Any, p: Packet) -> tuple[str, list[int]]:
    """The verdict, and the handles of the rules that count the packet."""
    items = [next(iter(one.items())) for one in document["nftables"]]
    sets = {told["name"]: told["elem"] for kind, told in items if kind == "set"}
    chain = next(told for kind, told in items if kind == "chain")
    counted = []
    for kind, rule in items:
        if kind != "rule" or not all(holds(one["match"], p, sets) for one in rule["expr"] if "match" in one):
            continue
        counted.append(rule["handle"])
        last = next(iter(rule["expr"][-1])) if rule["expr"] else "counter"
        if last == "reject":
            told = rule["expr"][-1]["reject"] or {}
            if told.get("type") == "icmp" and p.version != 4:
                counted.pop()
                continue
            return "punt", counted
        if last in ("accept", "drop"):
            return last, counted
        if last == "return":
            break
    return chain["policy"], [*counted, *([0] if last_is_policy(document, counted) else [])]


def last_is_policy(document: Any, counted: list[int]) -> bool:
    """A rule that returns is what decided then, with the policy's verdict."""
    for one in document["nftables"]:
        if "rule" in one and counted and one["rule"]["handle"] == counted[-1]:
            return not (one["rule"]["expr"] and "return" in one["rule"]["expr"][-1])
    return True


# -- rules


def payload(protocol: str, name: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": name}}


def meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def match(left: Any, op: str, right: Any) -> dict[str, Any]:
    return {"match": {"left": left, "op": op, "right": right}}


equal = st.sampled_from(["==", "==", "!="])
lists = {"unique": True, "min_size": 1, "max_size": 3}
names = st.sampled_from(["eth0", "eth1", "lan0", "eth*", "wan7"])
interfaces = st.builds(
    match,
    st.sampled_from([meta("iif"), meta("iifname"), meta("oifname")]),
    equal,
    names | st.lists(names, **lists).map(lambda some: {"set": some}),
)
V4 = ["10.0.0.0", "10.0.0.1", "10.0.0.200", "10.1.0.0", "192.0.2.1", "255.255.255.255", "0.0.0.0"]
V6 = ["::", "2001:db8::", "2001:db8::1", "2001:db8:0:1::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]


def addresses(some: list[str], lengths: list[int]) -> Any:
    def prefix(address: str, length: int) -> Any:
        network = ipaddress.ip_network(f"{address}/{length}", strict=False)
        return {"prefix": {"addr": str(network[0]), "len": length}}

    def span(pair: list[str]) -> Any:
        return {"range": sorted(pair, key=lambda one: int(ipaddress.ip_address(one)))}

    one = st.sampled_from(some)
    return one | st.builds(prefix, one, st.sampled_from(lengths)) | st.lists(one, min_size=2, max_size=2).map(span)


def asked(some: Any) -> Any:
    return some | st.lists(some, min_size=1, max_size=3).map(lambda several: {"set": several})


sides = st.sampled_from(["saddr", "daddr"])
four = st.builds(
    match,
    sides.map(lambda name: payload("ip", name)),
    equal,
    asked(addresses(V4, [8, 24, 31])) | st.just("@listed"),
)
six = st.builds(match, sides.map(lambda name: payload("ip6", name)), equal, asked(addresses(V6, [32, 64, 127])))
port = st.sampled_from([0, 22, 53, 80, 1024, 65535])
ports = port | st.lists(port, min_size=2, max_size=2).map(lambda pair: {"range": sorted(pair)})
from_to = st.builds(payload, st.sampled_from(["tcp", "udp", "th", "sctp"]), st.sampled_from(["sport", "dport"]))
transport = st.builds(match, from_to, equal, asked(ports)) | st.builds(
    match, from_to, st.sampled_from(["<", ">="]), port
)
protocol = st.builds(
    match,
    st.sampled_from([meta("l4proto"), meta("l4proto"), payload("ip", "protocol"), payload("ip6", "nexthdr")]),
    equal,
    asked(st.sampled_from(["tcp", 17, "icmp", "ipv6-icmp", "sctp"])),
)
flag = st.sampled_from(sorted(FLAG_BITS))
some_flags = flag | st.lists(flag, **lists)
tcp_flags = (
    st.builds(match, st.just(payload("tcp", "flags")), st.sampled_from(["in", "!", "==", "!="]), some_flags)
    | st.builds(lambda m, op, v: match({"&": [payload("tcp", "flags"), m]}, op, v), some_flags, equal, some_flags)
    | st.builds(
        match,
        st.just(payload("tcp", "flags")),
        equal,
        st.lists(flag | st.lists(flag, **lists).map(lambda some: {"|": some}), min_size=1, max_size=2).map(
            lambda some: {"set": some}
        ),
    )
)
icmp = st.builds(
    match,
    st.sampled_from([payload("icmp", "type"), payload("icmpv6", "type")]),
    equal,
    asked(st.sampled_from([0, 3, 8, 128])),
)
code = match(payload("icmp", "type"), "==", 3), match(payload("icmp", "code"), "==", {"set": [1, 3]})
state = st.sampled_from(STATES)
states = st.builds(
    match, st.just({"ct": {"key": "state"}}), st.sampled_from(["in", "!"]), state | st.lists(state, **lists)
) | st.builds(match, st.just({"ct": {"key": "state"}}), equal, asked(state))
family = st.builds(match, st.just(meta("nfproto")), equal, st.sampled_from(["ipv4", "ipv6"]))
matches = st.one_of(interfaces, four, six, transport, protocol, tcp_flags, icmp, states, states, family)
verdicts = st.sampled_from(
    [[{"accept": None}], [{"drop": None}], [{"counter": None}, {"accept": None}], [{"reject": None}],
     [{"return": None}], [{"reject": {"type": "icmp", "expr": "host-unreachable"}}], [{"counter": None}], [],
     [{"continue": None}]]
)  # fmt: skip
asking = st.lists(matches, max_size=3) | st.just(list(code))
rules = st.lists(st.builds(list.__add__, asking, verdicts), max_size=6)


def document(some: list[Any], drop: bool, listed: list[Any]) -> Any:
    place = {"family": "inet", "table": "t"}
    made: list[Any] = [
        {"table": {"family": "inet", "name": "t", "handle": 1}},
        {"set": {**place, "name": "listed", "type": "ipv4_addr", "flags": ["interval"], "elem": listed}},
        {"chain": {**place, "name": "c", "type": "filter", "hook": "forward", "prio": 0,
                   "policy": "drop" if drop else "accept"}},
    ]  # fmt: skip
    made += [{"rule": {**place, "chain": "c", "handle": i, "expr": one}} for i, one in enumerate(some, 1)]
    return {"nftables": made}


def packets(rng: random.Random) -> list[Packet]:
    """What rules above may tell apart."""
    found = []
    for _ in range(60):
        version = rng.choice([4, 6])
        ends = [int(ipaddress.ip_address(rng.choice(V4 if version == 4 else V6))) for _ in range(2)]
        most = (1 << (32 if version == 4 else 128)) - 1
        ends = [min(max(end + rng.choice([0, 0, 0, 1, -1, 5]), 0), most) for end in ends]
        words = [rng.choice([0, 1, 21, 22, 23, 53, 80, 1023, 1024, 65535]) for _ in range(2)]
        number = rng.choice([6, 6, 6, 17, 1 if version == 4 else 58])
        if number in (1, 58):
            words[0] = rng.choice([0, 3, 8, 128, 200]) << 8 | rng.choice([0, 1, 3, 8])
        flags = rng.choice([2, 2, 0x12, 0x10, 0x11, 4, 0, 0xFF, rng.randrange(256)]) if number == 6 else 0
        where = rng.randrange(3), rng.randrange(3), rng.choice(STATES)
        found.append(Packet(version, *ends, number, (words[0], words[1]), flags, *where))
    return found


@kernel
def _look(view, headers, size, results, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        store32(results + 4 * i, view.lookup(headers + size * i))


POLICY = fw.Policy(NAMES)
PART = POLICY.hits.join(0)


def answers(version: int, some: list[Packet]) -> list[int]:
    acl, size = (POLICY.acl, 16) if version == 4 else (POLICY.acl6, 40)
    keys, results = Arena(size * max(len(some), 1)), Arena(4 * max(len(some), 2))
    keys.buffer[: size * len(some)] = b"".join(one.header for one in some)
    _look(acl.view(), keys.address, size, results.address, len(some))
    found: list[int] = results.buffer.cast("I")[: len(some)].tolist()
    keys.close()
    results.close()
    return found


@settings(max_examples=5 if INTERPRETED else 150, deadline=None)
@given(some=rules, drop=st.booleans(), listed=st.lists(addresses(V4, [8, 30]), max_size=3), seed=st.integers(0, 99))
def test_any_rules_decide_and_count_as_their_json_says(some: list[Any], drop: bool, listed: Any, seed: int) -> None:
    made = document(some, drop, listed)
    try:
        POLICY.load(ruleset.parse(json.dumps(made)))
    except BadInput as error:  # several != on one rule are many prefixes
        if "entries" not in str(error):
            raise
        reject()
    before = {rule.key: hits for rule, *hits in POLICY.counted()}
    expected: dict[int, list[int]] = {}
    every = packets(random.Random(seed))
    for version in (4, 6):
        those = [one for one in every if one.version == version]
        for packet, value in zip(those, answers(version, those), strict=True):
            verdict, counted = decide(made, packet)
            assert ("", "accept", "drop", "punt")[value & fw.ACTION] == verdict, packet
            PART.view.count(value >> fw.NUMBER, 100)
            for handle in counted:
                row = expected.setdefault(handle, [0, 0])
                row[0], row[1] = row[0] + 1, row[1] + 100
    for rule, packets_, bytes_ in POLICY.counted():
        old = before[rule.key]
        assert [packets_ - old[0], bytes_ - old[1]] == expected.get(rule.handle, [0, 0]), rule
