"""Where every frame of a worker's memory is: what is lost a frame at a time stops a router after a week."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from libfp.jit import load64, load_acquire32, u32
from libfp.ports.rings import COMPLETION, CONSUMER, DESCS, FILL, MASK, OWN, PRODUCER, RX, TX

__all__ = ["FrameAccount", "frame_account"]


@dataclass(frozen=True)
class FrameAccount:
    """Frames of one worker by where they were found. `unseen` are with the kernel, in packets that it has not yet sent
    or received; `twice` are in two places at once, which must never be.

    Once traffic has ended, nothing is unseen but a frame or two a port that the kernel keeps for the next packet.
    """

    total: int
    free: int
    fill: int
    received: int
    to_send: int
    completed: int
    unseen: int
    twice: int


def frame_account(worker: Any) -> FrameAccount:
    """Look for every frame of `worker` (of `Application.workers`), which must not run: `worker.stop()` first."""
    state = worker.state
    memory = state.frames
    places: dict[str, list[int]] = {name: [] for name in ("free", "fill", "received", "to_send", "completed")}
    places["free"] = [load64(memory.free.at + 16 + 8 * n) for n in range(memory.free.count)]
    for number in range(len(state.open_ports)):
        at = state.blocks.rings(number).at
        places["received"] += _entries(at + RX, 16, load64(at + RX + OWN), _other(at + RX, PRODUCER))
        places["fill"] += _entries(at + FILL, 8, _other(at + FILL, CONSUMER), load64(at + FILL + OWN))
        places["to_send"] += _entries(at + TX, 16, _other(at + TX, CONSUMER), load64(at + TX + OWN))
        places["completed"] += _entries(
            at + COMPLETION, 8, load64(at + COMPLETION + OWN), _other(at + COMPLETION, PRODUCER)
        )
    found = Counter(offset // memory.stride for place in places.values() for offset in place)
    return FrameAccount(
        total=memory.frames,
        unseen=memory.frames - len(found),
        twice=sum(count > 1 for count in found.values()),
        **{name: len(offsets) for name, offsets in places.items()},
    )


def _other(ring: int, which: int) -> int:
    return load_acquire32(load64(ring + which))


def _entries(ring: int, size: int, first: int, end: int) -> list[int]:
    descs, mask = load64(ring + DESCS), load64(ring + MASK)
    return [load64(descs + size * ((first + n) & mask)) for n in range(u32(end - first))]
