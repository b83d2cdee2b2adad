"""The messages of memif's control channel, version 2.0: 128 bytes each on a SEQPACKET socket.

A message is a type of 16 bits and a body, without padding in between, all in the machine's order; a file descriptor
may come with it. The server says hello; the client answers with init, its regions and rings, each of which the server
acknowledges, and connect; connected ends the handshake. Either may say disconnect. (DPDK's net_memif, libmemif and VPP
speak it. "Client" and "server" are "slave" and "master" in older texts, S2M is C2S.)
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import ClassVar

from libfp.errors import PeerUnsuitable

SIZE = 128
VERSION = 2 << 8  # major, minor
COOKIE = 0x3E31F20
ETHERNET = 0  # mode of an interface; the others are IP and punt/inject
MOST_LOG2 = 14  # of a ring's size
SECRET = 24  # bytes
TO_SERVER = 1  # flag of a ring


@dataclass(frozen=True)
class Message:
    """Base: `kind` is the type's number, `form` the body's layout for struct."""

    kind: ClassVar[int]
    form: ClassVar[str] = "<"

    def pack(self) -> bytes:
        return (struct.pack("<H", self.kind) + struct.pack(self.form, *astuple(self))).ljust(SIZE, b"\0")


@dataclass(frozen=True)
class Ack(Message):
    kind = 1


@dataclass(frozen=True)
class Hello(Message):
    """Server to client: what it is called, and the greatest numbers it takes (of the indexes of regions and rings)."""

    kind, form = 2, "<32sHHHHHB"
    name: bytes
    least_version: int
    most_version: int
    most_region: int
    most_to_client: int
    most_to_server: int
    most_log2: int


@dataclass(frozen=True)
class Init(Message):
    """Client to server: which of the socket's interfaces it wants."""

    kind, form = 3, f"<HIB{SECRET}s32s"
    version: int
    id: int
    mode: int
    secret: bytes
    name: bytes


@dataclass(frozen=True)
class AddRegion(Message):
    """Client to server, with the memory's file descriptor."""

    kind, form = 4, "<HQ"
    index: int
    size: int


@dataclass(frozen=True)
class AddRing(Message):
    """Client to server, with the eventfd by which the ring's producer wakes its consumer."""

    kind, form = 5, "<HHHIBH"
    flags: int
    index: int
    region: int
    offset: int
    log2: int
    private: int


@dataclass(frozen=True)
class Connect(Message):
    kind, form = 6, "<32s"
    name: bytes


@dataclass(frozen=True)
class Connected(Message):
    kind, form = 7, "<32s"
    name: bytes


@dataclass(frozen=True)
class Disconnect(Message):
    kind, form = 8, "<I96s"
    code: int
    reason: bytes


_KINDS: dict[int, type[Message]] = {
    one.kind: one for one in (Ack, Hello, Init, AddRegion, AddRing, Connect, Connected, Disconnect)
}


def parse(data: bytes) -> Message:
    """The message in `data`. Raises PeerUnsuitable for one of another size or an unknown type."""
    if len(data) != SIZE:
        raise PeerUnsuitable(f"a message of {len(data)} bytes, not {SIZE}", "does the peer speak memif?")
    kind = _KINDS.get(struct.unpack_from("<H", data)[0])
    if kind is None:
        raise PeerUnsuitable(f"a message of type {struct.unpack_from('<H', data)[0]}", "does the peer speak memif 2.0?")
    return kind(*struct.unpack_from(kind.form, data, 2))


def text(name: bytes) -> str:
    """A name that the peer has sent, fit to be printed."""
    plain = name.partition(b"\0")[0].decode("ascii", "replace")
    return "".join(c if c.isprintable() else "?" for c in plain)


def version_text(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF}"
