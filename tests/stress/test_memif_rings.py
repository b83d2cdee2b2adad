"""The worker's side of memif, stepped by hand, with Python at the far ends: both roles, copies, chains, lies."""

from __future__ import annotations

import os
import platform
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.engine import context as c
from libfp.engine.state import WorkerState
from libfp.errors import PeerLied
from libfp.jit import (
    BOUNDSCHECK,
    INTERPRETED,
    Arena,
    kernel,
    load16,
    load32,
    load64,
    shr64,
    store16,
    store32,
    store64,
    store_release16,
)
from libfp.jit.memory import view
from libfp.ports.frames import HEADERS
from libfp.ports.memif import MemifPort
from libfp.ports.memif_memory import BIAS, HEADROOM, LINK_RX, LINK_TX, MASK, OURS, REGIONS, RING, THEIRS
from libfp.ports.memif_rings import SPLIT, WHOLE
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE
from libfp.testing.machine_code import check, compile_afresh
from libfp.testing.memif import FarEnd, shake_hands


@stage
def across(packet):  # type: ignore[no-untyped-def]
    if packet.length == 61:
        packet.drop("odd")
    elif packet.length == 62:
        packet.adj(8)
        packet.forward(packet.port ^ 1)
    elif packet.length == 1000:
        packet.append(100)
        packet.forward(packet.port ^ 1)
    elif packet.length == 1300:
        packet.prepend(20)
        packet.forward(packet.port ^ 1)
    elif packet.length == 1400:
        packet.adj(8)
        packet.forward(packet.port ^ 1)
    else:
        packet.forward(packet.port ^ 1)


class Bed:
    """A worker between two memif ports; `ends` are the far ends. `roles` are ours."""

    def __init__(
        self,
        roles: tuple[str, str],
        *,
        headers_only: bool = False,
        frame: int = 4096,
        guard: str = "",
        buffer: int = 2048,
        share: str = "",
    ) -> None:
        kind = stage.headers_only(across) if headers_only else across
        self.pipeline = Pipeline(kind)
        self.statistics = Arena(1 << 16)
        options: Any = {"ring_size": 64, "buffer_size": buffer, "first_index": (1 << 16) - 100, "share": share}
        self.ports = [MemifPort(f"p{k}", socket=f"@bed{id(self)}{k}", role=roles[k], **options) for k in (0, 1)]  # type: ignore[arg-type]
        at = self.statistics.address
        self.state = WorkerState(self.pipeline, MemifPort.open_all, self.ports, 0, at, frame_size=frame, guard=guard)
        self.step = self.pipeline.module().step
        self.frames = self.state.frames.free.count
        self.sessions: list[Any] = [None, None]
        self.ends: list[Any] = [None, None]
        for port in (0, 1):
            self.join(port)

    def join(self, port: int) -> None:
        """A peer comes."""
        wire = self.ports[port].wire
        server, client = shake_hands(wire.offer, wire.offer, share=wire.share)
        mine, self.sessions[port] = (server, client) if self.ports[port].role == "server" else (client, server)
        wire.publish(mine)
        self.ends[port] = FarEnd(self.sessions[port].links[0].address)
        self.turn()  # the worker has seen it

    def leave(self, port: int) -> None:
        """Its peer goes."""
        wire = self.ports[port].wire
        wire.withdraw(wire.session)  # type: ignore[arg-type]
        self.turn()
        assert wire.sweep()
        self.sessions[port].close()

    def reconnect(self) -> None:
        self.leave(0)
        self.leave(1)
        for port in (0, 1):
            self.join(port)

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.step(*self.state.direct_arguments())

    def counter(self, port: int, name: str) -> int:
        at = self.statistics.address + c.FIRST_PORT + port * COUNTERS_SIZE
        return load64(at + 8 * COUNTER_NAMES.index(name))

    def holders(self) -> list[int]:
        """Where the buffers are that the ports share, by slot."""
        shares = [port.wire.share for port in self.ports]
        assert all(shares)
        return [load32(share.table + 4 * slot) for share in shares if share for slot in range(2 * 64)]

    def close(self) -> None:
        if self.ports[0].share:
            assert len(set(self.holders())) == 2 * 2 * 64, "each buffer has one slot"
        self.state.close()
        for port in self.ports:
            port.close()
        for session in self.sessions:
            session.close()
        self.statistics.close()


ROLES = [("server", "client"), ("client", "server"), ("server", "server"), ("client", "client")]
KINDS = [(roles, headers, "") for roles in ROLES for headers in (False, True)]
SHARED = (("client", "client"), True, "both")


@pytest.fixture(params=[*KINDS, SHARED], ids=str)
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    roles, headers_only, share = request.param
    made = Bed(roles, headers_only=headers_only, share=share)
    yield made
    made.close()


def some(count: int, length: int = 0) -> list[bytes]:
    source = random.Random(count)
    return [
        source.randbytes(length or source.choice((14, 60, 63, 64, 65, 191, 192, 193, 256, 1514))) for _ in range(count)
    ]


def expected(packets: list[bytes]) -> list[bytes]:
    """What the stage makes of them."""
    made = [one[8:] if len(one) in (62, 1400) else one for one in packets if len(one) != 61]
    made = [bytes(20) + one if len(one) == 1300 else one for one in made]
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


@pytest.mark.parametrize("length", [61, 62, 1000, 193, 1300, 1400, 3000])
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
    with pytest.raises(PeerLied, match="an index or a buffer of queue 0 that cannot be; the connection is closed"):
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
        bed.reconnect()
    assert load16(bed.ends[0].word(LINK_TX, OURS)) == (1 << 16) - 100
    assert bed.ends[0].word(LINK_TX, MASK) == 63
    assert bed.ends[0].word(LINK_TX, RING) != 0


def written(bed: Bed) -> set[int]:
    """The bytes of frames that are not as they were when they were mapped."""
    frames = bed.state.frames
    return {at % frames.stride for at, one in enumerate(bytes(view(frames.address, frames.size))) if one}


def test_payload_is_copied_once(bed: Bed) -> None:
    """Where stages look at headers only, what is behind them never is in a frame: it goes from region to region."""
    packets = [bytes([255]) * length for length in (1514, 64, 192, 1000)]
    bed.ends[0].send(packets)
    bed.turn(2)
    assert bed.ends[1].receive() == expected(packets)
    headers_only = load64(bed.state.blocks.arena.address + SPLIT) != WHOLE
    assert written(bed) == set(range(HEADROOM, HEADROOM + (HEADERS if headers_only else 1514)))


@pytest.fixture
def sharing() -> Iterator[Bed]:
    roles, headers_only, share = SHARED
    made = Bed(roles, headers_only=headers_only, share=share, buffer=1024)
    yield made
    made.close()


def test_what_has_payload_is_moved_between_ports_that_share(sharing: Bed) -> None:
    """The buffer that one peer has filled is the one that the other finds, and nobody has another's meanwhile."""
    there, back = sharing.ends
    for turn in range(100):
        packets = [one for length in (192, 193, 1000, 1024, 900, 64) for one in some(1, length)]
        filled = [load64(there.descriptor(LINK_TX, there.sent + k) + 8) for k in range(len(packets))]
        there.send(packets)
        sharing.turn(2)
        found = [load64(back.descriptor(LINK_RX, back.received + k) + 8) for k in range(len(packets) + 1)]
        same = [one == two for one, two in zip(filled, found[:2] + found[4:], strict=False)]
        assert found[1] == filled[1], turn
        assert found[4:6] == filled[3:5], "the one of 1,000 has become too long for a buffer, and lies in two"
        assert found[0] not in filled
        assert not same[0]
        assert back.receive() == expected(packets)
        assert len(set(sharing.holders())) == 256
        there, back = back, there


def test_peers_that_share_come_and_go(sharing: Bed) -> None:
    """What has been moved stays where it is; who comes finds a whole ring of buffers."""
    for turn in range(6):
        for port in (0, 1):
            there, back = sharing.ends[port], sharing.ends[1 - port]
            packets = some(40, 900)
            assert there.send(packets) == 40
            sharing.turn(2)
            if turn % 3 == 0:  # unread: they are gone with the peer, and their buffers are not
                sharing.leave(1 - port)
                assert there.send(packets[:20]) == 20
                sharing.turn(2)
                sharing.join(1 - port)
            else:
                assert back.receive() == packets
            sharing.turn()
            assert [end.room for end in sharing.ends] == [64, 64]
            assert len(set(sharing.holders())) == 256
    assert sharing.state.frames.free.count == sharing.frames


def test_a_region_of_rings_is_not_shared(sharing: Bed) -> None:
    """Of another's connection a peer has the buffers, nothing else."""
    regions = [session.regions for session in sharing.sessions]
    assert [len(one) for one in regions] == [2, 2]
    view(regions[0][1].address, 1)[0] = 77
    assert view(regions[1][1].address, 1)[0] == 77
    view(regions[0][0].address + 32, 1)[0] = 77
    assert view(regions[1][0].address + 32, 1)[0] == 0


@pytest.mark.skipif(
    INTERPRETED or BOUNDSCHECK or platform.machine() != "x86_64", reason="reads the machine code of x86-64"
)
def test_the_loop_takes_no_lock_and_calls_nothing() -> None:
    """As `tests/proofs/test_machine_code.py` has it for other ports, with the faults that must be found."""
    bed = Bed(("server", "client"))
    report = check(*compile_afresh(bed.pipeline.module().loop, bed.state.arguments))
    bed.close()
    assert report.findings == ()
    assert report.indirect == 0
    assert report.calls <= {"memcpy"}
    for part in ("4loop", "rx_burst", "publish", "copy_out", "join", "adopt"):
        assert part in " ".join(report.functions), "or it was not read, and nothing is proven"


MUTATIONS = 1_000_000 if os.environ.get("LIBFP_FULL") or os.environ.get("LIBFP_STRESS") else 50_000
LINES = (THEIRS, OURS, BIAS, RING, MASK)


@kernel
def roll(dice):  # type: ignore[no-untyped-def]
    """63 bits of xorshift."""
    x = load64(dice)
    x ^= x << 13
    x ^= shr64(x, 7)
    x ^= x << 17
    store64(dice, x)
    return shr64(x, 1)


@kernel
def vandalise(dice, rings, count, size):  # type: ignore[no-untyped-def]
    """`count` stores such as a hostile peer might make into four `rings`, of which it knows all, in `size` bytes."""
    for _ in range(count):
        chosen, what, value = roll(dice), roll(dice), roll(dice)
        ring = rings + 64 * (chosen & 3)
        theirs, ours, bias, descs, mask = (
            load64(ring),
            load64(ring + 8),
            load64(ring + 16),
            load64(ring + 24),
            load64(ring + 32),
        )
        desc = descs + 16 * (shr64(chosen, 2) & mask)
        if chosen & 1024:
            value >>= shr64(chosen, 20) % 63  # short and long ones as often
        elif chosen & 2048:
            value = size - (value & 4095)
        kind = what & 31
        if kind < 3:
            store32(desc + 4, value & 0xFFFFFFFF)
        elif kind < 7:
            store32(desc + 4, value & 2047)
        elif kind < 9:
            store32(desc + 8, value & 0xFFFFFFFF)
        elif kind < 12:
            store32(desc + 8, roll(dice) % size)
        elif kind < 14:
            store16(desc, value & 0xFFFF)
        elif kind < 16:
            store16(desc, 0)
        elif kind < 18:
            store16(desc + 2, value & 0x1F)
        elif kind < 21:
            store16(desc + 2, 0)
        elif kind < 31:
            index = load16(theirs)
            if ((index - load16(ours) + bias) & 0xFFFF) < mask - 8:
                store_release16(theirs, (index + (value & 7)) & 0xFFFF)
        elif what & 0xF00 == 0:
            store16(theirs if what & (1 << 16) else ours, value & 0xFFFF)
        elif what & 0xF00 == 0x100:
            store64(descs - 128 + (value & 120), roll(dice))  # cookie, flags, an index
    return load64(dice)


class Vandal:
    """All that a hostile peer can reach of a bed's connections."""

    def __init__(self, bed: Bed) -> None:
        self.bed, self.memory = bed, Arena(512)
        store64(self.memory.address, 88172645463325252)
        self.seen, self.size = 0, 0
        self.aim()

    def aim(self) -> None:
        at = self.memory.address + 64
        for port in self.bed.ports:
            link = port.wire.session.links[0].address  # type: ignore[union-attr]
            self.size = load64(load64(link + REGIONS) + 8)
            for part in (LINK_RX, LINK_TX):
                for number, line in enumerate(LINES):
                    store64(at + 8 * number, load64(link + part + line))
                at += 64

    def act(self, count: int) -> None:
        vandalise(self.memory.address, self.memory.address + 64, count, self.size)

    def start_again(self) -> None:
        """If the worker has seen through it, have it do with new connections."""
        try:
            for port in self.bed.ports:
                port.wire.check()
        except PeerLied:
            self.seen += 1
            self.bed.reconnect()
            self.aim()


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("roles", [*ROLES, SHARED], ids=str)
def test_whatever_a_peer_stores_no_frame_is_lost_and_nothing_else_touched(roles: Any) -> None:
    """Frames and regions lie between guard pages. `LIBFP_FULL=1` and `make stress`: a million stores."""
    if roles is SHARED:
        bed = Bed(roles[0], headers_only=True, share="both", guard="end")
    else:
        bed = Bed(roles, headers_only=roles[0] == "server", guard="end")
    vandal = Vandal(bed)
    for _ in range(MUTATIONS // len(ROLES) // 32):
        vandal.act(32)
        bed.turn()
        assert bed.state.frames.free.count == bed.frames
        vandal.start_again()
    assert vandal.seen > 2
    if bed.ports[0].share:
        held = bed.holders()
        assert sorted(held) == list(range(HEADROOM, (HEADROOM + 2048) * 256, HEADROOM + 2048))
        assert held != sorted(held), "they have been moved"
    for name in ("rx_packets", "rx_errors", "tx_packets"):
        assert min(bed.counter(0, name), bed.counter(1, name)) > MUTATIONS // 5000, name
    packets = some(20)
    bed.reconnect()
    bed.ends[0].send(packets)
    bed.turn(2)
    assert bed.ends[1].receive() == packets, "and a decent peer finds all in order"
    bed.close()
    vandal.memory.close()


@pytest.mark.stress
def test_a_peer_may_store_while_we_read() -> None:
    """The same from another thread, at any moment: what was checked is what is used."""
    bed = Bed(("server", "client"), guard="end")
    vandal = Vandal(bed)
    for _ in range(MUTATIONS // 10_000):
        thread = threading.Thread(target=vandal.act, args=(10_000,))
        thread.start()
        while thread.is_alive():
            bed.turn(10)
            assert bed.state.frames.free.count == bed.frames
        thread.join()
        vandal.start_again()
    bed.close()
    vandal.memory.close()
