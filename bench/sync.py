"""The mirror at size: a full table (real prefixes, IPv4 and IPv6) in the kernel, taken in by the mirror of `fp router`.

`complete` runs from the start of a mirror to the moment when every route is in the forwarding tables; the peer is
pyroute2 reading the same dumps into Python objects, and into no table. `beyond dump` takes from ours the time that the
kernel needs for its dumps alone: received into one buffer, and not looked at.

pyroute2 takes minutes: it has one round, and what the harness has it do before that, uncounted, is to read links.
"""

from __future__ import annotations

import gzip
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyroute2 import IPRoute

from bench import rib
from bench.harness import Case
from bench.processes import preferred
from libfp.linux import rtnetlink as rt
from libfp.linux.mirror import Mirror
from libfp.linux.netlink import NLM_F_CREATE, Netlink, attribute, request
from libfp.stages.routes import Routes
from libfp.testing.netns import Lab

GATEWAYS = 16  # next hops of each family
BATCH = 64 << 10  # bytes of requests sent together
CAPACITY = 1 << 20


class Table:
    """client - r0 router r1 - server: the router has a full table, by sixteen neighbours of which one is the server."""

    def __init__(self, lab: Lab, with_ipv6: bool = True) -> None:
        self.client, self.host, self.server = lab.host("client"), lab.host("router"), lab.host("server")
        for number, (far, address) in enumerate(((self.client, 2), (self.server, 9))):
            lab.link(far, "e0", self.host, f"r{number}")
            self.host.address(f"r{number}", f"198.18.{number}.1/24")
            far.address("e0", f"198.18.{number}.{address}/24")
            far.route("default", via=f"198.18.{number}.1")
        self.host.sysctl("net.ipv4.ip_forward", 1)
        self.ports = {self.host.index(f"r{number}"): number for number in (0, 1)}
        addresses, lengths, self.origin = rib.ipv4()
        self.rows = {32: np.stack([addresses, np.zeros_like(addresses), lengths], 1)}
        self.link = self.host.index("r1")
        self._fill(32, [socket.inet_aton(f"198.18.1.{9 + i}") for i in range(GATEWAYS)])
        if with_ipv6:
            self.host.sysctl("net.ipv6.conf.r1.disable_ipv6", 0)
            self.host.sysctl("net.ipv6.route.max_size", 1 << 30)
            self.host.call(self._address6)
            self.rows[128] = ipv6()
            prefix = socket.inet_pton(socket.AF_INET6, "2001:2:0:1::")[:15]
            self._fill(128, [prefix + bytes([9 + i]) for i in range(GATEWAYS)])

    def _address6(self) -> None:
        address = socket.inet_pton(socket.AF_INET6, "2001:2:0:1::1")
        body = struct.pack("=BBBBI", rt.AF_INET6, 64, 2, 0, socket.if_nametoindex("r1")) + attribute(2, address)
        with Netlink() as netlink:  # without duplicate address detection
            netlink.ask(rt.RTM_NEWADDR, body, 4 | NLM_F_CREATE)

    def _fill(self, bits: int, gateways: list[bytes]) -> None:
        """All routes, as fast as the kernel takes them: requests by the hundred, one acknowledgement for all."""
        self.host.call(fill, self.rows[bits], bits, gateways, self.link)

    def count(self) -> int:
        """How many prefixes there are."""
        return sum(len(rows) for rows in self.rows.values())


def ipv6() -> np.ndarray:
    """The IPv6 prefixes of the real table, as rows of (high, low, length); none without it."""
    path = Path(os.environ.get("LIBFP_DATA", "")) / "rib" / "bart-tier1-prefixes.txt.gz"
    if not path.exists():
        return np.zeros((0, 3), np.int64)
    with gzip.open(path, "rt") as lines:
        given = [line.strip().partition("/") for line in lines if ":" in line]
    packed = b"".join(socket.inet_pton(socket.AF_INET6, address) for address, _, _ in given)
    halves = np.frombuffer(packed, ">i8").astype(np.int64).reshape(-1, 2)
    return np.column_stack([halves, [int(length) for _, _, length in given]])


def fill(rows: np.ndarray, bits: int, gateways: list[bytes], link: int) -> None:
    """Add `rows` of (high, low, length) as routes to the calling thread's namespace, by one gateway or another."""
    family = rt.AF_INET if bits == 32 else rt.AF_INET6
    tails = [attribute(5, gateway) + attribute(4, struct.pack("=I", link)) for gateway in gateways]
    word = struct.Struct("!I" if bits == 32 else "!qq")
    with Netlink() as netlink:
        batch = bytearray()
        for number, (high, low, length) in enumerate(rows.tolist()):
            body = struct.pack("=BBBBBBBBI", family, length, 0, 0, rt.TABLE_MAIN, 186, 0, rt.UNICAST, 0)
            body += attribute(1, word.pack(high) if bits == 32 else word.pack(high, low)) + tails[number % len(tails)]
            batch += request(rt.RTM_NEWROUTE, NLM_F_CREATE, 0, body)
            if len(batch) > BATCH:
                netlink.socket.send(batch)
                batch.clear()
                _refused(netlink)
        if batch:
            netlink.socket.send(batch)
        _refused(netlink)


def _refused(netlink: Netlink) -> None:
    """Errors of requests sent without NLM_F_ACK: raise the first."""
    while (datagram := netlink.datagram(wait=False)) is not None:
        number = -struct.unpack_from("=i", datagram, 16)[0]
        raise OSError(number, f"a route was refused: {os.strerror(number)}")


def resident() -> float:
    """MB of memory that this process has resident now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Sync:
    """Rounds over one table. Everything runs in the host's thread, so in its namespace."""

    def __init__(self, table: Table) -> None:
        self._table, self._warm = table, False
        self.families = [rt.AF_INET] + ([rt.AF_INET6] if 128 in table.rows else [])

    def dump(self) -> float:
        """Seconds the kernel needs for its dumps of routes."""
        return self._table.host.call(self._dump)

    def _dump(self) -> float:
        began = time.perf_counter()
        for family in self.families:
            with Netlink(buffer=1 << 21) as netlink:
                netlink.send(rt.RTM_GETROUTE, 0x300, struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0))
                buffer, last = bytearray(1 << 18), struct.pack("=H", 3)  # NLMSG_DONE
                while True:
                    length = netlink.socket.recv_into(buffer)
                    if buffer[4:6] == last or buffer[length - 16 : length - 14] == last:
                        break
        return time.perf_counter() - began

    def complete(self) -> float:
        """Seconds from nothing to tables that have every route."""
        routes = Routes(routes=CAPACITY)
        began = time.perf_counter()
        mirror = self._table.host.call(Mirror, routes, self._table.ports)
        try:
            self._table.host.call(mirror.start)
            mirror.wait_synced(600)
            took = time.perf_counter() - began
            assert len(routes.fib) >= len(self._table.rows[32]), "every route"
            return took
        finally:
            mirror.close()

    def beyond(self) -> float:
        """Seconds of `complete` that are not the kernel's: of two runs, one after the other."""
        alone = self.dump()
        return self.complete() - alone

    def pyroute2(self) -> float:
        """Seconds that pyroute2 takes to read the same routes."""
        return self._table.host.call(self._pyroute2)

    def _pyroute2(self) -> float:
        began, count = time.perf_counter(), 0
        with IPRoute() as netlink:
            if not self._warm:
                self._warm = True
                return float(len(netlink.get_links()))
            for family in self.families:
                count += sum(1 for _ in netlink.get_routes(family=family))
        assert count >= self._table.count()
        return time.perf_counter() - began


def cases() -> Iterator[Case]:
    """`complete` and `beyond dump`, of which the second is to be at most 6 s."""
    common: dict[str, Any] = {"bench": "sync", "unit": "s", "better": "lower"}
    with preferred(os.sched_getaffinity(0)), Lab() as lab:
        table = Table(lab)
        sync = Sync(table)
        about = f"{table.count():,} routes, {table.origin}"
        yield Case(
            case="beyond dump", ours=sync.beyond, rounds=3, about=f"{about}: beyond the kernel's own time", limit=6,
            **common,
        )  # fmt: skip
        yield Case(
            case="complete", ours=sync.complete, peer="pyroute2", theirs=sync.pyroute2, rounds=1, about=about, **common
        )
