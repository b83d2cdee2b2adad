"""A worker makes no system call: one that would be killed for the first carries traffic, and a tracer counts none.

Each proof has its contrast: a stage that does make a call dies of it, and the same tracer counts a worker's own calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest

from libfp.demo.network import SERVER, Network
from libfp.testing.instance import Instance
from libfp.testing.netns import wait_until
from libfp.testing.syscalls import count_syscalls
from libfp.testing.traffic import UdpStream

pytestmark = pytest.mark.timeout(300)  # a router that nobody has compiled yet takes its time to start

wait_for = functools.partial(wait_until, timeout=20.0)

FULL_RATE = 0  # as fast as the sender can
SEALED = {"kick": "helper", "idle": "spin", "sealed": True}


@contextlib.contextmanager
def flood(network: Network) -> Iterator[UdpStream]:
    """As much as the sender can, for as long as the block lasts; nobody waits for what is still on its way."""
    stream = UdpStream(network.client, network.server, SERVER, rate=FULL_RATE)
    try:
        yield stream
    finally:
        stream.kill()


def forwarded_by_linux(network: Network) -> int:
    """Datagrams that the router's kernel has forwarded itself."""

    def count() -> int:
        with open("/proc/thread-self/net/snmp") as snmp:
            names, values = [line.split() for line in snmp if line.startswith("Ip:")]
        return int(values[names.index("ForwDatagrams")])

    return network.router.call(count)


def test_a_sealed_worker_carries_traffic_for_ten_seconds_at_full_rate(
    network: Network, faulty: Callable[..., Instance]
) -> None:
    router = faulty(SEALED, prefer="worker")
    assert router.is_sealed()
    before, by_linux = router.counters, forwarded_by_linux(network)
    with UdpStream(network.client, network.server, SERVER, rate=FULL_RATE, seconds=10.0) as stream:
        result = stream.wait(30.0)
    forwarded, by_linux = router.counters.forwarded - before.forwarded, forwarded_by_linux(network) - by_linux
    assert result.seconds > 9.9
    assert forwarded > 100_000
    assert result.received > 100_000
    assert forwarded >= result.received - by_linux  # the watchdog's doing: a core may be busy with somebody else
    # It is alive and sealed, and has made none.
    beat = router.worker["heartbeat"]
    wait_for(lambda: router.worker["heartbeat"] > beat, what="the worker's loop to turn")
    assert router.is_sealed()
    assert router.worker["syscalls"] == 0


def test_a_sealed_worker_dies_of_its_first_system_call(network: Network, faulty: Callable[..., Instance]) -> None:
    router = faulty(SEALED, prefer="worker")
    assert router.is_sealed()
    with flood(network) as stream:
        forwarded = router.counters.forwarded
        wait_for(lambda: router.counters.forwarded > forwarded + 1000, what="the worker to forward")
        router.tell("fault")
        wait_for(lambda: router.thread_status("Seccomp") == "", what="the worker to be killed")
        beat = router.worker["heartbeat"]
        received = stream.received
        wait_for(lambda: stream.received > received, what="Linux to forward what the worker no longer does")
    assert router.worker["heartbeat"] == beat
    assert router.process.poll() is None  # the thread died, not the process


def test_a_tracer_counts_no_system_call_with_a_helper(network: Network, fp_router: Callable[..., Instance]) -> None:
    router = fp_router("--kick", "helper", "--idle", "spin", prefer="worker")
    with flood(network) as stream:
        wait_for(lambda: stream.received > 1000, what="traffic")
        counted = count_syscalls(router.worker["thread"], 2.0, lambda: router.counters)
    assert counted.calls == {}
    assert counted.after.forwarded - counted.before.forwarded > 1000
    assert counted.after.workers[0]["syscalls"] == 0


def test_the_same_tracer_counts_the_calls_of_a_worker_that_kicks(
    network: Network, fp_router: Callable[..., Instance]
) -> None:
    router = fp_router("--kick", "inline")
    with flood(network) as stream:
        wait_for(lambda: stream.received > 1000, what="traffic")
        counted = count_syscalls(router.worker["thread"], 2.0, lambda: router.worker)
    own = counted.after["syscalls"] - counted.before["syscalls"]
    assert counted.total > 100
    assert abs(counted.total - own) <= 1  # one may be under way at either end


def test_parking_is_a_call_and_is_counted(network: Network, fp_router: Callable[..., Instance]) -> None:
    router = fp_router("--kick", "inline", "--idle", "park")
    wait_for(lambda: router.worker["parks"] > 0, what="a worker without traffic to park")
    counted = count_syscalls(router.worker["thread"], 0.5, lambda: router.worker)
    own = counted.after["syscalls"] - counted.before["syscalls"]
    assert own >= counted.after["parks"] - counted.before["parks"] > 5
    assert abs(counted.total - own) <= 2  # and a poll that the tracer interrupts is begun again
