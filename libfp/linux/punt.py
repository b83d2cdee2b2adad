"""The slow path: packets that workers hand to Linux go into the TAP of the port they came by.

    worker -> its punt ring -> a thread here -> TAP -> ingress of the real port

One thread a worker, since a ring has one consumer. It sleeps until the ring has something, and then writes all of it
without the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from libfp.linux.tap import Tap

if TYPE_CHECKING:
    from libfp.engine.punt import PuntRing

NAP = 0.5  # seconds: whoever wakes us looks again in every turn; this is for one that has stopped turning


class PuntPath:
    """One TAP for each of `ports` ((interface index, MTU) in port order), and the threads that fill them.

    Made in the calling thread's network namespace. Raises what `Tap` raises.
    """

    def __init__(self, ports: Sequence[tuple[int, int]]) -> None:
        self._rings: list[PuntRing] = []
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        with ExitStack() as undo:
            self.taps = [undo.enter_context(Tap(f"lfp{index}", index, mtu)) for index, mtu in ports]
            self._resources = undo.pop_all()
        self.fds = np.array([tap.fd for tap in self.taps], dtype=np.int32)

    def write(self, port: int, frame: bytes) -> None:
        """Have one Ethernet frame arrive at the port with this number, as Linux sees it."""
        self.taps[port].write(frame)

    def start(self, rings: Sequence[PuntRing]) -> None:
        """Drain these rings too from now on, each in a thread of its own."""
        self._stopping.clear()
        for ring in rings:
            name = f"libfp-punt-{len(self._rings)}"
            thread = threading.Thread(target=self._drain, args=(ring,), name=name, daemon=True)
            self._rings.append(ring)
            self._threads.append(thread)
            thread.start()

    def _drain(self, ring: PuntRing) -> None:
        while not self._stopping.is_set():
            if not ring.drain(self.fds):
                ring.sleep(NAP)
        ring.drain(self.fds)

    def stop(self) -> None:
        """Deliver what the rings hold and end the threads. May be called again."""
        self._stopping.set()
        for ring in self._rings:
            ring.wake()
        for thread in self._threads:
            thread.join()
        self._rings, self._threads = [], []

    def close(self) -> None:
        """Stop, and remove the TAPs."""
        self.stop()
        self._resources.close()
