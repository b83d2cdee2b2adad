"""The control channel of memif: handshakes over real sockets, what is refused in which words, and who comes back."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libfp.cli import main
from libfp.errors import AlreadyRunning, BadInput, Error, FrameTooSmall, PeerGone, PeerUnsuitable
from libfp.jit import load16, store16
from libfp.ports import memif_control, memif_messages
from libfp.ports.frames import FrameMemory
from libfp.ports.memif import MemifPort
from libfp.ports.memif_memory import LINK_TX, NO_INTERRUPT, Pool, Share
from libfp.ports.memif_messages import SIZE, Ack, AddRegion, AddRing, Connect, Disconnect, Hello, Init, parse
from libfp.ports.memif_session import ClientSession, Offer, ServerSession
from libfp.testing.memif import FarEnd, MemifPeer, shake_hands
from libfp.testing.wait import wait_until

FULL = bool(os.environ.get("LIBFP_FULL") or os.environ.get("LIBFP_STRESS"))
OFFER = Offer("mem0", 0, b"", 1, 4, 2048)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, 2, "file descriptors to be closed")


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "socket") if request.param == "path" else f"@libfp-{os.getpid()}-{tmp_path.name}"


def test_server_and_client_meet_and_exchange_packets(address: str) -> None:
    packets = [bytes([k]) * (60 + k) for k in range(100)] + [bytes(5000)]
    options: Any = {"socket": address, "id": 7, "secret": "open", "queues": 2}
    with MemifPeer("one", role="server", **options) as one, MemifPeer("two", role="client", **options) as two:
        for side, other in ((one, two), (two, one)):
            side.wait()
            for queue in (0, 1):
                assert side.send(packets, queue) == len(packets)
                wait_until(lambda: other.port.connected)  # noqa: B023
                assert other.receive(queue) == packets
    assert not address.startswith("/") or not os.path.exists(address), "and the socket's file is gone"


def test_either_side_may_leave_and_come_back(address: str) -> None:
    with MemifPeer("stays", socket=address, role="server") as server:
        for turn in range(3):
            with MemifPeer("comes", socket=address, role="client") as client:
                client.wait()
                server.wait()
                client.send([bytes([turn]) * 60])
                assert server.receive() == [bytes([turn]) * 60]
            wait_until(lambda: not server.port.connected)
    with MemifPeer("stays", socket=address, role="client") as client:
        for _ in range(3):
            with MemifPeer("comes", socket=address, role="server") as server:
                server.wait()
                client.wait()
            wait_until(lambda: not client.port.connected)
        assert client.port.wire.connections == 3


def test_ports_share_a_socket_by_their_ids(address: str) -> None:
    with (
        MemifPeer("a", socket=address, role="server", id=1) as a,
        MemifPeer("b", socket=address, role="server", id=2) as b,
    ):
        with pytest.raises(AlreadyRunning, match="has an interface 2; give each its own id"):
            MemifPeer("c", socket=address, role="server", id=2)
        with MemifPeer("d", socket=address, role="client", id=2) as d:
            d.wait()
            b.wait()
            assert not a.port.connected
        a.close()
        with MemifPeer("e", socket=address, role="client", id=2) as e:
            e.wait()


def test_a_second_peer_is_refused_while_there_is_one(address: str) -> None:
    options: Any = {"socket": address, "role": "client"}
    with MemifPeer("s", socket=address, role="server") as server, MemifPeer("first", **options) as first:
        first.wait()
        server.wait()
        with raw_client(address) as sock:
            sock.send(Init(0x200, 0, 0, b"", b"x").pack())
            reply = parse(sock.recv(SIZE))
            assert isinstance(reply, Disconnect)
            assert memif_messages.text(reply.reason) == "interface 0 has a peer already"
        assert first.port.connected


class raw_client(socket.socket):
    """Connected, and the server's hello read."""

    def __init__(self, address: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.settimeout(5)
        self.connect("\0" + address[1:] if address.startswith("@") else address)
        assert isinstance(parse(self.recv(SIZE)), Hello)


def test_a_socket_in_use(address: str, tmp_path: Path) -> None:
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    taken.bind("\0" + address[1:] if address.startswith("@") else address)
    taken.listen(1)
    with pytest.raises(
        AlreadyRunning, match=rf"^memif socket {address} is in use; name another one, or be its client$"
    ):
        MemifPeer("s", socket=address, role="server")
    taken.close()
    if not address.startswith("@"):
        with MemifPeer("s", socket=address, role="server"):
            assert os.stat(address).st_mode & 0o777 == 0o600, "what nobody listens at is replaced"
        (tmp_path / "file").write_text("mine")
        with pytest.raises(BadInput, match="is no socket"):
            MemifPeer("s", socket=str(tmp_path / "file"), role="server")
        with pytest.raises(BadInput, match=r"cannot listen at .*; name another socket"):
            MemifPeer("s", socket=str(tmp_path / "none" / "s"), role="server")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"role": "master"}, "mem0: no role 'master'; server or client"),
        ({"ring_size": 1000}, "mem0: a ring of 1000; a power of 2, 16384 at most"),
        ({"ring_size": 32768}, "mem0: a ring of 32768; a power of 2, 16384 at most"),
        ({"buffer_size": 100}, "mem0: buffers of 100 bytes; a multiple of 64, 65,536 at most"),
        ({"queues": 0}, "mem0: 0 queues; 1 to 255, as many as workers"),
        ({"secret": "x" * 24}, "mem0: a secret that cannot be sent; 23 bytes at most, none of them 0"),
        ({"id": -1}, "mem0: id -1; a number of 32 bits"),
        ({"socket": ""}, "mem0: a socket ''; a path, or @name, of 107 bytes at most"),
        (
            {"role": "server", "share": "both"},
            "mem0: a server that shares buffers; the client makes them: role=client",
        ),
        (
            {"ring_size": 16384, "buffer_size": 65536, "queues": 2},
            "mem0: 2 queues of 16384 buffers of 65536 bytes, 4296019968 bytes in all; "
            "4 GiB at most, all that an offset of 32 bits reaches",
        ),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput) as caught:
        MemifPort("mem0", **{"socket": "@x", **options})
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("memif:@x", "memif ports without routes: Linux has none that lead there; give --routes FILE"),
        ("memif:@x eth0 --routes R", "memif ports beside eth0; give it ports of one kind"),
        ("memif:@x --routes R --only 10.0.0.0/8", "not for memif ports: --only; leave that out"),
        ("memif:@x --routes R --mode skb --bypass", "not for memif ports: --bypass, --mode; leave that out"),
        ("memif:@x,name= --routes R", "a memif port without a name; leave name= out, or give one"),
        ("memif:@x,mode=9 --routes R", "'memif:@x,mode=9' does not parse at 'mode=9'; mode is octal, such as 600"),
        ("memif:@x,id=x --routes R", "'memif:@x,id=x' does not parse at 'id=x'; id is a number"),
        (
            "memif:@x,size=1 --routes R",
            "'memif:@x,size=1' does not parse at 'size=1'; "
            "there are role, id, secret, name, ring-size, buffer-size, queues, share, mode",
        ),
        ("memif:@x,role=master,name=out --routes R", "out: no role 'master'; server or client"),
        ("memif:@x,ring-size=100,name=out --routes R", "out: a ring of 100; a power of 2, 16384 at most"),
        ("memif: --routes R", "memif0: a socket ''; a path, or @name, of 107 bytes at most"),
        ("memif:@x,name=a memif:@y,name=a --routes R", "two ports called a; name them: memif:SOCKET,name=NAME"),
        ("memif:@x --routes R", "R has routes out of out; name a port so: memif:SOCKET,name=out"),
    ],
)
def test_command_lines_that_cannot_be(
    words: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routes = tmp_path / "R"
    routes.write_text("198.51.100.0/24 dev out")
    arguments = words.replace(" R", f" {routes}").split()
    assert main(["router", *arguments]) == 2
    assert capsys.readouterr().err.replace(str(routes), "R") == f"fp: {text}\n"


def test_what_the_engine_asks_is_checked() -> None:
    port = MemifPort("mem0", socket="@x", role="client")
    frames = FrameMemory(8, 2048, huge=False)
    with pytest.raises(BadInput, match="mem0 has 1 queues, too few for 2 workers; queues=2, on both sides"):
        MemifPort.open_all([port], 1, frames)
    with pytest.raises(FrameTooSmall, match="frames of 1024 bytes; frame_size=2048 or more"):
        MemifPort.open_all([port], 0, FrameMemory(8, 1024, huge=False))
    with pytest.raises(BadInput, match="mem0 has 1 queues, and 0 workers; give it queues=0, or more cores"):
        port.take(0)


def test_ports_that_share_buffers_must_agree() -> None:
    def opened(*options: dict[str, Any]) -> None:
        ports = [MemifPort(f"mem{k}", socket="@x", share="both", **one) for k, one in enumerate(options)]
        MemifPort.open_all(ports, 0, FrameMemory(8, 2048, huge=False))

    with pytest.raises(BadInput, match=r"^mem0 shares buffers with no other port; say share=both for those too"):
        opened({})
    with pytest.raises(BadInput, match=r"^mem0 and mem1 share buffers of 1024 and 2048 bytes; give them the same buf"):
        opened({}, {"buffer_size": 1024})
    big = {"ring_size": 16384, "buffer_size": 65536}
    with pytest.raises(BadInput, match=r"^mem0 and mem1: 65536 buffers of 65536 bytes, with 256 before each, are more"):
        opened(big, big)
    pool = Pool("mem0", [32], 2048)
    with pytest.raises(PeerUnsuitable, match=r"^a server that takes one region only; share no buffers by mem0"):
        ClientSession(OFFER, Share(pool, pool.tables[0])).receive(Hello(b"", 512, 512, 0, 1, 1, 14).pack(), [])
    pool.leave()


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def ring(change: dict[str, int]) -> Any:
    def alter(data: bytes, fd: int) -> tuple[bytes, int]:
        message = parse(data)
        if isinstance(message, AddRing) and message.index == 0:
            data = AddRing(**{**vars(message), **change}).pack()
        return data, fd

    return alter


def region(size: int | None, seals: int, told: int = 0) -> Any:
    """Offers another file as region 0, and says that it has `told` bytes."""
    files: list[int] = []

    def alter(data: bytes, fd: int) -> tuple[bytes, int]:
        message = parse(data)
        if isinstance(message, AddRegion):
            file = memfd(message.size, seals) if size is None else memfd(size, seals)
            files.append(file)
            return AddRegion(0, told or message.size).pack(), file
        while files:
            os.close(files.pop())
        return data, fd

    alter.files = files  # type: ignore[attr-defined]
    return alter


def replace(kind: type, made: Any) -> Any:
    return lambda data, fd: (made(parse(data)).pack(), fd) if isinstance(parse(data), kind) else (data, fd)


def drop_fd(kind: type) -> Any:
    return lambda data, fd: (data, -1 if isinstance(parse(data), kind) else fd)


SEALED = fcntl.F_SEAL_SHRINK
REFUSED: dict[str, tuple[Any, str]] = {
    "version": (
        replace(Init, lambda m: Init(0x300, 0, 0, b"", b"")),
        "version 3.0, and this is 2.0; use a peer that speaks memif 2.0",
    ),
    "mode": (
        replace(Init, lambda m: Init(0x200, 0, 1, b"", b"")),
        "an interface of mode 1; only ethernet (0) is served",
    ),
    "unsealed": (
        region(None, 0),
        "a region that is not sealed against shrinking; let the peer add F_SEAL_SHRINK",
    ),
    "huge": (
        region(None, SEALED, 1 << 33),
        "a region of 8589934592 bytes; 4294967296 are all that an offset of 32 bits reaches",
    ),
    "short": (region(4096, SEALED), "a region of 69632 bytes whose file has 4096; the peer's sizes do not agree"),
    "cookie": (region(None, SEALED), "ring 0 to the server begins with 0x0; a ring of memif begins with 0x3e31f20"),
    "region's file": (drop_fd(AddRegion), "region 0 without its file descriptor; it goes with the message"),
    "region's index": (
        replace(AddRegion, lambda m: AddRegion(3, m.size)),
        "region 3 where 0 is next, of 64 at most; regions come in order",
    ),
    "ring's file": (drop_fd(AddRing), "ring 0 to the server without an eventfd; it goes with the message"),
    "ring's region": (ring({"region": 9}), "ring 0 to the server in region 9 of 1; the peer announces regions first"),
    "ring's offset": (
        ring({"offset": 69632 - 64}),
        "ring 0 to the server at bytes 69568 to 69952 of a region that has 69632; "
        "a ring lies inside its region, at a multiple of 64",
    ),
    "unaligned": (
        ring({"offset": 8}),
        "ring 0 to the server at bytes 8 to 392 of a region that has 69632; "
        "a ring lies inside its region, at a multiple of 64",
    ),
    "ring's size": (ring({"log2": 15}), "ring 0 to the server of 2^15 descriptors; 2^14 are the most"),
    "more rings": (ring({"index": 5}), "ring 5 to the server, and mem0 has 1 queues; queues=6"),
    "twice": (ring({"flags": 1}), "ring 0 to the server a second time; each ring comes once"),
    "early": (
        replace(AddRing, lambda m: Connect(b"x")),
        "0 rings to the server, and mem0 has 1 queues; give both sides the same number of queues",
    ),
    "init twice": (replace(Connect, lambda m: Init(0x200, 0, 0, b"", b"")), "a message init that has no place here"),
    "order": (replace(Init, lambda m: Connect(b"x")), "a message connect that has no place here"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_a_client_offers_is_checked(which: str) -> None:
    alter, text = REFUSED[which]
    with pytest.raises(PeerUnsuitable) as caught:
        shake_hands(OFFER, OFFER, alter)
    for fd in getattr(alter, "files", []):
        os.close(fd)
    assert str(caught.value).startswith(text)


def test_both_sides_must_want_the_same() -> None:
    def offer(**change: Any) -> Offer:
        return Offer(**{**vars(OFFER), **change})

    with pytest.raises(
        PeerUnsuitable, match=r"^buffers of 1024 bytes, and mem0 wants 2048; give both sides the same buff"
    ):
        shake_hands(OFFER, offer(buffer_size=1024))
    with pytest.raises(
        PeerUnsuitable, match=r"^1 rings to the server, and mem0 has 2 queues; give both sides the same nu"
    ):
        shake_hands(offer(queues=2), OFFER)
    with pytest.raises(PeerUnsuitable, match=r"^1 queues at most, and mem0 has 2; queues=1"):
        shake_hands(OFFER, offer(queues=2))
    for secret in (b"", b"wrong", b"right\0", b"rightly"):
        if secret.rstrip(b"\0") != b"right":
            with pytest.raises(PeerUnsuitable, match=r"^a wrong secret; give both sides the same"):
                shake_hands(offer(secret=b"right"), offer(secret=secret))
    for session in shake_hands(offer(secret=b"right", buffer_size=0), offer(secret=b"right")):
        assert session.connected
        session.close()


def test_a_server_of_another_version_is_refused() -> None:
    client = ClientSession(OFFER)
    with pytest.raises(PeerUnsuitable, match=r"^versions 3.0 to 3.1, and this is 2.0; use a peer"):
        client.receive(Hello(b"", 0x300, 0x301, 1, 1, 1, 14).pack(), [])
    with pytest.raises(PeerUnsuitable, match=r"^rings of 8 at most, and mem0 has 16; use a smaller ring_size"):
        client.receive(Hello(b"", 0x200, 0x200, 1, 1, 1, 3).pack(), [])
    with pytest.raises(PeerUnsuitable, match=r"a message ack that has no place here; does the peer have"):
        client.receive(Ack().pack(), [])
    with pytest.raises(PeerGone, match=r"the peer disconnects: en.ugh"):
        client.receive(Disconnect(0, b"en\xffugh").pack(), [])
    client.close()


def test_the_reason_is_said_to_both_sides(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with MemifPeer("s", socket=address, role="server", secret="a") as server:
        with MemifPeer("c", socket=address, role="client", secret="b"):
            wait_until(lambda: "a wrong secret" in caplog.text)
        assert str(server.port.error) == "s: a wrong secret; give both sides the same"
        with raw_client(address) as sock:
            sock.send(b"x" * 100)
            reply = parse(sock.recv(SIZE))
            assert isinstance(reply, Disconnect)
            assert memif_messages.text(reply.reason) == "a message of 100 bytes, not 128"
            assert sock.recv(SIZE) == b""


def test_what_a_server_sends_at_once_is_not_lost() -> None:
    """It is connected before the client knows that it is."""
    offer = Offer(**{**vars(OFFER), "first_index": (1 << 16) - 1})
    server, client = ServerSession(lambda _: offer), ClientSession(offer)
    said = [(server.hello(1), -1)]
    while not server.connected:
        replies = [reply for data, _ in said for reply in client.receive(data, [])]
        said = [reply for data, fd in replies for reply in server.receive(data, [os.dup(fd)] if fd >= 0 else [])]
    FarEnd(server.links[0].address).send([b"early", b"bird"])
    client.receive(said[0][0], [])
    assert FarEnd(client.links[0].address).receive() == [b"early", b"bird"]
    server.close()
    client.close()


def test_a_handshake_has_a_time_limit(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memif_control, "HANDSHAKE_SECONDS", 0.05)
    with MemifPeer("s", socket=address, role="server"), raw_client(address) as sock:
        reply = parse(sock.recv(SIZE))
        assert isinstance(reply, Disconnect)
        assert b"a handshake that does not come to its end" in reply.reason


def test_a_peer_that_sleeps_is_woken(address: str) -> None:
    """By the port's thread: workers make no system call. Ours poll, and ask for nothing."""
    with (
        MemifPeer("s", socket=address, role="server") as server,
        MemifPeer("c", socket=address, role="client") as client,
    ):
        server.wait()
        client.wait()
        session = server.port.wire.session
        assert session is not None
        flags, event = session.links[0].flags[LINK_TX], session.events[0]
        assert load16(flags) == NO_INTERRUPT
        os.set_blocking(event, True)  # as a peer may
        store16(flags, 0)
        for count in range(1, 4):
            server.send([bytes(60)])
            assert select.select([event], [], [], 5)[0], "the client's eventfd is readable"
            assert os.eventfd_read(event) == 1
            assert len(client.receive()) == 1, count


def test_strangers_do_not_disturb_a_connection(address: str) -> None:
    """Mutated handshakes over the socket, while a decent peer is connected."""
    said, _, sessions = conversations()
    files, source = [fd for _, fd in said if fd >= 0], random.Random(7)
    with (
        MemifPeer("s", socket=address, role="server") as server,
        MemifPeer("c", socket=address, role="client") as client,
    ):
        server.wait()
        client.wait()
        for _ in range(100):
            with raw_client(address) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for data, fds in mutate(source, said, files):
                    socket.send_fds(sock, [data], fds)
                    if not sock.recv(SIZE):
                        break
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(SIZE):
                    pass
        assert client.send([b"still here"]) == 1
        assert server.receive() == [b"still here"]
        assert server.port.wire.connections == 1
    for one in sessions:
        one.close()
    for fd in files:
        os.close(fd)


def mutate(source: random.Random, said: list[tuple[bytes, int]], files: list[int]) -> list[tuple[bytes, list[int]]]:
    """What a broken or hostile peer might say instead."""
    made = [(data, [fd] if fd >= 0 else []) for data, fd in said]
    for _ in range(source.choice((0, 1, 1, 1, 2, 5))):
        at = source.randrange(len(made))
        data, fds = made[at]
        what = source.randrange(8)
        if what == 0:
            position = source.randrange(min(len(data), 24) or 1)
            data = data[:position] + source.randbytes(source.choice((1, 2, 4, 8))) + data[position + 1 :]
            data = data[:SIZE]
        elif what == 1:
            value = source.choice((0, 1, 0x7FFF, 0xFFFF, 1 << 31, (1 << 64) - 1, 4096, 64))
            position = source.randrange(2, 24)
            data = data[:position] + struct.pack("<Q", value)[: source.choice((2, 4, 8))] + data[position:]
            data = data[:SIZE]
        elif what == 2:
            data = data[: source.randrange(SIZE)]
        elif what == 3:
            fds = [source.choice(files) for _ in range(source.randrange(4))]
        elif what == 4:
            data, fds = made[source.randrange(len(made))]
        elif what == 5:
            data = struct.pack("<H", source.randrange(12)) + source.randbytes(SIZE - 2)
        elif what == 6:
            del made[at]
            if not made:
                return []
            continue
        made[at] = data, fds
    return made


def conversations() -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]], list[Any]]:
    """What a client and a server say to each other when all is well, with the files."""
    said: list[tuple[bytes, int]] = []

    def record(data: bytes, fd: int) -> tuple[bytes, int]:
        said.append((data, os.dup(fd) if fd >= 0 else -1))
        return data, fd

    sessions = shake_hands(OFFER, OFFER, record)
    server = [(Hello(b"", 0x200, 0x200, 9, 9, 9, 14).pack(), -1)] + [(Ack().pack(), -1)] * (len(said) - 1)
    return said, [*server, (memif_messages.Connected(b"").pack(), -1)], list(sessions)


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_whatever_a_peer_says_ends_in_a_typed_error_or_a_connection() -> None:
    """Mutated handshakes, both roles; `LIBFP_FULL=1`: a million."""
    to_server, to_client, sessions = conversations()
    unsealed = memfd(69632, 0)
    files = [fd for _, fd in to_server if fd >= 0] + [unsealed, os.open("/dev/null", os.O_RDONLY)]
    source, connected, refused = random.Random(6), 0, 0
    for number in range(1_000_000 if FULL else 10_000):
        session: Any = ServerSession(lambda _: OFFER) if number % 2 else ClientSession(OFFER)
        try:
            for data, fds in mutate(source, to_server if number % 2 else to_client, files):
                session.receive(data, [os.dup(fd) for fd in fds])
            connected += session.connected
        except Error:
            refused += 1
        finally:
            session.close()
    assert connected > 100
    assert refused > 1000
    for one in sessions:
        one.close()
    for fd in files:
        os.close(fd)
