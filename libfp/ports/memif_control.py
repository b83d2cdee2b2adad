"""The control channel: a thread for each socket, which listens for clients or connects to a server, again and again.

It waits for messages, for the peer's end (which the kernel tells, however the peer ends), and a few dozen times a
second looks whether a worker has caught the peer at lying, whether withdrawn memory can be freed, and whether a peer
that sleeps is to be woken: what workers, which make no system call, leave to others.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable

from libfp.errors import AlreadyRunning, BadInput, Error, PeerGone, PeerUnsuitable
from libfp.ports.memif_messages import SIZE, Disconnect
from libfp.ports.memif_session import ClientSession, Offer, ServerSession, Session
from libfp.ports.memif_wire import Wire

log = logging.getLogger("libfp.memif")

TICK, KICK_TICK, RETRY = 0.02, 0.001, 0.05  # seconds between two looks, and to the next attempt to connect
HANDSHAKE_SECONDS = 5.0
MOST_STRANGERS = 8  # clients whose handshake is under way


class _Connection:
    """A socket with its session, and the port's wire once it is known."""

    def __init__(self, sock: socket.socket, session: Session, wire: Wire | None) -> None:
        self.sock, self.session, self.wire = sock, session, wire
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS

    def receive(self) -> None:
        """Handle one message. Raises what the session raises, PeerGone at the end."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, SIZE + 1, 4, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerGone(f"the peer is gone: {error.strerror}", "") from None
        if not data and not fds:
            raise PeerGone("the peer is gone", "")
        was = self.session.connected
        replies = self.session.receive(data, fds)
        if self.session.connected and not was and self.wire is not None:
            self.wire.publish(self.session)
        for message, fd in replies:
            self.send(message, fd)

    def send(self, message: bytes, fd: int = -1) -> None:
        try:
            socket.send_fds(self.sock, [message], [fd] if fd >= 0 else [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            raise PeerGone(f"the peer is gone: {error.strerror}", "") from None

    def end(self, why: str) -> None:
        """Say why, if the peer still listens, and close it."""
        with contextlib.suppress(Error):
            self.send(Disconnect(0, why.encode("ascii", "replace")[:95]).pack())
        self.sock.close()
        if self.wire is not None:
            self.wire.withdraw(self.session)
        else:
            self.session.close()


class Control:
    """Base: the thread and its connections. `address` is a path, or begins with a zero byte for an abstract one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._connections: list[_Connection] = []
        self._stop = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Let peers come. Nothing happens the second time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="libfp-memif", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread and all connections."""
        self._stop.set()
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        for one in self._connections:
            one.end("the interface is closed")
        self._connections.clear()
        os.close(self._wake)

    def _wires(self) -> list[Wire]:
        raise NotImplementedError

    def _files(self) -> list[socket.socket]:
        """What to wait for besides the connections."""
        return []

    def _turn(self, ready: set[int]) -> None:
        """What a role does besides."""

    def _run(self) -> None:
        pause = TICK
        while not self._stop.is_set():
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            for sock in [*self._files(), *(one.sock for one in self._connections)]:
                poll.register(sock, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(1000 * pause)}
            if self._stop.is_set():
                break
            for one in list(self._connections):
                self._guarded(one, functools.partial(self._serve, one, one.sock.fileno() in ready))
            self._turn(ready)
            wanted = False
            for wire in self._wires():
                wire.sweep()
                wanted |= wire.interrupt()
            pause = KICK_TICK if wanted else TICK

    def _serve(self, one: _Connection, ready: bool) -> None:
        if ready:
            one.receive()
        if one.session.connected and one.wire is not None:
            one.wire.check()
        elif time.monotonic() > one.deadline:
            raise PeerUnsuitable("a handshake that does not come to its end", "does the peer speak memif?")

    def _guarded(self, one: _Connection, action: Callable[[], None]) -> None:
        """`action`; if it fails, so does the connection."""
        try:
            try:
                action()
            except (OSError, MemoryError) as failure:
                raise PeerUnsuitable(f"what cannot be used: {failure}", "look at the limits of this process") from None
        except Error as error:
            self._connections.remove(one)
            if one.wire is None:
                log.warning("memif %s: %s", shown(self.address), error)
            elif isinstance(error, PeerGone):  # which one that tries again and again says often, until it is connected
                log.log(logging.INFO if one.session.connected else logging.DEBUG, "%s: %s", one.wire.offer.name, error)
            else:
                one.wire.failed(error)
            one.end(error.what)


class Listener(Control):
    """The servers of one socket, by id."""

    _all: dict[str, Listener] = {}  # noqa: RUF012
    _lock = threading.Lock()

    def __init__(self, address: str, mode: int) -> None:
        super().__init__(address)
        self.ports: dict[int, Wire] = {}
        try:
            self._sock = _listen(address, mode)
        except BaseException:
            os.close(self._wake)
            raise

    @classmethod
    def join(cls, address: str, mode: int, wire: Wire) -> Listener:
        """The listener of `address`, which also serves `wire` now. Raises AlreadyRunning, BadInput."""
        with cls._lock:
            one = cls._all.get(address)
            if one is not None and wire.offer.id in one.ports:
                raise AlreadyRunning(f"{shown(address)} has an interface {wire.offer.id}", "give each its own id")
            if one is None:
                one = cls._all[address] = cls(address, mode)
            one.ports[wire.offer.id] = wire
            return one

    def leave(self, wire: Wire) -> None:
        """Serve `wire` no more; the last one closes the socket."""
        with self._lock:
            self.ports.pop(wire.offer.id, None)
            if not self.ports:
                del self._all[self.address]
                self.close()
                self._sock.close()
                if not self.address.startswith("\0"):
                    with contextlib.suppress(OSError):
                        os.unlink(self.address)
                return
        os.eventfd_write(self._wake, 1)

    def _wires(self) -> list[Wire]:
        return list(self.ports.values())

    def _files(self) -> list[socket.socket]:
        return [self._sock]

    def _find(self, one: _Connection, number: int) -> Offer:
        wire = self.ports.get(number)
        if wire is None:
            raise PeerUnsuitable(
                f"no interface {number} here", f"there are {', '.join(map(str, self.ports)) or 'none'}"
            )
        if any(other.wire is wire for other in self._connections):
            raise PeerUnsuitable(f"interface {number} has a peer already", "one peer an id")
        wire.wait_free()
        one.wire = wire
        return wire.offer

    def _turn(self, ready: set[int]) -> None:
        for one in list(self._connections):
            if one.wire is not None and self.ports.get(one.wire.offer.id) is not one.wire:
                self._connections.remove(one)
                one.end("the interface is closed")
        if self._sock.fileno() not in ready:
            return
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return
        if sum(1 for one in self._connections if not one.session.connected) >= MOST_STRANGERS:
            sock.close()
            return
        made: list[_Connection] = []
        session = ServerSession(lambda number: self._find(made[0], number))
        made.append(_Connection(sock, session, None))
        self._connections += made
        queues = max((wire.offer.queues for wire in self._wires()), default=1)
        self._guarded(made[0], lambda: made[0].send(session.hello(queues)))


class Dialler(Control):
    """The client of one port: connects, and again when the server has gone."""

    def __init__(self, address: str, wire: Wire) -> None:
        super().__init__(address)
        self.wire = wire
        self._next = 0.0

    def _wires(self) -> list[Wire]:
        return [self.wire]

    def _turn(self, ready: set[int]) -> None:
        if self._connections or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + RETRY
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            self.wire.wait_free()
            sock.connect(self.address)
        except PeerUnsuitable:
            sock.close()  # a worker stands
        except OSError as error:
            sock.close()
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN):
                self.wire.failed(
                    BadInput(f"cannot connect to {shown(self.address)}: {error.strerror}", "name a socket")
                )
        else:
            self._connections.append(_Connection(sock, ClientSession(self.wire.offer, self.wire.share), self.wire))

    def leave(self, wire: Wire) -> None:
        """End."""
        self.close()


def shown(address: str) -> str:
    return "@" + address[1:] if address.startswith("\0") else address


def _listen(address: str, mode: int) -> socket.socket:
    """Listen at `address`. A socket file that nobody listens at is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if not address.startswith("\0") and os.path.lexists(address):
            _remove_stale(address)
        try:
            sock.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(address) from None
            raise BadInput(f"cannot listen at {shown(address)}: {error.strerror}", "name another socket") from None
        if not address.startswith("\0"):
            os.chmod(address, mode)
        sock.listen(16)
        sock.setblocking(False)
        return sock
    except BaseException:
        sock.close()
        raise


def _in_use(address: str) -> AlreadyRunning:
    return AlreadyRunning(f"memif socket {shown(address)} is in use", "name another one, or be its client")


def _remove_stale(address: str) -> None:
    if not stat.S_ISSOCK(os.lstat(address).st_mode):
        raise BadInput(f"{address} is no socket", "name another one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
        except OSError:
            raise _in_use(address) from None
        else:
            raise _in_use(address)
