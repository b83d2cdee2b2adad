"""A bare sink: takes what comes by memif ports, and gives it back without a look at it. How fast a generator is by
itself can be seen only beside something that is faster than all devices under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from libfp.gen import loop
from libfp.gen.station import Station
from libfp.jit import entry, kernel, load64, load_acquire16, load_acquire64, pause, store64, store_release64
from libfp.packet.burst import Burst
from libfp.ports.memif import MemifPort
from libfp.ports.memif_memory import LINK_RX, THEIRS
from libfp.ports.memif_rings import LINK, SEEN
from libfp.ports.rings import OWN, PUBLISHED, RX

LEAST = 64  # packets that are given back together, unless none come


@kernel
def discard(rings):  # type: ignore[no-untyped-def]
    """Give back the packets that are there; how many there were."""
    at = rings.at
    link = load_acquire64(at + LINK)
    if link != load64(at + SEEN):
        rings.adopt(link)
    if link == 0:
        return 0
    own = load64(at + RX + OWN)
    theirs = load_acquire16(load64(link + LINK_RX + THEIRS))
    ready = (theirs - own) & 0xFFFF
    store64(at + RX + OWN, theirs)
    waiting = (theirs - load64(at + RX + PUBLISHED)) & 0xFFFF
    if waiting >= LEAST or (waiting > 0 and ready == 0):
        rings.give_back(link, theirs)
    return ready


@entry
def swallow(ports: Any, burst: Burst, tester: int) -> None:
    """Until told to stop."""
    while load_acquire64(tester + loop.STOP) == 0:
        done = 0
        for port in range(load64(tester + loop.PORTS)):
            done += discard(ports.rings(port))
        if done == 0:
            pause()
        store64(tester + loop.PACKETS, load64(tester + loop.PACKETS) + done)
        store_release64(tester + loop.TURNS, load64(tester + loop.TURNS) + 1)


class Sink(Station):
    """Takes what comes by `ports`, all of them memif's, from `start` to `stop`; `report().packets` is how many."""

    def __init__(self, ports: Sequence[MemifPort], *, core: int | None = None) -> None:
        super().__init__(ports, None, (), core=core)

    def start(self) -> None:
        """Begin to take packets."""
        self._begin(0, 0, None, None)

    def _call(self) -> None:
        swallow(self._loop_ports, self._burst.burst, self._tester.address)
