"""What we know of Linux's links, addresses, neighbours, settings and routes, and how each message changes it.

`State.take` takes in datagrams, `State.apply` one message; both add to a `Changes` what that changed. Messages may
repeat what is known already and may be older than the dump that a state was made from (they are replayed after it): the
result is that of the last one. Nothing here does input or output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from libfp.linux import rtnetlink as rt
from libfp.linux.bulk import Bulk
from libfp.linux.netlink import NLM_F_APPEND, Message
from libfp.linux.prefixes import prefixes
from libfp.linux.rib import TABLES, Numbering, Rib

USABLE = rt.NUD_PERMANENT | rt.NUD_NOARP | rt.NUD_REACHABLE | rt.NUD_PROBE | rt.NUD_STALE | rt.NUD_DELAY
FEW = 64  # rows that are better off as prefixes


@dataclass
class Changes:
    """What a batch of messages changed. Links are by index, neighbours by (link, address bytes).

    Prefixes that changed are in `prefixes` or, where they are many, in the arrays of `rows` (`libfp.linux.prefixes`)
    by family, 32 or 128 bits; `of` has them all.
    """

    prefixes: set[rt.Prefix] = field(default_factory=set)
    neighbours: set[tuple[int, bytes]] = field(default_factory=set)
    links: set[int] = field(default_factory=set)
    netconf: bool = False  # forwarding or rp_filter of some interface
    addresses: bool = False  # this host's own
    policy: bool = False  # a policy rule or a traffic control object: the guard must look again
    resync: bool = False  # something changed that its message does not tell in full
    rows: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        found = self.prefixes or self.neighbours or self.links or self.addresses or self.netconf or self.policy
        return bool(found or self.resync or self.rows)

    def add_rows(self, bits: int, rows: np.ndarray) -> None:
        """These prefixes have changed."""
        if len(rows) <= FEW:
            self.prefixes.update(prefixes(rows, bits))
        else:
            self.rows.setdefault(bits, []).append(rows)

    def of(self, bits: int) -> np.ndarray:
        """Rows of all prefixes of a family that changed; one may be there twice."""
        few = [prefix.row() for prefix in self.prefixes if prefix.bits == bits]
        return np.concatenate([np.array(few, np.int64).reshape(-1, 3), *self.rows.get(bits, ())])


class State:
    """One copy of the kernel's state. Made from a dump, kept by notifications, compared with the next dump's.

    `like` is a state to compare with: the two then number their routes alike.
    """

    def __init__(self, like: State | None = None) -> None:
        self.links: dict[int, rt.Link] = {}
        self.addresses: dict[int, set[rt.Address]] = {}  # IPv4, by link
        self.addresses6: dict[int, set[rt.Address]] = {}
        self.neighbours: dict[tuple[int, bytes], rt.Neighbour] = {}
        self.netconf: dict[int, rt.NetConf] = {}  # IPv4, by link, with the pseudo links "all" and "default"
        self.netconf6: dict[int, rt.NetConf] = {}
        self.numbering: Numbering = like.numbering if like else Numbering()
        self.bulk: Bulk = like.bulk if like else Bulk(self.numbering)
        self.rib, self.rib6 = Rib(self.numbering), Rib(self.numbering, 128)
        self.ribs = {32: self.rib, 128: self.rib6}
        # table 253 holds routes: what finds none elsewhere is left to Linux anyway
        self.default_table: bool = bool(like and like.default_table)
        self.bulk.links_changed()

    def take(
        self, datagram: memoryview | bytes, changes: Changes, dump: bool = False, sequence: int = -1
    ) -> tuple[int, list[Message]]:
        """Take in a datagram, of a dump or of notifications; see `Bulk.take`. `harvest` completes the changes."""
        return self.bulk.take(self, memoryview(datagram), changes, dump, sequence)

    def harvest(self, changes: Changes) -> None:
        """Add to `changes` what `take` has left to be added at once."""
        self.bulk.harvest(changes)

    def apply(self, message: Message, changes: Changes, dump: bool = False) -> None:
        """Take in one message, of a dump or a notification. Raises `Malformed`; other kinds are ignored."""
        kind, body = message.type, message.body
        if kind in (rt.RTM_NEWROUTE, rt.RTM_DELROUTE):
            self._route(kind == rt.RTM_NEWROUTE, body, NLM_F_APPEND if dump else message.flags, changes)
        elif kind in (rt.RTM_NEWNEIGH, rt.RTM_DELNEIGH):
            self._neighbour(kind == rt.RTM_NEWNEIGH, rt.neighbour(body), changes)
        elif kind in (rt.RTM_NEWLINK, rt.RTM_DELLINK):
            self._link(kind == rt.RTM_NEWLINK, rt.link(body), changes)
        elif kind in (rt.RTM_NEWADDR, rt.RTM_DELADDR):
            self._address(kind == rt.RTM_NEWADDR, rt.address(body), changes)
        elif kind == rt.RTM_NEWNETCONF:
            self._netconf(rt.netconf(body), changes)
        elif kind in (rt.RTM_NEWRULE, rt.RTM_DELRULE) or kind in rt.RTM_TRAFFIC_CONTROL:
            changes.policy = True
        elif kind in (rt.RTM_NEWNEXTHOP, rt.RTM_DELNEXTHOP):
            self._nexthop(kind == rt.RTM_NEWNEXTHOP, body, changes)

    def _route(self, new: bool, body: memoryview, flags: int, changes: Changes) -> None:
        decoded = rt.route(body)
        if decoded is None:
            return
        prefix, route = decoded
        if not self._wanted(route):
            return
        rib = self.ribs[prefix.bits]
        if rib.add(prefix, self._marked(route, prefix.bits), flags) if new else rib.remove(prefix, route):
            changes.prefixes.add(prefix)

    def route_of(self, message: Message) -> tuple[rt.Route | None, bool]:
        """The route that a message means, None where it is none of ours; and whether that hangs on links' states."""
        decoded = rt.route(message.body)
        if decoded is None or not self._wanted(decoded[1]):
            return None, False
        prefix, route = decoded
        return self._marked(route, prefix.bits), any(hop.dead for hop in route.hops)

    def _wanted(self, route: rt.Route) -> bool:
        if route.table in TABLES:
            return True
        self.default_table = self.default_table or route.table == rt.TABLE_DEFAULT
        return False

    def _marked(self, route: rt.Route, bits: int) -> rt.Route:
        """The route with hops marked dead only if they are: over a link that is up and has an address none can be."""
        if not any(hop.dead for hop in route.hops):
            return route
        return route._replace(
            hops=tuple(hop._replace(dead=hop.dead and not self._lives(hop.link, bits)) for hop in route.hops)
        )

    def _lives(self, index: int, bits: int) -> bool:
        link = self.links.get(index)
        if link is None or not link.up:
            return False
        return bool(self.addresses.get(index)) if bits == 32 else link.ready

    def _neighbour(self, new: bool, neighbour: rt.Neighbour | None, changes: Changes) -> None:
        if neighbour is None:
            return
        key = neighbour.link, neighbour.address
        old = self.neighbours.get(key)
        if new:
            self.neighbours[key] = neighbour
        elif old is not None:
            del self.neighbours[key]
        if old != (neighbour if new else None):
            changes.neighbours.add(key)

    def _rows(self, changes: Changes, method: str, *arguments: Any) -> None:
        """Have both families' routes act on something, and note what that changes."""
        for bits, rib in self.ribs.items():
            changes.add_rows(bits, getattr(rib, method)(*arguments))

    def _link(self, new: bool, link: rt.Link | None, changes: Changes) -> None:
        if link is None:
            return
        old = self.links.get(link.index)
        if not new:
            if old is not None:
                self._link_gone(link.index, changes)
            return
        self.links[link.index] = link
        if old == link:
            return
        self.bulk.links_changed()
        changes.links.add(link.index)
        if old is None:
            return
        if old.up and not link.up:
            self._rows(changes, "link_down", link.index)
            changes.resync = changes.resync or self._nexthop_objects() > 0
        elif link.up and not old.up:
            changes.add_rows(32, self.rib.link_up(link.index))
        if link.ready and not old.ready:
            changes.add_rows(128, self.rib6.link_up(link.index))
        if old.carrier != link.carrier:
            self._rows(changes, "using", link.index)
        if old.master != link.master:
            changes.policy = True

    def _link_gone(self, index: int, changes: Changes) -> None:
        del self.links[index]
        self.bulk.links_changed()
        changes.links.add(index)
        self._rows(changes, "link_gone", index)
        changes.resync = changes.resync or self._nexthop_objects() > 0
        for by_link in (self.addresses, self.addresses6, self.netconf, self.netconf6):
            by_link.pop(index, None)
        for key in [key for key in self.neighbours if key[0] == index]:
            del self.neighbours[key]
            changes.neighbours.add(key)

    def _nexthop_objects(self) -> int:
        return self.rib.nexthop_objects + self.rib6.nexthop_objects

    def _address(self, new: bool, address: rt.Address | None, changes: Changes) -> None:
        if address is None or address.family not in rt.BITS:
            return
        bits = rt.BITS[address.family]
        rib, by_link = self.ribs[bits], self.addresses if bits == 32 else self.addresses6
        mine = by_link.setdefault(address.link, set())
        self.bulk.links_changed()
        changes.addresses = True
        # of IPv6 there is one with a link's local address, whatever its peer and its prefix become
        same = 3 if bits == 128 else 5
        mine -= {other for other in mine if other[:same] == address[:same]}
        if new:
            mine.add(address)
            if bits == 32 and address.link in self.links and self.links[address.link].up:
                changes.add_rows(bits, rib.link_up(address.link))
            return
        if not any(other.local == address.local for others in by_link.values() for other in others):
            changes.add_rows(bits, rib.address_gone(address.local))
        if not mine and bits == 32:
            changes.add_rows(bits, rib.link_down(address.link, host_scope=True))

    def _netconf(self, conf: rt.NetConf | None, changes: Changes) -> None:
        if conf is None or conf.family not in rt.BITS:
            return
        bits = rt.BITS[conf.family]
        known = self.netconf if bits == 32 else self.netconf6
        old = known.get(conf.link) or rt.NetConf(conf.link, conf.family, None, None, None)
        # a notification carries what changed only
        merged = old._replace(**{name: value for name, value in conf._asdict().items() if value is not None})
        known[conf.link] = merged
        if merged == old:
            return
        changes.netconf = True
        if merged.ignore_linkdown != old.ignore_linkdown:
            for link in self.links if conf.link < 0 else (conf.link,):
                changes.add_rows(bits, self.ribs[bits].using(link))

    def _nexthop(self, new: bool, body: memoryview, changes: Changes) -> None:
        if not self._nexthop_objects():
            return
        changes.resync = True  # a group may have lost a member, or routes follow a replaced one without a message
        nhid = rt.nexthop(body)
        if not new and nhid:
            self._rows(changes, "nexthop_gone", nhid)

    # -- questions

    def ignores_linkdown(self, link: int, bits: int = 32) -> bool:
        """True when Linux skips routes over this link while it has no carrier."""
        known = self.netconf if bits == 32 else self.netconf6
        return any(conf.ignore_linkdown for conf in (known.get(link), known.get(rt.NETCONFA_ALL)) if conf)

    def forwarding(self, link: int, bits: int = 32) -> bool:
        """True when Linux forwards packets of the family that arrive on this link: IPv6 knows one switch for all."""
        conf = self.netconf.get(link) if bits == 32 else self.netconf6.get(rt.NETCONFA_ALL)
        return bool(conf and conf.forwarding)

    def rp_filter(self, link: int) -> int:
        """The reverse path filter that counts: the larger of the link's and of "all"."""
        return max(
            (conf.rp_filter or 0 for conf in (self.netconf.get(link), self.netconf.get(rt.NETCONFA_ALL)) if conf),
            default=0,
        )

    def usable(self, link: int, address: bytes) -> rt.Neighbour | None:
        """The neighbour entry when it has a MAC address that may be used."""
        found = self.neighbours.get((link, address))
        return found if found is not None and found.state & USABLE and len(found.mac) == 6 else None

    def differences(self, other: State) -> Changes:
        """What somebody who has acted on `other` must look at again now that this state is the right one."""

        def differ(mine: dict[Any, Any], others: dict[Any, Any]) -> set[Any]:
            return {key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key)}

        changes = Changes(
            neighbours=differ(self.neighbours, other.neighbours),
            links=differ(self.links, other.links),
            addresses=(self.addresses, self.addresses6) != (other.addresses, other.addresses6),
            netconf=(self.netconf, self.netconf6) != (other.netconf, other.netconf6),
            policy=True,
        )
        for bits, rib in self.ribs.items():
            if self.numbering is other.numbering:
                changes.add_rows(bits, rib.map.differences(other.ribs[bits].map))
            else:
                changes.prefixes |= differ(dict(rib.routes), dict(other.ribs[bits].routes))
            for link in self.links.keys() & other.links.keys():
                if self.links[link].carrier != other.links[link].carrier or (
                    self.ignores_linkdown(link, bits) != other.ignores_linkdown(link, bits)
                ):
                    changes.add_rows(bits, rib.using(link))
        return changes
