"""The far end of a memory port, which stands for the kernel: it keeps the rules of the rings."""

from __future__ import annotations

import pytest

from libfp.jit import load32, load64, store32
from libfp.ports.frames import FrameMemory
from libfp.ports.memory import HEADROOM, MemoryPort, Wire


@pytest.fixture
def frames() -> FrameMemory:
    return FrameMemory(64, 2048, huge=False)


def give(wire: Wire, offsets: list[int]) -> None:
    """Be the worker: put frames on the fill ring."""
    from libfp.jit import store64

    for offset in offsets:
        at = load32(wire.fill.producer)
        store64(wire.fill.descs + 8 * (at & (wire.ring_size - 1)), offset)
        store32(wire.fill.producer, at + 1)


@pytest.mark.parametrize("first", [0, (1 << 32) - 2])
def test_receives_into_the_frames_it_was_given(frames: FrameMemory, first: int) -> None:
    wire = Wire(frames, 4, first)
    assert wire.inject([b"none"]) == []
    give(wire, [2048, 0, 4096])
    assert wire.inject([b"one", b"two"]) == [2048 + HEADROOM, HEADROOM]
    assert frames.arena.buffer[2048 + HEADROOM :][:3] == b"one"
    assert frames.arena.buffer[HEADROOM:][:3] == b"two"
    assert [load64(wire.rx.descs + 16 * ((first + k) % 4)) for k in (0, 1)] == [2048 + HEADROOM, HEADROOM]
    assert load32(wire.rx.producer) == (first + 2) % (1 << 32)
    assert wire.inject([bytes(2048), b"four"]) == [4096], "as far as there are frames; no headroom where it is needed"


def test_a_full_receive_ring_takes_no_more(frames: FrameMemory) -> None:
    """Even with frames at hand, as the worker refills before it has taken what came."""
    wire = Wire(frames, 4)
    for _ in range(2):
        give(wire, [2048 * k for k in range(4)])
        wire.inject([b"x"] * 4)
    assert load32(wire.rx.producer) == 4
    assert load32(wire.fill.consumer) == 4
    store32(wire.rx.consumer, 1)
    assert wire.inject([b"y"] * 4) == [HEADROOM]


@pytest.mark.parametrize("guard", ["end", "start"])
def test_guarded_packets_touch_a_guard_page(frames: FrameMemory, guard: str) -> None:
    guarded = FrameMemory(4, guard=guard)  # type: ignore[arg-type]
    wire = Wire(guarded, 4)
    give(wire, [0, guarded.stride])
    places = wire.inject([bytes(60), bytes(4096)])
    assert places == ([4096 - 60, guarded.stride] if guard == "end" else [0, guarded.stride])
    with pytest.raises(IndexError):
        load32(guarded.address + places[0] + 60 - 3 if guard == "end" else guarded.address + guarded.stride - 1)
    guarded.close()


def test_refuses_what_does_not_fit(frames: FrameMemory) -> None:
    wire = Wire(frames, 4)
    give(wire, [0])
    with pytest.raises(ValueError, match="2049 bytes, frames have 2048"):
        wire.inject([bytes(2049)])
    assert load32(wire.fill.consumer) == 0
    for size in (0, 3, -4):
        with pytest.raises(ValueError, match="power of 2"):
            Wire(frames, size)


def test_frames_are_given_out_once(frames: FrameMemory) -> None:
    taken = [frames.free.pop() for _ in range(frames.free.count)]
    assert sorted(taken) == [2048 * k for k in range(64)]
    frames.free.push(2048 * 5 + 300)
    assert frames.free.pop() == 2048 * 5, "a completed address may lie anywhere in its frame"
    frames.reset()
    assert frames.free.count == 64


def test_queues_are_apart(frames: FrameMemory) -> None:
    port = MemoryPort("p", ring_size=4)
    other = FrameMemory(8, 2048, huge=False)
    MemoryPort.open_all([port], 0, frames)
    MemoryPort.open_all([port], 1, other)
    give(port.wires[1], [0])
    assert port.inject([b"x"], 0) == []
    assert port.inject([b"x"], 1) == [HEADROOM]
    assert port.collect(0) == port.collect(1) == []
