"""The kernel's rules on forwarded packets, as `nft -j list ruleset` prints them, made into sets of numbers.

What a rule asks is kept as ranges of each field that the fast path has in its key (`apps/firewall/policy.py`), so that
every form that nftables knows of asking it comes to the same: names, prefixes, ranges, sets, `!=`, `<`. What the key
does not hold is refused, with the rule quoted.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from libfp.apps.firewall.ranges import Ranges, complement, meet, union
from libfp.errors import BadInput, MissingCapability, Unsupported

NFT_LIMIT = 30.0  # seconds
REMEDY = "apps/firewall/README.md lists what rules may say; leave it out, or leave forwarding to Linux"

FAMILIES = {"inet": frozenset((4, 6)), "ip": frozenset((4,)), "ip6": frozenset((6,))}
BITS = {"protocol": 8, "sport": 16, "dport": 16, "flags": 8}

# As the kernel has them: enum ip_conntrack_info's bits by state, in the order of the fast path's numbers for them.
STATES = {"new": 8, "established": 2, "related": 4, "invalid": 1, "untracked": 64}
FLAGS = {name: 1 << bit for bit, name in enumerate(("fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"))}
PROTOCOLS = {
    "icmp": 1, "tcp": 6, "udp": 17, "dccp": 33, "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "ipv6-icmp": 58,
    "comp": 108, "sctp": 132, "udplite": 136,
}  # fmt: skip
VERDICTS = ("accept", "drop", "return")
CHANGING = {"timeout", "dynamic"}  # flags of sets that packets or time change
WITH_PORTS = ("tcp", "udp", "udplite", "sctp", "dccp")
VERSIONS = {"ipv4": 4, "ip": 4, 2: 4, 0x0800: 4, 0x0008: 4, "ipv6": 6, "ip6": 6, 10: 6, 0x86DD: 6, 0xDD86: 6}
ICMP_TYPES = {
    "echo-reply": 0, "destination-unreachable": 3, "source-quench": 4, "redirect": 5, "echo-request": 8,
    "router-advertisement": 9, "router-solicitation": 10, "time-exceeded": 11, "parameter-problem": 12,
    "timestamp-request": 13, "timestamp-reply": 14, "info-request": 15, "info-reply": 16, "address-mask-request": 17,
    "address-mask-reply": 18,
}  # fmt: skip
ICMPV6_TYPES = {
    "destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3, "parameter-problem": 4, "echo-request": 128,
    "echo-reply": 129, "mld-listener-query": 130, "mld-listener-report": 131, "mld-listener-done": 132,
    "mld-listener-reduction": 132, "nd-router-solicit": 133, "nd-router-advert": 134, "nd-neighbor-solicit": 135,
    "nd-neighbor-advert": 136, "nd-redirect": 137, "router-renumbering": 138, "ind-neighbor-solicit": 141,
    "ind-neighbor-advert": 142, "mld2-listener-report": 143,
}  # fmt: skip
ICMPS: dict[str, tuple[int, int, dict[str, int]]] = {"icmp": (4, 1, ICMP_TYPES), "icmpv6": (6, 58, ICMPV6_TYPES)}


@dataclass(frozen=True)
class Chain:
    """A base chain on the hook forward."""

    family: str
    table: str
    name: str
    policy: str = "accept"

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


@dataclass(frozen=True)
class Interfaces:
    """A match on the interface that a packet came `in` by, or leaves by: names, or beginnings of names with a "*"."""

    out: bool
    names: frozenset[str]
    negated: bool = False

    def matches(self, name: str) -> bool:
        found = any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in self.names)
        return found != self.negated


@dataclass(frozen=True)
class Rule:
    """What a rule asks, all of it at once, and does.

    `versions` are the IP versions it is about. `fields` are ranges by name; what is not there does not matter: source,
    destination, protocol, sport (of ICMP: type << 8 | code), dport, flags, state (0 new, 1 established, 2 related, 3
    invalid, 4 untracked). `verdict` is "accept", "drop", "punt" (it rejects), "return", or "" if it only counts.
    """

    chain: Chain
    handle: int
    text: str
    verdict: str
    versions: frozenset[int] = frozenset((4, 6))
    fields: Mapping[str, Ranges] = field(default_factory=dict)
    interfaces: tuple[Interfaces, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What it is known by from one reading to the next."""
        return self.chain.family, self.chain.table, self.chain.name, self.handle, self.text

    @property
    def quoted(self) -> str:
        return f"nftables rule `{self.text}` (handle {self.handle} of {self.chain})"


@dataclass(frozen=True)
class Ruleset:
    """The base chains on the hook forward, and their rules in order."""

    chains: tuple[Chain, ...] = ()
    rules: tuple[Rule, ...] = ()

    def of(self, version: int) -> tuple[Chain | None, list[Rule]]:
        """What packets of that IP version meet. The chain's policy is the last of the rules, with handle 0."""
        found = [chain for chain in self.chains if version in FAMILIES[chain.family]]
        found.sort(key=self._decides, reverse=True)
        if not found:
            return None, []
        end = Rule(found[0], 0, f"policy {found[0].policy}", found[0].policy)
        return found[0], [*(rule for rule in self.rules if rule.chain == found[0]), end]

    def _decides(self, chain: Chain) -> bool:
        return chain.policy != "accept" or any(rule.chain == chain for rule in self.rules)

    def check(self) -> None:
        """Raise BadInput if two chains decide about packets of one version."""
        for version in (4, 6):
            found = [chain for chain in self.chains if version in FAMILIES[chain.family] and self._decides(chain)]
            if len(found) > 1:
                what = f"IPv{version} meets {len(found)} nftables chains on the hook forward: {found[0]} and {found[1]}"
                raise BadInput(what, "put their rules into one chain: libfp applies one for each IP version")


def nft(*arguments: str, text: str = "") -> str:
    """What the program nft prints, given `text` to read.

    Raises Unsupported, MissingCapability, BadInput with its first line of complaint.
    """
    try:
        done = subprocess.run(["nft", *arguments], input=text, capture_output=True, text=True, timeout=NFT_LIMIT)
    except FileNotFoundError:
        raise Unsupported("the program nft is missing", "install the package nftables") from None
    except subprocess.TimeoutExpired:
        raise Unsupported(f"nft says nothing for {NFT_LIMIT:.0f} s", "is the machine very busy?") from None
    if done.returncode:
        said = next((line.strip() for line in done.stderr.splitlines() if line.strip()), f"status {done.returncode}")
        if "not permitted" in done.stderr:
            raise MissingCapability(f"nft: {said}", "run as root, or with CAP_NET_ADMIN")
        raise BadInput(f"nft: {said}", f"try it yourself: nft {' '.join(arguments)}")
    return done.stdout


def read() -> Ruleset:
    """The rules of this thread's network namespace. Raises BadInput with the rule that cannot be represented."""
    return parse(nft("-n", "-s", "-j", "list", "ruleset"), nft("-a", "-s", "list", "ruleset"))


def parse(listing: str, texts: str = "") -> Ruleset:
    """The rules of `nft -j list ruleset`, quoted as in `texts`, the output of `nft -a -s list ruleset`."""
    try:
        items = [next(iter(one.items())) for one in json.loads(listing)["nftables"]]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise BadInput("this is no output of nft -j list ruleset", "make it so: nft -j list ruleset > FILE") from None
    quotes, dynamic = _quotes(texts), _dynamic(texts)
    chains, sets, found = dict[tuple[str, str, str], Chain](), dict[tuple[str, str, str], Any](), list[Rule]()
    for kind, told in items:
        if kind in ("set", "map"):
            place = told["family"], told["table"], told["name"]
            sets[place] = {**told, "flags": ["dynamic"]} if place in dynamic else told
        elif kind == "chain" and told.get("hook") == "forward" and told["family"] in FAMILIES:
            chain = Chain(told["family"], told["table"], told["name"], told.get("policy", "accept"))
            if told.get("type") != "filter":
                raise BadInput(f"nftables chain {chain} is of type {told.get('type')}", "a filter chain can be applied")
            chains[told["family"], told["table"], told["name"]] = chain
    for kind, told in items:
        place = (told["family"], told["table"], told["chain"]) if kind == "rule" else ("", "", "")
        if place in chains:
            text = quotes.get((*place, told["handle"])) or json.dumps(told["expr"])
            found += _Reader(chains[place], told["handle"], text, sets).rules(told["expr"])
    made = Ruleset(tuple(chains.values()), tuple(found))
    made.check()
    return made


def _quotes(texts: str) -> dict[tuple[str, str, str, int], str]:
    """The rules as nft writes them, by family, table, chain and handle."""
    found, table, chain, begun = dict[tuple[str, str, str, int], str](), ("", ""), "", ""
    for line in texts.splitlines():
        words = line.split()
        if line.startswith("table "):
            table = words[1], words[2]
        elif line.startswith("\tchain "):
            chain, begun = words[1], ""
        elif chain and line.startswith("\t\t"):
            begun = f"{begun} {line.strip()}" if line[2:3].isspace() else line.strip()
            if ended := re.fullmatch(r"(.*) # handle (\d+)", begun):
                found[(*table, chain, int(ended[2]))] = ended[1]
        elif words == ["}"]:
            chain = ""
    return found


def _dynamic(texts: str) -> set[tuple[str, str, str]]:
    """The sets that packets change, by family, table and name: nft 1.0.6 does not say it in JSON."""
    found, table, name = set[tuple[str, str, str]](), ("", ""), ""
    for line in texts.splitlines():
        words = line.replace(",", " ").split()
        if line.startswith("table "):
            table = words[1], words[2]
        elif line.startswith("\t") and words[-1:] != ["}"] and words[:1] in (["set"], ["map"]):
            name = words[1]
        elif words[:1] == ["flags"] and "dynamic" in words:
            found.add((*table, name))
    return found


class _Reader:
    """Makes a `Rule` of a rule's statements; of a rule that looks its verdict up in a map, one for each element."""

    def __init__(self, chain: Chain, handle: int, text: str, sets: Mapping[tuple[str, str, str], Any]) -> None:
        self._chain, self._handle, self._text, self._sets = chain, handle, text, sets
        self._versions = FAMILIES[chain.family]
        self._fields: dict[str, Ranges] = {}
        self._interfaces: list[Interfaces] = []

    def refuse(self, what: str) -> NoReturn:
        rule = Rule(self._chain, self._handle, self._text, "")
        raise BadInput(f"{rule.quoted} cannot be applied by libfp: {what}", REMEDY)

    def rules(self, statements: list[Any]) -> list[Rule]:
        """Raises BadInput that quotes the rule."""
        try:
            return self._read(statements)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration) as error:
            self.refuse(f"it is not understood ({error!r})")

    def _read(self, statements: list[Any]) -> list[Rule]:
        counted, verdict, done = False, "", list[Rule]()
        for statement in statements:
            kind, told = next(iter(statement.items()))
            if kind == "match":
                if counted:
                    self.refuse("it asks more after a counter")
                self._match(told["op"], told["left"], told["right"])
            elif kind == "counter":
                counted = True
            elif kind == "vmap" and not counted:
                done += self._map(told["key"], told["data"])
            elif kind in VERDICTS:
                verdict = kind
            elif kind == "reject":
                verdict = "punt"
                self._reject((told or {}).get("type", ""))
            elif kind != "continue":
                self.refuse(f"it has the statement {kind!r}")
        return [*done, self._rule(verdict)] if verdict or not done else done

    def _rule(self, verdict: str) -> Rule:
        some = self._chain, self._handle, self._text, verdict
        return Rule(*some, self._versions, dict(self._fields), tuple(self._interfaces))

    def _map(self, key: Any, data: Any) -> list[Rule]:
        """A rule for each element: no two of them match the same packet."""
        pairs = data.get("set") if isinstance(data, dict) else None
        if not isinstance(pairs, list) or not all(isinstance(one, list) and len(one) == 2 for one in pairs):
            self.refuse("its verdict map is no plain one")
        made, before = [], (self._versions, dict(self._fields), list(self._interfaces))
        for value, action in pairs:
            verdict = next(iter(action)) if isinstance(action, dict) else str(action)
            if verdict not in VERDICTS:
                self.refuse(f"its verdict map has the statement {verdict!r}")
            self._match("==", key, value)
            made.append(self._rule(verdict))
            self._versions, self._fields, self._interfaces = before[0], dict(before[1]), list(before[2])
        return made

    def _reject(self, how: str) -> None:
        """nftables lets a reject with ICMP, ICMPv6 or a reset match only what they can answer."""
        if how in ICMPS:
            self._versions &= {ICMPS[how][0]}
        elif how == "tcp reset":
            self._narrow("protocol", ((PROTOCOLS["tcp"],) * 2,))

    def _narrow(self, name: str, ranges: Ranges) -> None:
        self._fields[name] = meet(self._fields[name], ranges) if name in self._fields else ranges

    def _match(self, op: str, left: Any, right: Any) -> None:
        masked, mask = isinstance(left, dict) and "&" in left, ~0
        if masked:
            left, told = left["&"]
        kind, key = next(iter(left.items())) if isinstance(left, dict) else (str(left), {})
        key = key if isinstance(key, dict) else {}
        protocol, name = key.get("protocol", ""), str(key.get("field", key.get("key", "")))
        bits = STATES if (kind, name) == ("ct", "state") else FLAGS
        if (kind, name) == ("ct", "state") or (kind, protocol, name) == ("payload", "tcp", "flags"):
            if masked:
                mask = self._bits(told, bits)
            self._bitmask(op, right, mask, bits)
        elif masked:
            self.refuse("it masks a field")
        elif kind == "meta" and name in ("iif", "iifname", "oif", "oifname"):
            self._interface(op, right, name)
        elif kind == "meta" and name in ("nfproto", "protocol"):
            self._version(op, right)
        elif kind == "meta" and name == "l4proto":
            self._narrow("protocol", self._ranges(op, right, 8, PROTOCOLS))
        elif kind == "payload":
            self._payload(op, right, protocol, name)
        else:
            self.refuse(f"it asks for {' '.join(filter(None, (kind, protocol, name)))}")

    def _payload(self, op: str, right: Any, protocol: str, name: str) -> None:
        if protocol in ("ip", "ip6") and name in ("saddr", "daddr"):
            self._versions &= FAMILIES[protocol]
            ranges = self._ranges(op, right, 32 if protocol == "ip" else 128, {})
            self._narrow("source" if name == "saddr" else "destination", ranges)
        elif (protocol, name) in (("ip", "protocol"), ("ip6", "nexthdr")):
            self._versions &= FAMILIES[protocol]
            self._narrow("protocol", self._ranges(op, right, 8, PROTOCOLS))
        elif protocol in (*WITH_PORTS, "th") and name in ("sport", "dport"):
            if protocol != "th":
                self._narrow("protocol", ((PROTOCOLS[protocol],) * 2,))
            self._narrow(name, self._ranges(op, right, 16, {}))
        elif protocol in ICMPS and name in ("type", "code"):
            version, number, types = ICMPS[protocol]
            self._versions &= {version}
            self._narrow("protocol", ((number, number),))
            ranges = self._ranges(op, right, 8, types if name == "type" else {})
            if name == "type":
                self._narrow("sport", union((low << 8, high << 8 | 0xFF) for low, high in ranges))
            else:
                every = ((kind << 8 | low, kind << 8 | high) for kind in range(256) for low, high in ranges)
                self._narrow("sport", union(every))
        else:
            self.refuse(f"it asks for {protocol} {name}")

    def _version(self, op: str, right: Any) -> None:
        asked = right.get("set") if isinstance(right, dict) else [right]
        found = {VERSIONS.get(one) if isinstance(one, int | str) else None for one in asked or [None]}
        if None in found or op not in ("==", "!="):
            self.refuse("it asks for something else than IPv4 or IPv6")
        self._versions &= found if op == "==" else {4, 6} - found

    def _interface(self, op: str, right: Any, name: str) -> None:
        asked = self._elements(right)
        if op not in ("==", "!=") or not all(isinstance(one, int | str) for one in asked):
            self.refuse(f"{name} {op} is more than names")
        # a number is that of an interface that there is not
        names = frozenset(str(one) for one in asked if isinstance(one, str))
        self._interfaces.append(Interfaces(name.startswith("o"), names, op == "!="))

    def _bitmask(self, op: str, right: Any, mask: int, bits: dict[str, int]) -> None:
        """`ct state` and `tcp flags`: tried with every value that there is."""
        values = list(STATES.values()) if bits is STATES else range(256)
        asked = [self._bits(one, bits) for one in self._elements(right)]
        tests = {
            "in": lambda value: value & asked[0] != 0,
            "!": lambda value: value & asked[0] == 0,
            "==": lambda value: value in asked,
            "!=": lambda value: value not in asked,
        }
        if op not in tests or (op in ("in", "!") and len(asked) != 1):
            self.refuse(f"it compares bits with {op!r}")
        found = union((number, number) for number, value in enumerate(values) if tests[op](value & mask))
        if bits is FLAGS:
            self._narrow("protocol", ((PROTOCOLS["tcp"],) * 2,))
        self._narrow("state" if bits is STATES else "flags", found)

    def _bits(self, told: Any, bits: dict[str, int]) -> int:
        """The value of ``syn``, ``["syn", "ack"]`` or ``{"|": ["syn", "ack"]}``."""
        if isinstance(told, int):
            return told
        if isinstance(told, str) and told in bits:
            return bits[told]
        some = told.get("|") if isinstance(told, dict) else told
        if not isinstance(some, list):
            self.refuse(f"{told!r} is none of {', '.join(bits)}")
        found = 0
        for one in some:
            found |= self._bits(one, bits)
        return found

    def _elements(self, right: Any) -> list[Any]:
        """What is asked for: one thing, or the elements of a set."""
        if isinstance(right, str) and right.startswith("@"):
            given = self._sets.get((self._chain.family, self._chain.table, right[1:]))
            extra = {"timeout", "stmt", "map"} & set(given or ())
            if given is None or not isinstance(given["type"], str) or extra or set(given.get("flags", ())) & CHANGING:
                self.refuse(f"the set {right} is no plain one")
            right = {"set": given.get("elem", [])}
        if not isinstance(right, dict) or "set" not in right:
            return [right]
        some = right["set"] if isinstance(right["set"], list) else [right["set"]]
        if any(isinstance(one, dict) and "timeout" in one.get("elem", ()) for one in some):
            self.refuse("elements of its set have timeouts")
        return [one["elem"]["val"] if isinstance(one, dict) and "elem" in one else one for one in some]

    def _ranges(self, op: str, right: Any, bits: int, names: dict[str, int]) -> Ranges:
        found = union(self._range(one, bits, names) for one in self._elements(right))
        if op == "==":
            return found
        if op == "!=":
            return complement(found, bits)
        low, high = found[0]
        most = (1 << bits) - 1
        wider = {"<": (0, low - 1), "<=": (0, high), ">": (high + 1, most), ">=": (low, most)}
        if op not in wider:
            self.refuse(f"it compares with {op!r}")
        return union([wider[op]])

    def _range(self, told: Any, bits: int, names: dict[str, int]) -> tuple[int, int]:
        if isinstance(told, dict) and "range" in told:
            low, high = (self._range(one, bits, names) for one in told["range"])
            return low[0], high[1]
        if isinstance(told, dict) and "prefix" in told:
            low = self._range(told["prefix"]["addr"], bits, names)
            return low[0], low[0] | (1 << bits - told["prefix"]["len"]) - 1
        number = told
        if isinstance(told, str) and bits >= 32:
            try:
                number = int((ipaddress.IPv4Address if bits == 32 else ipaddress.IPv6Address)(told))
            except ValueError:
                self.refuse(f"{told!r} is no address")
        elif isinstance(told, str):
            number = names.get(told)
            if number is None and names is PROTOCOLS:
                try:
                    number = socket.getprotobyname(told)
                except OSError:
                    pass
        if not isinstance(number, int) or not 0 <= number < 1 << bits:
            self.refuse(f"{json.dumps(told)} is not known (nft -n prints numbers)")
        return number, number
