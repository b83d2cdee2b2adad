"""What NETLINK_ROUTE messages mean: links, addresses, neighbours, routes, netconf and rules as plain values.

Each decoder is a pure function of a message body. It returns None for what the mirror has no use for (bridge FDB
entries, cached routes), and raises `Malformed` for what cannot be. Unknown attributes are ignored, as ever in netlink.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import NamedTuple

from libfp.linux.netlink import Malformed, attributes, text, u8, u32

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_GETQDISC, RTM_GETTFILTER = 38, 46
RTM_TRAFFIC_CONTROL = (36, 37, 44, 45)  # new and deleted qdiscs and filters
RTM_NEWNETCONF, RTM_DELNETCONF, RTM_GETNETCONF = 80, 81, 82
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
GROUP_LINK, GROUP_NEIGH, GROUP_TC, GROUP_IPV4_ADDRESS, GROUP_IPV4_ROUTE, GROUP_IPV4_RULE = 1, 3, 4, 5, 7, 8
GROUP_IPV6_ADDRESS, GROUP_IPV6_ROUTE, GROUP_IPV6_RULE, GROUP_IPV6_NETCONF = 9, 11, 19, 25
GROUP_IPV4_NETCONF, GROUP_NEXTHOP = 24, 32

AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10
BITS = {AF_INET: 32, AF_INET6: 128}
IFF_UP, IFF_LOOPBACK, IFF_RUNNING, IFF_NOARP, IFF_LOWER_UP = 0x1, 0x8, 0x40, 0x80, 0x10000
ARPHRD_ETHER = 1
NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE = 0x01, 0x02, 0x04, 0x08, 0x10
NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x20, 0x40, 0x80
NTF_USE, NTF_PROXY = 0x01, 0x08
IFA_F_SECONDARY, IFA_F_TENTATIVE = 0x01, 0x40
TABLE_DEFAULT, TABLE_MAIN, TABLE_LOCAL = 253, 254, 255
TABLE_NAMES = {TABLE_DEFAULT: "default", TABLE_MAIN: "main", TABLE_LOCAL: "local"}
UNICAST, LOCAL, BROADCAST, ANYCAST, MULTICAST, BLACKHOLE, UNREACHABLE, PROHIBIT, THROW = range(1, 10)
SCOPE_UNIVERSE, SCOPE_LINK, SCOPE_HOST = 0, 253, 254
RTNH_F_DEAD = 1
RTM_F_CLONED, RTM_F_FIB_MATCH = 0x200, 0x2000
NETCONFA_ALL, NETCONFA_DEFAULT = -1, -2  # pseudo interface indexes

_IFINFOMSG = struct.Struct("=BxHiII")  # family, ARPHRD, index, flags, change
_IFADDRMSG = struct.Struct("=BBBBI")  # family, length, flags, scope, index
_NDMSG = struct.Struct("=B3xiHBB")  # family, index, state, flags, type
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst length, src length, tos, table, protocol, scope, type, flags
_RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, index
_RULEMSG = struct.Struct("=BBBBBxxBI")  # family, dst length, src length, tos, table, action, flags


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `mac` is empty where it has none; `master` is 0 where it has none."""

    index: int
    name: str
    flags: int
    mtu: int
    mac: bytes
    arphrd: int
    kind: str
    master: int
    master_kind: str
    mtu6: int = 0  # IPv6's, where it has one

    @property
    def up(self) -> bool:
        """Administratively up: its routes exist."""
        return bool(self.flags & IFF_UP)

    @property
    def carrier(self) -> bool:
        """The layer below is up: packets can leave. Without it the kernel marks routes `linkdown`."""
        return bool(self.flags & (IFF_RUNNING | IFF_LOWER_UP))

    @property
    def ready(self) -> bool:
        """Up, with a carrier of which all of the kernel has taken note: what IPv6 waits for (addrconf_link_ready)."""
        return self.flags & (IFF_UP | IFF_RUNNING | IFF_LOWER_UP) == IFF_UP | IFF_RUNNING | IFF_LOWER_UP


class Address(NamedTuple):
    """An address of this host: `local` is 4 or 16 bytes in network order; `peer` differs on point-to-point links.

    While it is `tentative` nobody uses it: somebody else might have it (RFC 4862). A `secondary` one is in another's
    subnet (of IPv6: a temporary one).
    """

    link: int
    family: int
    local: bytes
    peer: bytes
    length: int
    tentative: bool = False
    scope: int = 0
    secondary: bool = False


class Neighbour(NamedTuple):
    """An entry of the neighbour table; `mac` is empty while it is unknown."""

    link: int
    address: bytes
    state: int
    mac: bytes


class Hop(NamedTuple):
    """One next hop of a route. An empty `gateway` means that destinations are on the link itself.

    `dead` is the kernel's mark for a hop of a multipath route whose link went down or lost its last address. A message
    says it, too, of a hop whose link has only lost its carrier, where such hops are ignored. `weight` is 1 to 256.
    """

    link: int
    gateway: bytes = b""
    encapsulated: bool = False
    dead: bool = False
    weight: int = 1


class Route(NamedTuple):
    """A route as the kernel reports it. `mtu` is its metric, 0 where it has none; `nhid` its nexthop object's, or 0."""

    table: int
    tos: int
    metric: int
    type: int
    scope: int
    hops: tuple[Hop, ...]
    mtu: int = 0
    source: bytes = b""
    protocol: int = 0
    nhid: int = 0

    def alive(self) -> Route:
        """The same route without the marks that change by themselves: what tells one route from another."""
        if not any(hop.dead for hop in self.hops):
            return self
        return self._replace(hops=tuple(hop._replace(dead=False) for hop in self.hops))


class Prefix(NamedTuple):
    """`address` is an integer in host order with its host bits zero; `bits` is 32 or 128, the family's."""

    address: int
    length: int
    bits: int = 32

    def __str__(self) -> str:
        kind = ipaddress.IPv4Address if self.bits == 32 else ipaddress.IPv6Address
        return f"{kind(self.address)}/{self.length}"

    def covers(self, other: Prefix) -> bool:
        """True when every address of `other` is one of ours."""
        if other.length < self.length or other.bits != self.bits:
            return False
        return (self.address ^ other.address) >> (self.bits - self.length) == 0

    def row(self) -> tuple[int, int, int]:
        """As compiled code has it: see `libfp.linux.prefixes`."""
        if self.bits == 32:
            return self.address, 0, self.length
        high, low = self.address >> 64, self.address & (1 << 64) - 1
        return (high ^ 1 << 63) - (1 << 63), (low ^ 1 << 63) - (1 << 63), self.length

    @classmethod
    def of_row(cls, high: int, low: int, length: int, bits: int) -> Prefix:
        """What `row` made."""
        if bits == 32:
            return cls(high, length)
        return cls((high & (1 << 64) - 1) << 64 | low & (1 << 64) - 1, length, bits)


class NetConf(NamedTuple):
    """Per-interface settings in a netconf message; None where the message does not say."""

    link: int
    family: int
    forwarding: int | None
    rp_filter: int | None
    ignore_linkdown: int | None


class Rule(NamedTuple):
    """A policy rule: `plain` when it has no selector at all and looks up a table."""

    family: int
    priority: int
    table: int
    plain: bool
    what: str


def _fixed(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise Malformed(f"netlink payload of {len(body)} bytes where {layout.size} belong")
    return layout.unpack_from(body)


def _address(value: memoryview | None) -> bytes:
    if value is None:
        return b""
    if len(value) not in (4, 16):
        raise Malformed(f"an IP address of {len(value)} bytes")
    return bytes(value)


def link(body: memoryview) -> Link | None:
    """Decode RTM_NEWLINK, RTM_DELLINK; None for a bridge's own messages about its ports."""
    family, arphrd, index, flags, _ = _fixed(_IFINFOMSG, body)
    if family != AF_UNSPEC:
        return None
    found = attributes(body, 16)
    kind = master_kind = ""
    if 18 in found:  # IFLA_LINKINFO
        info = attributes(found[18])
        kind = text(info[1]) if 1 in info else ""
        master_kind = text(info[4]) if 4 in info else ""  # IFLA_INFO_SLAVE_KIND
    mtu6 = 0
    if 26 in found:  # IFLA_AF_SPEC, of it AF_INET6, of it IFLA_INET6_CONF: 32-bit words, the third is the MTU
        spec = attributes(found[26])
        conf = attributes(spec[AF_INET6]).get(2, b"") if AF_INET6 in spec else b""
        mtu6 = u32(memoryview(conf)[8:]) if len(conf) >= 12 else 0
    return Link(
        index=index,
        name=text(found[3]) if 3 in found else "",
        flags=flags,
        mtu=u32(found[4]) if 4 in found else 0,
        mac=bytes(found.get(1, b"")),
        arphrd=arphrd,
        kind=kind,
        master=u32(found[10]) if 10 in found else 0,
        master_kind=master_kind,
        mtu6=mtu6,
    )


def address(body: memoryview) -> Address | None:
    """Decode RTM_NEWADDR, RTM_DELADDR."""
    family, length, flags, scope, index = _fixed(_IFADDRMSG, body)
    found = attributes(body, 8)
    peer = _address(found.get(1))  # IFA_ADDRESS; IFA_LOCAL is there when it differs, and always for IPv4
    local = _address(found.get(2)) or peer
    tentative = family == AF_INET6 and flags & IFA_F_TENTATIVE != 0
    secondary = flags & IFA_F_SECONDARY != 0
    return Address(index, family, local, peer, length, tentative, scope, secondary) if local else None


def neighbour(body: memoryview) -> Neighbour | None:
    """Decode RTM_NEWNEIGH, RTM_DELNEIGH; None for forwarding database and proxy entries."""
    family, index, state, flags, _ = _fixed(_NDMSG, body)
    if family not in (AF_INET, AF_INET6) or flags & NTF_PROXY:
        return None
    found = attributes(body, 12)
    destination = _address(found.get(1))
    return Neighbour(index, destination, state, bytes(found.get(2, b""))) if destination else None


def route(body: memoryview) -> tuple[Prefix, Route] | None:
    """Decode RTM_NEWROUTE, RTM_DELROUTE; None for other families than IP and for cached (cloned) routes.

    `libfp.linux.bulk` relies on this: the route depends on neither the prefix nor RTA_CACHEINFO.
    """
    family, length, src, tos, table, protocol, scope, kind, flags = _fixed(_RTMSG, body)
    bits = BITS.get(family)
    if bits is None or flags & RTM_F_CLONED:
        return None
    if length > bits:
        raise Malformed(f"a prefix of {length} bits where an address has {bits}")
    found = attributes(body, 12)
    destination = found.get(1)
    if destination is not None and len(destination) != bits // 8:
        raise Malformed(f"a destination of {len(destination)} bytes where an address has {bits // 8}")
    address = int.from_bytes(destination, "big") if destination is not None else 0
    if 15 in found:
        table = u32(found[15])
    if 9 in found:
        hops = _multipath(found[9])
        if bits == 128:  # the kernel begins now with this one, now with that
            hops = tuple(sorted(hops))
    else:
        hop = _hop(found, u32(found[4]) if 4 in found else 0, flags)
        hops = (hop,) if hop.link else ()
    mtu = 0
    if 8 in found:
        metrics = attributes(found[8])
        mtu = u32(metrics[2]) if 2 in metrics else 0
    return Prefix(address >> (bits - length) << (bits - length), length, bits), Route(
        table=table,
        tos=tos or src,  # of IPv6, a route by source address: neither is looked at here
        metric=u32(found[6]) if 6 in found else 0,
        type=kind,
        scope=scope,
        hops=hops,
        mtu=mtu,
        source=_address(found.get(7)),
        protocol=protocol,
        nhid=u32(found[30]) if 30 in found else 0,
    )


def _hop(found: dict[int, memoryview], link: int, flags: int) -> Hop:
    gateway = _address(found.get(5))
    if 18 in found:  # RTA_VIA: family (2 bytes) and an address of it
        gateway = _address(found[18][2:])
    return Hop(link, gateway, 21 in found or 22 in found, bool(flags & RTNH_F_DEAD))  # RTA_ENCAP_TYPE, RTA_ENCAP


def _multipath(body: memoryview) -> tuple[Hop, ...]:
    hops = []
    at = 0
    while len(body) - at >= _RTNEXTHOP.size:
        length, flags, weight, index = _RTNEXTHOP.unpack_from(body, at)
        if length < _RTNEXTHOP.size or length > len(body) - at:
            raise Malformed(f"a next hop of {length} bytes where {len(body) - at} are left")
        hops.append(_hop(attributes(body[at : at + length], 8), index, flags)._replace(weight=weight + 1))
        at += (length + 3) & ~3
    return tuple(hops)


def netconf(body: memoryview) -> NetConf | None:
    """Decode RTM_NEWNETCONF, RTM_DELNETCONF; None where it names no interface."""
    (family,) = _fixed(struct.Struct("=B"), body)
    found = attributes(body, 4)
    if 1 not in found:
        return None
    index = u32(found[1])
    values = [u32(found[kind]) if kind in found else None for kind in (2, 3, 6)]
    return NetConf(index - (1 << 32) if index >> 31 else index, family, *values)


def rule(body: memoryview) -> Rule:
    """Decode RTM_NEWRULE, RTM_DELRULE."""
    family, dst, src, tos, table, action, flags = _fixed(_RULEMSG, body)
    found = attributes(body, 12)
    table = u32(found[15]) if 15 in found else table
    suppress = 14 in found and u32(found[14]) != 0xFFFFFFFF  # FRA_SUPPRESS_PREFIXLEN
    # whatever is not the priority, the table, the protocol or "suppress nothing" selects
    plain = not (dst or src or tos or flags & 2 or suppress or action != 1 or set(found) - {6, 14, 15, 21})
    parts = [f"policy rule {u32(found[6]) if 6 in found else 0}:", "not" if flags & 2 else "", "from"]
    parts.append(_prefix(found.get(2), src, family))
    if dst:
        parts.append("to " + _prefix(found.get(1), dst, family))
    for kind, word in ((3, "iif"), (17, "oif")):
        if kind in found:
            parts.append(f"{word} {text(found[kind])}")
    if 10 in found:
        parts.append(f"fwmark {u32(found[10]):#x}")
    if tos:
        parts.append(f"tos {tos:#x}")
    if 19 in found and u8(found[19]):
        parts.append("lookup [l3mdev-table]")
    else:
        parts.append(f"lookup {TABLE_NAMES.get(table, table)}" if action == 1 else f"action {action}")
    if suppress:
        parts.append(f"suppress_prefixlength {u32(found[14])}")
    return Rule(family, u32(found[6]) if 6 in found else 0, table, plain, " ".join(filter(None, parts)))


def _prefix(value: memoryview | None, length: int, family: int) -> str:
    if value is None or not length:
        return "all"
    return f"{ipaddress.ip_address(_address(value))}/{length}"


def nexthop(body: memoryview) -> int:
    """Decode RTM_NEWNEXTHOP, RTM_DELNEXTHOP: the object's id."""
    found = attributes(body, 8)
    return u32(found[1]) if 1 in found else 0
