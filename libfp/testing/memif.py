"""The far end of a memif port, in plain Python: for tests of pipelines on `MemifPort`s, and of the ports themselves.

with MemifPeer("peer", socket="@wire", role="client") as peer:
    peer.wait()
    peer.send([packet])
    assert peer.receive() == [packet]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from libfp.jit import load16, load32, load64, load_acquire16, store64, store_release16
from libfp.jit.memory import view
from libfp.ports.memif import MemifPort
from libfp.ports.memif_memory import (
    BASE,
    BIAS,
    BUFFER_SIZE,
    BUFFERS,
    FIRST,
    LINK_RX,
    LINK_TX,
    MASK,
    OURS,
    POOL,
    REGIONS,
    RING,
    THEIRS,
    Share,
)
from libfp.ports.memif_session import ClientSession, Offer, ServerSession, Session
from libfp.testing.wait import wait_until

__all__ = ["FarEnd", "MemifPeer"]

_NEXT = 1


class FarEnd:
    """One queue of a connection, given its link's address, from Python."""

    def __init__(self, link: int) -> None:
        self.link = link
        self.received, self.sent = self.word(LINK_RX, FIRST), self.word(LINK_TX, FIRST)

    def word(self, part: int, which: int) -> int:
        """A word of the link, see `libfp.ports.memif_memory`."""
        return load64(self.link + part + which)

    def descriptor(self, part: int, index: int) -> int:
        """The address of a slot's descriptor."""
        return self.word(part, RING) + 16 * (index & self.word(part, MASK))

    def _buffer(self, part: int, index: int) -> tuple[int, int]:
        """Address and size."""
        desc, own = self.descriptor(part, index), self.word(part, BUFFERS)
        first, second = load64(desc), load64(desc + 8) & 0xFFFFFFFF
        if own:
            offset = load32(own + 4 * (index & self.word(part, MASK)))
            return load64(self.link + BASE) + offset, self.word(part, BUFFER_SIZE)
        return load64(load64(self.link + REGIONS) + 16 * (first >> 16 & 0xFFFF)) + second, first >> 32 & 0xFFFFFFFF

    @property
    def room(self) -> int:
        """How many buffers may be sent."""
        limit = load_acquire16(self.word(LINK_TX, THEIRS)) + self.word(LINK_TX, BIAS)
        return (limit - self.sent) & 0xFFFF

    def send(self, packets: Iterable[bytes], piece: int = 1 << 16) -> int:
        """Send as many as there is room for, in pieces of at most `piece` bytes; return how many."""
        count = 0
        for packet in packets:
            at, index, room = 0, self.sent, self.room
            while at < len(packet) or at == 0:
                if room == 0:
                    return count
                address, size = self._buffer(LINK_TX, index)
                part = packet[at : at + min(size, piece)]
                view(address, len(part))[:] = part
                at += max(len(part), 1)
                desc = self.descriptor(LINK_TX, index)
                region = load64(desc) & 0xFFFF0000
                if self.word(LINK_TX, BUFFERS):
                    store64(desc + 8, address - load64(self.link + BASE))
                    region = load64(self.link + POOL)
                store64(desc, len(part) << 32 | region | (_NEXT if at < len(packet) else 0))
                index, room = index + 1, room - 1
            self.sent = index & 0xFFFF
            store_release16(self.word(LINK_TX, OURS), self.sent)
            count += 1
        return count

    def receive(self) -> list[bytes]:
        """What has come since the last call."""
        packets, packet = [], b""
        while self.received != load_acquire16(self.word(LINK_RX, THEIRS)):
            desc = self.descriptor(LINK_RX, self.received)
            length = load64(desc) >> 32 & 0xFFFFFFFF
            packet += bytes(view(self._buffer(LINK_RX, self.received)[0], length))
            if not load16(desc) & _NEXT:
                packets.append(packet)
                packet = b""
            if self.word(LINK_RX, BUFFERS):
                address, size = self._buffer(LINK_RX, self.received)
                store64(desc, size << 32 | load64(self.link + POOL))
                store64(desc + 8, address - load64(self.link + BASE))
            self.received = (self.received + 1) & 0xFFFF
        store_release16(self.word(LINK_RX, OURS), self.received + self.word(LINK_RX, BIAS))
        return packets


class MemifPeer:
    """A `MemifPort` (whose arguments these are) without an engine: Python sends and receives on queue `queue`."""

    def __init__(self, name: str, **options: Any) -> None:
        self.port = MemifPort(name, **options)
        self._ends: dict[int, FarEnd] = {}
        self.port._open()
        assert self.port._control is not None
        self.port._control.start()

    def wait(self, timeout: float = 5.0) -> None:
        """Until there is a peer, other than the one before."""
        self._ends = {}
        wait_until(lambda: self.port.connected, timeout, f"{self.port.name}'s peer")

    def end(self, queue: int = 0) -> FarEnd:
        """One queue of the connection there is."""
        session = self.port.wire.session
        assert session is not None, "not connected"
        if queue not in self._ends:
            self._ends[queue] = FarEnd(session.links[queue].address)
        return self._ends[queue]

    def send(self, packets: Iterable[bytes], queue: int = 0, **options: Any) -> int:
        """See `FarEnd.send`."""
        return self.end(queue).send(packets, **options)

    def receive(self, queue: int = 0) -> list[bytes]:
        """See `FarEnd.receive`."""
        return self.end(queue).receive()

    def close(self) -> None:
        """Leave the peer."""
        self.port.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shake_hands(
    server: Offer,
    client: Offer,
    alter: Callable[[bytes, int], tuple[bytes, int]] = lambda data, fd: (data, fd),
    share: Share | None = None,
) -> tuple[ServerSession, ClientSession]:
    """Both sides' sessions, connected without a socket. `alter` may change what the client says, and the file; the
    client's buffers may be of a pool."""
    one, two = ServerSession(lambda number: server), ClientSession(client, share)
    to_client = [(one.hello(server.queues), -1)]
    try:
        while to_client:
            to_server = [alter(*said) for said in _say(two, to_client)]
            to_client = _say(one, to_server)
    except BaseException:
        one.close()
        two.close()
        raise
    return one, two


def _say(listener: Session, said: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    return [reply for data, fd in said for reply in listener.receive(data, [os.dup(fd)] if fd >= 0 else [])]
