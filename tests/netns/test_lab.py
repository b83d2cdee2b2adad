"""The private networks that every other test in this folder stands on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from libfp.testing.netns import MARK, Lab, namespace_of, sweep, wait_until
from libfp.testing.traffic import UdpStream, tcp_transfer


@pytest.fixture
def routed():
    with Lab() as lab:
        yield lab.routed()


def test_ping_through_a_router_and_its_errors(routed):
    client, router, _ = routed
    result = client.ping("10.0.2.2")
    assert (result.sent, result.received, result.lost, result.errors) == (3, 3, 0, [])
    assert len(result.times) == 3
    expired = client.ping("10.0.2.2", ttl=1, count=1)
    assert expired.errors == [(11, 0, "10.0.1.1", 0)]
    router.set_mtu("r1", 1000)
    too_long = client.ping("10.0.2.2", size=1200, dont_fragment=True, count=1)
    assert too_long.errors == [(3, 4, "10.0.1.1", 1000)]
    router.sysctl("net.ipv4.ip_forward", 0)
    assert client.ping("10.0.2.2", count=1, timeout=0.2).received == 0


def test_links_are_as_asked_for():
    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, "a0", b, "b0", queues=2, mtu=3000)
        assert (a.mac("a0"), b.mac("b0")) == ("02:fb:00:01:00:01", "02:fb:00:02:00:01")
        assert sorted(a.interfaces()) == ["a0", "lo"]
        link = a.netlink("get_links", a.index("a0"))[0]
        assert link.get_attr("IFLA_MTU") == 3000
        assert (link.get_attr("IFLA_NUM_RX_QUEUES"), link.get_attr("IFLA_NUM_TX_QUEUES")) == (2, 2)
        assert not link["flags"] & 0x100, "promiscuous"
        b.down("b0")
        wait_until(lambda: not a.has_carrier("a0"))
        b.up("b0")
        wait_until(lambda: a.has_carrier("a0"))
        with pytest.raises(OSError):
            a.index("nonexistent")
        with pytest.raises(ValueError, match="already"):
            lab.host("a")


def test_udp_checksums_are_complete_on_the_wire():
    """What the tx offload would leave undone: the far end's raw socket sees a checksum that is right."""
    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, "a0", b, "b0")
        a.address("a0", "10.0.0.1/24")
        b.address("b0", "10.0.0.2/24")
        with b.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as tap, a.socket() as sender:
            tap.settimeout(5)
            tap.bind(("b0", 0x0800))
            sender.bind(("10.0.0.1", 1000))
            sender.sendto(b"hello", ("10.0.0.2", 9))
            frame = tap.recv(2048)
            from scapy.layers.inet import IP

            packet = IP(frame[14:])
            sent = packet["UDP"].chksum
            del packet["UDP"].chksum
            assert IP(bytes(packet))["UDP"].chksum == sent


def test_enter_moves_this_thread_only_and_back():
    outside = namespace_of(os.getpid())
    with Lab() as lab:
        host = lab.host("h")
        with host.enter():
            assert os.stat("/proc/thread-self/ns/net").st_ino == host.inode != outside
            seen = []
            thread = threading.Thread(target=lambda: seen.append(os.stat("/proc/thread-self/ns/net").st_ino))
            thread.start()
            thread.join()
            assert seen == [host.inode]  # a thread starts where its creator is
        assert os.stat("/proc/thread-self/ns/net").st_ino == outside
        with pytest.raises(ZeroDivisionError), host.enter():
            raise ZeroDivisionError
        assert os.stat("/proc/thread-self/ns/net").st_ino == outside


def test_programs_run_inside_and_see_their_own_sysfs():
    with Lab() as lab:
        host = lab.host("h")
        done = host.run(["sh", "-c", "readlink /proc/self/ns/net; ls /sys/class/net; echo oops >&2; exit 3"])
        assert done.stdout.split() == [f"net:[{host.inode}]", "lo"]
        assert (done.stderr, done.returncode) == ("oops\n", 3)
        with pytest.raises(subprocess.TimeoutExpired):
            host.run(["sleep", "60"], timeout=0.1)
        with pytest.raises(subprocess.CalledProcessError):
            host.run(["false"], check=True)


def test_everything_is_removed_after_an_exception():
    with pytest.raises(RuntimeError, match="deliberate"), Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, "a0", b, "b0")
        inodes = {a.inode, b.inode}
        stubborn = a.popen(["sh", "-c", "trap '' TERM; sleep 60 & echo ready; wait"], stdout=subprocess.PIPE, text=True)
        assert stubborn.stdout.readline() == "ready\n"
        sock = b.socket()
        raise RuntimeError("deliberate")
    assert stubborn.poll() is not None
    assert sock.fileno() == -1
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [pid for pid in pids if namespace_of(pid) in inodes]


LEAVES = {
    "a lab": "lab = Lab().__enter__(); process = lab.host('h').popen(['sleep', '60'])",
    "a bench": "process = subprocess.Popen(['sleep', '60'], env=marked()); process.send_signal(signal.SIGSTOP)",
}


@pytest.mark.parametrize("leaves", LEAVES.values(), ids=LEAVES)
def test_what_is_left_by_one_that_was_killed_is_swept(leaves):
    script = (
        "import signal, subprocess, sys; from libfp.testing.netns import Lab, marked\n"
        f"{leaves}\n"
        "print(process.pid, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        orphan = int(owner.stdout.readline())
        assert MARK in Path(f"/proc/{orphan}/environ").read_text()
        assert orphan not in sweep(), "its owner lives"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert orphan in sweep()


def test_an_aborted_lab_ends_whoever_works_with_it():
    lab = Lab()
    ended = []

    def work():
        with lab:
            process = lab.host("h").popen(["sleep", "60"])
            started.set()
            process.wait()
            with pytest.raises(InterruptedError):
                lab.hosts["h"].socket()
            ended.append(process.returncode)

    started = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(10)
    lab.abort()
    thread.join(10)
    assert ended == [-signal.SIGTERM]
    assert lab.hosts == {}


def test_tcp_transfer_is_intact_both_ways(routed):
    client, _, server = routed
    for sender, receiver, address in ((client, server, "10.0.2.2"), (server, client, "10.0.1.2")):
        result = tcp_transfer(sender, receiver, address, 3_000_000)
        assert result.intact
        assert result.mbit_s > 0
    with pytest.raises(OSError):
        tcp_transfer(client, server, "10.9.9.9", 1000)


def test_udp_stream_counts_what_was_sent_lost_and_received(routed):
    client, router, server = routed
    with UdpStream(client, server, "10.0.2.2", rate=5000, count=500) as stream:
        stream.wait()
    result = stream.result
    assert (result.offered, result.received, result.lost) == (500, 500, 0)
    assert (result.duplicates, result.reordered) == (0, 0)
    assert 0.08 < result.seconds < 5
    with UdpStream(client, server, "10.0.2.2", rate=2000, size=1000) as stream:
        wait_until(lambda: stream.received > 100, what="the stream to arrive")
        router.sysctl("net.ipv4.ip_forward", 0)
        before = stream.sent  # at most 0.1 s old, so at most 200 datagrams behind
        wait_until(lambda: stream.sent > before + 400, what="datagrams to be lost")
        router.sysctl("net.ipv4.ip_forward", 1)
        arrived = stream.received
        wait_until(lambda: stream.received > arrived, what="the stream to arrive again")
    assert stream.result.lost >= 100
    assert stream.result.longest_gap > 0.05


def test_a_stream_without_a_receiver_is_an_error(routed):
    client, _, server = routed
    with pytest.raises(ChildProcessError, match="cannot receive"):
        UdpStream(client, server, "10.9.9.9", rate=1)


def test_wait_until_names_what_it_waited_for():
    assert wait_until(lambda: "yes") == "yes"
    with pytest.raises(TimeoutError, match=r"0\.02 s for the impossible"):
        wait_until(lambda: False, timeout=0.02, what="the impossible")
