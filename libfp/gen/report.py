"""What a test has shown: counts, rates, and how long packets were on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from libfp.gen.histogram import Histogram
from libfp.gen.signature import FCS


@dataclass
class Stream:
    """What one port has sent, and what came of it.

    sent, sent_bytes (without FCS), seconds from the first packet to the end of sending. received: intact packets, each
    once; lost: the others, corrupted ones among them. duplicates came again. reordered ones came after one sent later
    (RFC 4737), which was at most `extent` numbers ahead. late: more than 262,144 numbers late; first ones and
    duplicates cannot be told then, and they count as lost.
    """

    port: str
    sent: int
    sent_bytes: int
    seconds: float
    received: int
    received_bytes: int
    duplicates: int
    reordered: int
    extent: int
    late: int
    latency: Histogram
    ring_full: int = 0

    @property
    def lost(self) -> int:
        """Packets that did not come intact."""
        return self.sent - self.received

    @property
    def pps(self) -> float:
        """Packets sent a second."""
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def bps(self) -> float:
        """Bits of frames sent a second, FCS included."""
        return 8 * (self.sent_bytes + FCS * self.sent) / self.seconds if self.seconds else 0.0

    def as_dict(self, signed: bool = True) -> dict[str, Any]:
        """For JSON; not `signed`, without what cannot be told of one stream then."""
        told = {name: getattr(self, name) for name in ("port", "sent", "sent_bytes", "ring_full")}
        told |= {"seconds": round(self.seconds, 6), "pps": round(self.pps), "bps": round(self.bps)}
        if not signed:
            return told
        names = ("received", "received_bytes", "lost", "duplicates", "reordered", "extent", "late")
        return {**told, **{name: getattr(self, name) for name in names}, "latency_us": self.latency.as_dict()}


@dataclass
class Report:
    """All streams of a test; what could not be given to one.

    packets: all that came. corrupted: what does not add up; foreign: packets that are not of a test; stale: of another
    test, or a former one. Of traffic without signatures (a capture) whatever came is counted as received.
    """

    streams: list[Stream]
    packets: int = 0
    corrupted: int = 0
    foreign: int = 0
    stale: int = 0
    signed: bool = True
    counters: dict[str, dict[str, int]] = field(default_factory=dict)

    def _sum(self, name: str) -> int:
        return sum(getattr(stream, name) for stream in self.streams)

    @property
    def sent(self) -> int:
        """Packets that the ports have taken."""
        return self._sum("sent")

    @property
    def received(self) -> int:
        """Intact packets, each once; of a capture all that came."""
        return self._sum("received") if self.signed else self.packets

    @property
    def lost(self) -> int:
        """Packets that did not come intact."""
        return self.sent - self.received

    @property
    def loss(self) -> float:
        """The share of packets that were lost."""
        return self.lost / self.sent if self.sent else 0.0

    @property
    def duplicates(self) -> int:
        """Packets that came again."""
        return self._sum("duplicates")

    @property
    def reordered(self) -> int:
        """Packets that came after one sent later."""
        return self._sum("reordered")

    @property
    def late(self) -> int:
        """Packets too late to be told from duplicates."""
        return self._sum("late")

    @property
    def pps(self) -> float:
        """Packets sent a second, by all ports."""
        return sum(stream.pps for stream in self.streams)

    @property
    def bps(self) -> float:
        """Bits of frames sent a second, FCS included."""
        return sum(stream.bps for stream in self.streams)

    @property
    def seconds(self) -> float:
        """How long was sent."""
        return max((stream.seconds for stream in self.streams), default=0.0)

    @property
    def latency(self) -> Histogram:
        """Of all streams together."""
        unit = self.streams[0].latency.unit if self.streams else 1.0
        return Histogram(
            np.sum([stream.latency.counts for stream in self.streams], axis=0) if self.streams else [], unit
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("packets", "sent", "received", "lost", "duplicates", "reordered", "late", "corrupted", "foreign")
        told = {name: getattr(self, name) for name in (*names, "stale")}
        rates = {"loss": self.loss, "seconds": round(self.seconds, 6), "pps": round(self.pps), "bps": round(self.bps)}
        told["foreign"] *= self.signed
        streams = [stream.as_dict(self.signed) for stream in self.streams]
        return {**told, **rates, "latency_us": self.latency.as_dict(), "ports": self.counters, "streams": streams}
