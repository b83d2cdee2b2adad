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
from libfp.ports.memif import MemifPort
from libfp.testing.memif import MemifPeer
from libfp.testing.testpmd import Testpmd, Vdev, installed
from libfp.testing.wait import wait_until

pytestmark = pytest.mark.timeout(300)
needs_testpmd = pytest.mark.skipif(not installed(), reason="dpdk-testpmd is not installed; apt-get install dpdk")

FULL = bool(os.environ.get("LIBFP_FULL") or os.environ.get("LIBFP_STRESS"))
LEAVES = 50 if FULL else 2
OTHER = {"server": "client", "client": "server"}
_numbers = itertools.count()


@stage.headers_only
@stage
def across(packet):  # type: ignore[no-untyped-def]
    packet.forward(1 - packet.port)


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
@pytest.mark.parametrize("role", ["server", "client"])
def test_testpmd_swaps_the_macs_of_what_passes_us(socket: str, role: Any, cores: list[int]) -> None:
    """Python - memif - a pipeline - memif - testpmd and back: in order, byte for byte, also in several buffers."""
    ports = [
        MemifPort("near", socket=socket + "n", role="server"),
        MemifPort("far", socket=socket, role=role, buffer_size=1024 if role == "client" else None),
    ]
    vdev = Vdev(socket, OTHER[role], buffer_size=1024)
    with (
        Pipeline(across).start(ports, cores[:1]) as app,
        Testpmd([vdev], mode="macswap", core=cores[-1]) as far,
        MemifPeer("peer", socket=socket + "n", role="client") as near,
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


def polls(port: MemifPort, app: Any, more: int = 1000) -> None:
    """Wait until so many packets more have come by `port`."""
    before = app.counters.ports[port.name]["rx_packets"]
    wait_until(lambda: app.counters.ports[port.name]["rx_packets"] >= before + more, 10, f"{more} packets by {port!r}")


@stage.headers_only
@stage
def back(packet):  # type: ignore[no-untyped-def]
    packet.forward(packet.port)


@needs_testpmd
@pytest.mark.parametrize("role", ["server", "client"])
def test_testpmd_dies_in_mid_traffic_and_comes_back(socket: str, role: Any, cores: list[int]) -> None:
    port = MemifPort("far", socket=socket, role=role, queues=2)
    with Pipeline(back).start([port], cores) as app:
        for turn in range(LEAVES):
            with Testpmd([Vdev(socket, OTHER[role])], mode="io", core=cores[-1], queues=2) as far:
                far.start(first=True)
                polls(port, app, 10_000)
                assert port.wire.connections == turn + 1
                assert port.connected
                far.kill()
                wait_until(lambda: not port.connected)
    assert app.counters.ports["far"]["rx_errors"] == 0


class Load:
    """A thread that has packets sent and received by a Python end, as fast as it can, while the block runs."""

    def __init__(self, near: MemifPeer) -> None:
        self.near, self.received = near, 0
        self._packets, self._end = some(100), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._end.is_set():
            self.near.send(self._packets)
            self.received += len(self.near.receive())

    def more(self, count: int = 200) -> None:
        before = self.received
        wait_until(lambda: self.received >= before + count, 10, f"{count} packets more")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.parametrize("role", ["server", "client"])
def test_either_side_restarts_under_load(socket: str, role: Any, cores: list[int]) -> None:
    """Two applications with a memif between them: one is started anew, again and again, while packets pass."""

    def restarted() -> Any:
        return Pipeline(back).start([MemifPort("back", socket=socket, role=role)], cores[-1:])

    ports = [MemifPort("near", socket=socket + "n", role="server"), MemifPort("far", socket=socket, role=OTHER[role])]
    with Pipeline(across).start(ports, cores[:1]) as app, MemifPeer("p", socket=socket + "n", role="client") as near:
        near.wait()
        with Load(near) as load:
            for turn in range(LEAVES):
                with restarted():
                    load.more()
                    if turn == 0:
                        before = open_files(), threading.active_count(), maps()
                wait_until(lambda: not ports[1].connected)
            with restarted():
                load.more()
                wait_until(lambda: (open_files(), threading.active_count(), maps()) == before, what="nothing to leak")
    assert app.counters.ports["far"]["rx_errors"] == 0


def maps() -> int:
    """Mappings that are shared with a peer."""
    with open("/proc/self/maps") as file:
        return sum("memfd:libfp-memif" in line for line in file)
