"""memif ports under load: DPDK's testpmd at the far end in both roles, and peers that leave and come back.

`LIBFP_FULL=1` (and `make stress`) has them leave 50 times where `make test` has 2.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from libfp import Pipeline, stage
from libfp.jit import load32
from libfp.jit.memory import known
from libfp.ports.memif import MemifPort
from libfp.testing.memif import MemifPeer
from libfp.testing.testpmd import Testpmd, Vdev, installed
from libfp.testing.wait import wait_until
from tests.stress.test_memif_rings import across

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]
needs_testpmd = pytest.mark.skipif(not installed(), reason="dpdk-testpmd is not installed; apt-get install dpdk")

FULL = bool(os.environ.get("LIBFP_FULL") or os.environ.get("LIBFP_STRESS"))
LEAVES = 50 if FULL else 2
OTHER = {"server": "client", "client": "server"}
_numbers = itertools.count()
headers = stage.headers_only(across)


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return f"@libfp-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:2]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = open_files(), threading.active_count()
    yield
    wait_until(lambda: (open_files(), threading.active_count()) == before, 5, "files and threads to be closed")


def open_files() -> int:
    gc.collect()  # a page of statistics is unmapped with its object
    return len(os.listdir("/proc/self/fd"))


def some(count: int, lengths: tuple[int, ...] = (60, 64, 191, 192, 193, 500, 1514)) -> list[bytes]:
    source = random.Random(count)
    return [struct.pack(">IQ", k, k) + source.randbytes(source.choice(lengths) - 12) for k in range(count)]


PROBE = bytes(60)  # until the first of which comes back, packets may be lost: DPDK fills its ring when it polls


def swapped(packet: bytes) -> bytes:
    return packet[6:12] + packet[:6] + packet[12:]


def there_and_back(near: MemifPeer, packets: list[bytes], timeout: float = 10.0) -> list[bytes]:
    """What comes back of `packets`, of which never more than a ring has room for are under way."""
    got: list[bytes] = []
    sent = 0

    def go_on() -> bool:
        nonlocal sent
        if sent - len(got) < 500:
            sent += near.send(packets[sent : sent + 250])
        got.extend(one for one in near.receive() if one != PROBE)
        return len(got) >= len(packets)

    wait_until(go_on, timeout, "all packets to come back", interval=0)
    return got


@needs_testpmd
@pytest.mark.parametrize("role", ["server", "client", "sharing"])
def test_testpmd_swaps_the_macs_of_what_passes_us(socket: str, role: Any, cores: list[int]) -> None:
    """Python - memif - a pipeline - memif - testpmd and back: in order, byte for byte, also in several buffers, and
    from the one peer's buffers to the other's without a copy."""
    shared = role == "sharing"
    role = "client" if shared else role
    options: Any = {"buffer_size": 1024} if role == "client" else {}
    near_options = {**options, "share": "both"} if shared else {"role": "server"}
    ports = [
        MemifPort("near", socket=socket + "n", **near_options),
        MemifPort("far", socket=socket, role=role, **options, share="both" if shared else ""),
    ]
    vdev = Vdev(socket, OTHER[role], buffer_size=1024)
    with (
        Pipeline(headers if shared else across).start(ports, cores[:1]) as app,
        Testpmd([vdev], mode="macswap", core=cores[-1]) as far,
        MemifPeer("peer", socket=socket + "n", role=OTHER[ports[0].role]) as near,
    ):
        near.wait()
        far.start()
        wait_until(lambda: ports[0].connected and ports[1].connected)
        packets = some(3000)
        wait_until(lambda: near.send([PROBE]) and near.receive(), what="testpmd to have buffers")
        assert there_and_back(near, packets) == [swapped(one) for one in packets]
        count = app.counters.ports["far"]
        assert count["tx_packets"] == count["rx_packets"] > len(packets)
        assert count["rx_errors"] == 0
        if shared:
            assert buffers_of(ports[1]) != sorted(buffers_of(ports[1])), "some have been moved"


def buffers_of(port: MemifPort) -> list[int]:
    """Where the buffers are that a port which shares them has now."""
    share = port.wire.share
    assert share is not None
    return [load32(share.table + 4 * slot) for slot in range(2 * port.ring_size)]


def polls(port: MemifPort, app: Any, more: int = 1000) -> None:
    """Wait until so many packets more have come by `port`."""
    before = app.counters.ports[port.name]["rx_packets"]
    wait_until(lambda: app.counters.ports[port.name]["rx_packets"] >= before + more, 10, f"{more} packets by {port!r}")


@needs_testpmd
@pytest.mark.parametrize("role", ["server", "client"])
def test_testpmd_dies_in_mid_traffic_and_comes_back(socket: str, role: Any, cores: list[int]) -> None:
    sockets = socket, socket + "2"
    ports = [MemifPort(f"far{k}", socket=sockets[k], role=role, queues=2) for k in (0, 1)]
    vdevs = [Vdev(one, OTHER[role]) for one in sockets]
    with Pipeline(across).start(ports, cores) as app:
        for turn in range(LEAVES):
            with Testpmd(vdevs, mode="io", core=cores[-1], queues=2) as far:
                far.start(first=True)
                polls(ports[0], app, 10_000)
                assert [port.wire.connections for port in ports] == [turn + 1] * 2
                assert all(port.connected for port in ports)
                far.kill()
                wait_until(lambda: not any(port.connected for port in ports))
    assert app.counters.ports["far0"]["rx_errors"] == app.counters.ports["far1"]["rx_errors"] == 0


class Load:
    """A thread that sends by one Python end and receives by another, as fast as it can, while the block runs."""

    def __init__(self, near: MemifPeer, far: MemifPeer) -> None:
        self.near, self.far, self.received = near, far, 0
        self._packets, self._end = some(100), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._end.is_set():
            self.near.send(self._packets)
            self.received += len(self.far.receive())

    def more(self, count: int = 200) -> None:
        before = self.received
        wait_until(lambda: self.received >= before + count, 10, f"{count} packets more")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.parametrize("role", ["server", "client", "sharing"])
def test_either_side_restarts_under_load(socket: str, role: Any, cores: list[int]) -> None:
    """Two applications with two memifs between them: one is started anew, again and again, while packets pass. The one
    that stays may share its buffers between all its peers."""
    shared = {"share": "all"} if role == "sharing" else {}
    role = "server" if shared else role

    def ports(role: Any, **options: Any) -> list[MemifPort]:
        return [MemifPort(f"link{k}", socket=f"{socket}{k}", role=role, **options) for k in (0, 1)]

    def restarted() -> Any:
        return Pipeline(across).start(ports(role), cores[-1:])

    stays = ports(OTHER[role], **shared)
    end: Any = "client" if shared else "server"
    ends = [MemifPort(f"end{k}", socket=f"{socket}{k}", id=1, role=end, **shared) for k in (2, 3)]
    with (
        Pipeline(headers if shared else across).start([ends[0], *stays, ends[1]], cores[:1]) as app,
        MemifPeer("near", socket=f"{socket}2", id=1, role=OTHER[end]) as near,
        MemifPeer("far", socket=f"{socket}3", id=1, role=OTHER[end]) as far,
    ):
        near.wait()
        far.wait()
        with Load(near, far) as load:
            for turn in range(LEAVES):
                with restarted():
                    load.more()
                    if turn == 0:
                        before = what_is_open()
                wait_until(lambda: not any(port.connected for port in stays))
            with restarted():
                load.more()
                wait_until(lambda: what_is_open() == before, what="nothing to leak")
        if shared:
            held = [offset for port in (ends[0], *stays, ends[1]) for offset in buffers_of(port)]
            assert held != sorted(held) == list(range(256, 4 * 2 * 1024 * 2304, 2304)), "each is in one place, still"
    assert app.counters.ports["link0"]["rx_errors"] == app.counters.ports["link1"]["rx_errors"] == 0


def what_is_open() -> tuple[int, int, int, int]:
    """Files, threads, mappings shared with a peer, and all the memory that compiled code may reach."""
    return open_files(), threading.active_count(), maps(), len(known())


def maps() -> int:
    """Mappings that are shared with a peer."""
    with open("/proc/self/maps") as file:
        return sum("memfd:libfp-memif" in line for line in file)
