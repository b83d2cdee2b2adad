"""What a tap records of a packet, and the ring it comes by: the side of whoever reads, in this process or another.

A ring: producer index and drop count on the worker's line, consumer index on the reader's, then slots of equal size,
one for each packet. A slot: the header, for each stage 8 bytes (kind and verdict after it), the first `snap` bytes of
the packet as it came in, and as it went out. Everything is little-endian or, as bytes, a packet's.

This module loads neither numba nor the rest of the engine: ``fp trace`` and ``fp capture`` use it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PRODUCER, DROPPED, CONSUMER, SLOTS = 0, 8, 64, 128

# Byte offsets in a slot.
TICKS, FRAME, LENGTH, PORT, VERDICT, NEXT_HOP, LENGTH_OUT, RAN, LOST, MARK = 0, 8, 16, 20, 24, 28, 32, 36, 40, 48
# In the upper half of LOST's 8 bytes: the stage that the packet began with here.
STAGES = 64
_HEADER = struct.Struct("<QQIIIIIIIIQ")

# How a punted packet was lost after all, in LOST.
DELIVERED, OVER_RATE, RING_FULL = 0, 1, 2
_LOSSES = {OVER_RATE: "punt-rate", RING_FULL: "punt-ring-full"}

# The page of ticks: pairs of ticks and packets, 16 bytes a row. First the whole burst (and how many bursts), then the
# parts of the loop around the stages, then each stage.
PARTS = (
    "counters", "mailbox", "hand-off", "each turn", "receive", "carry out", "transmit", "recycle", "system calls",
    "idle",
)  # fmt: skip
PAIR, STAGE_ROW = 16, 1 + len(PARTS)
ROW = {name: 1 + number for number, name in enumerate(PARTS)}

KIND_SHIFT, PORT_MASK = 28, 0xFFFF  # of a verdict word: see `libfp.packet.verdict`
KINDS = ("pass", "forward", "drop", "punt", "consume", "hand-off")


def stride_of(stages: int, snap: int) -> int:
    """Bytes of a slot, whole cache lines."""
    return (STAGES + 8 * stages + 2 * snap + 63) & ~63


def size_of(slots: int, stages: int, snap: int) -> int:
    """Bytes of a ring."""
    return SLOTS + slots * stride_of(stages, snap)


@dataclass(frozen=True)
class Verdict:
    """`kind` of `KINDS`, `reason` of a drop or punt, `port` index of one that is sent."""

    kind: str
    reason: str = ""
    port: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.reason}".strip()


class Verdicts:
    """Verdict words to names; `names` as `libfp.engine.reasons.Reasons.verdicts`, its keys perhaps from JSON."""

    def __init__(self, names: Mapping[Any, Sequence[str]]) -> None:
        self._names = {int(word): (kind, reason) for word, (kind, reason) in names.items()}

    def __call__(self, word: int) -> Verdict:
        kind = KINDS[min(word >> KIND_SHIFT, len(KINDS) - 1)]
        if kind == "forward":
            return Verdict(kind, "", word & PORT_MASK)
        if kind == "hand-off":
            return Verdict(kind, f"to worker {word & PORT_MASK}")
        return Verdict(kind, self._names.get(word, ("", "other" if kind in ("drop", "punt") else ""))[1])


@dataclass(frozen=True)
class Record:
    """One packet: when (ticks of the clock), where, how long, what it was and became, and what each stage left.

    `stages`: (kind of `libfp.packet.burst`, verdict) after each stage that it came to, from stage number `first` on:
    that is not 0 where another worker has handed it off, whose own record of it ends so. `verdict` is what became of it
    in the end: a packet that a stage forwards may be dropped because the port has no room. `lost` names why a punted
    packet did not reach Linux. `data` and `out` (of a forwarded packet) are cut at the tap's `snap`.
    """

    ticks: int
    frame: int
    port: int
    length: int
    length_out: int
    verdict: Verdict
    lost: str
    next_hop: int
    mark: int
    first: int
    stages: tuple[tuple[int, Verdict], ...]
    data: bytes
    out: bytes


class RingReader:
    """The consumer of one ring in `memory`, of `slots` slots (a power of 2)."""

    def __init__(self, memory: Any, *, slots: int, stages: int, snap: int, verdicts: Verdicts) -> None:
        self._memory, self._slots, self._stages, self._snap = memory, slots, stages, snap
        self._stride, self._verdicts = stride_of(stages, snap), verdicts
        self._own = self._word(CONSUMER)

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("=I", self._memory, at)[0])

    @property
    def dropped(self) -> int:
        """Packets that found no slot free."""
        return int(struct.unpack_from("=Q", self._memory, DROPPED)[0])

    def __len__(self) -> int:
        return (self._word(PRODUCER) - self._own) & 0xFFFFFFFF

    def read(self) -> Iterator[Record]:
        """Every packet that is there; each slot is given back when the next is asked for."""
        for _ in range(len(self)):
            yield self._record(SLOTS + (self._own & (self._slots - 1)) * self._stride)
            self._own = (self._own + 1) & 0xFFFFFFFF
            struct.pack_into("=I", self._memory, CONSUMER, self._own)

    def _record(self, at: int) -> Record:
        memory, verdicts = self._memory, self._verdicts
        head = _HEADER.unpack_from(memory, at)
        ticks, frame, length, port, word, next_hop, length_out, ran, lost, first, mark = head
        began, ended = at + STAGES + 8 * first, at + STAGES + 8 * min(ran, self._stages)
        steps = struct.iter_unpack("<II", memory[began:ended])
        verdict = verdicts(word)
        data = at + STAGES + 8 * self._stages
        out = data + self._snap
        sent = min(length_out, self._snap) if verdict.kind == "forward" else 0
        return Record(
            ticks,
            frame,
            port,
            length,
            length_out,
            verdict,
            _LOSSES.get(lost, ""),
            next_hop,
            mark,
            first,
            tuple((kind, verdicts(left)) for kind, left in steps),
            bytes(memory[data : data + min(length, self._snap)]),
            bytes(memory[out : out + sent]),
        )
