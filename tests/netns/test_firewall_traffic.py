"""`fp firewall` under traffic: bulk TCP, new rules under a stream, a flood of SYNs; and SIGKILL, after which Linux
filters by the same rules.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from libfp.testing import tcp
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.router import AppProcess, Crossroads, footprint
from libfp.testing.traffic import UdpStream, tcp_transfer

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, CLIENT6, SERVER6 = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.CLIENT6, Crossroads.SERVER6
OPEN, CLOSED, KNOWN, FLOODED = 5002, 5003, 7000, 7001
RULES = f"""flush ruleset
table inet filter {{
  chain forward {{
    type filter hook forward priority 0; policy drop;
    udp dport {OPEN} counter accept
    ct state established,related counter accept
    tcp flags & (fin|syn|rst|ack) == syn tcp dport {{ {KNOWN}, {FLOODED}, 5001 }} accept
    %s
  }}
}}
"""
CONNECTIONS, SYNS = 4096, 1_000_000


@pytest.fixture(scope="module")
def net() -> Iterator[Crossroads]:
    with Lab(ipv6=True) as lab:
        net = Crossroads(lab)
        net.router.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 1)
        silent = (
            "add table inet f; add chain inet f c { type filter hook input priority 0; }; add rule inet f c tcp dport"
        )
        assert net.server.run(["nft", f"{silent} {FLOODED} drop"]).returncode == 0
        for port, end, host, addresses in (
            ("r0", "c0", net.client, (CLIENT, CLIENT6)), ("r1", "s0", net.server, (SERVER, SERVER6))
        ):  # fmt: skip
            for one in addresses:  # a connection that begins with a packet for Linux is known to Linux alone
                net.router.neighbour(port, one, host.mac(end))
        yield net


@pytest.fixture(scope="module")
def firewall(net: Crossroads, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppProcess]:
    file = tmp_path_factory.mktemp("firewall") / "rules.nft"
    file.write_text(RULES % "")
    arguments = [*net.PORTS, "--load", str(file), "--connections", str(CONNECTIONS), "--kick", "inline"]
    with AppProcess(net.router, "firewall", *arguments) as process:
        process.file = file  # type: ignore[attr-defined]
        yield process


@contextlib.contextmanager
def connections(client: Host, server: Host, count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Both ends of so many TCP connections."""
    with contextlib.ExitStack() as undo:
        listening = undo.enter_context(server.socket(kind=socket.SOCK_STREAM))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((SERVER, KNOWN))
        listening.listen(count)
        made = []
        for _ in range(count):
            one = undo.enter_context(client.socket(kind=socket.SOCK_STREAM))
            one.settimeout(5)
            one.connect((SERVER, KNOWN))
            other = undo.enter_context(listening.accept()[0])
            other.settimeout(5)
            made.append((one, other))
        yield made


def talk(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Each end says something to the other, and hears it."""
    for pair in pairs:
        for one, other in (pair, pair[::-1]):
            one.sendall(b"x")
            assert other.recv(1) == b"x"


@pytest.mark.parametrize("address", [SERVER, SERVER6])
def test_a_tcp_transfer(net: Crossroads, firewall: AppProcess, address: str) -> None:
    before = firewall.counters().forwarded
    result = tcp_transfer(net.client, net.server, address, 20 << 20)
    assert result.intact
    assert firewall.counters().forwarded - before > (20 << 20) // 1500, "by the fast path"


def test_new_rules_lose_no_packet(net: Crossroads, firewall: AppProcess) -> None:
    file: Path = firewall.file  # type: ignore[attr-defined]
    with (
        connections(net.client, net.server, 3) as pairs,
        UdpStream(net.client, net.server, SERVER, 1000, OPEN) as stream,
    ):
        wait_until(lambda: stream.received > 100)
        for number, rules in enumerate(["counter", "tcp dport 9 reject", "limit rate 5/second accept", "", "nonsense"]):
            file.write_text(RULES % rules)
            before, received = len(firewall.said()), stream.received
            firewall.process.send_signal(signal.SIGHUP)
            wanted = "stay as they were" if number in (2, 4) else "rules read again"
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: wanted in firewall.said()[before:], 20)  # noqa: B023
            assert wanted in firewall.said()[before:]
            talk(pairs)
            wait_until(lambda: stream.received > received + 300)  # noqa: B023
    assert stream.result.lost == stream.result.duplicates == 0
    file.write_text(RULES % "")
    assert firewall.counters().punts.get("flow-unknown", 0) == 0


def flood_frames(dice: np.random.Generator, count: int, like: bytes) -> np.ndarray:
    """So many SYNs from random addresses, with right checksums: what a source adds, other fields take away."""
    frames = np.tile(np.frombuffer(like, np.uint8), (count, 1))
    words = frames[:, 14:].view(">u2")
    high, low = dice.integers(0x0B00, 0x7EFF, count), dice.integers(1, 0xFFFF, count)
    difference = (words[:, 6].astype(int) + words[:, 7] - high - low) % 0xFFFF
    for field, by in ((2, difference), (12, difference)):  # IP's identification, half the sequence number
        words[:, field] = (words[:, field].astype(int) + by) % 0xFFFF
    words[:, 6], words[:, 7] = high, low
    return frames


class Flood:
    """Sends many frames a system call: sendmmsg(2)."""

    def __init__(self, host: Host, name: str) -> None:
        self.socket = host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.bind((name, 0))
        self.libc = ctypes.CDLL(None, use_errno=True)

    def send(self, frames: np.ndarray) -> None:
        count, size = frames.shape
        at = frames.ctypes.data + np.arange(count, dtype=np.uint64) * size
        vectors = np.column_stack([at, np.full(count, size, np.uint64)])
        headers = np.zeros((count, 8), np.uint64)  # struct mmsghdr: an msghdr of 56 bytes, a length
        headers[:, 2], headers[:, 3] = vectors.ctypes.data + np.arange(count, dtype=np.uint64) * 16, 1
        sent = 0
        while sent < count:
            done = self.libc.sendmmsg(
                self.socket.fileno(), ctypes.c_void_p(headers[sent:].ctypes.data), count - sent, 0
            )
            assert done > 0
            sent += done


def test_a_flood_of_syns_leaves_known_connections_alone(net: Crossroads, firewall: AppProcess) -> None:
    """10^6 of them, from as many addresses, and room for 4,096 connections."""
    ends = {"eth_dst": net.router.mac("r0"), "eth_src": net.client.mac("c0"), "src": CLIENT, "dst": SERVER}
    like = tcp(dport=FLOODED, flags="S", seq=1, **ends)
    dice, flood = np.random.default_rng(1), Flood(net.client, "c0")
    with flood.socket, connections(net.client, net.server, 100) as pairs:
        talk(pairs)
        before = firewall.counters()
        while (now := firewall.counters()).forwarded - before.forwarded < SYNS:
            for _ in range(16):
                flood.send(flood_frames(dice, 4096, like))
            talk(pairs[:3])
        talk(pairs)
    assert now.punts == before.punts
    assert now.drops.get("filtered", 0) == before.drops.get("filtered", 0)


def test_after_sigkill_linux_decides_by_the_same_rules(net: Crossroads, firewall: AppProcess) -> None:
    """Under load: what is blocked stays blocked, all the time; what is open goes on."""
    ends = net.client, net.server, SERVER, 2000
    with UdpStream(*ends, CLOSED) as closed, UdpStream(*ends, OPEN) as stream:
        wait_until(lambda: stream.received > 200)
        firewall.process.kill()
        assert firewall.wait() == -signal.SIGKILL
        after = stream.received
        wait_until(lambda: stream.received > after + 2000)
        assert closed.sent > 2000
    assert closed.result.received == 0
    assert stream.result.lost < 500, "what was in its rings"
    counted = net.router.run(["nft", "list", "ruleset"]).stdout
    assert f"udp dport {OPEN} counter packets 0" not in counted, "Linux's rule has decided"
    with connections(net.client, net.server, 1) as pairs:
        talk(pairs)
    back = net.server.ping(CLIENT, count=2, interval=0.001, timeout=0.1)
    assert back.received == 0


def test_interrupted_while_it_starts(net: Crossroads) -> None:
    """By Ctrl-C: nothing stays but the kernel's rules."""
    before, rules = footprint(net.router), net.router.run(["nft", "-s", "list", "ruleset"]).stdout
    with AppProcess(net.router, "firewall", *net.PORTS, "--kick", "inline", wait=False) as process:
        process.wait_said("reading Linux's")
        assert process.stop(signal.SIGINT, timeout=10) in (0, 130)
        assert "Traceback" not in process.said()
        assert process.end or "fp: interrupted" in process.said()
    assert footprint(net.router) == before
    assert net.router.run(["nft", "-s", "list", "ruleset"]).stdout == rules
