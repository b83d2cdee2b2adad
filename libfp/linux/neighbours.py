"""Hit marks: Linux must know which neighbours the fast path uses, or it would let them grow old and go.

A neighbour that only the fast path talks to looks idle to Linux: REACHABLE turns STALE, and STALE is collected. Every
few seconds the next hops that workers have used are asked for, and for those whose neighbour is STALE a "use" is sent,
which does what a packet of Linux's own would: a probe soon, and REACHABLE when it is answered.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping

from libfp.linux import rtnetlink as rt
from libfp.linux.decide import Via
from libfp.linux.netlink import NLM_F_CREATE, Netlink, attribute
from libfp.linux.state import State

SHORTEST, LONGEST = 0.5, 10.0  # seconds between two looks
MOST_PATIENCE = 30.0  # seconds between two uses for a gateway that does not answer


def interval(names: Iterable[str]) -> float:
    """How often to look, in seconds: three times in the shortest life of an unused neighbour on these interfaces.

    Reads base_reachable_time and gc_stale_time of the calling thread's network namespace.
    """
    lives = [3 * LONGEST]
    for name, version in ((name, version) for name in names for version in (4, 6)):
        folder = f"/proc/sys/net/ipv{version}/neigh/{name}"
        try:
            with open(f"{folder}/base_reachable_time_ms") as reachable, open(f"{folder}/gc_stale_time") as stale:
                lives += [int(reachable.read()) / 1000, float(stale.read())]
        except OSError:
            continue  # gone since, or without IPv6
    return min(LONGEST, max(SHORTEST, min(lives) / 3))


class HitMarks:
    """Sends uses to the kernel, on a socket of its own in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._netlink = Netlink()
        self._asked: dict[tuple[int, bytes], tuple[float, float]] = {}  # when to ask again, and for how long not then
        self._kept: dict[tuple[int, bytes], tuple[float, float]] = {}  # the same
        self.sent = 0

    def mark(self, used: Iterable[Via], state: State) -> None:
        """Tell Linux of neighbours that packets have been sent to, where it would not notice."""
        while self._netlink.ready():  # answers: an entry may have gone meanwhile, which its own message tells
            self._netlink.receive()
        wanted: Mapping[tuple[int, bytes], None] = dict.fromkeys((via.link, via.gateway) for via in used)
        for link, address in wanted:
            known = state.neighbours.get((link, address))
            if known is not None and known.state & rt.NUD_STALE:
                self._use(link, address, 0)

    def resolve(self, wanted: Iterable[Via], now: float | None = None) -> None:
        """Have Linux find out these neighbours' MAC addresses: those, and no others, that are still unknown.

        For one that stays so it is asked after half a second, one, two and so on to `MOST_PATIENCE`: each time Linux
        sends up to three requests. `now` is on the monotonic clock.
        """
        now = time.monotonic() if now is None else now
        asked, self._asked = self._asked, {}
        for key in {(via.link, via.gateway) for via in wanted}:
            due, patience = asked.get(key, (now, SHORTEST))
            if now >= due:
                self._use(*key, NLM_F_CREATE)
                due, patience = now + patience, min(2 * patience, MOST_PATIENCE)
            self._asked[key] = due, patience

    def want(self, wanted: Iterable[tuple[int, bytes]], now: float | None = None) -> None:
        """Have Linux find out the MAC addresses of these (link, address), for which packets have been dropped since the
        last call: Linux never sees those. As `resolve`, but asked for as long as packets come."""
        now = time.monotonic() if now is None else now
        self._kept = {key: when for key, when in self._kept.items() if now < when[0] + MOST_PATIENCE}
        for key in wanted:
            due, patience = self._kept.get(key, (now, SHORTEST))
            if now >= due:
                self._use(*key, NLM_F_CREATE)
                self._kept[key] = now + patience, min(2 * patience, MOST_PATIENCE)

    def retry(self) -> None:
        """Those that did not answer may do so now: ask again at the next look."""
        self._asked.clear()
        self._kept.clear()

    def _use(self, link: int, address: bytes, flags: int) -> None:
        family = rt.AF_INET if len(address) == 4 else rt.AF_INET6
        body = struct.pack("=B3xiHBB", family, link, 0, rt.NTF_USE, 0) + attribute(1, address)  # NDA_DST
        self._netlink.send(rt.RTM_NEWNEIGH, flags, body)
        self.sent += 1

    def close(self) -> None:
        self._netlink.close()
