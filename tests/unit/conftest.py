"""One pipeline that most tests of the engine share: what happens to a packet is told by its UDP destination port."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from libfp import Pipeline, stage
from libfp.jit import Arena, kernel, load64, load_acquire64, native, store16be, store_release64, word
from libfp.packet.burst import Burst, Packet
from libfp.packet.verdict import DROP, KIND_SHIFT
from libfp.stages import parse
from libfp.tables import Hash

REASON = "from-a-global"
REASONS = ("first-of-two", "second-of-two")

(TO_DROP, TO_PUNT, TO_FORWARD, TO_CONSUME, TO_NO_PORT, TWICE, BY_HELPER, BY_GLOBAL, UNNAMED, BY_BOUND, IF_LONG, MARKED,
 LATER, BY_TUPLE, TO_FIRST, STALL, UNLIMITED) = range(2001, 2018)  # fmt: skip


@native
class Gate:
    """A word that a test sets to stop a stage, and on the next line how often it has stood there."""

    at: word

    def wait(self) -> None:
        store_release64(self.at + 64, load64(self.at + 64) + 1)
        while load_acquire64(self.at) != 0:
            pass


@kernel
def refuse(packet: Packet) -> None:
    packet.drop("by-a-helper")


@stage
def act(packet: Packet, limit: int, why: str, gate: Gate) -> None:
    if not packet.is_udp:
        return
    action = packet.udp.dport
    if action == TO_DROP:
        packet.drop("denied")
    elif action == TO_PUNT:
        packet.punt("ask-linux")
    elif action == TO_FORWARD:
        packet.forward(1)
    elif action == TO_FIRST:
        packet.forward(0)
    elif action == TO_CONSUME:
        packet.consume()
    elif action == TO_NO_PORT:
        packet.forward(7)
    elif action == TWICE:
        packet.drop("denied")
        packet.punt("ask-linux")
        packet.forward(1)
        packet.consume()
    elif action == BY_HELPER:
        refuse(packet)
    elif action == BY_GLOBAL:
        packet.drop(REASON)
    elif action == BY_TUPLE:
        packet.drop(REASONS[1])
    elif action == UNNAMED:
        packet.settle((DROP << KIND_SHIFT) + 12345)
    elif action == BY_BOUND:
        packet.drop(why)
    elif action == IF_LONG:
        if packet.length > limit:
            packet.drop("too-long")
    elif action == MARKED:
        packet.mark = packet.udp.sport
    elif action == UNLIMITED:
        packet.punt("via-linux")
    elif action == STALL:
        gate.wait()
        packet.drop("waited")


@stage.burst
def tell(burst: Burst, add: int) -> None:
    """Write the packet's place, the burst's count and the mark into the source MAC address."""
    for i in range(burst.count):
        packet = burst.packet(i)
        store16be(packet.data + 6, i)
        store16be(packet.data + 8, burst.count)
        store16be(packet.data + 10, packet.mark + add)


@stage
def last(packet: Packet, blocked: Hash) -> None:
    if packet.is_ipv4 and packet.ipv4.src in blocked:
        packet.drop("blocked")
    if packet.is_udp and packet.udp.dport == LATER:
        packet.forward(0)


@pytest.fixture(scope="session")
def probe() -> SimpleNamespace:
    """`pipeline`, its table `blocked`, its `gate`."""
    gate, blocked = Arena(128), Hash(key="ipv4", capacity=64)
    pipeline = Pipeline(parse, act(100, "from-outside", Gate(gate.address)), tell(1000), last(blocked))
    return SimpleNamespace(pipeline=pipeline, blocked=blocked, gate=gate)


@pytest.fixture(scope="session")
def actions() -> SimpleNamespace:
    """The UDP ports that mean something to the pipeline of `probe`."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if name.isupper()})
