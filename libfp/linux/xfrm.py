"""XFRM policies by netlink: what Linux's own IPsec says must become of packets (ip-xfrm(8)).

Linux keeps one policy for each selector and direction (and mark, which those made here have not); among several that
cover a packet the smallest priority decides.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import NamedTuple

from libfp.linux.netlink import NETLINK_XFRM, NLM_F_ACK, NLM_F_CREATE, Malformed, Message, Netlink, attributes

GROUP_POLICY = 4
NEWPOLICY, DELPOLICY, GETPOLICY, UPDPOLICY, GETDEFAULT = 0x13, 0x14, 0x15, 0x19, 0x28
BLOCK_BY_DEFAULT = 1
DIRECTIONS, ACTIONS = ("in", "out", "fwd"), ("allow", "block")
TEMPLATES, MARK, IF_ID = 5, 21, 31  # attributes; a template is 64 bytes

_SELECTOR = struct.Struct("=16s16sHHHHHBBB3xiI")  # destination, source, ports and masks, family, lengths, protocol, ...
_INFO = struct.Struct("=IIBBBB4x")  # priority, index, direction, action, flags, share; behind lifetimes of 96 bytes
_INFO_AT = _SELECTOR.size + 96
_FOREVER = struct.pack("=4Q", *(4 * [2**64 - 1])) + bytes(64)  # struct xfrm_lifetime_cfg, xfrm_lifetime_cur


class Policy(NamedTuple):
    """One policy. `family` is AF_INET, AF_INET6 or AF_UNSPEC, prefixes are text; `direction` "in", "out" or "fwd",
    `action` "block" or "allow". `templates` counts what it wants done to packets, `plain` says that there are none and
    that nothing but the prefixes selects. `number` is Linux's name for it, 0 for one that is not there (yet)."""

    family: int
    source: str
    destination: str
    direction: str
    action: str
    priority: int = 0
    templates: int = 0
    plain: bool = True
    number: int = 0

    def __str__(self) -> str:
        selector = f"{self.source} > {self.destination}"
        return f"XFRM policy {self.action} {selector} dir {self.direction} priority {self.priority}"


def policies() -> list[Policy]:
    """All of this thread's network namespace; none where the kernel has no XFRM. Raises OSError."""
    try:
        netlink = Netlink(NETLINK_XFRM)
    except OSError:
        return []
    with netlink:
        found = map(_decode, netlink.dump_all(GETPOLICY, bytes(64)))
        return [policy for policy in found if policy is not None]


def blocks_by_default(netlink: Netlink) -> bool:
    """Whether packets out or forwarded are blocked where no policy covers them. Raises OSError before Linux 5.14."""
    answers = netlink.ask(GETDEFAULT, bytes(4))  # in, forward, out
    return any(BLOCK_BY_DEFAULT in message.body[1:3] for message in answers if len(message.body) >= 3)


def add(policy: Policy, replace: bool = False) -> None:
    """Add a policy. Where its selector has one in this direction, that is replaced, at once, or with `replace` false
    FileExistsError is raised; otherwise OSError."""
    body = _selector(policy) + _FOREVER
    direction, action = DIRECTIONS.index(policy.direction), ACTIONS.index(policy.action)
    body += _INFO.pack(policy.priority, 0, direction, action, 0, 0)
    with Netlink(NETLINK_XFRM) as netlink:
        netlink.ask(UPDPOLICY if replace else NEWPOLICY, body, NLM_F_ACK | NLM_F_CREATE)


def remove(policy: Policy) -> bool:
    """Remove the very one that `policies` returned; False when it is gone. Raises OSError."""
    body = _selector(policy) + struct.pack("=IB3x", policy.number, DIRECTIONS.index(policy.direction))
    with Netlink(NETLINK_XFRM) as netlink:
        try:
            netlink.ask(DELPOLICY, body)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
    return True


def _selector(policy: Policy) -> bytes:
    source, destination = ipaddress.ip_network(policy.source), ipaddress.ip_network(policy.destination)
    addresses = [network.network_address.packed.ljust(16, b"\0") for network in (destination, source)]
    lengths = destination.prefixlen, source.prefixlen
    return _SELECTOR.pack(*addresses, 0, 0, 0, 0, policy.family, *lengths, 0, 0, 0)


def _decode(message: Message) -> Policy | None:
    if message.type != NEWPOLICY:
        return None
    if len(message.body) < _INFO_AT + _INFO.size:
        raise Malformed(f"an XFRM policy of {len(message.body)} bytes")
    daddr, saddr, *ports, family, dlength, slength, protocol, link, _user = _SELECTOR.unpack_from(message.body)
    priority, index, direction, action, _flags, _share = _INFO.unpack_from(message.body, _INFO_AT)
    if direction >= len(DIRECTIONS) or action >= len(ACTIONS):
        return None  # one of a socket's own
    found = attributes(message.body, _INFO_AT + _INFO.size)
    templates = len(found.get(TEMPLATES, b"")) // 64
    return Policy(
        family,
        _prefix(saddr, slength, family),
        _prefix(daddr, dlength, family),
        DIRECTIONS[direction],
        ACTIONS[action],
        priority,
        templates,
        not (any(ports) or protocol or link or templates or MARK in found or IF_ID in found),
        index,
    )


def _prefix(address: bytes, length: int, family: int) -> str:
    if family == socket.AF_INET:
        return f"{ipaddress.IPv4Address(address[:4])}/{length}"
    return f"{ipaddress.IPv6Address(address)}/{length}"
