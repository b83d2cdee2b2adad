"""The firewall's stages, each in nanoseconds a packet, beside the plain router's over the same frames.

Frames of 60 bytes of established TCP connections, each in its turn (64 k or 1 M of them), checksums verified, one
direction; rules of which the first accepts what is established, and 100 or 1,000 for new connections behind it. A round
is 1,048,576 packets in chunks of 8,192 frames that are written outside the timing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.harness import Case
from libfp.apps.firewall.conntrack import Connections, Settings
from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.hits import Hits
from libfp.apps.firewall.policy import ACCEPT, DROP, ESTABLISHED, NUMBER, STATE_AT
from libfp.apps.firewall.reading import sum_of
from libfp.jit import (
    Arena,
    clock,
    clock_hz,
    kernel,
    load32,
    load64,
    prefetch,
    store16,
    store16be,
    store32,
    store32be,
    store64,
)
from libfp.packet.burst import FRAME, LENGTH, VERDICT, WORKERS, BurstMemory
from libfp.packet.checksum import checksum
from libfp.packet.verdict import FORWARD, KIND_SHIFT
from libfp.stages import Forward, Routes, by_flow, forward, parse, rewrite, route
from libfp.tables import Acl, Rule

FRAMES, STRIDE, CHUNKS, SIZE = 8192, 128, 128, 60
FLOWS = {"64 k": 1 << 16, "1 M": 1 << 20}
RULES = (100, 1000)
STAGES = ("parse", "by_flow", "route", "filter", "rewrite")

_parse, _by_flow, _route, _filter, _rewrite, _forward = (
    one.kernel for one in (parse, by_flow, route, filtering, rewrite, forward)
)


@kernel
def _fold(total):  # type: ignore[no-untyped-def]
    for _ in range(4):
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@kernel
def renew(base, first, flows, number, reply):  # type: ignore[no-untyped-def]
    """Write the frames of packets `first` on: packet n is of flow n % `flows`, in round `number`."""
    for i in range(FRAMES):
        at, flow = base + i * STRIDE, (first + i) & flows - 1
        client, server = 0x0A000000 + (flow >> 2), 0x0B000000 + (flow & 0xFFF)
        sport, dport = 1024 + (flow & 0x7FFF), 443
        store16be(at + 12, 0x0800)
        store32be(at + 14, 0x4500_0000 | SIZE - 14)
        store32be(at + 18, 0)
        store32be(at + 22, 64 << 24 | 6 << 16)
        store32be(at + 26, server if reply else client)
        store32be(at + 30, client if reply else server)
        store16be(at + 24, checksum(at + 14, 20))
        store16be(at + 34, dport if reply else sport)
        store16be(at + 36, sport if reply else dport)
        store32be(at + 38, 1000 + 6 * number)
        store32be(at + 42, 1000 + 6 * number)
        store32be(at + 46, 0x50101000)
        store32(at + 50, 0)
        store32(at + 54, 0)
        total = sum_of(at + 26, SIZE - 26) + (6 << 8) + ((SIZE - 34) << 8)
        store16(at + 50, _fold(total))


@kernel
def stages(burst, base, routes, acl, acl6, hits, connections, ticks):  # type: ignore[no-untyped-def]
    """All frames through the stages; the ticks of each are added up at `ticks`. How many are forwarded."""
    sent = 0
    for first in range(0, FRAMES, 64):
        _fill(burst, base, first)
        connections.each_turn()
        t0 = clock()
        _parse(burst)
        t1 = clock()
        for i in range(64):
            _by_flow(burst.packet(i))
        t2 = clock()
        for i in range(64):  # half of them would be another worker's
            store32(burst.at + VERDICT + 4 * i, 0)
        t2_again = clock()
        _route(burst, routes)
        t3 = clock()
        _filter(burst, routes, acl, acl6, hits, connections)
        t4 = clock()
        _rewrite(burst, routes)
        t5 = clock()
        _add(ticks, t1 - t0)
        _add(ticks + 8, t2 - t1)
        _add(ticks + 16, t3 - t2_again)
        _add(ticks + 24, t4 - t3)
        _add(ticks + 32, t5 - t4)
        sent += _sent(burst)
    return sent


@kernel
def plain(burst, base, routes, ticks):  # type: ignore[no-untyped-def]
    """The same of the router's."""
    sent = 0
    for first in range(0, FRAMES, 64):
        _fill(burst, base, first)
        began = clock()
        _parse(burst)
        _forward(burst, routes)
        _add(ticks, clock() - began)
        sent += _sent(burst)
    return sent


@kernel
def _add(at, ticks):  # type: ignore[no-untyped-def]
    store64(at, load64(at) + ticks)


@kernel
def _fill(burst, base, first):  # type: ignore[no-untyped-def]
    burst.base = base
    for i in range(64):
        prefetch(base + STRIDE * (first + i))
        store64(burst.at + FRAME + 8 * i, STRIDE * (first + i))
        store32(burst.at + LENGTH + 4 * i, SIZE)
    burst.begin(64)


@kernel
def _sent(burst):  # type: ignore[no-untyped-def]
    sent = 0
    for i in range(64):
        sent += load32(burst.at + VERDICT + 4 * i) >> KIND_SHIFT == FORWARD
    return sent


def rules(count: int) -> list[Rule]:
    """What is established first; then services of servers, for new connections; then nothing."""
    random, made = np.random.default_rng(5), [Rule(1 << NUMBER | ACCEPT, interface=(ESTABLISHED << STATE_AT, 7 << 12))]
    for number in range(2, count):
        server = f"11.{random.integers(256)}.{random.integers(256)}.0/{random.integers(24, 33)}".replace(".0/", ".0/")
        port = int(random.integers(1, 60000))
        server = server.split("/")[0] + "/24" if random.random() < 0.5 else server.split("/")[0] + "/32"
        made.append(Rule(number << NUMBER | ACCEPT, destination=server, dport=(port, port + 9), protocol="tcp"))
    return [*made, Rule(count << NUMBER | ACCEPT, destination="11.0.0.0/8", dport=443), Rule(DROP)]


class Bed:
    """One size of the tables: `round()` sends a million packets through the firewall, `router()` through the router."""

    def __init__(self, flows: int, count: int) -> None:
        self.flows, self.number = flows, 2
        self.routes = Routes(routes=1024, routes6=1024, next_hops=4096)
        hops = [self.routes.next_hops.add(Forward(n, b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", 1500)) for n in (0, 1)]
        self.routes.fib["10.0.0.0/8"], self.routes.fib["11.0.0.0/8"] = hops
        self.acl, self.acl6, self.hits = Acl(2000), Acl(10, "ipv6"), Hits()
        self.acl.load(rules(count))
        self.connections = Connections(Settings(), capacity=flows + flows // 4, capacity6=0)
        self.part, self.counted = self.connections.join(0), self.hits.join(0)
        self.views = self.acl.view(), self.acl6.view(), self.counted.view, self.part.view
        self.frames, self.ticks, self.memory = Arena(FRAMES * STRIDE, huge=True), Arena(4096), BurstMemory()
        self.burst = self.memory.burst
        store64(self.burst.at + WORKERS, 2)
        for number, reply in ((0, 0), (1, 1), (1, 0)):  # picked up, answered, and known
            for first in range(0, flows, FRAMES):
                renew(self.frames.address, first, flows, number, reply)
                self._stages()

    def close(self) -> None:
        self.connections.leave(self.part)
        self.hits.leave(self.counted)

    def _stages(self) -> int:
        view = self.routes.stage_view(lambda table: table.view())
        sent: int = stages(self.burst, self.frames.address, view, *self.views, self.ticks.address)
        return sent

    def round(self) -> list[float]:
        """Nanoseconds a packet, by stage."""
        self._renewed(self._stages)
        return [self.ticks.words[n] / clock_hz() * 1e9 / (FRAMES * CHUNKS) for n in range(len(STAGES))]

    def router(self) -> float:
        """The same of parse and forward together."""
        view = self.routes.stage_view(lambda table: table.view())
        self._renewed(lambda: plain(self.burst, self.frames.address, view, self.ticks.address))
        return float(self.ticks.words[0] / clock_hz() * 1e9 / (FRAMES * CHUNKS))

    def _renewed(self, run) -> None:  # type: ignore[no-untyped-def]
        self.ticks.words[:] = 0
        self.number += 1
        for chunk in range(CHUNKS):
            renew(self.frames.address, FRAMES * chunk, self.flows, self.number, 0)
            sent = run()
            assert sent == FRAMES, f"{sent} of {FRAMES} packets were forwarded"


def cases() -> Iterator[Case]:
    """`64 k flows, 100 rules: all` beside parse and forward, then each stage, and so on for other sizes."""
    common: dict[str, Any] = {"bench": "firewall", "unit": "ns/packet", "better": "lower"}
    for size, flows in FLOWS.items():
        for count in RULES:
            bed = Bed(flows, count)
            name, about = f"{size} flows, {count} rules", f"{len(bed.connections)} connections, {len(bed.acl)} rules"
            whole = functools.partial(_whole, bed)
            yield Case(case=f"{name}: all", ours=whole, peer="parse, forward", theirs=bed.router, about=about, **common)
            for number, stage in enumerate(STAGES):
                yield Case(case=f"{name}: {stage}", ours=functools.partial(_one, bed, number), rounds=3, **common)
            bed.close()


def _whole(bed: Bed) -> float:
    return sum(bed.round())


def _one(bed: Bed, number: int) -> float:
    return bed.round()[number]
