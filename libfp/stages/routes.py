"""The tables `forward` reads: prefixes to next hops, next hops to what is done, and what is checked on each port.

Filled by `libfp.linux`, or by hand:

    routes = Routes()
    gateway, own = bytes.fromhex("020000000002"), bytes.fromhex("020000000001")
    hop = routes.next_hops.add(Forward(port=1, dst=gateway, src=own, mtu=1500))
    routes.fib["198.51.100.0/24"] = hop

Every change reaches every worker in the order it was made: add a next hop before the routes that use it, remove it
after them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from libfp.engine.dissect import dissect
from libfp.errors import BadInput
from libfp.jit import kernel, load8, load64, native, ult64
from libfp.stages.next_hops import ACTION_FORWARD, HEAD, HOP_SIZE, MAX_PORTS, Drop, NextHops, NextHopsView, signed
from libfp.tables.lpm4 import Lpm4, Lpm4View
from libfp.tables.lpm6 import Lpm6, Lpm6View
from libfp.tables.table import Table

PORT_RPF_STRICT, PORT_RPF_LOOSE, PORT_REDIRECTS, PORT_ACCEPT_LOCAL = 1, 2, 4, 8
CHECK_SOURCES = PORT_RPF_STRICT | PORT_RPF_LOOSE

# Word offsets in the head of the table of next hops: what reaches the workers beside the routes.
_PORT_FLAGS, _SOURCES, _HASHING, _ADDRESSES = 8, 264, 560, 576

# What a flow is for multipath routes, as the kernel's fib_multipath_hash_fields has it (its L3 and L4 policies, too).
FIELD_SRC, FIELD_DST, FIELD_PROTOCOL, FIELD_LABEL, FIELD_SPORT, FIELD_DPORT = 1, 2, 4, 8, 16, 32

# The filter that tells usual addresses: one byte for each value of an address's first byte, 1 where it is in 0/8, 127/8
# or 224/3; then one byte for each hash of an address, 1 where an address of this host has it.
FIRST_BYTES = 256
_HASHES, HASH, HASH_SHIFT = 2048, 0x9E3779B1, 21
_FILTER_WORDS = (FIRST_BYTES + _HASHES) // 8

#: Reasons that routes give.
REASONS = (
    "no-neighbour", "no-route", "unreachable", "prohibit", "blackhole", "via-linux", "local", "broadcast", "multicast",
)  # fmt: skip


def _hash_of(address: int) -> int:
    """Of an address as it lies in a packet, loaded in the machine's order."""
    return (address * HASH & 0xFFFFFFFF) >> HASH_SHIFT


_hash = kernel(_hash_of)


@kernel
def is_unusual(filter_at: int, source: int, destination: int) -> int:
    """0 if both are plain unicast addresses and `source` surely none of this host's. As they lie in the packet."""
    found = load8(filter_at + (source & 0xFF)) | load8(filter_at + (destination & 0xFF))
    return found | load8(filter_at + FIRST_BYTES + _hash(source))


@native
class RoutesView:
    """`Routes` as one worker sees them."""

    fib: Lpm4View
    fib6: Lpm6View
    next_hops: NextHopsView

    @property
    def hops(self) -> int:
        """Address of entry 0."""
        return load64(self.next_hops.cell) + 8 * HEAD

    @property
    def capacity(self) -> int:
        """Next hops have indexes below this."""
        return self.next_hops.capacity

    @property
    def hits(self) -> int:
        """Address of the hit marks, 32 bits a next hop: the worker stores `epoch` when it forwards by one."""
        return self.next_hops.hits

    @property
    def epoch(self) -> int:
        """The control plane's present epoch, below 2**32."""
        return load64(self.next_hops.epoch_at)

    @property
    def notes(self) -> int:
        """Address of what `libfp.stages.notes` describes."""
        return self.next_hops.notes

    def address(self, port: int) -> int:
        """Where a port's own addresses lie: 4 bytes as in a packet, and 8 on 16 bytes; zeros where it has none."""
        return load64(self.next_hops.cell) + 8 * (_ADDRESSES + 3 * port)

    def checks(self, port: int) -> int:
        """The PORT_ flags of a port."""
        return load64(load64(self.next_hops.cell) + 8 * (_PORT_FLAGS + port))

    @property
    def hashing(self) -> int:
        """Address of the seed of flow hashes; 4 and 6 words on are the FIELD_ flags that make a flow."""
        return load64(self.next_hops.cell) + 8 * _HASHING

    @property
    def sources(self) -> int:
        """Address of the filter for `is_unusual`."""
        return load64(self.next_hops.cell) + 8 * _SOURCES


@kernel
def out_port(routes: RoutesView, hop: int) -> int:
    """Index of the port that a next hop sends by; -1 if that next hop does not send."""
    what = load64(routes.hops + HOP_SIZE * hop) if ult64(hop, routes.capacity) else 0
    return what >> 8 & 0xFFFF if what & 0xFF == ACTION_FORWARD else -1


class Routes:
    """What one `forward` stage reads: `fib` for IPv4, `fib6` for IPv6, `next_hops` for both. Binds as it is."""

    #: Reasons that reach the pipeline through table entries, not through literals in a stage.
    stage_reasons = REASONS

    def __init__(self, *, routes: int = 1 << 20, routes6: int = 1 << 19, next_hops: int = 1 << 16) -> None:
        self.fib, self.fib6 = Lpm4(capacity=routes), Lpm6(capacity=routes6)
        self.next_hops = NextHops(next_hops)
        self.next_hops.set_head({
            _HASHING: signed(os.urandom(8)),
            _HASHING + 4: FIELD_SRC | FIELD_DST,
            _HASHING + 6: FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_LABEL,
        })  # fmt: skip
        self._filter = np.zeros(_FILTER_WORDS, np.int64)
        self.set_local(())
        self.complete = True
        self._compile()

    def _compile(self) -> None:
        """Make a change and take it back: what changes the tables is compiled now, not when a route is in a hurry."""
        hop = self.next_hops.add(Drop("blackhole"))
        self.fib.set(0, 32, hop)  # of fib6 when its first route comes: hosts without IPv6 need not wait for it
        self.fib.remove(0, 32)
        self.next_hops.remove(hop)

    def set_port(self, port: int, rp_filter: int = 0, redirects: bool = False, accept_local: bool = False) -> None:
        """What is asked of packets that arrive on `port`.

        rp_filter as the kernel's sysctl has it (RFC 3704): 0 none, 1 strict (the way back leaves by that port), 2
        loose (there is one). redirects: packets that would leave by the port they came in by go to Linux, which sends
        an ICMP redirect. accept_local: this host's own addresses may be sources.
        """
        if not 0 <= port < MAX_PORTS or rp_filter not in (0, 1, 2):
            raise BadInput(
                f"port {port}, rp_filter {rp_filter}", f"ports are 0 to {MAX_PORTS - 1}, rp_filter 0, 1 or 2"
            )
        flags = (0, PORT_RPF_STRICT, PORT_RPF_LOOSE)[rp_filter]
        flags |= (PORT_REDIRECTS if redirects else 0) | (PORT_ACCEPT_LOCAL if accept_local else 0)
        self.next_hops.set_head({_PORT_FLAGS + port: flags})

    def set_address(self, port: int, address: bytes = b"", address6: bytes = b"") -> None:
        """The addresses (4 and 16 bytes, network order, or none) that ICMP errors about packets of `port` come from."""
        if not 0 <= port < MAX_PORTS or len(address) not in (0, 4) or len(address6) not in (0, 16):
            raise BadInput(f"addresses {address!r} and {address6!r} of port {port}", "4 and 16 bytes, or none")
        data = address.ljust(8, b"\0") + address6.ljust(16, b"\0")
        self.next_hops.set_head({_ADDRESSES + 3 * port + k: signed(data[8 * k : 8 * k + 8]) for k in range(3)})

    def wanted(self) -> set[tuple[int, bytes]]:
        """(index of the next hop, destination as 4 or 16 bytes) of packets that were dropped for want of a neighbour,
        because Linux must never get them (`packet.keep`), since the last call: a few of the latest, of each worker.
        """
        return self.next_hops.wanted()

    def set_local(self, prefixes: Iterable[tuple[int, int]]) -> None:
        """This host's own (address, length) prefixes: packets that claim to come from there are dropped.

        Only a filter: the address must also have a route to ``Punt("local")``.
        """
        marks = np.zeros(FIRST_BYTES + _HASHES, np.uint8)
        marks[[0, 127, *range(224, 256)]] = 1
        for address, length in prefixes:
            which = _hash_of(int.from_bytes(address.to_bytes(4, "little"), "big")) if length == 32 else slice(None)
            marks[FIRST_BYTES:][which] = 1
        words, before = marks.view(np.int64), self._filter
        self._filter = words
        self.next_hops.set_head({_SOURCES + i: int(words[i]) for i in np.flatnonzero(words != before).tolist()})

    def set_complete(self, complete: bool) -> None:
        """Whether what no route holds has none, as at first; otherwise its route may be still to come.

        Until then packets to such addresses, and from them where sources are looked at, are ``Punt("via-linux")``.
        """
        self.complete = complete
        self.next_hops.set_complete(complete)

    def set_hashing(self, fields: int, version: Literal[4, 6] = 4) -> None:
        """Which FIELD_ flags make a flow for multipath routes of that IP version.

        By default the kernel's policy 0: the addresses, for IPv6 flow label and next header too.
        """
        self.next_hops.set_head({_HASHING + version: fields})

    def explain(self, next_hop: int, packet: bytes) -> str:
        """See `libfp.Pipeline.explain`: the longest prefix, and what is done with what it covers."""
        found = self.match(packet)
        return f"{found[0]} {self.next_hops.actions.get(next_hop or found[1])}" if found is not None else ""

    def match(self, packet: bytes) -> tuple[str, int] | None:
        """The longest prefix that holds a frame's destination, and the index of its next hop; None without one."""
        headers = dissect(packet)
        if headers.version == 0 or headers.dst is None:
            return None
        return (self.fib if headers.version == 4 else self.fib6).match(headers.address(headers.dst))

    def stage_tables(self) -> tuple[Table, ...]:
        """See `libfp.engine.Bindable`."""
        return self.fib, self.fib6, self.next_hops

    def stage_view(self, replica: Callable[[Any], Any]) -> RoutesView:
        """See `libfp.engine.Bindable`."""
        return RoutesView(replica(self.fib), replica(self.fib6), replica(self.next_hops))
