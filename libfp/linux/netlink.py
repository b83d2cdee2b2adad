"""Netlink framing: messages and attributes in a receive buffer, and the sockets that bring them.

Everything here is pure bytes and one socket; what the payloads mean is in `libfp.linux.rtnetlink`. The kernel is
trusted to decide, not to be well-formed: a length that does not fit is `Malformed`, which a reader answers with a new
dump, and never with a crash. Integers are in host byte order, as netlink has them; addresses stay network-order bytes.
"""

from __future__ import annotations

import errno
import functools
import operator
import os
import select
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self

from libfp.errors import Error, MissingCapability

NETLINK_ROUTE, NETLINK_XFRM, NETLINK_NETFILTER = 0, 6, 12
SOL_NETLINK, ADD_MEMBERSHIP, GET_STRICT_CHK = 270, 1, 12

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x01, 0x04, 0x10, 0x300
NLM_F_REPLACE, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x400, 0x800
NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN, NLMSG_MIN_TYPE = 1, 2, 3, 4, 16
NLA_TYPE_MASK = 0x3FFF  # the two high bits say "nested" and "network byte order"

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_ATTRIBUTE = struct.Struct("=HH")  # length (with these 4 bytes), type
_s32, _u32 = struct.Struct("=i"), struct.Struct("=I")


class Malformed(Error):
    """A netlink message whose lengths do not fit together; the reader resynchronises."""


class Overrun(Error):
    """The kernel dropped notifications because the socket's receive buffer was full; the reader resynchronises."""


class Interrupted(Error):
    """A dump ran while what it lists changed (NLM_F_DUMP_INTR): something may be missing or double."""


class Message(NamedTuple):
    """One message. `body` is the payload after the 16-byte header, a view of the receive buffer."""

    type: int
    flags: int
    sequence: int
    body: memoryview


Take = Callable[[memoryview, int], tuple[int, list[Message]]]


def first(view: memoryview) -> Message:
    """The message with which `view` begins. Raises `Malformed` where its length does not fit."""
    if len(view) < _HEADER.size:
        raise Malformed(f"{len(view)} bytes after the last netlink message")
    length, kind, flags, sequence, _port = _HEADER.unpack_from(view)
    if length < _HEADER.size or length > len(view):
        raise Malformed(f"netlink message of {length} bytes where {len(view)} are left")
    return Message(kind, flags, sequence, view[_HEADER.size : length])


def messages(buffer: bytes | bytearray | memoryview) -> Iterator[Message]:
    """The messages of one datagram. Raises `Malformed` where a length does not fit what is left."""
    view = memoryview(buffer)
    at = 0
    while at < len(view):
        message = first(view[at:])
        yield message
        at += (_HEADER.size + len(message.body) + 3) & ~3


def attribute_list(body: memoryview, start: int = 0) -> Iterator[tuple[int, memoryview]]:
    """(type, value) of the attributes from `start` to the end of `body`.

    Raises `Malformed` where a length does not fit; fewer than four bytes at the end are padding.
    """
    at, end = start, len(body)
    if at > end:
        raise Malformed(f"netlink payload of {end} bytes is shorter than its fixed part of {start}")
    while end - at >= 4:
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < 4 or length > end - at:
            raise Malformed(f"netlink attribute of {length} bytes where {end - at} are left")
        yield kind & NLA_TYPE_MASK, body[at + 4 : at + length]
        at += (length + 3) & ~3


def attributes(body: memoryview, start: int = 0) -> dict[int, memoryview]:
    """`attribute_list` by type; of two with one type the last counts, as in Linux."""
    return dict(attribute_list(body, start))


def u8(value: memoryview) -> int:
    """The attribute's first byte. Raises `Malformed` when it is empty."""
    if len(value) < 1:
        raise Malformed("empty netlink attribute where a byte belongs")
    return value[0]


def u32(value: memoryview) -> int:
    """The attribute as an unsigned 32-bit integer. Raises `Malformed` when it is shorter."""
    if len(value) < 4:
        raise Malformed(f"netlink attribute of {len(value)} bytes where 4 belong")
    number: int = _u32.unpack_from(value)[0]
    return number


def text(value: memoryview) -> str:
    """The attribute as a string up to its first NUL; bytes that are not UTF-8 are replaced."""
    return bytes(value).partition(b"\0")[0].decode("utf-8", "replace")


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(len(value) + 4, kind) + value + bytes(-len(value) % 4)


def request(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Encode one request (NLM_F_REQUEST is added)."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, sequence, 0) + body


def readable(fds: Iterable[int], timeout: float) -> set[int]:
    """Wait up to `timeout` seconds for something to read and return where. Like select(2), but for any descriptor."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(1000 * timeout)}


class Netlink:
    """A netlink socket of the calling thread's network namespace.

    `groups` are multicast group numbers (RTNLGRP_...) to listen to. `buffer` is the receive buffer in bytes: beyond
    the host's limit with CAP_NET_ADMIN (SO_RCVBUFFORCE), otherwise as much as the limit allows.
    """

    def __init__(self, protocol: int = NETLINK_ROUTE, groups: Iterable[int] = (), buffer: int = 1 << 20) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            try:
                self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_RCVBUFFORCE", 33), buffer)
            except PermissionError:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self.socket.setsockopt(SOL_NETLINK, GET_STRICT_CHK, 1)  # filters in a dump request count, or are refused
            self.socket.bind((0, 0))
            for group in groups:
                self.socket.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
        except PermissionError as error:
            self.socket.close()
            raise MissingCapability("listening to netlink needs CAP_NET_ADMIN", "run as root") from error
        except BaseException:
            self.socket.close()
            raise
        self._sequence = 0
        self._buffer = bytearray(1 << 18)  # larger than any datagram the kernel builds for a dump (32 KiB)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self) -> list[Message]:
        """Wait for the next datagram from the kernel and return its messages (copied out of the receive buffer).

        Raises `Overrun` when notifications were lost, `Malformed` for a truncated datagram or wrong lengths.
        """
        datagram = self.datagram()
        assert datagram is not None
        return list(messages(bytes(datagram)))

    def datagram(self, wait: bool = True) -> memoryview | None:
        """The next datagram from the kernel, in the receive buffer: valid until the next call.

        None when there is none and it is not to be waited for. Raises as `receive` does.
        """
        waiting = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                length, _, flags, sender = self.socket.recvmsg_into([self._buffer], 0, waiting)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise Overrun("netlink notifications were lost: receive buffer full") from error
                raise
            if not _from_kernel(sender):
                continue
            if flags & socket.MSG_TRUNC:
                raise Malformed(f"netlink datagram larger than {len(self._buffer)} bytes")
            return memoryview(self._buffer)[:length]

    def ready(self, timeout: float = 0.0) -> bool:
        """True when a datagram (or an overrun) is waiting; waits up to `timeout` seconds."""
        return bool(readable([self.socket.fileno()], timeout))

    def send(self, kind: int, flags: int, body: bytes) -> int:
        """Send one request and return its sequence number."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.socket.send(request(kind, flags, self._sequence, body))
        return self._sequence

    def _replies(self, sequence: int, timeout: float) -> Iterator[Message]:
        while True:
            if not self.ready(timeout):
                raise Error(f"no netlink reply within {timeout:g} s")
            for message in self.receive():
                if message.sequence == sequence:
                    yield message

    def ask(self, kind: int, body: bytes, flags: int = NLM_F_ACK, timeout: float = 10.0) -> list[Message]:
        """Send one request and return the replies before its acknowledgement. Raises OSError as the kernel answers."""
        found: list[Message] = []
        for message in self._replies(self.send(kind, flags, body), timeout):
            if message.type == NLMSG_ERROR:
                _raise(message)
                return found
            found.append(message)
            if not flags & NLM_F_ACK:
                return found
        return found

    def dump(self, kind: int, body: bytes, timeout: float = 10.0) -> Iterator[tuple[Message, ...]]:
        """Request a dump and yield it datagram by datagram.

        Raises `Interrupted` at the end of a dump that changed while it ran: something may be missing from it.
        """
        batch: list[Message] = []

        def take(datagram: memoryview, sequence: int) -> tuple[int, list[Message]]:
            mine = [message for message in messages(bytes(datagram)) if message.sequence == sequence]
            batch.extend(message for message in mine if message.type >= NLMSG_MIN_TYPE)
            return functools.reduce(operator.or_, (m.flags for m in mine), 0), [
                message for message in mine if message.type < NLMSG_MIN_TYPE
            ]

        for _ in self.dump_into(take, kind, body, timeout):
            yield tuple(batch)
            batch.clear()

    def dump_into(self, take: Take, kind: int, body: bytes, timeout: float = 10.0) -> Iterator[None]:
        """Request a dump and hand each datagram to `take`, with the sequence number that its messages must have.

        `take` returns the flags of the messages and those that are of netlink itself. Yields after each datagram;
        raises as `dump` does.
        """
        sequence = self.send(kind, NLM_F_DUMP, body)
        interrupted = done = False
        while not done:
            if not self.ready(timeout):
                raise Error(f"no netlink reply within {timeout:g} s")
            datagram = self.datagram()
            assert datagram is not None
            flags, control = take(datagram, sequence)
            interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
            for message in control:
                if message.type == NLMSG_ERROR:
                    _raise(message)
                if message.type == NLMSG_OVERRUN:
                    raise Overrun("netlink dump overrun")
                if message.type == NLMSG_DONE:
                    if len(message.body) >= 4 and _s32.unpack_from(message.body)[0] < 0:
                        _raise(message)
                    done = True
            yield
        if interrupted:
            raise Interrupted("netlink dump changed while it ran")

    def dump_all(self, kind: int, body: bytes, attempts: int = 5) -> list[Message]:
        """A whole dump as one list, asked for again when it was interrupted. For dumps that are not bulk."""
        for attempt in range(attempts):
            try:
                return [message for batch in self.dump(kind, body) for message in batch]
            except Interrupted:
                if attempt == attempts - 1:
                    raise
        return []


def _from_kernel(sender: tuple[int, int]) -> bool:
    """Any process may send to a netlink socket; the kernel's port id is 0."""
    return sender[0] == 0


def _raise(message: Message) -> None:
    """Raise the OSError that an NLMSG_ERROR (or a failed NLMSG_DONE) carries; return when it is an acknowledgement."""
    if len(message.body) < 4:
        raise Malformed("netlink error message without an error")
    number = -_s32.unpack_from(message.body)[0]
    if number:
        raise OSError(number, os.strerror(number))
