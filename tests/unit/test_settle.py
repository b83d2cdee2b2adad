"""What becomes of forwarded packets: each leaves once, by its port, in order, whole, counted, or is dropped by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.engine.context import FIRST_PORT
from libfp.engine.state import WorkerState
from libfp.jit import Arena, load8, load64
from libfp.ports.memory import MemoryPort
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE

pytestmark = pytest.mark.timeout(120)

PORTS, RING = 5, 128  # the receive ring holds two bursts


@stage
def as_told(packet: Any) -> None:
    """Byte 14 says by which port the packet leaves, 255 that nothing is said about it yet, 254 that it is dropped."""
    told = load8(packet.data + 14)
    if told == 254:
        packet.drop("told-so")
    elif told != 255:
        packet.forward(told)


@stage
def rest(packet: Any) -> None:
    packet.forward(load8(packet.data + 15))


class Bed:
    """One worker's state over five memory ports, stepped by hand."""

    def __init__(self, first_index: int) -> None:
        self.pipeline = Pipeline(as_told, rest)
        self.ports = [MemoryPort(f"m{n}", ring_size=RING, first_index=first_index) for n in range(PORTS)]
        self.statistics = Arena(1 << 16)
        self.state = WorkerState(self.pipeline, MemoryPort.open_all, self.ports, 0, self.statistics.address)
        self.step = self.pipeline.module().step
        self.number = 0
        self.step(*self.state.direct_arguments())

    def packet(self, told: int, then: int = 0) -> bytes:
        self.number += 1
        return bytes(14) + bytes([told, then]) + self.number.to_bytes(4, "big") + bytes(self.number % 40)

    def counter(self, port: int, name: str) -> int:
        at = self.statistics.address + FIRST_PORT + COUNTERS_SIZE * port
        return load64(at + 8 * COUNTER_NAMES.index(name))

    def totals(self, name: str) -> list[int]:
        return [self.counter(port, name) for port in range(PORTS)]

    def run(self, packets: list[bytes]) -> None:
        assert len(self.ports[0].inject(packets)) == len(packets)
        self.step(*self.state.direct_arguments())

    def close(self) -> None:
        self.state.close()
        self.statistics.close()


@pytest.fixture(params=[0, (1 << 32) - 40], ids=["zero", "wrapping"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    one = Bed(request.param)
    yield one
    one.close()


# the usual bursts go out in one pass: those by one port, or by two whose numbers differ in one bit
SETS = [
    (0,),
    (3,),
    (0, 1),
    (2, 3),
    (0, 2),
    (1, 2),
    (0, 3),
    (0, 1, 2),
    (0, 1, 2, 3, 4),
    (4, 0),
    (255, 0),
    (254, 1),
    (255, 254),
]


@pytest.mark.parametrize("ports", SETS, ids=str)
def test_every_packet_leaves_once_by_its_port_in_order(bed: Bed, ports: tuple[int, ...]) -> None:
    """Bursts of every length, round the rings many times."""
    dice = random.Random(7)
    for length in [*range(1, 65), 64, 64, 64]:
        before = bed.totals("tx_packets"), bed.totals("tx_bytes")
        packets = [bed.packet(dice.choice(ports), dice.randrange(PORTS)) for _ in range(length)]
        bed.run(packets)
        expected: list[list[bytes]] = [[] for _ in range(PORTS)]
        for late in (False, True):  # what the first stage decides goes before what the second does
            for packet in packets:
                told = packet[15] if packet[14] == 255 else packet[14]
                if (packet[14] == 255) == late and told < PORTS:
                    expected[told].append(packet)
        assert [port.collect() for port in bed.ports] == expected
        grown = [now - was for now, was in zip(bed.totals("tx_packets"), before[0], strict=True)]
        assert grown == [len(sent) for sent in expected]
        grown = [now - was for now, was in zip(bed.totals("tx_bytes"), before[1], strict=True)]
        assert grown == [sum(map(len, sent)) for sent in expected]


@pytest.mark.parametrize("ports", [(1,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_what_finds_no_room_is_dropped_and_its_frame_comes_back(bed: Bed, ports: tuple[int, ...]) -> None:
    """The far end takes nothing: rings fill up to the last slot, and not a frame is lost."""
    dice, sent, given = random.Random(3), [0] * PORTS, [0] * PORTS
    for _ in range(12):
        packets = [bed.packet(dice.choice(ports)) for _ in range(50)]
        for packet in packets:
            given[packet[14]] += 1
        bed.run(packets)
    for number, port in enumerate(bed.ports):
        sent[number] = len(port.collect())
    assert sent == [min(count, RING) for count in given]
    assert bed.totals("tx_full") == [count - out for count, out in zip(given, sent, strict=True)]
    for _ in range(20):  # as before: no frame has gone
        bed.run([bed.packet(1) for _ in range(64)])
        assert len(bed.ports[1].collect()) == 64


def test_a_port_that_is_not_there_is_a_drop_by_name() -> None:
    outcomes = Pipeline(as_told).run_once([bytes(14) + bytes([told]) + bytes(45) for told in (0, 1, 2, 77)], ports=2)
    assert outcomes == ["forward", "forward", "drop bad-port", "drop bad-port"]
    assert Pipeline(as_told).run_once([bytes(14) + b"\x07" + bytes(45)] * 3, ports=2) == ["drop bad-port"] * 3
