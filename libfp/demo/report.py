"""What the demo found out: the numbers of its summary and of its one JSON line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Totals:
    """Packets since the router started, as its counters have them; drops and punts by reason."""

    received: int = 0
    forwarded: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    punted: dict[str, int] = field(default_factory=dict)

    @property
    def drops(self) -> int:
        return sum(self.dropped.values())

    @property
    def punts(self) -> int:
        return sum(self.punted.values())


@dataclass
class Report:
    """`offered`, `received` and `lost` are datagrams of the paced stream, counted at its two ends by their numbers.

    `mpps` is what the router forwarded a second during the flood, in millions, by its own counters; `flood_offered` and
    `flood_received` are what the sender and the receiver at the far end counted meanwhile. `capacity_pps` is what the
    whole path, sender and receiver included, carried without loss when it was first measured; the paced stream runs at
    half of that.
    """

    ports: str  # "veth" or "memory"
    reason: str = ""  # why it is memory
    offered: int = 0
    received: int = 0
    capacity_pps: float = 0.0
    paced_pps: float = 0.0
    duplicates: int = 0
    reordered: int = 0
    ping_sent: int = 0
    ping_received: int = 0
    ping_ms: float | None = None
    tcp_mbit_s: float | None = None
    flood_offered: int = 0
    flood_received: int = 0
    flood_seconds: float = 0.0
    mpps: float = 0.0
    totals: Totals = field(default_factory=Totals)
    zero_copy: bool = False
    kick: str = "none"
    cores: list[int] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.offered - self.received

    def as_dict(self) -> dict[str, Any]:
        """Flat, ready for JSON."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "totals"}
        values |= {
            "lost": self.lost,
            "forwarded": self.totals.forwarded,
            "punted": self.totals.punts,
            "dropped": self.totals.drops,
            "punts": self.totals.punted,
            "drops": self.totals.dropped,
        }
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
