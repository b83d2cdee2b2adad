"""What a quiet `fp router` costs, and what the first packet after a silence waits for.

A wire (see `bench.wire`), 1,000 routes in the router's kernel, no traffic but the bench's own. `fp router` runs as a
user starts it, policy `park`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

from bench.harness import Case
from bench.processes import Router, preferred
from bench.wire import DESTINATION, Wire
from libfp.testing.netns import Lab
from libfp.testing.probe import Arrivals
from libfp.testing.traffic import UdpStream
from libfp.testing.wait import wait_until

ROUTES = 1000
SECONDS = 30.0
SILENCES = (0.2, 0.5)  # seconds, at random between the two
PACKETS = 50
PORT = 5003


class Idle:
    """A router on a wire that forwards, and then has nothing to do."""

    def __init__(self, wire: Wire, router: Router) -> None:
        self._wire, self._router = wire, router

    def cpu(self) -> float:
        """Percent of a core that the whole process uses, all threads, over 30 s."""
        before, began = self._router.cpu_seconds(), time.monotonic()
        time.sleep(SECONDS)
        self._router.check()
        return 100 * (self._router.cpu_seconds() - before) / (time.monotonic() - began)

    def wake(self) -> float:
        """The longest time in ms from sending to the receiving kernel, of 50 packets that come after a silence."""
        forwarded, sent = self._router.forwarded(), []
        with Arrivals(self._wire.sink, port=PORT) as arrivals, self._wire.gen.socket() as sock:
            for number in range(PACKETS):
                time.sleep(random.uniform(*SILENCES))
                sent.append(time.time())
                sock.sendto(number.to_bytes(8, "big"), (DESTINATION, PORT))
            wait_until(lambda: len(arrivals.take()) == PACKETS, what="every packet")
            taken = arrivals.take()
        assert self._router.forwarded() - forwarded >= PACKETS, "by the fast path"
        return 1000 * max(taken[number] - sent[number] for number in range(PACKETS))


def cases() -> Iterator[Case]:
    """`cpu` at most 2 %, `wake` at most 15 ms."""
    common: dict[str, Any] = {"bench": "idle", "better": "lower"}
    cores = os.sched_getaffinity(0)
    with preferred(cores), Lab() as lab:
        wire = Wire(lab)
        for number in range(ROUTES):
            wire.dut.route(f"198.18.{number >> 8}.{number & 255}/32", via=DESTINATION)
        with Router(wire.dut, cores) as router:
            with UdpStream(wire.gen, wire.sink, DESTINATION, 1000):
                router.wait_forwarding()
            idle = Idle(wire, router)
            about = f"the whole process over {SECONDS:.0f} s, {ROUTES:,} routes mirrored"
            yield Case(case="cpu", ours=idle.cpu, unit="%", rounds=1, about=about, limit=2, **common)
            about = f"the longest of {PACKETS} first packets after silences, sent to received"
            yield Case(case="wake", ours=idle.wake, unit="ms", rounds=1, about=about, limit=15, **common)
