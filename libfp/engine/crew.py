"""The workers of one application as they lend each other frames: who takes packets, and the lanes between them.

The control plane's side of `libfp.engine.handoff`. A worker's frames may be in any other's hands, so the memory of all
is freed only when all have ended.
"""

from __future__ import annotations

import os

from libfp.engine.context import HEARTBEAT, LENDING, PARKED, RETURNED, STATISTICS, ContextMemory
from libfp.engine.handoff import (
    BACK,
    COUNT,
    HOME,
    IN,
    LANE,
    LENT,
    LINE,
    LINES,
    ONE,
    OUT,
    PEER,
    ROLL,
    ROOM,
    TAKES,
    UMEM,
    WAKE,
    Lane,
)
from libfp.errors import Error
from libfp.jit import Arena, load64, load_acquire64, store64, store_release64
from libfp.packet.verdict import DROP, KIND_SHIFT, reason_code
from libfp.ports.frames import FrameMemory
from libfp.rings.spsc import Spsc

_NOT_TAKEN = (DROP << KIND_SHIFT) + reason_code("bad-worker")


class Crew:
    """For up to `room` workers."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.roll = Arena(TAKES + 8 * room)
        self.members: list[Member] = []
        self._dismissed: list[Member] = []
        self._lanes: dict[tuple[int, int], tuple[Spsc, Spsc]] = {}

    def join(self, number: int, context: ContextMemory, frames: FrameMemory) -> Member:
        """Worker `number`, the next there is, has lanes to and from all; it takes no packets yet."""
        if number != len(self.members) or number >= self.room:
            raise Error(f"worker {number} in place of one whose frames are still lent", "restart the application")
        member = Member(self, number, context, frames)
        self.members.append(member)
        for other in self.members:
            self._connect(member, other)
            if other is not member:
                self._connect(other, member)
        store_release64(self.roll.address + COUNT, len(self.members))
        return member

    def _connect(self, lender: Member, borrower: Member) -> None:
        pair = lender.number, borrower.number
        if pair not in self._lanes:
            self._lanes[pair] = Spsc(LANE, element=16), Spsc(LANE, element=16)
        there, back = self._lanes[pair]
        store64(lender.line(borrower) + OUT, there.view.base)
        store64(lender.line(borrower) + HOME, back.view.base)
        store64(borrower.line(lender) + IN, there.view.base)
        store64(borrower.line(lender) + BACK, back.view.base)
        store64(borrower.line(lender) + UMEM, lender.frames.address)
        store64(lender.line(borrower) + PEER, borrower.block.address)

    def dismiss(self, member: Member) -> bool:
        """The last to have joined has ended before it was of use; whether its memory may be freed: no frame is lent.

        The lanes and its block stay, since others may be looking at them.
        """
        if member.lent or any(load64(other.line(member) + LENT) for other in self.members):
            return False
        self.members.remove(member)
        self._dismissed.append(member)
        store_release64(self.roll.address + COUNT, len(self.members))
        return True

    def close(self) -> None:
        """All workers have ended."""
        for lanes in self._lanes.values():
            for lane in lanes:
                lane.close()
        for member in (*self.members, *self._dismissed):
            os.close(member.wake)
            member.block.close()
        self.roll.close()


class Member:
    """One worker's part."""

    def __init__(self, crew: Crew, number: int, context: ContextMemory, frames: FrameMemory) -> None:
        self.crew, self.number, self.context, self.frames = crew, number, context, frames
        self.block = Arena(LINES + LINE * crew.room)
        store64(self.block.address + ROLL, crew.roll.address)
        store64(self.block.address + ROOM, crew.room)
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        store64(self.block.address + WAKE, self.wake)
        store64(self.block.address + ONE, 1)
        context.set(LENDING, self.block.address)

    def line(self, other: Member) -> int:
        return self.block.address + LINES + LINE * other.number

    @property
    def lent(self) -> int:
        """Frames that others have at the moment."""
        return sum(load64(self.line(other) + LENT) for other in self.crew.members)

    def takes(self, yes: bool) -> None:
        """Let others hand packets off to it, or not: they drop those by name then."""
        store_release64(self.crew.roll.address + TAKES + 8 * self.number, int(yes))

    def beats(self) -> list[int]:
        """How often each has turned: for `is_quiet`."""
        return [load_acquire64(_statistics(other) + HEARTBEAT) for other in self.crew.members]

    def is_quiet(self, since: list[int]) -> bool:
        """Whether nobody has a packet for it, and nobody that works one of it; the others have turned since `beats`."""
        for other, beat, now in zip(self.crew.members, since, self.beats(), strict=False):
            line, works = self.line(other), load64(self.crew.roll.address + TAKES + 8 * other.number)
            turned = now >= beat + 2 or load_acquire64(_statistics(other) + PARKED) != 0
            if not turned or len(Lane(load64(line + IN))) or (works and load64(line + LENT)):
                return False
        return True

    def give_up(self) -> None:
        """Its thread has ended: what others have lent it and it has not looked at goes back, to be dropped."""
        for other in self.crew.members:
            lane, back = Lane(load64(self.line(other) + IN)), Lane(load64(self.line(other) + BACK))
            there = lane.peek(LANE)
            for i in range(0, there, 2):
                slot, source = back.slot(i), lane.item(i)
                for word in (0, 8, 24):
                    store64(slot + word, load64(source + word))
                store64(slot + 16, _NOT_TAKEN)
            lane.release(there)
            back.commit(there)

    def recover(self) -> None:
        """Its thread does not run yet: what came home while it stood is free, whatever was to become of it."""
        for other in self.crew.members:
            line = self.line(other)
            lane = Lane(load64(line + HOME))
            there = lane.peek(LANE)
            for i in range(0, there, 2):
                self.frames.free.push(load64(lane.item(i)) & ((1 << 48) - 1))
            lane.release(there)
            store64(line + LENT, load64(line + LENT) - there // 2)
            returned = _statistics(self) + RETURNED
            store64(returned, load64(returned) + there // 2)


def _statistics(member: Member) -> int:
    return load64(member.context.arena.address + STATISTICS)
