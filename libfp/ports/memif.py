"""A port to another process on this host, without a kernel: memif 2.0, as VPP, DPDK and container networks speak it.

    MemifPort("vpp", socket="/run/vpp/memif.sock", role="client", id=3)

What is copied, and why. The peer maps the regions in which its packets arrive, and can change them at any time; and a
peer must not see what is meant for another one. So a packet is neither judged where the peer can still change it, nor
are our own frames ever in memory that a peer maps:

- receiving copies a packet from the region into a frame of the worker's, and stages read that: what decides was read
  once, and stays as it was read. Where all stages of the pipeline say that they look at no more than headers
  (`stage.headers_only`; the shared ones do), only the first 192 bytes are copied, and the rest stays with the peer;
- transmitting copies the frame to the buffer in the other peer's region, and what is still with the first peer
  straight from there. Then, a turn later, the first peer gets its buffers back.

So payload is copied once between two memif ports, headers twice, in cache the second time; with a stage that looks at
payload the whole packet is copied twice, as DPDK does always. Alternatives: stages that read in place judge what may
change afterwards; frames in memory that the receiving peer maps save the second copy, and show that peer what policy
keeps from it; moving descriptors from peer to peer does too. A peer can change payload until it is copied out, which
it could have sent in the first place.

`share` is for peers that trust each other: ports of one name offer the same region of buffers, and payload that comes
by one of them and leaves by another is not copied at all; each of these peers can read and write what passes between
all of them, also after it was judged.

Everything of the protocol is in the modules beside this one: `memif_messages` (what is said), `memif_session` (in which
order), `memif_control` (sockets), `memif_memory` (regions and rings), `memif_rings` (the worker's side), `memif_wire`
(what is between the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from libfp.errors import BadInput, Error, FrameTooSmall
from libfp.jit import store64
from libfp.ports.frames import HEADERS, BlockWords, FrameMemory, OpenPort
from libfp.ports.memif_control import Dialler, Listener
from libfp.ports.memif_memory import HEADROOM, MOST_BYTES, Pool, Share, own_bytes
from libfp.ports.memif_messages import MOST_LOG2, SECRET
from libfp.ports.memif_rings import (
    FRAME_SHIFT,
    FREE,
    MEMORY,
    RESTS,
    ROOM,
    SPLIT,
    STAGE,
    TARGETS,
    WATCHED,
    WHOLE,
    MemifBlock,
    MemifRings,
)
from libfp.ports.memif_session import Offer
from libfp.ports.memif_wire import Wire
from libfp.ports.rings import BLOCK, COUNTERS, DESCS, MASK, TX, PortBlocks

LEAST = 1514  # bytes of a packet that frames must hold


class MemifPort:
    """Interface `id` of the socket at `socket`: a path, or "@name" for an abstract one.

    role: the server listens and the client connects (again, whenever the server has gone); the client makes the shared
    memory: `ring_size` packets in each ring, a power of 2, of `buffer_size` bytes each, longer ones in several. To a
    server that is the client's affair; a `buffer_size` given all the same must be the client's. secret: both sides the
    same, 23 bytes at most. queues: as many as workers, on both sides. mode: of the server's socket file. share: clients
    of one name move packets to each other instead of copying them, and the peer of each can read and change those of
    all. first_index: where a client has the indexes begin (just below 2^16, to see them wrap).

    Packets for a peer that is not there are dropped ("tx-full"). `connected` and `error` (what went wrong last) say
    how it stands. Raises BadInput.
    """

    rings = MemifRings

    def __init__(
        self,
        name: str,
        *,
        socket: str,
        role: Literal["server", "client"] = "client",
        id: int = 0,  # noqa: A002
        secret: str | bytes = b"",
        ring_size: int = 1024,
        buffer_size: int | None = None,
        queues: int = 1,
        mode: int = 0o600,
        share: str = "",
        first_index: int = 0,
    ) -> None:
        if role not in ("server", "client"):
            raise BadInput(f"{name}: no role {role!r}", "server or client")
        if ring_size & (ring_size - 1) or not 2 <= ring_size <= 1 << MOST_LOG2:
            raise BadInput(f"{name}: a ring of {ring_size}", f"a power of 2, {1 << MOST_LOG2} at most")
        if buffer_size is not None and (buffer_size % 64 or not 64 <= buffer_size <= 1 << 16):
            raise BadInput(f"{name}: buffers of {buffer_size} bytes", "a multiple of 64, 65,536 at most")
        if not 0 < queues <= 255:
            raise BadInput(f"{name}: {queues} queues", "1 to 255, as many as workers")
        if not 0 <= id < 1 << 32:
            raise BadInput(f"{name}: id {id}", "a number of 32 bits")
        if not socket or len(socket.encode()) > 107:
            raise BadInput(f"{name}: a socket {socket!r}", "a path, or @name, of 107 bytes at most")
        given = secret.encode() if isinstance(secret, str) else bytes(secret)
        if len(given) >= SECRET or b"\0" in given:
            raise BadInput(f"{name}: a secret that cannot be sent", f"{SECRET - 1} bytes at most, none of them 0")
        self.name, self.role, self.ring_size, self.queues, self.mode = name, role, ring_size, queues, mode
        self.socket = "\0" + socket[1:] if socket.startswith("@") else socket
        if share and role != "client":
            raise BadInput(f"{name}: a server that shares buffers", "the client makes them: role=client")
        size = buffer_size or (2048 if role == "client" else 0)
        if (total := own_bytes(queues, ring_size, size)) > MOST_BYTES:
            what = f"{name}: {queues} queues of {ring_size} buffers of {size} bytes, {total} bytes in all"
            raise BadInput(what, f"{MOST_BYTES >> 30} GiB at most, all that an offset of 32 bits reaches")
        self.share = share
        self.wire = Wire(Offer(name, id, given, queues, ring_size.bit_length() - 1, size, first_index))
        self._control: Listener | Dialler | None = None

    @staticmethod
    def open_all(ports: Sequence[MemifPort], queue: int, frames: FrameMemory) -> list[OpenPort]:
        """See `libfp.ports.frames.Port`. Peers come from `take` on. Raises AlreadyRunning for a socket in use."""
        for port in ports:
            if queue >= port.queues:
                remedy = f"queues={queue + 1}, on both sides"
                raise BadInput(f"{port.name} has {port.queues} queues, too few for {queue + 1} workers", remedy)
            if frames.frame_size < HEADROOM + LEAST:
                raise FrameTooSmall(f"{port.name}: frames of {frames.frame_size} bytes", "frame_size=2048 or more")
        share_buffers([port for port in ports if port.wire.share is None])
        for port in ports:
            port._open()
        opened: list[OpenPort] = []
        for port in ports:
            opened.append(
                OpenMemif(port.wire, queue, MemifBlock(frames.frames, opened[0].resource if opened else None))
            )
        return opened

    def _open(self) -> None:
        if self._control is None and self.role == "server":
            self._control = Listener.join(self.socket, self.mode, self.wire)
        elif self._control is None:
            self._control = Dialler(self.socket, self.wire)

    @property
    def connected(self) -> bool:
        """Whether there is a peer."""
        return self.wire.connected

    @property
    def error(self) -> Error | None:
        """Why the last peer was refused or given up; None if it was not."""
        return self.wire.error

    def take(self, queue: int) -> None:
        """Let a peer come, if none has. Raises BadInput where there are fewer workers than queues."""
        if len(self.wire.blocks) < self.queues:
            what = f"{self.name} has {self.queues} queues, and {len(self.wire.blocks)} workers"
            raise BadInput(what, f"give it queues={len(self.wire.blocks)}, or more cores")
        if self._control is not None:
            self._control.start()

    def leave(self, queue: int) -> None:
        """There is nobody to leave the packets to: they wait."""

    def close(self) -> None:
        """Say goodbye to the peer."""
        if self._control is not None:
            self._control.leave(self.wire)
            self._control = None
        self.wire.close()

    def __repr__(self) -> str:
        return f"MemifPort({self.name!r}, {self.role}, id={self.wire.offer.id})"


def share_buffers(ports: Sequence[MemifPort]) -> None:
    """Make the pools of those ports that are to share their buffers. Raises BadInput."""
    for name in dict.fromkeys(port.share for port in ports if port.share):
        group = [port for port in ports if port.share == name]
        if len(group) == 1:
            raise BadInput(f"{group[0].name} shares buffers with no other port", f"say share={name} for those too")
        sizes, names = {port.wire.offer.buffer_size for port in group}, " and ".join(port.name for port in group)
        if len(sizes) > 1:
            what = f"{names} share buffers of {min(sizes)} and {max(sizes)} bytes"
            raise BadInput(what, "give them the same buffer_size")
        pool = Pool(names, [2 * port.queues * port.ring_size for port in group], sizes.pop())
        for port, table in zip(group, pool.tables, strict=True):
            port.wire.share = Share(pool, table)


class OpenMemif(OpenPort):
    """One queue of a port, open for one worker."""

    def __init__(self, wire: Wire, queue: int, block: MemifBlock) -> None:
        self._wire, self._queue, self.resource = wire, queue, block
        self.fd, self.zero_copy, self.flight_limit = -1, False, 0

    def fill_in(self, blocks: PortBlocks, number: int, frames: FrameMemory, asked: BlockWords) -> None:
        at, made = blocks.arena.address + number * BLOCK, self.resource
        values = {
            TX + DESCS: made.stage,
            TX + MASK: STAGE - 1,
            TARGETS: made.targets,
            RESTS: made.rests,
            FREE: frames.free.at,
            MEMORY: frames.address,
            ROOM: frames.frame_size - HEADROOM,
            FRAME_SHIFT: frames.stride.bit_length() - 1,
            COUNTERS: asked.counters,
            WATCHED: asked.watched,
            SPLIT: HEADERS if asked.headers_only else WHOLE,
        }
        for offset, value in values.items():
            store64(at + offset, value)
        self._wire.attach(self._queue, at)

    def close(self) -> None:
        self._wire.detach(self._queue)
        self.resource.close()
