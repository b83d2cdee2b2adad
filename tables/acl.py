"""Packet classification by several fields: the first rule, by priority, that a header matches.

    root ──► node ──► node ──► leaf: 8 rules, compared with the header all at once (──► next leaf)

A decision tree. Each node tells its children apart by a few bits of one field; rules that do not ask about those bits
are in many children, and children with the same rules are one. Trees are cut until 8 rules are left, which vector
instructions compare side by side, or until no cut helps, or copies would take too much memory: the rules that are left
then form a chain of leaves. Where short prefixes would be copied too often, they have trees of their own.

HiCuts (Gupta and McKeown, Hot Interconnects 1999) is the tree, BitCuts (Liu et al., INFOCOM 2018) the choice of bits
anywhere in a field, EffiCuts (Vamanan et al., SIGCOMM 2010) the separate trees. A burst of headers goes down the tree
together, 16 side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping

import numpy as np

from libfp.errors import BadInput, TableFull
from libfp.jit import BOUNDSCHECK, constant, load32be, load64, native, store32, word
from libfp.jit.memory import view
from libfp.tables import acl_build as make
from libfp.tables import acl_cut as fields_of
from libfp.tables.acl_effort import effort
from libfp.tables.acl_layout import HAS_PORTS, TREES, find, leaf_size, record_size, unit_size
from libfp.tables.acl_rule import SCTP, Rule, encode
from libfp.tables.acl_vector import lookup64
from libfp.tables.table import Table
from libfp.tables.words import Words

_MOST = 1 << 20
_PRIORITIES = 1 << 31
_ROOM = 1 << 17  # words of an arena, and
_WORDS = 256  # more for each rule, and
_UNITS = {4: 1 << 22, 6: 1 << 20}  # the most, in units
_LISTED = 256  # rules that lists hold, for each rule
# Which tree a rule is in whose prefixes are both long, the source short, the destination short, both: from the right.
_ONE, _SOURCES, _DESTINATIONS, _FOUR = 0b00_00_00_00, 0b01_00_01_00, 0b10_10_00_00, 0b11_10_01_00
_COPIES = 64  # of a rule in a tree, on average, at most
_MANY = 1 << 14  # rules; of more, those with short prefixes are never with the others: changing one would take seconds
_SHALLOW = 3000  # effort with which one tree is good enough


@native
class AclView:
    """An `Acl` as compiled code sees it: `cell` is the address of a word that holds the arena's address; `addresses`
    is how many dwords of addresses a header has.

    A header in memory is 16 bytes (IPv4) or 40 (IPv6), all in network order: source, destination, source port,
    destination port, protocol, TCP flags, and 16 bits: the interface, and 0x8000 if there are ports. What is not there
    is 0.
    """

    cell: word
    addresses: constant

    def classify(self, packet):  # type: ignore[no-untyped-def]
        """The value of the first rule that the packet matches, 0 if there is none or it is of the other family."""
        if self.addresses == 2:
            if not packet.is_ipv4:
                return 0
            at, protocol = packet.l3 + 12, packet.ipv4.protocol
        else:
            if not packet.is_ipv6:
                return 0
            at, protocol = packet.l3 + 8, packet.ipv6.next_header
        ports, meta = 0, protocol << 24 | packet.port & 0x7FFF
        if packet.is_tcp:
            ports, meta = load32be(packet.l4), meta | packet.tcp.flags << 16 | HAS_PORTS
        elif packet.is_udp or packet.has_l4(SCTP, 12):
            ports, meta = load32be(packet.l4), meta | HAS_PORTS
        return find(load64(self.cell), self.addresses, at, ports, meta) & 0xFFFFFFFF

    def lookup(self, header):  # type: ignore[no-untyped-def]
        """The value of the first rule that the header at address `header` matches, 0 if there is none."""
        at = header + 4 * self.addresses
        return find(load64(self.cell), self.addresses, header, load32be(at), load32be(at + 4)) & 0xFFFFFFFF

    def lookup_burst(self, headers, results, count):  # type: ignore[no-untyped-def]
        """`lookup` of `count` headers, one after another; the values (u32) go to `results`, elsewhere.

        64 at a time, so that they wait for memory side by side.
        """
        base, size = load64(self.cell), 4 * self.addresses + 8
        whole = 0 if BOUNDSCHECK else count & ~63  # vectors are not checked
        for i in range(0, whole, 64):
            lookup64(base, self.addresses, headers + size * i, results + 4 * i)
        for i in range(whole, count):
            store32(results + 4 * i, self.lookup(headers + size * i))


class Acl(Table, MutableMapping[int, Rule]):
    """Rules by priority, 0 to 2**31 - 1: the one with the lowest number of those that match is the answer, and there is
    one of each. See `Rule` for what a rule may ask. `family` is "ipv4" or "ipv6".

        acl = Acl(capacity=1000)
        acl[10] = Rule(1, source="192.0.2.0/24", dport=(0, 1023), protocol="tcp")
        acl[20] = Rule(2)

    In a stage, ``acl.classify(packet)`` is a value, or 0. Values need not differ: counters are the application's, and a
    value may be the index of one.

    A change touches what the rule reaches: a few hundred words at most where that is little; as much as a load where it
    is nearly everything. It takes effect leaf by leaf, each header finding what was right before or after. A table that
    has doubled by single changes is made anew. A rule takes 0.2 to 2 KB, most of it copies; 3 to 4 KB are reserved for
    each, populated by use. Raises BadInput for what is no rule or priority, TableFull beyond `capacity`, KeyError as a
    dict does.
    """

    def __init__(self, capacity: int = 100_000, family: str = "ipv4") -> None:
        if family not in ("ipv4", "ipv6"):
            raise BadInput(f"an ACL of family {family!r}", 'it is "ipv4" or "ipv6"; make one of each for both')
        if not 0 < capacity <= _MOST:
            raise BadInput(f"a capacity of {capacity} rules", f"it is 1 to {_MOST}")
        self.capacity, self.family = capacity, family
        self._version, self._addresses = (4, 2) if family == "ipv4" else (6, 8)
        self._rules: dict[int, Rule] = {}
        self._numbers: dict[int, int] = {}  # of the records, by priority
        self._spare: list[int] = []
        self._built = 0
        super().__init__(self._empty())

    def view_for(self, cell: int) -> AclView:
        """See `Table.view_for`."""
        return AclView(cell, self._addresses)

    def _no_records(self) -> np.ndarray:
        return np.zeros((0, record_size(self._addresses) // 4), np.uint32)

    def _make(self) -> Words:
        """The words of a table that is yet to be built."""
        addresses = self._addresses
        least = unit_size(addresses) // 8
        reserved = -(-(leaf_size(addresses) // 8 + TREES) // least) * least
        words = Words(min(_ROOM + _WORDS * self.capacity, _UNITS[self._version] * least), reserved)
        listed = 4 * _LISTED * self.capacity + (1 << 20)
        stack = words.extra(listed)
        values = {
            fields_of.ADDRESSES: addresses,
            fields_of.RULES: words.extra(record_size(addresses) * (self.capacity + 1)),
            fields_of.ORDER: words.extra(4 * self.capacity + 8),
            fields_of.STACK: stack,
            fields_of.STACK_END: stack + listed,
        }
        for field, value in values.items():
            words.fields[field // 8] = value
        return words

    def _built_of(self, records: np.ndarray, classes: int, copies: int) -> Words | None:
        """A table of the rules of these records, which are by priority; None if there is no room for it."""
        words = self._make()
        fields, order = words.fields, np.arange(len(records), dtype=np.uint32)
        if len(records):
            view(fields[fields_of.RULES // 8], records.nbytes)[:] = records.reshape(-1).view(np.uint8).data
            view(fields[fields_of.ORDER // 8], order.nbytes)[:] = order.view(np.uint8).data
        fields[fields_of.COUNT // 8] = len(records)
        fields[fields_of.CLASSES // 8], fields[fields_of.COPIES // 8] = classes, copies
        if make.build(words.block) == make.DONE:
            return words
        words.close()
        return None

    def _best_of(self, records: np.ndarray) -> Words:
        """The table of these rules that is looked up fastest, of those with one tree and those with several."""
        best, least = None, 0
        for classes in (_ONE, _SOURCES, _DESTINATIONS, _FOUR)[len(records) > _MANY :]:
            words = self._built_of(records, classes, _COPIES)
            cost = effort(words.block) if words and len(records) else 0
            if words and (best is None or cost < least):
                if best:
                    best.close()
                best, least = words, cost
            elif words:
                words.close()
            if best and least < _SHALLOW:
                break
        best = best or self._built_of(records, _ONE, 0)
        if best is None:
            raise TableFull(f"no memory for {len(records)} rules", "make the table with a larger capacity")
        return best

    def load(self, rules: Mapping[int, Rule] | Iterable[Rule]) -> None:
        """Let the table hold exactly these rules: by priority, or one after another from priority 0 on.

        Built aside, in up to four ways of which the fastest stays, and then swapped in. Raises BadInput or TableFull,
        and changes nothing then.
        """
        given = dict(rules) if isinstance(rules, Mapping) else dict(enumerate(rules))
        if len(given) > self.capacity:
            raise TableFull(f"{len(given)} rules for a table of {self.capacity}", "make it with a larger capacity")
        order = sorted(_checked(one) for one in given)
        records = self._no_records()
        if order:
            rows = [[*encode(given[one], self._version), one, given[one].value] for one in order]
            records = np.array(rows, np.uint32)
        with self.lock:
            self._swap(records)
            self._rules, self._numbers = {one: given[one] for one in order}, {one: i for i, one in enumerate(order)}

    def _swap(self, records: np.ndarray) -> None:
        self.replace(self._best_of(records) if len(records) else self._empty())
        self._spare, self._built = [], len(records)

    def _empty(self) -> Words:
        words = self._built_of(self._no_records(), _FOUR, _COPIES)
        assert words
        return words

    def _again(self) -> None:
        """Make the trees anew, out of all rules."""
        order = sorted(self._rules)
        fields, size = self._words.fields, record_size(self._addresses)
        made = len(self._rules) + len(self._spare)
        every = np.frombuffer(view(fields[fields_of.RULES // 8], max(made, 1) * size), np.uint32).reshape(-1, size // 4)
        self._swap(every[[self._numbers[one] for one in order]])
        self._numbers = {one: i for i, one in enumerate(order)}

    def _change(self, priority: int, old: int, new: int) -> int:
        block = self._words.block
        result: int = make.change(block, old, new, make.index(block, priority))
        if old != make.NONE:
            self._spare.append(old)
        return result

    def __setitem__(self, priority: int, rule: Rule) -> None:
        row = [*encode(rule, self._version), _checked(priority), rule.value]
        with self.lock:
            old = self._numbers.get(priority, make.NONE)
            if old == make.NONE and len(self._rules) == self.capacity:
                raise TableFull(f"a table of {self.capacity} rules is full", "make it with a larger capacity")
            new = self._spare.pop() if self._spare else len(self._rules)
            at = self._words.fields[fields_of.RULES // 8] + new * 4 * len(row)
            for i, one in enumerate(row):
                store32(at + 4 * i, one)
            result = self._change(priority, old, new)
            self._rules[priority], self._numbers[priority] = rule, new
            if result == make.NO_ROOM or len(self._rules) > 2 * self._built + 64:
                self._again()
            self.commit()

    def __delitem__(self, priority: int) -> None:
        with self.lock:
            result = self._change(priority, self._numbers[priority], make.NONE)
            del self._rules[priority], self._numbers[priority]
            if result == make.NO_ROOM:
                self._again()
            self.commit()

    def clear(self) -> None:
        """Remove all rules."""
        self.load({})

    def __getitem__(self, priority: int) -> Rule:
        return self._rules[priority]

    def __contains__(self, priority: object) -> bool:
        return priority in self._rules

    def __len__(self) -> int:
        return len(self._rules)

    def __iter__(self) -> Iterator[int]:
        with self.lock:
            return iter(sorted(self._rules))

    def __repr__(self) -> str:
        return f"<Acl of {len(self)} {self.family} rules, at most {self.capacity}>"


def _checked(priority: int) -> int:
    if type(priority) is not int or not 0 <= priority < _PRIORITIES:
        raise BadInput(f"a priority of {priority!r}", "it is 0 to 2**31 - 1, and the lowest comes first")
    return priority
