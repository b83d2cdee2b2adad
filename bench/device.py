"""A process that forwards between two memif ports on a core of its own, as a side of `bench memif`.

Its other threads are on the generator's core, as testpmd's are. Standard output has one JSON line when its sockets are
there; it ends with its standard input.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench import rib
from libfp.engine.decorator import stage
from libfp.engine.pipeline import Pipeline
from libfp.gen import Sink
from libfp.jit import load32, load64, shl64, shr64, store32, store64
from libfp.packet.burst import Burst
from libfp.ports.memif import MemifPort
from libfp.stages import Forward, Routes, forward, parse

LEFT, RIGHT = 0, 1
NEXT_HOPS = 64


@stage.headers_only
@stage.burst
def macswap(burst: Burst) -> None:
    """Swap the MAC addresses, and out by the other port."""
    for i in range(burst.count):
        data = burst.data(i)
        low, high = load64(data), load32(data + 8)  # 8 and 4 of the 12 bytes
        store64(data, shr64(low, 48) | shl64(high, 16) | shl64(low, 48))
        store32(data + 8, shr64(low, 16))
        burst.forward(i, burst.port ^ 1)


@stage.headers_only
@stage.burst
def io(burst: Burst) -> None:
    """Out by the other port, as it is."""
    for i in range(burst.count):
        burst.forward(i, burst.port ^ 1)


def _router(addresses: np.ndarray, lengths: np.ndarray) -> Pipeline:
    """What `fp router` runs, with these routes, all of them out by the right port, by 64 next hops or as many as there
    are routes."""
    routes = Routes(routes=max(len(addresses), 1024))
    hops = [
        routes.next_hops.add(Forward(RIGHT, b"\x02\0\0\0\1" + bytes([number]), b"\x02\0\0\0\0\1", 1500))
        for number in range(min(NEXT_HOPS, len(addresses)))
    ]
    drawn = np.random.default_rng(3).integers(0, len(hops), len(addresses))
    routes.fib.load(addresses, lengths, np.array(hops)[drawn])
    return Pipeline(parse, forward(routes))


#: What a device does, by name.
PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "io": lambda: Pipeline(io),
    "macswap": lambda: Pipeline(macswap),
    "one route": lambda: _router(np.array([0]), np.array([0])),
    "full table": lambda: _router(*rib.ipv4()[:2]),
}


def main() -> None:
    """Run what the first argument asks for, until standard input ends."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    logging.getLogger("libfp").setLevel(logging.ERROR)  # the watchdog sees us stand still
    ports = [
        MemifPort(name, socket=socket, **asked["port"])
        for name, socket in zip(("left", "right"), asked["sockets"], strict=False)
    ]
    with ExitStack() as undo:
        if asked["kind"] == "sink":
            sink = undo.enter_context(Sink(ports, core=asked["core"]))
            _others(asked["around"], [])
            sink.start()
        else:
            app = undo.enter_context(PIPELINES[asked["kind"]]().start(ports, [asked["core"]]))
            _others(asked["around"], [worker["thread"] for worker in app.counters.workers])
        print(json.dumps({"ready": asked["kind"]}), flush=True)
        sys.stdin.read()


def _others(core: int, workers: Sequence[int]) -> None:
    """All threads but the workers go to `core`."""
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread not in workers:
            os.sched_setaffinity(thread, {core})
