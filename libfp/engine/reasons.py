"""From the hash a stage stored to a name, a counter and a rate limit: one small table per pipeline.

Drops and punts with the same name are counted apart, so the table is keyed by the whole verdict word. It is searched
only for packets that are dropped or punted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from libfp.errors import BadInput
from libfp.jit import Arena, clock, clock_hz, kernel, load32, load64, store32, store64
from libfp.packet.verdict import DROP, KIND_SHIFT, KINDS, PUNT, reason_code

OTHER = 0  # the counter of verdicts whose reason no stage of the pipeline names

#: Punts a second and worker, by reason; 0 is no limit. Anything not named gets DEFAULT_RATE: enough for what Linux
#: answers or learns from. What Linux would go on to forward gets so much that it hardly loses any, and yet does not
#: keep the rest from the ring; routes that only Linux can follow are its own affair.
DEFAULT_RATE, FORWARDED_RATE = 1000, 50_000
RATES: Mapping[str, int] = {
    **dict.fromkeys(("via-linux", "local", "broadcast"), 0),
    **dict.fromkeys(("redirect", "rp-filter", "fragment-needed", "ip-options"), FORWARDED_RATE),
}

#: Reasons that the engine itself gives.
ENGINE_REASONS = ("punt-rate", "punt-ring-full", "tx-full", "bad-port", "bad-worker", "hand-off-full", "undecided")

BUCKET = 32  # ticks a token costs, ticks the bucket holds at most, time up to which it is spent


class Reasons:
    """The reasons of a pipeline, numbered. `names` lists (kind, reason) by counter; number 0 is ("drop", "other")."""

    def __init__(self, names: Iterable[str], rates: Mapping[str, int] | None = None) -> None:
        self.names: list[tuple[str, str]] = [("drop", "other")]
        self.verdicts: dict[int, tuple[str, str]] = {}
        for name in sorted({*names, *ENGINE_REASONS}):
            for kind in (DROP, PUNT):
                verdict = (kind << KIND_SHIFT) + reason_code(name)
                if verdict in self.verdicts:
                    clash = self.verdicts[verdict][1]
                    raise BadInput(f"drop reasons {name!r} and {clash!r} have the same hash", "rename one of them")
                self.verdicts[verdict] = (KINDS[kind], name)
                self.names.append((KINDS[kind], name))
        size = 64
        while size < 2 * len(self.names):
            size *= 2
        self.mask = size - 1
        self.rates = {**RATES, **(rates or {})}
        self.table = Arena(8 * size)
        for number, key in enumerate(self.names[1:], 1):
            verdict = next(v for v, k in self.verdicts.items() if k == key)
            slot = verdict & self.mask
            while load32(self.table.address + 8 * slot):
                slot = (slot + 1) & self.mask
            store32(self.table.address + 8 * slot, verdict)
            store32(self.table.address + 8 * slot + 4, number)

    def describe(self, verdict: int) -> tuple[str, str]:
        """The kind and the reason of a verdict word."""
        kind = KINDS[verdict >> KIND_SHIFT]
        return self.verdicts.get(verdict, (kind, "other" if kind in ("drop", "punt") else ""))

    def buckets(self) -> Arena:
        """Fresh token buckets for one worker, full: a tenth of a second's worth of punts, 64 at least."""
        arena = Arena(BUCKET * len(self.names))
        for number, (kind, name) in enumerate(self.names):
            rate = self.rates.get(name, DEFAULT_RATE) if kind == "punt" else 0
            cost = clock_hz() // rate if rate else 0
            store64(arena.address + BUCKET * number, cost)
            store64(arena.address + BUCKET * number + 8, cost * max(rate // 10, 64))
        return arena


@kernel
def number_of(table: int, mask: int, verdict: int) -> int:
    """The counter of a verdict word, `OTHER` if there is none."""
    slot = verdict & mask
    while True:
        at = table + 8 * slot
        found = load32(at)
        if found == verdict:
            return load32(at + 4)
        if found == 0:
            return OTHER
        slot = (slot + 1) & mask


@kernel
def take_token(buckets: int, number: int) -> bool:
    """Whether the rate limit of that counter lets one more through (a virtual-time token bucket)."""
    at = buckets + BUCKET * number
    cost = load64(at)
    if cost == 0:
        return True
    now = clock()
    spent = max(load64(at + 16), now - load64(at + 8))
    if spent + cost > now:
        return False
    store64(at + 16, spent + cost)
    return True
