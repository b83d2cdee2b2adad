"""`fp trace`, `fp capture` and `fp stats` on a router that runs, from another process and another namespace."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from scapy.all import IP, RawPcapNgReader, rdpcap

from libfp.engine.stats import Counters
from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import Arrivals
from libfp.testing.router import Crossroads, RouterProcess
from libfp.testing.traffic import UdpStream

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER = Crossroads.CLIENT, Crossroads.SERVER
BEHIND, HOLE = "198.51.100.7", "203.0.113.9"
UNANSWERED = {"count": 1, "timeout": 0.1}  # options of a ping
FLOWS, PORT = 64, 5016  # enough that each worker has some


class Net(Crossroads):
    """Behind the server is 198.51.100.0/24; 203.0.113.0/24 is a blackhole."""

    def __init__(self, lab: Lab, workers: int) -> None:
        super().__init__(lab, workers)
        self.router.route("198.51.100.0/24", via=SERVER)
        self.server.address("lo", f"{BEHIND}/32")
        self.router.netlink("route", "add", dst="203.0.113.0/24", type="blackhole")
        self.router.route("192.0.2.0/24", multipath=[{"gateway": SERVER}, {"gateway": self.OTHER}])


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Net]:
    with Lab(ipv6=True) as lab:
        yield Net(lab, workers)


@pytest.fixture(scope="module")
def router(net: Net) -> Iterator[RouterProcess]:
    with RouterProcess(net.router, *net.PORTS, *net.options) as process:
        net.client.ping(BEHIND)
        yield process


def fp(router: RouterProcess, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "libfp", *arguments, "--name", router.ready["name"]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def taps(router: RouterProcess) -> int:
    """How many taps the router has open: it maps the shared memory of each, one a worker."""
    mapped = Path(f"/proc/{router.process.pid}/maps").read_text().count("memfd:libfp-tap")
    return -(-mapped // len(router.ready["cores"]))


def wait_open(process: subprocess.Popen[str], router: RouterProcess) -> None:
    """Until the reader maps the rings too: by then it has the router's answer, and every worker its ring."""
    maps, workers = Path(f"/proc/{process.pid}/maps"), len(router.ready["cores"])
    wait_until(lambda: maps.read_text().count("memfd:libfp-tap") == workers, 20, "the tap to open")


def trace(
    net: Net, router: RouterProcess, to: str, count: int, *words: str, ping: Mapping[str, Any] | None = None
) -> str:
    process = fp(router, "trace", "-c", str(count), *words)
    wait_open(process, router)
    net.client.ping(to, **(ping or {}))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return out


def test_a_packet_through_every_stage_and_the_route_that_decided(net: Net, router: RouterProcess) -> None:
    out = trace(net, router, BEHIND, 1, "icmp", "and", "dst", BEHIND)
    assert re.search(r"^1  \d\d:\d\d:\d\d\.\d{9}  in r0, worker [01], 98 bytes$", out, re.M), out
    assert re.search(rf"^   IPv4 {CLIENT} > {BEHIND}, ICMP echo request, TTL 64, 02:", out, re.M), out
    assert re.search(r"^   parse    a sound IPv4 header$", out, re.M), out
    assert re.search(r"^   forward  forward r1$", out, re.M), out
    assert re.search(rf"^   => forward r1  \(198\.51\.100\.0/24 via {SERVER} dev r1\)$", out, re.M), out
    wait_until(lambda: taps(router) == 0, 20, "the tap to close")


def test_neighbours_and_blackholes_decide_too(net: Net, router: RouterProcess) -> None:
    out = trace(net, router, SERVER, 1, "--json", "icmp and dst 10.0.2.0/24")
    told = json.loads(out)
    assert told["entry"] == f"neighbour {SERVER} lladdr {net.server.mac('s0')} dev r1"
    assert told["verdict"] == "forward r1"
    told = json.loads(trace(net, router, HOLE, 1, "--json", f"dst host {HOLE}", ping=UNANSWERED))
    assert (told["verdict"], told["entry"]) == ("drop blackhole", "203.0.113.0/24 blackhole")
    assert [step["stage"] for step in told["stages"]] == ["parse", "forward"]


def test_ipv6_and_multipath_routes_are_named(net: Net, router: RouterProcess) -> None:
    wait_until(lambda: net.client.ping(net.SERVER6, count=1).received and net.client.ping(net.OTHER, count=1).received)
    told = json.loads(trace(net, router, net.SERVER6, 1, "--json", f"icmp6 and dst host {net.SERVER6}"))
    assert told["summary"].startswith(f"IPv6 {net.CLIENT6} > {net.SERVER6}, ICMPv6 echo request, hop limit 64")
    assert told["stages"][0]["did"] == "a sound IPv6 header"
    assert told["entry"] == f"neighbour {net.SERVER6} lladdr {net.server.mac('s0')} dev r1"
    told = json.loads(trace(net, router, "192.0.2.200", 1, "--json", "dst host 192.0.2.200", ping=UNANSWERED))
    assert told["verdict"] in ("forward r1", "forward r2")
    by = {"forward r1": f"via {SERVER} dev r1", "forward r2": f"via {net.OTHER} dev r2"}[told["verdict"]]
    assert told["entry"] == f"192.0.2.0/24 {by} (of 2 paths)"


def test_a_trace_that_is_killed_leaves_nothing_open(net: Net, router: RouterProcess) -> None:
    process = fp(router, "trace")
    wait_open(process, router)
    process.kill()
    process.communicate()
    wait_until(lambda: taps(router) == 0, 20, "the tap to close")


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs the program tcpdump")
def test_both_directions_with_verdicts_in_a_file(net: Net, router: RouterProcess, tmp_path: Path) -> None:
    path = tmp_path / "out.pcapng"
    process = fp(router, "capture", "-w", str(path), "icmp and host 10.0.1.2")
    wait_open(process, router)
    net.client.ping(BEHIND)
    net.client.ping(HOLE, **UNANSWERED)
    with UdpStream(net.client, net.server, SERVER, rate=1000, count=100) as stream:
        assert stream.wait().lost == 0  # not to be in the file
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert err.splitlines()[-1] == "fp: 7 packets"
    packets = rdpcap(str(path))
    assert len(packets) == 2 * 6 + 1
    with RawPcapNgReader(str(path)) as reader:
        told = [(b"".join(meta.comments), meta.ifname, meta.direction) for _, meta in reader]
    comments = [(re.sub(rb", worker [01]$", b"", comment), *rest) for comment, *rest in told]
    assert (comments != told) == (net.workers > 1)
    for seen in (
        (b"forward r1", b"r0", 1), (b"forward r1, from r0", b"r1", 2),
        (b"forward r0", b"r1", 1), (b"forward r0, from r1", b"r0", 2),
    ):  # fmt: skip
        assert comments.count(seen) == 3, comments
    assert comments.count((b"drop blackhole", b"r0", 1)) == 1
    assert [packet[IP].ttl for packet in packets[:2]] == [64, 63]
    assert abs(float(packets[0].time) - path.stat().st_mtime) < 60
    done = subprocess.run(["tcpdump", "-n", "-r", str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("ICMP echo request") == 7
    assert done.stdout.count("ICMP echo reply") == 6


def test_a_capture_ends_after_so_many(net: Net, router: RouterProcess, tmp_path: Path) -> None:
    process = fp(router, "capture", "-w", str(tmp_path / "x"), "-c", "2", "icmp")
    wait_open(process, router)
    net.client.ping(BEHIND)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(rdpcap(str(tmp_path / "x"))) == 4


def flows(net: Net) -> None:
    """A datagram of each of some flows, for the client's kernel to spread over its queues."""
    with Arrivals(net.server, port=PORT) as arrivals, contextlib.ExitStack() as stack:
        for number in range(FLOWS):
            stack.enter_context(net.client.socket()).sendto(number.to_bytes(8, "big"), (SERVER, PORT))
        wait_until(lambda: len(arrivals.take()) == FLOWS, what="every datagram")


def counted(router: RouterProcess, before: Counters) -> list[int]:
    """How many each worker has received since."""
    pairs = zip(router.counters().workers, before.workers, strict=True)
    return [now["received"] - then["received"] for now, then in pairs]


def test_packets_of_every_worker_are_in_one_trace(net: Net, router: RouterProcess) -> None:
    """Each with the worker that had it, which is the one that has counted it."""
    net.client.ping(SERVER)
    process = fp(router, "trace", "--json", "-c", str(FLOWS), f"udp dport {PORT}")
    wait_open(process, router)
    before = router.counters()
    flows(net)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    told = [json.loads(line) for line in out.splitlines()]
    assert len({one["summary"] for one in told}) == FLOWS, "each flow once"
    by = Counter(one["worker"] for one in told)
    assert [by[worker] for worker in range(net.workers)] == counted(router, before)
    assert min(by.values()) >= FLOWS // net.workers // 4


def test_packets_of_every_worker_are_in_one_capture(net: Net, router: RouterProcess, tmp_path: Path) -> None:
    path = tmp_path / "out.pcapng"
    net.client.ping(SERVER)
    process = fp(router, "capture", "-w", str(path), "-c", str(FLOWS), f"udp dport {PORT}")
    wait_open(process, router)
    before = router.counters()
    flows(net)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    with RawPcapNgReader(str(path)) as reader:
        comments = Counter(b"".join(meta.comments).decode() for _, meta in reader)
    workers = [f", worker {number}" for number in range(net.workers)] if net.workers > 1 else [""]
    for worker, count in zip(workers, counted(router, before), strict=True):
        assert comments.pop(f"forward r1{worker}") == comments.pop(f"forward r1, from r0{worker}") == count
    assert not comments


def test_the_time_of_each_stage(net: Net, router: RouterProcess) -> None:
    command = [sys.executable, "-m", "libfp", "stats", router.ready["name"], "--stages", "--json"]
    with UdpStream(net.client, net.server, SERVER, rate=2000, count=6000):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    told = json.loads(done.stdout)
    stages = {row["stage"]: row for row in told["stages"]}
    assert list(stages) == ["parse", "forward", "carry out"]
    assert stages["forward"]["packets"] >= 100
    assert 0 < stages["forward"]["ns"] < 100_000
    assert sum(worker["received"] for worker in told["workers"]) == told["received"] > 0
    wait_until(lambda: taps(router) == 1, what="one page, kept")
    table = subprocess.run([*command[:-1], "--once"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "ns a packet" in table
    assert "worker 0" in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trace", "udp dport x"], "fp: filter 'udp dport x', position 11: 'x' is not a port or a range of ports"),
        (["capture", "-w", "{}/no/file", "icmp"], "fp: cannot write {}/no/file: No such file or directory; "),
        (["capture", "-w", "{}/file", "nonsense"], "fp: filter 'nonsense', position 1: 'nonsense' is not a condition"),
    ],
)
def test_errors_are_one_line(router: RouterProcess, tmp_path: Path, arguments: list[str], said: str) -> None:
    process = fp(router, *(argument.format(tmp_path) for argument in arguments))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(said.format(tmp_path))
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_instance(tmp_path: Path) -> None:
    for command in (["trace"], ["capture", "-w", str(tmp_path / "x")]):
        done = subprocess.run(
            [sys.executable, "-m", "libfp", *command, "--name", "nobody"], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2
        assert done.stderr.startswith("fp: no instance named 'nobody' is running")
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
