"""A generator that counts what comes back, and gives it back unseen: all that its core does beside that is to send.

Looking at each packet costs `libfp.gen.Generator` more than making it does, and a device that is faster than that would
not be what is measured. `looking` is for runs in which packets are verified and their time is taken.
"""

from __future__ import annotations

from typing import Any

from libfp.gen import loop
from libfp.gen.sink import discard
from libfp.gen.station import Generator
from libfp.jit import clock, entry, kernel, load64, load_acquire64, pause, store64, store_release64
from libfp.packet.burst import Burst
from libfp.ports.rings import CACHED, OWN, RX


@kernel
def count(rings):  # type: ignore[no-untyped-def]
    """Give back what has come, so that the other loop can go on from there; how many packets."""
    ready = discard(rings)
    if ready != 0:
        store64(rings.at + RX + CACHED, load64(rings.at + RX + OWN))
    return ready


@entry
def blast(ports: Any, burst: Burst, tester: int) -> None:
    """Send what is due, and count what comes, until told to stop."""
    while load_acquire64(tester + loop.STOP) == 0:
        now = clock()
        store64(tester + loop.NOW, now)
        sent, came = 0, 0
        for k in range(load64(tester + loop.SENDERS)):
            sent += loop.transmit(ports, tester, load64(tester + loop.SENDER_AT) + loop.SENDER_SIZE * k, now)
        for port in range(load64(tester + loop.PORTS)):
            came += count(ports.rings(port))
        if sent + came == 0:
            pause()
        store64(tester + loop.PACKETS, load64(tester + loop.PACKETS) + came)
        store_release64(tester + loop.TURNS, load64(tester + loop.TURNS) + 1)


class Blaster(Generator):
    """By memif ports, with packets of one buffer; `report().packets` is what has come."""

    looking = False

    def _call(self) -> None:
        if self.looking:
            super()._call()
        else:
            blast(self._loop_ports, self._burst.burst, self._tester.address)
