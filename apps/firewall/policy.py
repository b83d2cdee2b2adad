"""The rules as compiled code asks them: one `Acl` for each family, and what its key and its value mean.

The key is a header of `AclView.lookup` (16 bytes for IPv4, 40 for IPv6), as on the wire, of packets that are tracked:

    source, destination        4 or 16 bytes each
    the transport header's first 4 bytes, as they are: the ports of TCP and UDP; type, code and checksum of ICMP (v6)
    protocol                   1 byte; that of a packet without extension headers
    TCP flags                  1 byte, 0 for others
    HAS_PORTS | where          2 bytes, big-endian: see `where`

The value is never 0: every table ends with a rule for all else. ``value & ACTION`` is what is done, ``value >> NUMBER``
the number of the outcome: the index of its counters in `Hits`. An outcome is what happens to a packet and the rules
that have counted it: rules that only count do not decide, so that each combination of them with a rule that does is an
outcome of its own.
"""

from __future__ import annotations

import ipaddress
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

from libfp.apps.firewall.hits import NUMBERS, Hits
from libfp.apps.firewall.ranges import Ranges, cubes, members, prefixes
from libfp.apps.firewall.ruleset import Rule, Ruleset
from libfp.errors import BadInput
from libfp.jit import kernel
from libfp.tables import Acl
from libfp.tables import Rule as AclRule
from libfp.tables.acl_layout import HAS_PORTS

#: States of connection tracking, in the key.
NEW, ESTABLISHED, RELATED, INVALID, UNTRACKED = range(5)
#: What is done, in ``value & ACTION``. PUNT: a rule that rejects; Linux does it.
ACTION = 3
ACCEPT, DROP, PUNT = 1, 2, 3
NUMBER = 2  # bits that the action takes

PORTS = 64  # ports that can be told apart
OUT_AT, STATE_AT = 6, 12

CAPACITY = 1 << 14  # rules of a table, and
MOST = 4096  # of these for one of nftables
APPLIED = 5.0  # seconds in which workers have taken a change
_ACTIONS = {"accept": ACCEPT, "drop": DROP, "punt": PUNT}
_STATES, _BYTES = frozenset(range(5)), frozenset(range(256))
_TCP = (6, 0xFF)


@kernel
def where(port_in, port_out, state):  # type: ignore[no-untyped-def]
    """The last two bytes of the key, in host order: indexes of ports, below `PORTS`, and a state."""
    return HAS_PORTS | port_in | port_out << OUT_AT | state << STATE_AT


Pair = tuple[int, int]


class Box(NamedTuple):
    """What a rule of an Acl asks: (value, mask), and (lowest, highest) of ports."""

    source: Pair = (0, 0)
    destination: Pair = (0, 0)
    protocol: Pair = (0, 0)
    flags: Pair = (0, 0)
    where: Pair = (0, 0)
    sport: Pair = (0, 0xFFFF)
    dport: Pair = (0, 0xFFFF)

    def meet(self, other: Self) -> Box | None:
        """What both ask at once; None if nothing is so."""
        masks = []
        for mine, theirs in zip(self[:5], other[:5], strict=True):
            if (mine[0] ^ theirs[0]) & mine[1] & theirs[1]:
                return None
            masks.append((mine[0] | theirs[0], mine[1] | theirs[1]))
        ports = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(self[5:], other[5:], strict=True)]
        return Box(*masks, *ports) if all(low <= high for low, high in ports) else None

    def rule(self, value: int, version: int) -> AclRule:
        kind = ipaddress.IPv4Network if version == 4 else ipaddress.IPv6Network
        source, destination = (kind((at, mask.bit_count())) if mask else None for at, mask in self[:2])
        sport, dport = (pair if pair != (0, 0xFFFF) else None for pair in self[5:])
        protocol, flags, where = (pair if pair[1] else None for pair in self[2:5])
        return AclRule(value, source, destination, sport, dport, protocol, flags, where)


def boxes(rule: Rule, version: int, names: Sequence[str]) -> list[Box]:
    """What a rule asks of packets of that IP version between ports of these names. Raises BadInput."""
    if version not in rule.versions:
        return []
    ports = frozenset(range(len(names)))
    sides = []
    for out in (False, True):
        asked = [one for one in rule.interfaces if one.out == out]
        sides.append(frozenset(i for i in ports if all(one.matches(names[i]) for one in asked)))

    def pairs(name: str, every: frozenset[int], bits: int) -> Sequence[Pair]:
        return cubes(members(rule.fields[name]) & every, bits, every) if name in rule.fields else ((0, 0),)

    def networks(name: str) -> Sequence[Pair]:
        bits = 32 if version == 4 else 128
        return prefixes(rule.fields[name], bits) if name in rule.fields else ((0, 0),)

    protocol, flags = pairs("protocol", _BYTES, 8), pairs("flags", _BYTES, 8)
    if "flags" in rule.fields and any(mask for _, mask in flags):
        protocol = [_TCP] if any((value ^ _TCP[0]) & mask == 0 for value, mask in protocol) else []
    shifted = [
        [(value << at, mask << at) for value, mask in some]
        for at, some in (
            (0, cubes(sides[0], OUT_AT, ports)),
            (OUT_AT, cubes(sides[1], OUT_AT, ports)),
            (STATE_AT, pairs("state", _STATES, 3)),
        )
    ]
    places = [(a[0] | b[0] | c[0], a[1] | b[1] | c[1]) for a, b, c in itertools.product(*shifted)]
    words: list[Ranges] = [rule.fields.get(name, ((0, 0xFFFF),)) for name in ("sport", "dport")]
    parts = [networks("source"), networks("destination"), protocol, flags, places, *words]
    count = int(np.prod([len(part) for part in parts], dtype=object))
    if count > MOST:
        what = f"{rule.quoted} cannot be applied by libfp: it takes {count:,} entries, and {MOST:,} are the most"
        raise BadInput(what, "split it, or ask for less at once")
    return [Box(*some) for some in itertools.product(*parts)]


Entry = tuple[Box, tuple[Rule, ...], int]  # the rules that count it, and what is done


def entries(ruleset: Ruleset, version: int, names: Sequence[str]) -> Iterator[Entry]:
    """The rules of the table for that version, the first first. Raises BadInput."""
    chain, rules = ruleset.of(version)
    counting: list[tuple[Rule, list[Box]]] = []
    for rule in rules:
        asked = boxes(rule, version, names)
        if not rule.verdict:
            counting.append((rule, asked))
            continue
        assert chain
        action = _ACTIONS[chain.policy if rule.verdict == "return" else rule.verdict]
        for box in asked:
            for part, counts in _split(box, counting, ()):
                yield part, (*counts, rule), action
    if chain is None:
        yield Box(), (), ACCEPT


def _split(
    box: Box, counting: Sequence[tuple[Rule, list[Box]]], counts: tuple[Rule, ...]
) -> Iterator[tuple[Box, tuple[Rule, ...]]]:
    """A box in parts that the same of the `counting` rules match, those first that more of them match."""
    for number, (rule, asked) in enumerate(counting):
        parts = [part for one in asked if (part := box.meet(one)) is not None]
        for part in parts:
            yield from _split(part, counting[number + 1 :], (*counts, rule))
        if box in parts:
            return
    yield box, counts


class Policy:
    """The rules that packets between ports of these names meet: `acl` for IPv4, `acl6` for IPv6, `hits` for both.

    A stage is given all three. Raises BadInput beyond `PORTS` ports.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if len(names) > PORTS:
            raise BadInput(f"{len(names)} interfaces", f"rules tell {PORTS} apart: name fewer")
        self.names = list(names)
        self.acl, self.acl6, self.hits = Acl(CAPACITY), Acl(CAPACITY, "ipv6"), Hits()
        self.ruleset = Ruleset()
        self._lock = threading.Lock()
        self._loaded: dict[int, list[AclRule]] = {4: [], 6: []}
        self._numbers: dict[tuple[object, ...], int] = {}  # of outcomes: the keys of the rules that count, the action
        self._before = np.zeros((NUMBERS, 2), np.int64)  # what an earlier outcome of that number had counted
        self._kept: dict[object, np.ndarray] = {}  # hits of rules in outcomes that are no more
        self.load(self.ruleset)

    def load(self, ruleset: Ruleset) -> None:
        """Let packets meet these rules: each finds the old ones or the new ones, whole.

        Rules that stay as they were keep their hits. Raises BadInput, and changes nothing then.
        """
        with self._lock:
            made = self.check(ruleset)
            keys = {self._key(rules, action) for some in made.values() for _, rules, action in some}
            numbers = self._with_numbers(keys)
            for version, acl in ((4, self.acl), (6, self.acl6)):
                told = [
                    box.rule(numbers[self._key(rules, action)] << NUMBER | action, version)
                    for box, rules, action in made[version]
                ]
                if told != self._loaded[version]:
                    acl.load(told)
                    self._loaded[version] = told
            self._numbers, self.ruleset = numbers, ruleset

    def wait_applied(self) -> bool:
        """Return when all workers go by what has been loaded: True, or False if one does not for seconds."""
        try:
            for acl in (self.acl, self.acl6):
                acl.wait_applied(APPLIED)
        except TimeoutError:
            return False
        return True

    def check(self, ruleset: Ruleset) -> dict[int, list[Entry]]:
        """What would be loaded, by IP version. Raises BadInput where `load` does."""
        made: dict[int, list[Entry]] = {}
        for version in (4, 6):
            made[version] = list(itertools.islice(entries(ruleset, version, self.names), CAPACITY + 1))
            if len(made[version]) > CAPACITY:
                what = f"the rules for IPv{version} take more than {CAPACITY:,} entries"
                raise BadInput(what, "use fewer, or fewer that only count")
        if len({self._key(rules, action) for some in made.values() for _, rules, action in some}) > NUMBERS:
            raise BadInput(f"the rules have more than {NUMBERS:,} outcomes", "use fewer")
        return made

    @staticmethod
    def _key(rules: tuple[Rule, ...], action: int) -> tuple[object, ...]:
        return (action, *(rule.key for rule in rules))

    def _with_numbers(self, keys: set[tuple[object, ...]]) -> dict[tuple[object, ...], int]:
        """The numbers of all outcomes that there have been, with new ones for those of `keys` that have none."""
        numbers = dict(self._numbers)
        new = keys - numbers.keys()
        if len(numbers) + len(new) > NUMBERS:
            counted = self.hits.counted()
            for key in numbers.keys() - keys:
                number = numbers.pop(key)
                for rule in key[1:]:
                    self._kept[rule] = self._kept.get(rule, 0) + counted[number] - self._before[number]
                self._before[number] = counted[number]
        free = sorted(set(range(NUMBERS)) - set(numbers.values()))
        return numbers | dict(zip(sorted(new, key=repr), free, strict=False))

    def counted(self) -> list[tuple[Rule, int, int]]:
        """The rules in order, the policies of chains after theirs, each with the packets and bytes that it matched."""
        with self._lock:
            found, counted = dict[object, np.ndarray](self._kept), self.hits.counted() - self._before
            for key, number in self._numbers.items():
                for rule in key[1:]:
                    found[rule] = found.get(rule, 0) + counted[number]
            shown = dict[object, Rule]()
            for version in (4, 6):
                shown |= {rule.key: rule for rule in self.ruleset.of(version)[1]}
        return [(rule, *found.get(key, np.zeros(2, int)).tolist()) for key, rule in shown.items()]
