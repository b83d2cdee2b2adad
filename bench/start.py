"""From the command to the first packet: `fp router` in a namespace with traffic waiting, and `fp --help`.

`warm` finds its compiled code in the cache, `cold` an empty one. The clock runs from the start of the process to the
first packet that the fast path has forwarded, by its own counters: until then, Linux forwards.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from bench.harness import Case
from bench.processes import Router, fp, preferred
from bench.wire import DESTINATION, Wire
from libfp.testing.netns import Lab
from libfp.testing.traffic import UdpStream

RATE = 1000  # packets a second meanwhile: one comes within a millisecond, and the sender is no burden


class Start:
    """Starts `fp router` on a wire, as a user would, and ends it again."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def __call__(self, cache: str) -> float:
        """Seconds to the first forwarded packet, with compiled code in the folder `cache`."""
        with Router(self._wire.dut, os.sched_getaffinity(0), cache=cache) as router:
            seconds = router.wait_forwarding()
            assert "compiling" in router.said(), "the command shows what it does"
            return seconds

    def cold(self) -> float:
        with tempfile.TemporaryDirectory(prefix="libfp-bench-") as cache:
            return self(cache)


def show_help() -> float:
    """Seconds for `fp --help`."""
    began = time.perf_counter()
    subprocess.run([*fp(), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def cases() -> Iterator[Case]:
    """`help` at most 0.2 s, `warm` 2 s, `cold` 20 s."""
    common: dict[str, Any] = {"bench": "start", "unit": "s", "better": "lower"}
    with preferred(os.sched_getaffinity(0)):
        yield Case(case="help", ours=show_help, about="fp --help", limit=0.2, **common)
        about = "fp router d0 d1, from the start of the process to the first packet forwarded by the fast path"
        with Lab() as lab, tempfile.TemporaryDirectory(prefix="libfp-bench-") as cache:
            wire = Wire(lab)
            start = Start(wire)
            with UdpStream(wire.gen, wire.sink, DESTINATION, RATE):
                # the round that does not count fills the cache
                yield Case(case="warm", ours=lambda: start(cache), about=f"{about}, compiled before", limit=2, **common)
                yield Case(case="cold", ours=start.cold, rounds=3, about=f"{about}, compiling", limit=20, **common)
