"""A rule of `libfp.tables.Acl`, and the record it is kept as: see `libfp.tables.acl_layout`."""

from __future__ import annotations

import functools
import ipaddress
from dataclasses import dataclass
from typing import Any

from libfp.errors import BadInput
from libfp.packet.headers import ICMP, ICMPV6, TCP, UDP
from libfp.tables.acl_layout import ANY_PORTS, FLAGS_AT, HAS_PORTS, INTERFACE, PROTOCOL_AT

SCTP = 132
PROTOCOLS = {"icmp": ICMP, "tcp": TCP, "udp": UDP, "icmpv6": ICMPV6, "sctp": SCTP}


@dataclass(frozen=True)
class Rule:
    """What a header must be like for `value`, 1 to 2**32 - 1, to be the answer. What is None does not matter.

    `source` and `destination` are prefixes, as text or `ipaddress` networks or addresses. `sport` and `dport` are a
    port or the lowest and highest, both included. `protocol` is a number, "tcp", "udp", "icmp", "icmpv6", "sctp", or
    (value, mask). `tcp_flags` is (value, mask) of the byte that has FIN 1, SYN 2, RST 4, PSH 8, ACK 16; it asks for
    TCP, too. `interface` is the index of the port that the packet came in by, or (value, mask) of the 15 bits there.

    A rule that asks for ports matches no packet without: no ICMP, no later fragment, no cut-off header.
    """

    value: int
    source: Any = None
    destination: Any = None
    sport: int | tuple[int, int] | None = None
    dport: int | tuple[int, int] | None = None
    protocol: int | str | tuple[int, int] | None = None
    tcp_flags: tuple[int, int] | None = None
    interface: int | tuple[int, int] | None = None


def encode(rule: Rule, version: int) -> list[int]:
    """The u32 of its record, without the priority and the value at the end. Raises BadInput."""
    if not isinstance(rule, Rule):
        raise BadInput(f"{rule!r} is not a rule", 'write Rule(1, source="192.0.2.0/24")')
    if type(rule.value) is not int or not 0 < rule.value < 1 << 32:
        raise BadInput(f"a rule's value of {rule.value!r}", "it is 1 to 2**32 - 1; 0 is what no rule is found for")
    words: list[int] = []
    for prefix in (rule.source, rule.destination):
        words += _prefix(prefix, version)
    sport, dport = _range(rule.sport), _range(rule.dport)
    words += [sport[0] << 16 | dport[0], sport[1] << 16 | dport[1]]
    value, mask = _protocol(rule)
    value, mask = value << PROTOCOL_AT, mask << PROTOCOL_AT
    if rule.tcp_flags is not None:
        flags, told = _pair(rule.tcp_flags, 0xFF, "TCP flags")
        value, mask = value | flags << FLAGS_AT, mask | told << FLAGS_AT
    if not rule.sport is rule.dport is rule.tcp_flags is None:
        value, mask = value | HAS_PORTS, mask | HAS_PORTS
    if rule.interface is not None:
        where, told = _interface(rule.interface)
        value, mask = value | where, mask | told
    return [*words, value, mask]


@functools.lru_cache(1 << 16)
def _prefix(given: Any, version: int) -> list[int]:
    """The dwords of an address, each with its mask."""
    bits = 32 if version == 4 else 128
    if given is None:
        return [0, 0] * (bits // 32)
    try:
        made: Any = (ipaddress.IPv4Network if version == 4 else ipaddress.IPv6Network)(given)
    except (ValueError, TypeError) as error:
        example = "192.0.2.0/24" if version == 4 else "2001:db8::/32"
        raise BadInput(f"{given!r} is not an IPv{version} prefix ({error})", f'write "{example}"') from None
    both = int(made.network_address), int(made.netmask)
    return [one >> at & 0xFFFFFFFF for at in range(bits - 32, -1, -32) for one in both]


def _range(given: Any) -> tuple[int, int]:
    if given is None:
        return 0, ANY_PORTS & 0xFFFF
    lowest, highest = given if isinstance(given, tuple | list) and len(given) == 2 else (given, given)
    if type(lowest) is not int or type(highest) is not int or not 0 <= lowest <= highest <= 0xFFFF:
        raise BadInput(f"{given!r} are no ports", "write 80, or (1024, 65535): the lowest first")
    return lowest, highest


def _pair(given: Any, most: int, name: str) -> tuple[int, int]:
    if not isinstance(given, tuple | list) or len(given) != 2 or any(type(one) is not int for one in given):
        raise BadInput(f"{given!r} are no {name}", "write (value, mask)")
    value, mask = given
    if not (0 <= mask <= most and 0 <= value <= most and value & ~mask == 0):
        raise BadInput(f"{name} of {given!r}", f"both are 0 to {most}, the value without bits beyond the mask")
    return value, mask


def _interface(given: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(given, tuple | list):
        return _pair(given, INTERFACE, "interface")
    if type(given) is not int or not 0 <= given <= INTERFACE:
        raise BadInput(f"a rule's interface of {given!r}", f"it is a port's index, 0 to {INTERFACE}, or (value, mask)")
    return given, INTERFACE


def _protocol(rule: Rule) -> tuple[int, int]:
    given = rule.protocol
    if given is None:
        value, mask = 0, 0
    elif isinstance(given, str):
        if given not in PROTOCOLS:
            raise BadInput(f"no protocol {given!r}", f"there are {', '.join(PROTOCOLS)}, and numbers")
        value, mask = PROTOCOLS[given], 0xFF
    elif type(given) is int:
        if not 0 <= given <= 0xFF:
            raise BadInput(f"a protocol of {given}", "it is 0 to 255")
        value, mask = given, 0xFF
    else:
        value, mask = _pair(given, 0xFF, "protocol")
    if rule.tcp_flags is None:
        return value, mask
    if (value ^ TCP) & mask:
        raise BadInput(f"TCP flags with protocol {given!r}", 'write "tcp", or leave it out')
    return TCP, 0xFF
