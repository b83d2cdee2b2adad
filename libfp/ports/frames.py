"""The memory packets live in: a UMEM of equal frames, owned by one worker and shared by all its ports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from libfp.jit import Arena, store64
from libfp.jit import memory as _memory
from libfp.ports.rings import STACK, FreeFrames, PortBlocks, RingAddresses

#: Bytes of a packet that a stage may look at that says it looks at headers only (`libfp.stage.headers_only`).
HEADERS = 192


class FrameMemory:
    """A UMEM of `frames` frames of `frame_size` bytes (a power of 2), and the stack of those that are free.

    `guard` puts an unreadable page after every frame, for finding accesses outside a packet: packets that memory
    ports receive then end ("end") or begin ("start") exactly at such a page. Frames are then one page, whatever
    `frame_size` says.
    """

    def __init__(
        self, frames: int, frame_size: int = 2048, *, guard: Literal["", "end", "start"] = "", huge: bool = True
    ) -> None:
        self.frames, self.guard = frames, guard
        self.frame_size = _memory.PAGE if guard else frame_size
        self.stride = 2 * _memory.PAGE if guard else frame_size
        self.arena = Arena(frames * self.stride, huge=huge and not guard)
        self.address, self.size = self.arena.address, self.arena.size
        if guard:
            _memory.unregister(self.address)
            for frame in range(frames):
                _memory.protect(self.address + frame * self.stride + _memory.PAGE, _memory.PAGE)
                _memory.register(self.address + frame * self.stride, _memory.PAGE)
        self._stack = Arena(STACK + 8 * frames)
        self.free = FreeFrames(self._stack.address)
        self.reset()

    def reset(self) -> None:
        """Make every frame free again; only while nobody uses them."""
        store64(self._stack.address, 0)
        store64(self._stack.address + 8, self.frames)
        store64(self._stack.address + 16, -self.stride)
        for frame in reversed(range(self.frames)):
            self.free.push(frame * self.stride)

    def close(self) -> None:
        """Unmap it. No socket and no worker may use it any more."""
        self.arena.close()
        self._stack.close()


class BlockWords(NamedTuple):
    """What a port's block says that the port does not know: where its counters are; where a word is that is not 0
    while somebody looks at whole packets; whether the stages look at no more than a packet's headers."""

    counters: int
    watched: int
    headers_only: bool


@dataclass
class OpenPort:
    """One queue of a port, open for one worker: its rings (rx, tx, fill, completion), and what to poll.

    `resource` is closed with it; `flight_limit` caps the frames handed to tx that have not come back.
    """

    rings: tuple[RingAddresses, RingAddresses, RingAddresses, RingAddresses]
    fd: int
    zero_copy: bool
    flight_limit: int
    resource: Any

    def fill_in(self, blocks: PortBlocks, number: int, frames: FrameMemory, asked: BlockWords) -> None:
        """Write the block of a worker's port `number`."""
        blocks.fill_in(
            number,
            self.rings,
            counters=asked.counters,
            flight_limit=self.flight_limit,
            fd=self.fd,
            umem_size=frames.size,
            zero_copy=self.zero_copy,
        )

    def close(self) -> None:
        """Close the queue's socket, and what belongs to it."""
        self.resource.close()


class Port(Protocol):
    """One way in and out. Queue i belongs to worker i."""

    name: str

    @staticmethod
    def open_all(ports: Any, queue: int, frames: FrameMemory) -> list[OpenPort]:
        """Open `queue` of all `ports`, which are of this class, over one UMEM."""

    def take(self, queue: int) -> None:
        """Let the queue's packets come to the worker."""

    def leave(self, queue: int) -> None:
        """Let the queue's packets go to Linux instead."""

    def close(self) -> None:
        """Give up everything but the open queues, which have been closed before."""
