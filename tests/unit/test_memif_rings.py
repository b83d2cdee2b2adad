"""The worker's side of memif, stepped by hand, with Python at the far ends: both roles, copies, chains, lies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.engine import context as c
from libfp.engine.state import WorkerState
from libfp.errors import PeerLied
from libfp.jit import Arena, load16, load64, store16, store32, store64
from libfp.ports.memif import MemifPort
from libfp.ports.memif_memory import LINK_RX, LINK_TX, MASK, OURS, RING
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE
from libfp.testing.memif import FarEnd, shake_hands


@stage
def across(packet):  # type: ignore[no-untyped-def]
    if packet.length == 61:
        packet.drop("odd")
    elif packet.length == 62:
        packet.adj(8)
        packet.forward(1 - packet.port)
    elif packet.length == 1000:
        packet.append(100)
        packet.forward(1 - packet.port)
    else:
        packet.forward(1 - packet.port)


class Bed:
    """A worker between two memif ports; `ends` are the far ends. `roles` are ours."""

    def __init__(
        self, roles: tuple[str, str], *, headers_only: bool = False, frame: int = 4096, guard: str = "", buffer: int = 2048
    ) -> None:
        kind = stage.headers_only(across) if headers_only else across
        self.pipeline = Pipeline(kind)
        self.statistics = Arena(1 << 16)
        options: Any = {"ring_size": 64, "buffer_size": buffer, "first_index": (1 << 16) - 100}
        self.ports = [MemifPort(f"p{k}", socket=f"@bed{id(self)}{k}", role=roles[k], **options) for k in (0, 1)]  # type: ignore[arg-type]
        at = self.statistics.address
        self.state = WorkerState(self.pipeline, MemifPort.open_all, self.ports, 0, at, frame_size=frame, guard=guard)
        self.step = self.pipeline.module().step
        self.frames = self.state.frames.free.count
        self.sessions: list[Any] = []
        self.connect()

    def connect(self) -> None:
        self.ends = []
        for port in self.ports:
            server, client = shake_hands(port.wire.offer, port.wire.offer)
            mine, theirs = (server, client) if port.role == "server" else (client, server)
            port.wire.publish(mine)
            self.sessions.append(theirs)
            self.ends.append(FarEnd(theirs.links[0].address))
        self.turn()  # the worker has seen it

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.step(*self.state.direct_arguments())

    def counter(self, port: int, name: str) -> int:
        at = self.statistics.address + c.FIRST_PORT + port * COUNTERS_SIZE
        return load64(at + 8 * COUNTER_NAMES.index(name))

    def close(self) -> None:
        self.state.close()
        for port in self.ports:
            port.close()
        for session in self.sessions:
            session.close()
        self.statistics.close()


ROLES = [("server", "client"), ("client", "server"), ("server", "server"), ("client", "client")]


@pytest.fixture(params=[(r, h) for r in ROLES for h in (False, True)], ids=str)
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    made = Bed(request.param[0], headers_only=request.param[1])
    yield made
    made.close()


def some(count: int, length: int = 0) -> list[bytes]:
    source = random.Random(count)
    return [source.randbytes(length or source.choice((14, 60, 63, 64, 65, 191, 192, 193, 256, 1514))) for _ in range(count)]


def expected(packets: list[bytes]) -> list[bytes]:
    """What the stage makes of them."""
    made = [one[8:] if len(one) == 62 else one for one in packets if len(one) != 61]
    return [one + bytes(100) if len(one) == 1000 else one for one in made]


def test_packets_pass_both_ways_in_order_and_intact_around_the_rings(bed: Bed) -> None:
    for count in (1, 2, 40, 63, 64, 64, 64, 31):
        there, back = some(count), some(65 - count)
        assert bed.ends[0].send(there) == count
        assert bed.ends[1].send(back) == 65 - count
        bed.turn(2)
        assert bed.ends[1].receive() == there
        assert bed.ends[0].receive() == back
        bed.turn()  # which gives the last buffers back
    total = sum((1, 2, 40, 63, 64, 64, 64, 31))
    assert bed.ends[0].sent < 1000, "the indexes have come around"
    assert bed.counter(0, "rx_packets") == bed.counter(1, "tx_packets") == total
    assert bed.counter(0, "rx_bytes") == bed.counter(1, "tx_bytes")
    assert bed.counter(0, "rx_errors") == bed.counter(1, "tx_full") == 0
    assert bed.state.frames.free.count == bed.frames
    assert bed.ends[0].room == bed.ends[1].room == 64


@pytest.mark.parametrize("length", [61, 62, 1000, 193, 3000])
def test_a_stage_may_drop_shorten_and_lengthen(bed: Bed, length: int) -> None:
    packets = some(10, length)
    bed.ends[0].send(packets)
    bed.turn(12)
    got = bed.ends[1].receive()
    assert [one[: min(length, 1000)] for one in got] == [one[: min(length, 1000)] for one in expected(packets)]
    assert [len(one) for one in got] == [len(one) for one in expected(packets)]
    assert bed.state.frames.free.count == bed.frames


def test_long_packets_are_joined_and_split(bed: Bed) -> None:
    """Sent in pieces, and to buffers of 2,048 bytes; the ring wraps within them."""
    for _ in range(12):
        packets = some(4, 3500) + some(3, 100)
        assert bed.ends[0].send(packets, piece=900) == 7
        bed.turn(9)
        assert bed.ends[1].receive() == packets
        bed.turn()
    assert bed.state.frames.free.count == bed.frames


def test_a_full_peer_costs_packets_and_no_frames(bed: Bed) -> None:
    for _ in range(3):
        bed.ends[0].send(some(64, 60))
        bed.turn(2)
    assert len(bed.ends[1].receive()) == 64
    assert bed.counter(1, "tx_full") == 2 * 64
    assert bed.counter(1, "tx_packets") == 64
    assert bed.counter(1, "tx_bytes") == 64 * 60
    bed.ends[0].send(some(7, 60))
    bed.turn(2)
    assert len(bed.ends[1].receive()) == 7
    assert bed.state.frames.free.count == bed.frames


def test_a_long_packet_without_room_is_dropped_whole(bed: Bed) -> None:
    bed.ends[0].send(some(62, 60))
    bed.turn(2)
    bed.ends[0].send(some(2, 3000) + some(3, 60))
    bed.turn(2)
    bed.turn(2)
    assert [len(one) for one in bed.ends[1].receive()] in ([60] * 62 + [3000], [60] * 62 + [3000, 3000])
    assert bed.state.frames.free.count == bed.frames


def lie(bed: Bed, which: str) -> None:
    """Packet 3 of 10 is described wrongly."""
    end = bed.ends[0]
    desc = end.descriptor(LINK_TX, end.sent - 7)
    if which == "length":
        store32(desc + 4, 0xFFFFFFFF)
    elif which == "no length":
        store32(desc + 4, 0)
    elif which == "longer than a frame":
        store32(desc + 4, 4000)
    elif which == "region":
        store16(desc + 2, 1)
        store32(desc + 4, 5000)
    elif which == "offset":
        store32(desc + 8, 0xFFFFFFFF)
        store32(desc + 4, 5000)


@pytest.mark.parametrize("which", ["length", "no length", "longer than a frame", "region", "offset"])
def test_a_descriptor_that_cannot_be_costs_its_packet(bed: Bed, which: str) -> None:
    packets = some(10, 60)
    bed.ends[0].send(packets)
    lie(bed, which)
    bed.turn(2)
    assert bed.ends[1].receive() == packets[:3] + packets[4:]
    assert bed.counter(0, "rx_errors") == 1
    assert bed.state.frames.free.count == bed.frames


def test_a_chain_without_an_end_costs_what_is_in_it(bed: Bed) -> None:
    end = bed.ends[0]
    end.send(some(64, 60))
    for slot in range(64):
        store16(end.descriptor(LINK_TX, slot), 1)
    bed.turn(2)
    assert bed.ends[1].receive() == []
    assert bed.counter(0, "rx_errors") == 1
    packets = some(5, 60)
    end.send(packets)
    bed.turn(2)
    assert bed.ends[1].receive() == packets, "and the next ones pass"


@pytest.mark.parametrize("part", [LINK_RX, LINK_TX])
def test_an_index_that_cannot_be_ends_the_connection(bed: Bed, part: int) -> None:
    end, wire = bed.ends[1], bed.ports[1].wire
    store16(end.word(part, OURS), 40_000)
    bed.ends[0].send(some(5, 60))
    bed.turn(2)
    with pytest.raises(PeerLied, match="an index of queue 0 that cannot be; the connection is closed"):
        wire.check()
    assert bed.counter(1, "rx_packets" if part == LINK_TX else "tx_packets") == 0
    wire.withdraw(bed.ports[1].wire.session)  # type: ignore[arg-type]
    assert not wire.sweep()
    bed.turn()
    assert wire.sweep(), "once the worker has seen it"


def test_a_peer_that_rewrites_our_descriptors_gets_no_other_memory(bed: Bed) -> None:
    """Where the memory is ours, buffers are where we know them to be."""
    if bed.ports[1].role != "client":
        pytest.skip("the memory is the peer's")
    end = bed.ends[1]
    for slot in range(64):
        desc = end.descriptor(LINK_RX, slot)
        store64(desc, 0xFFFF_FFFF_FFFF_FFFF - (1 << 64))
        store64(desc + 8, 0xFFFF_FFFF)
    packets = some(10)
    bed.ends[0].send(packets)
    bed.turn(2)
    assert bed.ends[1].receive() == packets


def test_a_connection_is_followed_by_another(bed: Bed) -> None:
    for _ in range(3):
        packets = some(20)
        bed.ends[0].send(packets)
        bed.turn(2)
        assert bed.ends[1].receive() == packets
        for port in bed.ports:
            port.wire.withdraw(port.wire.session)  # type: ignore[arg-type]
        bed.turn()
        assert all(port.wire.sweep() for port in bed.ports)
        bed.connect()
    assert load16(bed.ends[0].word(LINK_TX, OURS)) == (1 << 16) - 100
    assert bed.ends[0].word(LINK_TX, MASK) == 63
    assert bed.ends[0].word(LINK_TX, RING) != 0
