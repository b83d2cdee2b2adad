"""The programs of examples/ as a user starts them, with real traffic."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from libfp.pyxdp.device import look
from libfp.testing import udp
from libfp.testing.instance import running
from libfp.testing.netns import Lab, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
VIP, BALANCER = "10.0.1.80", "10.0.1.1"
START = 60.0  # seconds; the first start compiles
WATCHDOG = re.compile(r"worker \d (has stood still|moves again).*\n")  # of a busy machine


def start(host, name, *arguments):
    return host.popen(
        [sys.executable, str(EXAMPLES / name), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Ctrl-C; what it said at the end. It has nothing to complain of but the machine."""
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, WATCHDOG.sub("", errors)) == (0, "")
    return out


def line(process):
    """The next line that it prints."""
    text = process.stdout.readline()
    assert text, process.stderr.read()
    return text.rstrip("\n")


@pytest.fixture(scope="module")
def net():
    """client -- (eth0 router eth1) -- server; the client has 192.0.2.7, too."""
    with Lab() as lab:
        client, router, server = lab.routed("eth0", "eth1")
        client.address("c0", "192.0.2.7/32")
        router.route("192.0.2.7/32", via="10.0.1.2")
        server.address("s0", "10.0.3.2/32")
        router.route("10.0.3.0/24", via="10.0.2.2")
        yield client, router, server


def type_in(process, text):
    process.stdin.write(text + "\n")
    process.stdin.flush()
    return line(process)


@pytest.mark.timeout(120)
def test_deny_denies(net):
    client, router, _ = net
    process = start(router, "deny.py", "eth0", "eth1")
    assert type_in(process, "192.0.2.7") == "blocked: 192.0.2.7"
    wait_until(lambda: client.ping("10.0.2.2", 1, source="192.0.2.7", timeout=0.1).received == 0, 5, "the block")
    assert client.ping("10.0.2.2").received == 3
    assert "'nonsense' is not of type ipv4" in type_in(process, "nonsense")
    assert type_in(process, "-192.0.2.7") == "blocked: nobody"
    wait_until(lambda: client.ping("10.0.2.2", 1, source="192.0.2.7", timeout=0.1).received, 5, "the way to be free")
    assert int(end(process).split()[0]) >= 1
    assert client.ping("10.0.2.2").received == 3, "Linux carries on"


@contextlib.contextmanager
def statistics(process):
    """The counters of the program's instance, once its workers turn."""

    def turning():
        assert process.poll() is None, process.stderr.read()
        return running(process)

    with contextlib.closing(wait_until(turning, START, "the program to run")) as reader:
        yield reader.counters


@pytest.mark.timeout(120)
def test_prefix_count_counts(net, tmp_path):
    client, router, _ = net
    (tmp_path / "prefixes").write_text("default via 10.0.2.2\n10.0.0.0/8\n10.0.2.0/24 dev eth1\n10.0.3.0/24\n")
    process = start(router, "prefix_count.py", str(tmp_path / "prefixes"), "eth0", "eth1")
    with statistics(process) as counters, client.socket() as sock:
        before = counters().received
        for address, count, size in (("10.0.2.2", 20, 100), ("10.0.3.2", 30, 200), ("10.0.4.2", 10, 1000)):
            for _ in range(count):
                sock.sendto(bytes(size), (address, 9))
        wait_until(lambda: counters().received >= before + 60, 10, "all to be counted")
    assert line(process) == "counting by 3 prefixes; Ctrl-C ends with the table"
    rows = {words[0]: words[1:] for words in map(str.split, end(process).splitlines()) if words}
    assert rows["10.0.2.0/24"] == ["20", str(20 * 142)]
    assert rows["10.0.3.0/24"] == ["30", str(30 * 242)]
    assert rows["10.0.0.0/8"][0] >= "10"  # and ICMP errors about it
    order = [name for name in rows if name.startswith("10.")]
    assert order.index("10.0.3.0/24") < order.index("10.0.2.0/24")


@pytest.mark.timeout(120)
def test_rate_limit_limits(net):
    client, router, _ = net
    process = start(router, "rate_limit.py", "10", "eth0", "eth1")
    with statistics(process) as counters, client.socket() as sock:

        def limited():
            for _ in range(50):
                sock.sendto(b"", ("10.0.2.2", 9))
            return counters()["over-rate"] >= 45

        wait_until(limited, 10, "too many packets")
        wait_until(lambda: client.ping("10.0.2.2", 1, timeout=0.2).received, 5, "credit")
    said = end(process).splitlines()
    assert said[0].endswith(" packets dropped")
    assert said[1].split()[1] == "10.0.1.2"


def serve(listener, name):
    """Say who one is, then how many bytes have come."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            connection.sendall(name.encode() + b"\n")
            total = 0
            while data := connection.recv(65536):
                total += len(data)
            connection.sendall(str(total).encode())


class Backend:
    """A host with VIP on its loopback, whose service is on TCP port 80, and which takes datagrams on port 9."""

    def __init__(self, host, name):
        self.host, self.name = host, name
        host.address("lo", VIP + "/32")
        for setting, value in (("arp_ignore", 1), ("arp_announce", 2)):
            host.sysctl(f"net.ipv4.conf.all.{setting}", value)
        self.datagrams = host.socket()
        self.datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.datagrams.bind((VIP, 9))
        self.datagrams.setblocking(False)
        self.open()

    def open(self):
        self.listener = self.host.socket(kind=socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("0.0.0.0", 80))
        self.listener.listen()
        self.thread = threading.Thread(target=serve, args=(self.listener, self.name), daemon=True)
        self.thread.start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()

    def taken(self):
        """(payload, source port) of what has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, port) = self.datagrams.recvfrom(100)
                yield data, port


@pytest.fixture(scope="module")
def site():
    """A switch, and on it a client, a balancer, and three backends that answer the client past the balancer."""
    with Lab() as lab:
        switch = lab.host("switch")
        switch.netlink("link", "add", ifname="br0", kind="bridge")
        switch.up("br0")
        hosts = {}
        for number, name in enumerate(("balancer", "client", "b11", "b12", "b13")):
            hosts[name] = lab.host(name)
            lab.link(hosts[name], "eth0", switch, f"p{number}")
            switch.netlink("link", "set", index=switch.index(f"p{number}"), master=switch.index("br0"))
            address = name[1:] if name.startswith("b1") else number + 1
            hosts[name].address("eth0", f"10.0.1.{address}/24")
        hosts["balancer"].address("eth0", VIP + "/32")
        backends = [Backend(hosts[name], f"10.0.1.{name[1:]}") for name in ("b11", "b12", "b13")]
        yield hosts["client"], hosts["balancer"], backends
        for backend in backends:
            backend.close()


FLOWS = range(20000, 20300)


def owners(client, balancer, backends, payload):
    """Send datagrams of every flow until each has come to a backend: {source port: the backend's name}."""
    found, mac = {}, balancer.mac("eth0")
    frames = {
        port: udp(payload, sport=port, src="10.0.1.2", dst=VIP, eth_dst=mac, eth_src=client.mac("eth0"))
        for port in FLOWS
    }
    with client.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))

        def all_come():
            for backend in backends:
                for data, port in backend.taken():
                    if data == payload:
                        assert found.setdefault(port, backend.name) == backend.name, "one flow, one backend"
            for port in frames.keys() - found.keys():
                sock.send(frames[port])
            return len(found) == len(frames)

        wait_until(all_come, 10, "every flow to come to a backend", interval=0.05)
    return found


@pytest.mark.timeout(120)
def test_maglev_balances(site):
    client, balancer, backends = site
    names = [backend.name for backend in backends]
    process = start(balancer, "maglev.py", "-i", "eth0", VIP, *names)
    assert line(process) == "backends: " + ", ".join(names)
    before = owners(client, balancer, backends, b"before")
    shares = Counter(before.values())
    assert all(60 <= shares[name] <= 140 for name in names), shares  # five standard deviations
    talked = Counter()
    for _ in range(12):
        with client.socket(kind=socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect((VIP, 80))
            with sock.makefile("rb") as answers:
                talked[answers.readline().decode().strip()] += 1
                sock.sendall(bytes(100_000))
                sock.shutdown(socket.SHUT_WR)
                assert answers.read() == b"100000"
    assert set(talked) <= set(names)
    assert len(talked) >= 2, "12 connections to one of three: 1 in 60,000"
    assert client.ping(VIP).received == 3, "a backend answers"
    assert client.ping(BALANCER).received == 3, "everything else stays with Linux"

    backends[1].close()
    assert line(process) == f"backends: {names[0]}, {names[2]}"
    after = owners(client, balancer, backends, b"after")
    assert names[1] not in after.values()
    moved = [port for port in FLOWS if before[port] != after[port] and before[port] != names[1]]
    assert len(moved) <= 15, "of the other backends' 200 flows, few"
    backends[1].open()
    assert line(process) == "backends: " + ", ".join(names)
    assert owners(client, balancer, backends, b"again") == before
    end(process)
    with balancer.enter():
        assert look("eth0").programs == ()
