"""The two questions this package asks rtnetlink: what is this link, and which prefixes are this host's own.

Not sysfs: after setns(2) /sys still shows the links of the namespace it was mounted in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

RTM_NEWLINK, RTM_GETLINK, RTM_NEWROUTE, RTM_GETROUTE = 16, 18, 24, 26
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_EXT_MASK, IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES, IFLA_LINK_NETNSID, IFLA_XDP = 29, 31, 32, 37, 43
IFLA_INFO_KIND = 1
IFLA_XDP_PROGRAMS = (4, 5, 6, 7)  # the only one, native, generic, in hardware
RTEXT_FILTER_SKIP_STATS = 1 << 3
RTA_DST, TABLE_LOCAL = 1, 255
RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST = 2, 3, 4
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
IFF_UP, IFF_LOOPBACK = 1, 8
_TYPE = 0x3FFF  # an attribute's type without its flag bits


@dataclass(frozen=True)
class Link:
    """A network interface as rtnetlink describes it; 0, "" or b"" where it says nothing."""

    name: str
    index: int
    flags: int
    mtu: int
    mac: bytes
    kind: str
    lower: int
    lower_elsewhere: bool
    master: int
    rx_queues: int
    tx_queues: int
    programs: tuple[int, ...]


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & _TYPE] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def _ask(message: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(5)
        with contextlib.suppress(OSError):  # then the kernel dumps one table and not all of them
            sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        sock.send(struct.pack("=IHHII", 16 + len(body), message, NLM_F_REQUEST | flags, 1, 0) + body)
        while True:
            data = sock.recv(1 << 17)
            while len(data) >= 16:
                length, kind, _flags, _sequence, _port = struct.unpack_from("=IHHII", data)
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", data, 16)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                if kind == NLMSG_DONE:
                    return
                yield kind, data[16:length]
                data = data[(length + 3) & ~3 :]


def _number(attributes: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(attributes.get(kind, b"")[:4], "little")


def _link(data: bytes) -> Link:
    _family, index, flags, _change = struct.unpack_from("=BxxxiII", data)
    found = _attributes(data[16:])
    xdp = _attributes(found.get(IFLA_XDP, b""))
    kind = _attributes(found.get(IFLA_LINKINFO, b"")).get(IFLA_INFO_KIND, b"")
    return Link(
        name=found[IFLA_IFNAME].rstrip(b"\0").decode(),
        index=index,
        flags=flags,
        mtu=_number(found, IFLA_MTU),
        mac=found.get(IFLA_ADDRESS, b""),
        kind=kind.rstrip(b"\0").decode(),
        lower=_number(found, IFLA_LINK),
        lower_elsewhere=IFLA_LINK_NETNSID in found,
        master=_number(found, IFLA_MASTER),
        rx_queues=_number(found, IFLA_NUM_RX_QUEUES),
        tx_queues=_number(found, IFLA_NUM_TX_QUEUES),
        programs=tuple(sorted({_number(xdp, kind) for kind in IFLA_XDP_PROGRAMS} - {0})),
    )


_SKIP_STATISTICS = struct.pack("=HHI", 8, IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)


def link(name: str) -> Link | None:
    """The interface of that name in this thread's network namespace; None when there is none."""
    try:
        index = socket.if_nametoindex(name)
        body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + _SKIP_STATISTICS
        return next(_link(data) for kind, data in _ask(RTM_GETLINK, NLM_F_ACK, body) if kind == RTM_NEWLINK)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO, None):  # if_nametoindex gives no number
            return None
        raise


def links() -> list[Link]:
    """All interfaces of this thread's network namespace."""
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _SKIP_STATISTICS
    return [_link(data) for kind, data in _ask(RTM_GETLINK, NLM_F_DUMP, body) if kind == RTM_NEWLINK]


def local_prefixes() -> set[tuple[bytes, int]]:
    """Every (address, length) that the local tables deliver to this host; addresses are 4 or 16 bytes in wire order.

    The tables and not the list of addresses: they have the broadcast and anycast addresses that the kernel made by
    itself, 127.0.0.0/8, and prefixes that `ip route add local` gave to this host.
    """
    found = set()
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        body = struct.pack("=8BI", family, 0, 0, 0, TABLE_LOCAL, 0, 0, 0, 0)
        for kind, data in _ask(RTM_GETROUTE, NLM_F_DUMP, body):
            if kind != RTM_NEWROUTE or data[0] != family:  # a kernel without IPv6 answers with what it has
                continue
            length, table, use = data[1], data[4], data[7]
            if table == TABLE_LOCAL and use in (RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST):
                found.add((_attributes(data[12:]).get(RTA_DST, bytes(size)), length))
    return found
