"""Classification by the book, for tests of `libfp.tables.Acl`: a linear scan over the rules, in plain Python."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from libfp.tables.acl_rule import PROTOCOLS, Rule


@dataclass(frozen=True)
class Header:
    """What rules ask about. `ports` is None for a packet without; addresses are ints."""

    source: int = 0
    destination: int = 0
    protocol: int = 17
    ports: tuple[int, int] | None = (0, 0)
    flags: int = 0
    interface: int = 0

    def bytes(self, version: int) -> bytes:
        """As `AclView.lookup` has it."""
        size = 4 if version == 4 else 16
        sport, dport = self.ports or (0, 0)
        told = self.interface | (0x8000 if self.ports else 0)
        addresses = self.source.to_bytes(size, "big") + self.destination.to_bytes(size, "big")
        return addresses + struct.pack("!HHBBH", sport, dport, self.protocol, self.flags, told)


def matches(rule: Rule, header: Header) -> bool:
    """Whether the header is as the rule asks."""
    for prefix, address in ((rule.source, header.source), (rule.destination, header.destination)):
        if prefix is not None:
            network = ipaddress.ip_network(prefix)
            if address & int(network.netmask) != int(network.network_address):
                return False
    for number, ports in enumerate((rule.sport, rule.dport)):
        if ports is not None:
            lowest, highest = ports if isinstance(ports, tuple) else (ports, ports)
            if header.ports is None or not lowest <= header.ports[number] <= highest:
                return False
    if rule.protocol is not None:
        wanted = PROTOCOLS[rule.protocol] if isinstance(rule.protocol, str) else rule.protocol
        value, mask = wanted if isinstance(wanted, tuple) else (wanted, 0xFF)
        if header.protocol & mask != value:
            return False
    if rule.tcp_flags is not None:
        value, mask = rule.tcp_flags
        if header.protocol != 6 or header.ports is None or header.flags & mask != value:
            return False
    if rule.interface is None:
        return True
    value, mask = rule.interface if isinstance(rule.interface, tuple) else (rule.interface, 0x7FFF)
    return header.interface & mask == value


def first(rules: Mapping[int, Rule], header: Header) -> int:
    """The value of the first rule by priority that the header matches, or 0."""
    return next((rules[one].value for one in sorted(rules) if matches(rules[one], header)), 0)
