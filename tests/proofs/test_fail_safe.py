"""However libfp ends, Linux carries on: killed, stalled, stopped and terminated under load.

Losses are counted by sequence number in a stream of known rate: packets lost, divided by the rate, is the time that
was lost. Half a second of traffic before an event and half a second after it belong to each measurement.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable
from typing import Any, Self

import pytest

from libfp.demo.network import SERVER, Network
from libfp.engine.stats import instances
from libfp.testing.instance import Instance
from libfp.testing.netns import wait_until
from libfp.testing.traffic import UdpStream, stream_by
from tests.netns.conftest import workers as workers  # the fixture: one, then two

pytestmark = pytest.mark.timeout(300)  # a router that nobody has compiled yet takes its time to start

wait_for = functools.partial(wait_until, timeout=20.0)

RATE = 20_000  # datagrams a second, through one worker
SHARED_RATE = 4_000  # through each of several, which leave the ends of the traffic no core to themselves
INTERFACES = {"lo", "r0", "r1"}


class Flows:
    """Streams from client to server, one through each worker, as if they were one of `rate` datagrams a second."""

    def __init__(self, network: Network, router: Instance) -> None:
        self._network, self._router = network, router
        self._streams: list[UdpStream] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        count = len(self._router.counters.workers)
        self.rate = RATE if count == 1 else SHARED_RATE * count
        with self._stack as stack:
            for worker in range(count):
                stream = stream_by(
                    lambda worker=worker: self._router.counters.workers[worker]["received"],  # type: ignore[misc]
                    *(self._network.client, self._network.server, SERVER),
                    rate=self.rate // count,
                    first_port=5100 + 32 * worker,
                )
                self._streams.append(stack.enter_context(stream))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @property
    def sent(self) -> int:
        return sum(stream.sent for stream in self._streams)

    @property
    def received(self) -> int:
        return sum(stream.received for stream in self._streams)

    @property
    def lost(self) -> int:
        """Known after the end."""
        return sum(stream.result.lost for stream in self._streams)

    @property
    def lost_ms(self) -> float:
        return 1000 * self.lost / self.rate


def once(workers: int) -> None:
    """For what workers do each for itself: with one, and with two only if LIBFP_FULL is set."""
    if workers > 1 and not os.environ.get("LIBFP_FULL"):
        pytest.skip("with one worker, and with two only if LIBFP_FULL is set")


def through(network: Network, router: Instance) -> Flows:
    """The traffic, from client to server."""
    return Flows(network, router)


def arrives(flows: Flows) -> None:
    """Wait for half a second's datagrams more."""
    before, more = flows.received, flows.rate // 2
    wait_for(lambda: flows.received >= before + more, what=f"{more} datagrams more")


def forwards(router: Instance, packets: int = 2000) -> None:
    """Wait until each worker has forwarded so many more."""
    for number, before in enumerate(router.counters.workers):
        wait_for(
            lambda number=number, before=before: (  # type: ignore[misc]
                router.counters.workers[number]["forwarded"] >= before["forwarded"] + packets
            ),
            what=f"worker {number} to forward {packets} packets",
        )


def left_behind(network: Network, router: Instance) -> list[str]:
    """What there still is of it, by name."""
    found = []
    for link in network.router.netlink("get_links"):
        name = link.get_attr("IFLA_IFNAME")
        if name not in INTERFACES:
            found.append(f"interface {name}")
        if (xdp := link.get_attr("IFLA_XDP")) is not None and xdp.get_attr("IFLA_XDP_ATTACHED"):
            found.append(f"XDP program on {name}")
    if sockets := af_xdp_sockets(network):
        found.append(f"{sockets} AF_XDP sockets")
    if router.name in instances():
        found.append(f"instance {router.name}")
    return found


def af_xdp_sockets(network: Network) -> int:
    """How many the router's namespace has."""

    def count() -> int:
        with open("/proc/thread-self/net/protocols") as protocols:
            return next((int(line.split()[2]) for line in protocols if line.startswith("XDP ")), 0)

    return network.router.call(count)


def test_what_is_looked_for_is_there_while_it_runs(
    network: Network, workers: int, fp_router: Callable[..., Instance]
) -> None:
    """The contrast to all that follows: `left_behind` can see each of these."""
    router = fp_router()
    found = left_behind(network, router)
    taps = [f"interface lfp{network.router.index(name)}" for name in ("r0", "r1")]
    expected = [
        *taps,
        "XDP program on r0",
        "XDP program on r1",
        f"{2 * workers} AF_XDP sockets",
        f"instance {router.name}",
    ]
    assert sorted(found) == sorted(expected)


def test_killed_under_load_linux_forwards_and_nothing_is_left(
    network: Network, fp_router: Callable[..., Instance]
) -> None:
    router = fp_router()
    with through(network, router) as stream:
        forwards(router)
        arrives(stream)
        router.end(signal.SIGKILL)
        wait_for(lambda: left_behind(network, router) == [], what="nothing to be left")
        arrives(stream)
    print(f"kill -9: {stream.lost_ms:.1f} ms lost")
    assert stream.lost_ms <= 200
    assert network.client.ping(SERVER).received == 3
    again = fp_router()  # and nothing stands in the way of the next one
    assert network.client.ping(SERVER).received == 3
    assert again.counters.forwarded >= 6


def test_a_stalled_worker_is_bypassed_until_it_moves_again(network: Network, faulty: Callable[..., Instance]) -> None:
    router = faulty()
    with through(network, router) as stream:
        forwards(router)
        arrives(stream)
        router.tell("stall")
        wait_for(lambda: "Linux takes its traffic" in router.said, what="the watchdog to see it")
        forwarded = router.counters.forwarded
        arrives(stream)  # by Linux, while the process lives
        assert router.counters.forwarded == forwarded
        assert router.process.poll() is None
        router.tell("go")
        wait_for(lambda: "moves again" in router.said, what="the watchdog to see it move")
        forwards(router)
        arrives(stream)
    print(f"stall: {stream.lost_ms:.1f} ms lost")
    assert stream.lost_ms <= 200


def test_a_stopped_process_black_holes_until_it_is_continued(
    network: Network, workers: int, fp_router: Callable[..., Instance]
) -> None:
    """The limit of what a process can do for itself: its watchdog stands still as well."""
    once(workers)
    router = fp_router()
    with through(network, router) as stream:
        forwards(router)
        black_hole(router, stream)
        router.process.send_signal(signal.SIGCONT)
        forwards(router)
        arrives(stream)


def test_a_stopped_process_black_holes_until_it_is_killed(
    network: Network, workers: int, fp_router: Callable[..., Instance]
) -> None:
    once(workers)
    router = fp_router()
    with through(network, router) as stream:
        forwards(router)
        black_hole(router, stream)
        router.end(signal.SIGKILL)
        arrives(stream)
    assert left_behind(network, router) == []


def black_hole(router: Instance, stream: Flows) -> None:
    """Stop the process, and see that nothing arrives of a whole second of traffic."""
    router.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: router.thread_status("State") == "T", what="the process to stop")
    sent = stream.sent
    wait_for(lambda: stream.sent > sent + stream.rate // 5, what="what was on its way to have arrived")
    sent, received = stream.sent, stream.received
    wait_for(lambda: stream.sent > sent + stream.rate, what="a second to pass")
    assert stream.received == received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_hands_over_to_linux(
    network: Network, workers: int, fp_router: Callable[..., Instance], number: signal.Signals
) -> None:
    router = fp_router()
    with through(network, router) as stream:
        forwards(router)
        arrives(stream)
        assert router.end(number) == 0
        assert left_behind(network, router) == []
        arrives(stream)
    print(f"{number.name}: {stream.lost} packets lost")
    assert stream.lost <= 64 * workers
    assert router.said.splitlines()[-1].startswith("fp router:")  # no traceback


def test_a_worker_restarted_under_load_loses_little(
    network: Network, workers: int, faulty: Callable[..., Instance]
) -> None:
    once(workers)  # test_router_workers has two: one restarted, the other untouched
    router = faulty()
    with through(network, router) as stream:
        forwards(router)
        arrives(stream)
        for _ in range(5):
            before = router.counters
            router.tell("restart")
            after = router.counters
            assert after.forwarded >= before.forwarded
            assert after.workers[0]["heartbeat"] > before.workers[0]["heartbeat"]
            forwards(router)
        router.tell("stop")
        arrives(stream)
    print(f"five restarts and a stop: {stream.lost} packets lost")
    assert stream.lost <= 5 * 64
