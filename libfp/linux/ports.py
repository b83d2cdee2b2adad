"""The ports of a host: AF_XDP ports that can be handed back to Linux, and what Linux's settings say about each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from libfp.linux import rtnetlink as rt
from libfp.linux.state import State
from libfp.ports.xdp import XdpPort
from libfp.pyxdp.steer import Family
from libfp.stages.routes import FIELD_DPORT, FIELD_DST, FIELD_LABEL, FIELD_PROTOCOL, FIELD_SPORT, FIELD_SRC

OUTER_FIELDS = FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_LABEL | FIELD_SPORT | FIELD_DPORT


class HostPort(XdpPort):
    """An XdpPort that Linux can take back while workers run: paused, every packet that arrives is Linux's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = threading.Lock()  # workers' threads take and leave, the mirror's thread pauses
        self._taken: set[int] = set()
        self._paused = False

    def carry(self, families: Iterable[Family]) -> None:
        """Take the packets of these families ("ipv4", "ipv6") and no others: all of them may be Linux's."""
        families = tuple(families)
        with self._lock:
            if self.attachment is not None and families and families != self.attachment.families:
                self.attachment.update(families=families)
            self.steer.families = families or self.steer.families
        self.pause(not families)

    @property
    def paused(self) -> bool:
        return self._paused

    def take(self, queue: int) -> None:
        with self._lock:
            self._taken.add(queue)
            if not self._paused:
                super().take(queue)

    def leave(self, queue: int) -> None:
        with self._lock:
            self._taken.discard(queue)
            super().leave(queue)

    def pause(self, paused: bool) -> None:
        """Leave all queues to Linux, or take those again that workers want. Nothing happens when it is so already."""
        with self._lock:
            if paused == self._paused:
                return
            self._paused = paused
            for queue in self._taken:
                (super().leave if paused else super().take)(queue)


@dataclass(frozen=True)
class PortPolicy:
    """What Linux's settings say about packets that arrive on a port.

    `forwarding`, `forwarding6`: they are forwarded at all. Of IPv4 alone: `rp_filter`: 0 no reverse path filter, 1 the
    way back to the source must leave by this port, 2 there must be a way back. `redirects`: a packet that leaves by the
    port it came in by has an ICMP redirect sent to its source. `accept_local`: own addresses may be sources.
    """

    forwarding: bool = True
    forwarding6: bool = False
    rp_filter: int = 0
    redirects: bool = True
    accept_local: bool = False


def policy(state: State, link: int, name: str) -> PortPolicy:
    """The settings in effect; what nothing announces is read from /proc, the rest is as mirrored."""
    return PortPolicy(
        forwarding=state.forwarding(link),
        forwarding6=state.forwarding(link, 128),
        rp_filter=state.rp_filter(link),
        redirects=setting("send_redirects", "all", name),
        accept_local=setting("accept_local", "all", name),
    )


def own_address(state: State, link: int, bits: int = 32, before: bytes = b"") -> bytes:
    """What the ICMP errors about packets that arrive on a port come from (RFC 1812, 4.3.2.4): its primary address, of
    several the one it was `before`. A port without any borrows another link's; empty when the host has none."""
    by_link = state.addresses if bits == 32 else state.addresses6
    for links in ((link,), sorted(by_link)):
        found = [
            (address.secondary, address.scope, address.local != before, address.local)
            for index in links
            for address in by_link.get(index, ())
            if address.scope < rt.SCOPE_LINK and not address.tentative
        ]
        if found:
            return min(found)[3]
    return b""


def setting(what: str, *scopes: str) -> bool:
    """Whether net.ipv4.conf.SCOPE.WHAT is set for any of the scopes, in the calling thread's network namespace."""
    for scope in scopes:
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv4/conf/{scope}/{what}") as file:
            if file.read().strip() != "0":
                return True
    return False


def hash_fields() -> dict[Literal[4, 6], int]:
    """What makes a flow for multipath routes of each IP version: `fib_multipath_hash_policy` as FIELD_ flags.

    Inner headers, which policy 2 and some custom fields ask for, are not looked at.
    """
    found: dict[Literal[4, 6], int] = {}
    versions: tuple[Literal[4, 6], ...] = (4, 6)
    for version in versions:
        folder = f"/proc/sys/net/ipv{version}/fib_multipath_hash_"
        with contextlib.suppress(OSError, ValueError), open(folder + "policy") as policy:
            chosen = int(policy.read())
            found[version] = FIELD_SRC | FIELD_DST | (FIELD_PROTOCOL | FIELD_LABEL if version == 6 else 0)
            if chosen == 1:
                found[version] = FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_SPORT | FIELD_DPORT
            elif chosen == 3:
                with open(folder + "fields") as fields:
                    found[version] = int(fields.read(), 0) & OUTER_FIELDS
    return found
