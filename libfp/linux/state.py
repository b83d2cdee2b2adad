"""What we know of Linux's links, addresses, neighbours, settings and routes, and how each message changes it.

`State.apply` takes one message and adds to a `Changes` what it changed. Messages may repeat what is known already and
may be older than the dump that a state was made from (they are replayed after it): the result is that of the last one.
Nothing here does input or output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from libfp.linux import rtnetlink as rt
from libfp.linux.netlink import NLM_F_APPEND, Message
from libfp.linux.rib import TABLES, Rib

USABLE = rt.NUD_PERMANENT | rt.NUD_NOARP | rt.NUD_REACHABLE | rt.NUD_PROBE | rt.NUD_STALE | rt.NUD_DELAY


@dataclass
class Changes:
    """What a batch of messages changed. Links are by index, neighbours by (link, address bytes)."""

    prefixes: set[rt.Prefix] = field(default_factory=set)
    neighbours: set[tuple[int, bytes]] = field(default_factory=set)
    links: set[int] = field(default_factory=set)
    netconf: bool = False  # forwarding or rp_filter of some interface
    policy: bool = False  # a policy rule or a traffic control object: the guard must look again
    resync: bool = False  # something changed that its message does not tell in full

    def __bool__(self) -> bool:
        return bool(self.prefixes or self.neighbours or self.links or self.netconf or self.policy or self.resync)


class State:
    """One copy of the kernel's state. Made from a dump, kept by notifications, compared with the next dump's."""

    def __init__(self) -> None:
        self.links: dict[int, rt.Link] = {}
        self.addresses: dict[int, set[rt.Address]] = {}  # IPv4, by link
        self.neighbours: dict[tuple[int, bytes], rt.Neighbour] = {}
        self.netconf: dict[int, rt.NetConf] = {}  # IPv4, by link, with the pseudo links "all" and "default"
        self.rib = Rib()
        self.default_table = False  # table 253 holds routes: what finds none elsewhere is left to Linux anyway

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
        if route.table not in TABLES:
            self.default_table = self.default_table or (new and route.table == rt.TABLE_DEFAULT)
            return
        if self.rib.add(prefix, self._marked(route), flags) if new else self.rib.remove(prefix, route):
            changes.prefixes.add(prefix)

    def _marked(self, route: rt.Route) -> rt.Route:
        """The route with hops marked dead only if they are: over a link that is up and has an address none can be."""
        if not any(hop.dead for hop in route.hops):
            return route
        return route._replace(
            hops=tuple(hop._replace(dead=hop.dead and not self._lives(hop.link)) for hop in route.hops)
        )

    def _lives(self, link: int) -> bool:
        return link in self.links and self.links[link].up and bool(self.addresses.get(link))

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
        changes.links.add(link.index)
        if old is None:
            return
        if old.up and not link.up:
            changes.prefixes.update(self.rib.link_down(link.index))
            changes.resync = changes.resync or self.rib.nexthop_objects > 0
        elif link.up and not old.up:
            changes.prefixes.update(self.rib.link_up(link.index))
        if old.carrier != link.carrier:
            changes.prefixes.update(self.rib.using(link.index))
        if old.master != link.master:
            changes.policy = True

    def _link_gone(self, index: int, changes: Changes) -> None:
        del self.links[index]
        changes.links.add(index)
        changes.prefixes.update(self.rib.link_gone(index))
        changes.resync = changes.resync or self.rib.nexthop_objects > 0
        self.addresses.pop(index, None)
        self.netconf.pop(index, None)
        for key in [key for key in self.neighbours if key[0] == index]:
            del self.neighbours[key]
            changes.neighbours.add(key)

    def _address(self, new: bool, address: rt.Address | None, changes: Changes) -> None:
        if address is None or address.family != rt.AF_INET:
            return
        mine = self.addresses.setdefault(address.link, set())
        if new:
            mine.add(address)
            if address.link in self.links and self.links[address.link].up:
                changes.prefixes.update(self.rib.link_up(address.link))
            return
        mine.discard(address)
        if not any(other.local == address.local for others in self.addresses.values() for other in others):
            changes.prefixes.update(self.rib.address_gone(address.local))
        if not mine:
            changes.prefixes.update(self.rib.link_down(address.link, host_scope=True))

    def _netconf(self, conf: rt.NetConf | None, changes: Changes) -> None:
        if conf is None or conf.family != rt.AF_INET:
            return
        old = self.netconf.get(conf.link) or rt.NetConf(conf.link, conf.family, None, None, None)
        # a notification carries what changed only
        merged = old._replace(**{name: value for name, value in conf._asdict().items() if value is not None})
        self.netconf[conf.link] = merged
        if merged == old:
            return
        changes.netconf = True
        if merged.ignore_linkdown != old.ignore_linkdown:
            for link in self.links if conf.link < 0 else (conf.link,):
                changes.prefixes.update(self.rib.using(link))

    def _nexthop(self, new: bool, body: memoryview, changes: Changes) -> None:
        if not self.rib.nexthop_objects:
            return
        changes.resync = True  # a group may have lost a member, or routes follow a replaced one without a message
        nhid = rt.nexthop(body)
        if not new and nhid:
            changes.prefixes.update(self.rib.nexthop_gone(nhid))

    # -- questions

    def ignores_linkdown(self, link: int) -> bool:
        """True when Linux skips routes over this link while it has no carrier."""
        return any(conf.ignore_linkdown for conf in (self.netconf.get(link), self.netconf.get(rt.NETCONFA_ALL)) if conf)

    def forwarding(self, link: int) -> bool:
        """True when Linux forwards IPv4 packets that arrive on this link."""
        conf = self.netconf.get(link)
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
            prefixes=differ(self.rib.routes, other.rib.routes),
            neighbours=differ(self.neighbours, other.neighbours),
            links=differ(self.links, other.links),
            netconf=self.netconf != other.netconf,
            policy=True,
        )
        carrier = {link for link in changes.links if link in self.links and link in other.links}
        for link in carrier:
            if self.links[link].carrier != other.links[link].carrier:
                changes.prefixes.update(self.rib.using(link))
        if changes.netconf:
            changes.prefixes.update(
                prefix
                for link in self.links
                if self.ignores_linkdown(link) != other.ignores_linkdown(link)
                for prefix in self.rib.using(link)
            )
        return changes
