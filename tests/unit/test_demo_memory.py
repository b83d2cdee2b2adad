"""`fp demo` where there is nothing to ask of the kernel: the same router over memory ports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from libfp.demo.wire import FastWire
from libfp.jit import load32, load64, store32, store64
from libfp.ports.frames import FrameMemory
from libfp.ports.memory import Wire
from libfp.testing.packets import udp


@pytest.mark.timeout(120)
def test_the_demo_over_memory_ports_loses_nothing_and_says_why():
    command = [sys.executable, "-m", "libfp", "demo", "--memory", "--json", "--seconds", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["ports"], result["reason"]) == ("memory", "--memory")
    assert "over memory ports: --memory" in done.stderr
    assert result["ping_received"] == 5
    assert result["offered"] == result["received"] > 100
    assert result["lost"] == 0
    assert result["mpps"] > 0
    assert (result["drops"], result["punts"]) == ({"blackhole": 100}, {"ttl-expired": 1})
    assert (result["tcp_mbit_s"], result["kick"]) == (None, "none")


def reflect(wire):
    """Stand in for a worker without a pipeline: what was received is sent, what was completed is free again."""

    def word(ring, index, width):
        return ring.descs + (index % ring.size) * width

    while (index := load32(wire.rx.consumer)) != load32(wire.rx.producer):
        at, to = word(wire.rx, index, 16), word(wire.tx, load32(wire.tx.producer), 16)
        store64(to, load64(at))
        store64(to + 8, load64(at + 8))
        store32(wire.rx.consumer, (index + 1) & 0xFFFFFFFF)
        store32(wire.tx.producer, (load32(wire.tx.producer) + 1) & 0xFFFFFFFF)
    while (index := load32(wire.completion.consumer)) != load32(wire.completion.producer):
        to = word(wire.fill, load32(wire.fill.producer), 8)
        store64(to, load64(word(wire.completion, index, 8)))
        store32(wire.completion.consumer, (index + 1) & 0xFFFFFFFF)
        store32(wire.fill.producer, (load32(wire.fill.producer) + 1) & 0xFFFFFFFF)


def test_numbers_come_back_in_order_across_the_wrap_of_the_indexes():
    frames = FrameMemory(16)
    wire = Wire(frames, 8, first_index=0xFFFFFFFA)
    fast = FastWire(wire, udp(b"\0" * 18))
    assert fast.inject(0, 5) == 0, "the fill ring is empty"
    for n in range(8):
        store64(wire.fill.descs + ((0xFFFFFFFA + n) % 8) * 8, frames.free.pop())
    store32(wire.fill.producer, (0xFFFFFFFA + 8) & 0xFFFFFFFF)
    received, sent = [], 0
    while sent < 100:
        sent += fast.inject(sent, min(5, 100 - sent))
        reflect(wire)
        received += fast.collect().tolist()
    assert received == list(range(100))
    assert fast.collect().size == 0
    reflect(wire)  # what was collected last is free again
    assert [fast.inject(100, 5), fast.inject(105, 5)] == [5, 3], "no more than the rings hold"
    with pytest.raises(ValueError, match="no room"):
        FastWire(wire, b"short")
    wire.close()
    frames.close()
