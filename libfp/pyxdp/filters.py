"""The pin-hole grammar: which packets to take.

    filter    = condition { "and" condition }
    condition = "ip" | "ip6"                              any IPv4 packet, any IPv6 packet
              | ("udp" | "tcp") { ("sport" | "dport") PORTS }
              | "proto" ("icmp" | "udp" | "tcp" | "sctp" | "gre" | "esp" | "icmp6" | NUMBER)
              | ("src" | "dst") PREFIX                    10.0.0.5, 198.51.100.0/24, 2001:db8::5 or 2001:db8::/32
    PORTS     = NUMBER [ "-" NUMBER ]                     4789 or 5000-5010

A filter that names no family ("ip", "ip6", a prefix) is for both. Of an IPv6 packet only the header itself is looked
at: its next header is the protocol, so that UDP behind an extension header is no "udp".
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from libfp.errors import BadInput

__all__ = ["Filter", "parse_filter", "parse_prefix"]

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "icmp6": 58, "sctp": 132}
_REMEDY = 'a filter reads like "udp dport 4789" or "src 10.0.0.0/8 and proto icmp"'

Prefix = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Filter:
    """All conditions must hold; None is "any". Port ranges are inclusive and in host order.

    `family` is 4 or 6; prefixes are of that family.
    """

    protocol: int | None = None
    src: Prefix | None = None
    dst: Prefix | None = None
    sport: tuple[int, int] | None = None
    dport: tuple[int, int] | None = None
    family: int | None = None

    @property
    def group(self) -> bool:
        """It names multicast or broadcast destinations, which come to a group MAC address and not to the port's."""
        return self.dst is not None and (self.dst.is_multicast or str(self.dst) == "255.255.255.255/32")


def parse_filter(text: str) -> Filter:
    """Parse one filter. Raises BadInput naming the token that does not fit, and the character where it starts."""
    return _Parser(text).parse()


def parse_prefix(text: str) -> Prefix:
    """An address or a prefix of either family; bits beyond its length must be zero. Raises BadInput."""
    try:
        if "%" in text:
            raise ValueError("an address in a packet has no zone")
        return ipaddress.IPv6Network(text) if ":" in text else ipaddress.IPv4Network(text)
    except ValueError as error:
        what = f"{text!r} is not an IPv4 or IPv6 prefix: {error}"
        raise BadInput(what, "write 10.0.0.5, 198.51.100.0/24 or 2001:db8::/32") from error


class _Parser:
    """Positions in messages count characters from 1."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [(found.group(), found.start() + 1) for found in re.finditer(r"\S+", text)]
        self.position = 0

    def next(self, expected: str) -> str:
        if self.position == len(self.tokens):
            end = len(self.text.rstrip()) + 1
            raise BadInput(f"filter {self.text!r} ends where {expected} should be, at character {end}", _REMEDY)
        self.position += 1
        return self.tokens[self.position - 1][0]

    def peek(self) -> str | None:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else None

    def wrong(self, expected: str) -> BadInput:
        """About the token that `next` returned last."""
        token, at = self.tokens[self.position - 1]
        return BadInput(f"filter {self.text!r}: {token!r} at character {at} is not {expected}", _REMEDY)

    def parse(self) -> Filter:
        found = self.condition(Filter())
        while self.peek() is not None:
            if self.next("'and'") != "and":
                raise self.wrong("'and'")
            found = self.condition(found)
        return found

    def condition(self, found: Filter) -> Filter:
        token = self.next("a condition")
        if token in ("ip", "ip6"):
            return self.family(found, 4 if token == "ip" else 6)
        if token in ("udp", "tcp"):
            found = self.protocol(found, PROTOCOLS[token])
            while (which := self.peek()) in ("sport", "dport"):
                self.next("")
                self.once(found.sport if which == "sport" else found.dport)
                ports = self.ports()
                found = replace(found, sport=ports) if which == "sport" else replace(found, dport=ports)
            return found
        if token == "proto":
            name = self.next("a protocol")
            if name not in PROTOCOLS and not _number(name, 255):
                raise self.wrong(f"a protocol: {', '.join(PROTOCOLS)} or a number")
            return self.protocol(found, PROTOCOLS[name] if name in PROTOCOLS else int(name))
        if token in ("src", "dst"):
            self.once(found.src if token == "src" else found.dst)
            text = self.next("a prefix")
            try:
                prefix = parse_prefix(text)
            except BadInput as error:
                raise self.wrong(f"an IPv4 or IPv6 prefix: {error.__cause__}") from error
            found = self.family(found, prefix.version)
            return replace(found, src=prefix) if token == "src" else replace(found, dst=prefix)
        raise self.wrong("a condition: ip, ip6, udp, tcp, proto, src or dst")

    def family(self, found: Filter, family: int) -> Filter:
        if found.family not in (None, family):
            raise self.wrong("possible here: the filter is for the other family already")
        return replace(found, family=family)

    def protocol(self, found: Filter, number: int) -> Filter:
        if found.protocol not in (None, number):
            raise self.wrong("possible here: the filter has another protocol already")
        return replace(found, protocol=number)

    def once(self, present: object) -> None:
        if present is not None:
            raise self.wrong("possible here: the filter has one already")

    def ports(self) -> tuple[int, int]:
        token = self.next("a port")
        first, dash, last = token.partition("-")
        texts = (first, last) if dash else (first, first)
        if not all(_number(text, 65535) for text in texts) or int(texts[0]) > int(texts[1]):
            raise self.wrong("a port or a range of ports (0 to 65535)")
        return int(texts[0]), int(texts[1])


def _number(text: str, largest: int) -> bool:
    return text.isdecimal() and len(text) <= len(str(largest)) and int(text) <= largest
