"""Filters over packets, as `fp trace` and `fp capture` take them: a subset of pcap-filter(7), and all that steering
filters say (`libfp.pyxdp.filters`).

expression = term { "or" term }
term       = factor { "and" factor }
factor     = "not" factor | "(" expression ")" | primitive
primitive  = ("ip" | "ip6" | "tcp" | "udp" | "sctp" | "icmp" | "icmp6" | "arp" | "vlan") { where }
           | "proto" (NAME | NUMBER) | where
where      = [ "src" | "dst" ] ( "host" ADDRESS | "net" PREFIX | "port" PORTS | PREFIX )
           | ("sport" | "dport") PORTS
PORTS      = NUMBER [ "-" NUMBER ]

A `where` that stands behind a protocol must hold too: "udp port 53" is "udp and port 53".
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from libfp.engine.dissect import ARP, IPV4, IPV6, PROTOCOLS, Headers
from libfp.errors import BadInput

Test = Callable[[Headers], bool]

_TOKEN = re.compile(r"[()]|[^\s()]+")
_REMEDY = 'a filter reads like "udp port 53 and not host 192.0.2.1"'
_TYPES = {"ip": IPV4, "ip6": IPV6, "arp": ARP}
_PROTOCOLS = ("tcp", "udp", "sctp", "icmp", "icmp6")
_WHERE = ("src", "dst", "host", "net", "port", "sport", "dport")

DEPTH = 100  # of "not" and "("


class _Token(NamedTuple):
    text: str
    at: int  # 1 is the first character


def compile_filter(text: str) -> Test:
    """A function of a packet's headers. The empty text matches everything.

    Raises BadInput that names the position and what does not fit.
    """
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [_Token(one.group(), one.start() + 1) for one in _TOKEN.finditer(text)]
        self.next = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.next].text if self.next < len(self.tokens) else ""

    def take(self, expected: str) -> str:
        if self.next == len(self.tokens):
            self.wrong(expected)
        self.next += 1
        return self.tokens[self.next - 1].text

    def accept(self, word: str) -> bool:
        if self.peek() != word:
            return False
        self.next += 1
        return True

    def wrong(self, expected: str) -> NoReturn:
        """The next token does not fit."""
        if self.next < len(self.tokens):
            token = self.tokens[self.next]
            what = f"filter {self.text!r}, position {token.at}: {token.text!r} is not {expected}"
        else:
            what = f"filter {self.text!r}, position {len(self.text) + 1}: it ends where {expected} should be"
        raise BadInput(what, _REMEDY)

    def refuse(self, expected: str) -> NoReturn:
        """The token that was taken last does not fit."""
        self.next -= 1
        self.wrong(expected)

    def parse(self) -> Test:
        if not self.tokens:
            return lambda headers: True
        found = self.expression()
        if self.next < len(self.tokens):
            self.wrong("'and' or 'or'")
        return found

    def expression(self) -> Test:
        found = self.term()
        while self.accept("or"):
            found = _either(found, self.term())
        return found

    def term(self) -> Test:
        found = self.factor()
        while self.accept("and"):
            found = _both(found, self.factor())
        return found

    def factor(self) -> Test:
        self.depth += 1
        if self.depth > DEPTH:
            self.wrong(f"in reach: more than {DEPTH} words deep")
        try:
            return self.inner()
        finally:
            self.depth -= 1

    def inner(self) -> Test:
        if self.accept("not"):
            negated = self.factor()
            return lambda headers: not negated(headers)
        if self.accept("("):
            inner = self.expression()
            if not self.accept(")"):
                self.wrong("')'")
            return inner
        return self.primitive()

    def primitive(self) -> Test:
        word = self.peek()
        if word in _WHERE:
            return self.where()
        word = self.take("a condition")
        if word == "proto":
            name = self.take("a protocol")
            if name not in PROTOCOLS and not (name.isdecimal() and int(name) < 256):
                self.refuse(f"a protocol: {', '.join(PROTOCOLS)} or a number")
            return _protocol(PROTOCOLS[name] if name in PROTOCOLS else int(name))
        if word in _TYPES:
            found = _type(_TYPES[word])
        elif word == "vlan":
            found = lambda headers: headers.vlan is not None  # noqa: E731
        elif word in _PROTOCOLS:
            found = _protocol(PROTOCOLS[word])
        else:
            self.refuse(f"a condition: not, (, {', '.join((*_TYPES, 'vlan', *_PROTOCOLS, 'proto', *_WHERE))}")
        while self.peek() in _WHERE:
            found = _both(found, self.where())
        return found

    def where(self) -> Test:
        word = self.take("a condition")
        side = word if word in ("src", "dst") else ""
        if side:
            what = self.peek()
            if what in ("host", "net", "port"):
                self.next += 1
            else:
                what = "net"
        else:
            side, what = {"sport": ("src", "port"), "dport": ("dst", "port")}.get(word, ("", word))
        if what == "port":
            return _port(side, *self.ports())
        return _network(side, self.prefix(host=what == "host"))

    def prefix(self, host: bool) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        kind = "an address" if host else "an address or a prefix"
        token = self.take(kind)
        try:
            found = ipaddress.ip_network(token)
        except ValueError as error:
            self.refuse(f"{kind} ({error})")
        if host and "/" in token:
            self.refuse(kind)
        return found

    def ports(self) -> tuple[int, int]:
        first, dash, last = self.take("a port").partition("-")
        texts = (first, last) if dash else (first, first)
        if not all(text.isdecimal() and int(text) < 65536 for text in texts) or int(texts[0]) > int(texts[1]):
            self.refuse("a port or a range of ports (0 to 65535)")
        return int(texts[0]), int(texts[1])


def _both(one: Test, other: Test) -> Test:
    return lambda headers: one(headers) and other(headers)


def _either(one: Test, other: Test) -> Test:
    return lambda headers: one(headers) or other(headers)


def _type(number: int) -> Test:
    return lambda headers: headers.type == number


def _protocol(number: int) -> Test:
    return lambda headers: headers.version != 0 and headers.proto == number


def _network(side: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Test:
    first, last, six = int(network[0]), int(network[-1]), network.version == 6

    def within(headers: Headers, address: int | None) -> bool:
        return address is not None and (headers.version == 6) == six and first <= address <= last

    if side == "src":
        return lambda headers: within(headers, headers.src)
    if side == "dst":
        return lambda headers: within(headers, headers.dst)
    return lambda headers: within(headers, headers.src) or within(headers, headers.dst)


def _port(side: str, first: int, last: int) -> Test:
    def within(port: int | None) -> bool:
        return port is not None and first <= port <= last

    if side == "src":
        return lambda headers: within(headers.sport)
    if side == "dst":
        return lambda headers: within(headers.dport)
    return lambda headers: within(headers.sport) or within(headers.dport)
