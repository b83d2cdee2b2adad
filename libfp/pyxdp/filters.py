"""The pin-hole grammar: which IPv4 packets to take.

filter    = condition { "and" condition }
condition = "ip"                                      any IPv4 packet
          | ("udp" | "tcp") { ("sport" | "dport") PORTS }
          | "proto" ("icmp" | "udp" | "tcp" | "sctp" | "gre" | "esp" | NUMBER)
          | ("src" | "dst") PREFIX                    10.0.0.5 or 198.51.100.0/24
PORTS     = NUMBER [ "-" NUMBER ]                     4789 or 5000-5010
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace

from libfp.errors import BadInput

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "sctp": 132}
_REMEDY = 'a filter reads like "udp dport 4789" or "src 10.0.0.0/8 and proto icmp"'


@dataclass(frozen=True)
class Filter:
    """All conditions must hold; None is "any". Port ranges are inclusive and in host order."""

    protocol: int | None = None
    src: ipaddress.IPv4Network | None = None
    dst: ipaddress.IPv4Network | None = None
    sport: tuple[int, int] | None = None
    dport: tuple[int, int] | None = None

    @property
    def group(self) -> bool:
        """It names multicast or broadcast destinations, which come to a group MAC address and not to the port's."""
        return self.dst is not None and (self.dst.is_multicast or str(self.dst) == "255.255.255.255/32")


def parse_filter(text: str) -> Filter:
    """Parse one filter. Raises BadInput naming the token that does not fit."""
    return _Parser(text).parse()


def parse_prefix(text: str) -> ipaddress.IPv4Network:
    """An address or a prefix; bits beyond its length must be zero. Raises BadInput."""
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise BadInput(f"{text!r} is not an IPv4 prefix: {error}", "write 10.0.0.5 or 198.51.100.0/24") from error


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = text.split()
        self.position = 0

    def next(self, expected: str) -> str:
        if self.position == len(self.tokens):
            raise BadInput(f"filter {self.text!r} ends where {expected} should be", _REMEDY)
        self.position += 1
        return self.tokens[self.position - 1]

    def peek(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def wrong(self, token: str, expected: str) -> BadInput:
        return BadInput(f"filter {self.text!r}: {token!r} is not {expected}", _REMEDY)

    def parse(self) -> Filter:
        found = self.condition(Filter())
        while self.peek() is not None:
            token = self.next("'and'")
            if token != "and":
                raise self.wrong(token, "'and'")
            found = self.condition(found)
        return found

    def condition(self, found: Filter) -> Filter:
        token = self.next("a condition")
        if token == "ip":
            return found
        if token in ("udp", "tcp"):
            found = self.protocol(found, token, PROTOCOLS[token])
            while (which := self.peek()) in ("sport", "dport"):
                self.next("")
                self.once(found.sport if which == "sport" else found.dport, which)
                ports = self.ports()
                found = replace(found, sport=ports) if which == "sport" else replace(found, dport=ports)
            return found
        if token == "proto":
            name = self.next("a protocol")
            if name not in PROTOCOLS and not (name.isdecimal() and int(name) < 256):
                raise self.wrong(name, f"a protocol: {', '.join(PROTOCOLS)} or a number")
            return self.protocol(found, name, PROTOCOLS[name] if name in PROTOCOLS else int(name))
        if token in ("src", "dst"):
            self.once(found.src if token == "src" else found.dst, token)
            prefix = parse_prefix(self.next("a prefix"))
            return replace(found, src=prefix) if token == "src" else replace(found, dst=prefix)
        raise self.wrong(token, "a condition: ip, udp, tcp, proto, src or dst")

    def protocol(self, found: Filter, token: str, number: int) -> Filter:
        if found.protocol not in (None, number):
            raise self.wrong(token, "possible here: the filter has another protocol already")
        return replace(found, protocol=number)

    def once(self, present: object, token: str) -> None:
        if present is not None:
            raise self.wrong(token, "possible here: the filter has one already")

    def ports(self) -> tuple[int, int]:
        token = self.next("a port")
        first, dash, last = token.partition("-")
        texts = (first, last) if dash else (first, first)
        if not all(text.isdecimal() and int(text) < 65536 for text in texts) or int(texts[0]) > int(texts[1]):
            raise self.wrong(token, "a port or a range of ports (0 to 65535)")
        return int(texts[0]), int(texts[1])
