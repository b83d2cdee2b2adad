"""The handshake of a memif connection, either side, without its socket: messages go in, messages come out.

    session = ServerSession(find)         # or ClientSession(offer)
    for data, fd in session.receive(message, fds):
        send(data, fd)                    # fd is -1 where none goes with it
    session.links                         # once `session.connected`: one for each queue

A session owns the file descriptors it is given, and its regions, until `close`. What the peer says is checked before
it is used; what is wrong raises PeerUnsuitable, PeerGone for a disconnect, and the session is of no use then.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import select
from collections.abc import Callable
from dataclasses import dataclass

from libfp.errors import PeerGone, PeerUnsuitable
from libfp.jit import store16
from libfp.ports.memif_memory import (
    HEAD,
    MOST_REGIONS,
    POOL_REGION,
    Link,
    OwnMemory,
    Region,
    Ring,
    Share,
    buffer_sizes,
    check_ring,
    map_region,
)
from libfp.ports.memif_messages import (
    ETHERNET,
    MOST_LOG2,
    SECRET,
    TO_SERVER,
    VERSION,
    Ack,
    AddRegion,
    AddRing,
    Connect,
    Connected,
    Disconnect,
    Hello,
    Init,
    Message,
    parse,
    text,
    version_text,
)

NAME = b"libfp"
Out = list[tuple[bytes, int]]


@dataclass(frozen=True)
class Offer:
    """What one side wants. buffer_size: of a client its own, of a server what the client's must be, 0 for any."""

    name: str
    id: int
    secret: bytes
    queues: int
    log2: int
    buffer_size: int
    first_index: int = 0

    @property
    def size(self) -> int:
        return 1 << self.log2


class Session:
    """What both have in common."""

    def __init__(self) -> None:
        self.connected = False
        self.links: list[Link] = []
        #: eventfds of the rings that the peer consumes, by queue.
        self.events: dict[int, int] = {}
        self.peer = ""
        self._fds: list[int] = []

    def receive(self, data: bytes, fds: list[int]) -> Out:
        """Take a message and its file descriptors; return what to send."""
        self._fds += fds
        if len(fds) > 1:
            raise PeerUnsuitable(f"a message with {len(fds)} file descriptors", "one at most goes with a message")
        message = parse(data)
        if isinstance(message, Disconnect):
            raise PeerGone(f"the peer disconnects: {text(message.reason) or 'without a reason'}", "")
        replies = self._handle(message, fds[0] if fds else -1)
        return [(one.pack(), fd) for one, fd in replies]

    def _handle(self, message: Message, fd: int) -> list[tuple[Message, int]]:
        raise NotImplementedError

    def _unexpected(self, message: Message) -> PeerUnsuitable:
        what = f"a message {type(message).__name__.lower()} that has no place here"
        return PeerUnsuitable(what, "does the peer have the other role?")

    def kick(self, queue: int) -> None:
        """Wake the consumer of what we send by `queue`."""
        poll = select.poll()
        poll.register(self.events[queue], select.POLLOUT)
        os.set_blocking(self.events[queue], False)  # the peer can change that, too
        if poll.poll(0):  # else it would have us wait: it has been woken more often than can be counted
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self.events[queue], 1)

    def close(self) -> None:
        """Unmap and close everything. No worker may go by its links any more."""
        for link in self.links:
            link.close()
        self.links = []
        while self._fds:
            os.close(self._fds.pop())


class ServerSession(Session):
    """The server's side; `find(id)` is the offer of that interface, and raises what is wrong with it."""

    def __init__(self, find: Callable[[int], Offer]) -> None:
        super().__init__()
        self._find = find
        self.offer: Offer | None = None
        self.regions: list[Region] = []
        self._rings: dict[tuple[bool, int], Ring] = {}

    def hello(self, queues: int) -> bytes:
        """The first message; a client may have up to `queues` rings in either direction."""
        most = queues - 1
        return Hello(NAME, VERSION, VERSION, MOST_REGIONS - 1, most, most, MOST_LOG2).pack()

    def _handle(self, message: Message, fd: int) -> list[tuple[Message, int]]:
        if isinstance(message, Init) and self.offer is None:
            self._init(message)
        elif self.offer is None or self.connected:
            raise self._unexpected(message)
        elif isinstance(message, AddRegion):
            self._add_region(message, fd)
        elif isinstance(message, AddRing):
            self._add_ring(self.offer, message, fd)
        elif isinstance(message, Connect):
            self._connect(self.offer)
            self.peer = f"{self.peer} {text(message.name)}".strip()
            return [(Connected(NAME), -1)]
        else:
            raise self._unexpected(message)
        return [(Ack(), -1)]

    def _init(self, message: Init) -> None:
        if message.version != VERSION:
            what = f"version {version_text(message.version)}, and this is {version_text(VERSION)}"
            raise PeerUnsuitable(what, "use a peer that speaks memif 2.0")
        if message.mode != ETHERNET:
            raise PeerUnsuitable(f"an interface of mode {message.mode}", "only ethernet (0) is served")
        offer = self._find(message.id)
        if offer.secret and not hmac.compare_digest(offer.secret.ljust(SECRET, b"\0"), message.secret):
            raise PeerUnsuitable("a wrong secret", "give both sides the same")
        self.offer, self.peer = offer, text(message.name)

    def _add_region(self, message: AddRegion, fd: int) -> None:
        if fd < 0:
            raise PeerUnsuitable(f"region {message.index} without its file descriptor", "it goes with the message")
        if message.index != len(self.regions) or message.index >= MOST_REGIONS:
            what = f"region {message.index} where {len(self.regions)} is next, of {MOST_REGIONS} at most"
            raise PeerUnsuitable(what, "regions come in order")
        self.regions.append(map_region(fd, message.size))
        self._fds.remove(fd)  # mapped: it is not needed any more
        os.close(fd)

    def _add_ring(self, offer: Offer, message: AddRing, fd: int) -> None:
        way = bool(message.flags & TO_SERVER)
        name = f"ring {message.index} to the {'server' if way else 'client'}"
        if fd < 0 or os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
            raise PeerUnsuitable(f"{name} without an eventfd", "it goes with the message")
        if message.index >= offer.queues:
            raise PeerUnsuitable(f"{name}, and {offer.name} has {offer.queues} queues", f"queues={message.index + 1}")
        if (way, message.index) in self._rings:
            raise PeerUnsuitable(f"{name} a second time", "each ring comes once")
        if message.log2 > MOST_LOG2:
            raise PeerUnsuitable(f"{name} of 2^{message.log2} descriptors", f"2^{MOST_LOG2} are the most")
        ring = Ring(message.region, message.offset, 1 << message.log2)
        check_ring(name, self.regions, ring)
        self._rings[way, message.index] = ring
        if not way:
            self.events[message.index] = fd

    def _connect(self, offer: Offer) -> None:
        for way in (True, False):
            count = sum(1 for one in self._rings if one[0] == way)
            if count != offer.queues:
                what = f"{count} rings to the {'server' if way else 'client'}, and {offer.name} has {offer.queues}"
                raise PeerUnsuitable(f"{what} queues", "give both sides the same number of queues")
        for index in range(offer.queues):
            sizes = buffer_sizes(self.regions, self._rings[False, index]) - {offer.buffer_size}
            if offer.buffer_size and sizes:
                what = f"buffers of {min(sizes)} bytes, and {offer.name} wants {offer.buffer_size}"
                raise PeerUnsuitable(what, "give both sides the same buffer_size")
        for index in range(offer.queues):
            rings = self._rings[True, index], self._rings[False, index]
            self.links.append(Link(self.regions, *rings, client=False))
        self.connected = True

    def close(self) -> None:
        super().close()
        while self.regions:
            self.regions.pop().close()


class ClientSession(Session):
    """The client's side: makes the memory, and describes it to the server. Its buffers may be a pool's."""

    def __init__(self, offer: Offer, share: Share | None = None) -> None:
        super().__init__()
        self.offer, self._share = offer, share
        self._memory: OwnMemory | None = None
        self._to_say: list[tuple[Message, int]] = []

    def _handle(self, message: Message, fd: int) -> list[tuple[Message, int]]:
        if self.connected:
            raise self._unexpected(message)
        if isinstance(message, Hello) and self._memory is None:
            self._hello(message)
        elif isinstance(message, Connected) and self._memory is not None and not self._to_say:
            self.peer = f"{self.peer} {text(message.name)}".strip()
            self._begin(self._memory)
            return []
        elif not isinstance(message, Ack) or not self._to_say:
            raise self._unexpected(message)
        return [self._to_say.pop(0)]

    def _hello(self, message: Hello) -> None:
        offer = self.offer
        if not message.least_version <= VERSION <= message.most_version:
            spoken = f"{version_text(message.least_version)} to {version_text(message.most_version)}"
            what = f"versions {spoken}, and this is {version_text(VERSION)}"
            raise PeerUnsuitable(what, "use a peer that speaks memif 2.0")
        most = min(message.most_to_client, message.most_to_server) + 1
        if offer.queues > most:
            raise PeerUnsuitable(f"{most} queues at most, and {offer.name} has {offer.queues}", f"queues={most}")
        if offer.log2 > message.most_log2:
            what = f"rings of {1 << min(message.most_log2, 15)} at most, and {offer.name} has {offer.size}"
            raise PeerUnsuitable(what, "use a smaller ring_size")
        if self._share and message.most_region < POOL_REGION:
            raise PeerUnsuitable("a server that takes one region only", f"share no buffers by {offer.name}")
        self.peer = text(message.name)
        self._memory = memory = OwnMemory(offer.queues, offer.size, offer.buffer_size, offer.first_index, self._share)
        self._to_say = [(Init(VERSION, offer.id, ETHERNET, offer.secret, NAME), -1)]
        self._to_say += [(AddRegion(index, one.size), one.fd) for index, one in enumerate(memory.offered)]
        for number, ring in enumerate(memory.rings):
            way, index = int(number < offer.queues), number % offer.queues
            event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._fds.append(event)
            if way:
                self.events[index] = event
            self._to_say.append((AddRing(TO_SERVER * way, index, 0, ring.offset, offer.log2, 0), event))
        self._to_say.append((Connect(NAME), -1))

    def _begin(self, memory: OwnMemory) -> None:
        """DPDK's server has set all indexes to 0 when it connected, and may have sent something since."""
        queues, size, first = self.offer.queues, self.offer.buffer_size, self.offer.first_index
        for index in range(queues):
            send, receive = memory.rings[index], memory.rings[queues + index]
            store16(memory.region.address + receive.offset + HEAD, first + receive.size)
            link = Link([*memory.offered], receive, send, client=True, buffer_size=size, first=first)
            link.own_buffers(memory, queues + index, index)
            self.links.append(link)
        self.connected = True

    def close(self) -> None:
        super().close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
