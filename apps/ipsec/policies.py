"""The security policy database (RFC 4301 section 4.4.1): which packets are protected, which may pass in clear.

    policies = Policies(sas)
    policies.load([Policy("bypass", "10.1.9.0/24", "10.2.0.0/16"),
                   Policy("protect", "10.1.0.0/16", "10.2.0.0/16", tunnel="office")])

A policy is written as it is for what goes out, and holds mirrored for what comes in; the first that matches counts.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from libfp.apps.ipsec.sa import SaTable
from libfp.errors import BadInput, TableFull
from libfp.jit import BOUNDSCHECK, kernel, load8, load64, native, store32, word
from libfp.tables.acl import Acl, Rule
from libfp.tables.acl_layout import find
from libfp.tables.acl_vector import lookup64

MANY = 12  # pairs that are looked up faster all 64 than one by one
BYPASS, DISCARD, PROTECT = 1, 2, 3  # the two lowest bits of an answer; above them, the tunnel's number
_ACTIONS = {"bypass": BYPASS, "discard": DISCARD, "protect": PROTECT}


@dataclass(frozen=True)
class Policy:
    """What is done with packets from the prefix `source`, here, to the prefix `destination`, there, and back: "bypass",
    "discard", or "protect" by the SAs of the tunnel of that name. Raises BadInput."""

    action: Literal["bypass", "discard", "protect"]
    source: str
    destination: str
    tunnel: str = ""

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS:
            raise BadInput(f"a policy of {self.action!r}", f"it is {', '.join(_ACTIONS)}")
        if (self.action == "protect") != bool(self.tunnel):
            raise BadInput(f"a policy {self.action!r} with tunnel {self.tunnel!r}", '"protect" names one, others none')
        versions = {_prefix(one).version for one in (self.source, self.destination)}
        if len(versions) > 1:
            raise BadInput(f"a policy from {self.source} to {self.destination}", "give two prefixes of one family")

    @property
    def version(self) -> int:
        """4 or 6."""
        return _prefix(self.source).version


def _prefix(text: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{text!r} is not a prefix ({error})", "write it as 192.0.2.0/24 or 2001:db8::/32") from None


@native
class PoliciesView:
    """The `Policies` as one worker sees them: where its replicas of the four classifiers are, and the default.

    The answers are BYPASS, DISCARD, or PROTECT with a tunnel's number << 2; 0 where no policy matches.
    """

    out4: word
    out6: word
    in4: word
    in6: word
    default: word

    def outbound(self, ip: int) -> int:
        """The answer for the packet at `ip`, by the policies as they are written."""
        return self.outbound6(ip + 8) if is_ipv6(ip) else self.outbound4(ip + 12)

    def inbound(self, ip: int) -> int:
        """The answer for the packet at `ip`, by the policies mirrored."""
        return self.inbound6(ip + 8) if is_ipv6(ip) else answer(self.in4, 2, ip + 12)

    def inbound4(self, pairs: int, answers: int, count: int) -> None:
        """The answers, by the policies mirrored, for `count` pairs of IPv4 addresses at `pairs`, each source,
        destination and eight bytes of 0, go to `answers` (u32). Both have room for 64."""
        if count >= MANY and not BOUNDSCHECK:  # vectors are not checked
            lookup64(load64(self.in4), 2, pairs, answers)
        else:
            for k in range(count):
                store32(answers + 4 * k, answer(self.in4, 2, pairs + 16 * k))

    def inbound6(self, pair: int) -> int:
        """The answer, by the policies mirrored, for two IPv6 addresses."""
        return answer(self.in6, 8, pair)

    def outbound4(self, pair: int) -> int:
        """`outbound` of the two IPv4 addresses at `pair`, source and destination."""
        return answer(self.out4, 2, pair)

    def outbound6(self, pair: int) -> int:
        """`outbound` of two IPv6 addresses."""
        return answer(self.out6, 8, pair)


@kernel
def is_ipv6(ip: int) -> bool:
    """Of a sound IP packet."""
    return load8(ip) >> 4 == 6


@kernel
def answer(cell: int, addresses: int, pair: int) -> int:
    """What a classifier, whose addresses are so many dwords, says of the addresses at `pair`."""
    return find(load64(cell), addresses, pair, 0, 0) & 0xFFFFFFFF


class Policies:
    """The policies of one application, `capacity` of them at most; none at first. `default` is what is done with
    packets that none matches: "bypass", as Linux does, or "discard", as RFC 4301 wants.

    Packets to this host itself, and to groups of hosts, are Linux's, whatever policies say.
    """

    def __init__(self, sas: SaTable, default: Literal["bypass", "discard"] = "bypass", capacity: int = 4096) -> None:
        if default not in ("bypass", "discard"):
            raise BadInput(f"a default of {default!r}", 'it is "bypass" or "discard"')
        self.default, self.capacity, self.policies = default, capacity, list[Policy]()
        self._sas, self._lock = sas, threading.Lock()
        self._out4, self._in4 = (Acl(capacity, "ipv4") for _ in range(2))
        self._out6, self._in6 = (Acl(capacity, "ipv6") for _ in range(2))

    def load(self, policies: Iterable[Policy]) -> None:
        """Let these be the policies, in order. Raises TableFull, and changes nothing then."""
        given = list(policies)
        if len(given) > self.capacity:
            raise TableFull(f"{len(given)} policies for {self.capacity}", "make Policies with a larger capacity")
        values = [
            _ACTIONS[one.action] | (self._sas.tunnel(one.tunnel) << 2 if one.action == "protect" else 0)
            for one in given
        ]
        both = list(zip(given, values, strict=True))
        with self._lock:
            for version, out, back in ((4, self._out4, self._in4), (6, self._out6, self._in6)):
                mine = {i: (one, value) for i, (one, value) in enumerate(both) if one.version == version}
                back.load({i: Rule(v, source=one.destination, destination=one.source) for i, (one, v) in mine.items()})
                out.load({i: Rule(v, source=one.source, destination=one.destination) for i, (one, v) in mine.items()})
            self.policies = given

    def stage_tables(self) -> tuple[Acl, ...]:
        """See `libfp.engine.decorator.Bindable`."""
        return self._out4, self._out6, self._in4, self._in6

    def stage_view(self, replica: Callable[[Any], Any]) -> PoliciesView:
        """See `libfp.engine.decorator.Bindable`."""
        out4, out6, in4, in6 = (replica(one).cell for one in self.stage_tables())
        return PoliciesView(out4, out6, in4, in6, _ACTIONS[self.default])
