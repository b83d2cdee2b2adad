"""The punt path: a frame written for a port arrives at Linux as if the port had received it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from libfp.engine.punt import PuntRing
from libfp.errors import AlreadyRunning
from libfp.linux.punt import PuntPath
from libfp.linux.tap import Tap
from libfp.pyxdp import Socket, Steer
from libfp.testing.netns import Lab, wait_until
from libfp.testing.packets import udp

PORT = 4000


class Net:
    """client (10.0.1.2) - r0 router r1 - server (10.0.2.2); `heard` is a socket of the server's."""

    def __init__(self, lab: Lab) -> None:
        self.client, self.router, self.server = lab.routed()
        self.heard = self.server.socket()
        self.heard.bind(("10.0.2.2", PORT))
        self.heard.settimeout(5)

    def frame(self, text: bytes = b"punted", **more: object) -> bytes:
        defaults = {"eth_dst": self.router.mac("r0"), "eth_src": self.client.mac("c0"), "dport": PORT}
        return udp(text, **(defaults | more))  # type: ignore[arg-type]

    def tap(self, name: str = "r0", **more: bool) -> Tap:
        index = self.router.index(name)
        return self.router.call(Tap, f"lfp{index}", index, 1500, **more)


@pytest.fixture
def net() -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab)


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "cls_bpf"])
@pytest.mark.parametrize("mode", ["native", "skb"])
def test_arrives_and_is_forwarded(net: Net, mode: str, tcx: bool, rp_filter: int) -> None:
    net.router.sysctl("net.ipv4.conf.all.rp_filter", rp_filter)
    with net.router.call(Steer().attach, "r0", mode=mode) as attachment, net.tap(tcx=tcx) as tap:
        tap.mark(attachment.marker)
        tap.write(net.frame())
        data, (source, _) = net.heard.recvfrom(100)
        assert (data, source) == (b"punted", "10.0.1.2")
        tap.write(net.frame(b"x" * 1472))
        assert len(net.heard.recv(2000)) == 1472, "a full-size frame"


def test_wrong_source_is_refused_by_a_strict_filter(net: Net) -> None:
    net.router.sysctl("net.ipv4.conf.all.rp_filter", 1)
    with net.tap() as tap:
        tap.write(net.frame(b"from the other side", src="10.0.2.7"))
        tap.write(net.frame(b"from this side"))
        assert net.heard.recv(100) == b"from this side"


@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft (apt-get install nftables)")
def test_nft_sees_the_true_port(net: Net) -> None:
    rule = "table ip t { chain c { type filter hook forward priority 0; iifname != r0 drop; }; }"
    net.router.run(["nft", rule], check=True)
    with net.tap() as tap:
        tap.write(net.frame())
        assert net.heard.recv(100) == b"punted"


def test_policy_rules_see_the_true_port(net: Net) -> None:
    net.router.netlink("rule", "add", iifname="r0", table=100, priority=10)
    net.router.route("10.0.77.0/24", via="10.0.2.2", table=100)
    net.server.address("s0", "10.0.77.2/32")
    net.heard.close()
    with net.server.socket() as heard, net.tap() as tap:
        heard.bind(("10.0.77.2", PORT))
        heard.settimeout(5)
        tap.write(net.frame(dst="10.0.77.2"))
        assert heard.recv(100) == b"punted"


def test_icmp_error_comes_from_the_port_s_address(net: Net) -> None:
    with net.client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as errors, net.tap() as tap:
        errors.settimeout(5)
        tap.write(net.frame(ttl=1))
        packet, (source, _) = errors.recvfrom(200)
        assert (source, packet[20]) == ("10.0.1.1", 11)


def test_reinjected_frames_do_not_come_back_in_skb_mode(net: Net) -> None:
    """What the wire brings goes to our socket; the same frame written into the TAP goes to Linux."""
    with (
        net.router.call(Steer().attach, "r0", mode="skb") as attachment,
        net.router.call(Socket, "r0", 0, mode="copy", steer=attachment) as sock,
        net.client.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire,
        net.tap() as tap,
    ):
        wire.bind(("c0", 0))
        wire.send(net.frame(b"from the wire"))
        first = sock.recv(5)
        assert first is not None
        assert first.endswith(b"from the wire")
        tap.mark(attachment.marker)
        tap.write(net.frame(b"from us"))
        assert net.heard.recv(100) == b"from us"
        wire.send(net.frame(b"from the wire again"))
        second = sock.recv(5)
        assert second is not None
        assert second.endswith(b"from the wire again")


def test_ring_to_tap(net: Net) -> None:
    indexes = [net.router.index(name) for name in ("r0", "r1")]
    path: PuntPath = net.router.call(PuntPath, [(index, 1500) for index in indexes])
    ring = PuntRing(slots=8)
    try:
        path.start([ring])
        for number in range(50):
            frame = net.frame(f"{number}".encode())
            put_frame(ring, frame, 0)
            assert net.heard.recv(100) == f"{number}".encode()
        path.stop()
        path.start([ring])
        put_frame(ring, net.frame(b"again"), 0)
        assert net.heard.recv(100) == b"again"
    finally:
        path.close()
        ring.close()
    assert net.router.interfaces() == ["lo", "r0", "r1"]


def put_frame(ring: PuntRing, frame: bytes, port: int) -> None:
    """What a worker does, from Python."""
    from libfp.jit import Arena

    memory = Arena(2048)
    try:
        memory.buffer[: len(frame)] = frame
        wait_until(lambda: ring.slots.put(memory.address, len(frame), port), what="room in the punt ring")
        if ring.slots.sleeper():
            ring.wake()
    finally:
        memory.close()


def test_silent(net: Net) -> None:
    """Nothing that Linux sends by itself leaves through a TAP, and it has no addresses."""
    net.router.sysctl("net.ipv6.conf.default.disable_ipv6", 0)
    with net.tap() as tap:
        assert net.router.netlink("get_addr", index=tap.index) == []
        with pytest.raises(BlockingIOError):
            os.read(tap.fd, 2048)


def test_name_taken(net: Net) -> None:
    with net.tap():
        with pytest.raises(AlreadyRunning, match=r"lfp\d+ exists"):
            net.tap()
        indexes = [net.router.index("r1"), net.router.index("r0")]
        with pytest.raises(AlreadyRunning):
            net.router.call(PuntPath, [(index, 1500) for index in indexes])
    assert net.router.interfaces() == ["lo", "r0", "r1"]


def test_mtu_follows_whatever_namespace_the_caller_is_in(net: Net) -> None:
    """The TAP's index is another interface's elsewhere: that one must not be touched."""
    with net.tap() as tap, Lab() as other:
        elsewhere = other.host("elsewhere")
        while tap.index not in (indexes := {link["index"]: link for link in elsewhere.netlink("get_links")}):
            elsewhere.netlink("link", "add", ifname=f"x{len(indexes)}", kind="bridge")
        with elsewhere.enter():
            tap.set_mtu(9000)
        assert net.router.netlink("get_links", tap.index)[0].get_attr("IFLA_MTU") == 9000
        assert elsewhere.netlink("get_links", tap.index)[0].get_attr("IFLA_MTU") == 1500


def test_killed_process_leaves_nothing(net: Net) -> None:
    code = (
        "import socket, sys; from libfp.linux.tap import Tap; i = socket.if_nametoindex('r0')\n"
        "tap = Tap(f'lfp{i}', i, 1500); print('ready', flush=True); sys.stdin.read()"
    )
    process = net.router.popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert len(net.router.interfaces()) == 4
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    wait_until(lambda: net.router.interfaces() == ["lo", "r0", "r1"], what="the TAP to be gone")
