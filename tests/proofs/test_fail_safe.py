"""However libfp ends, Linux carries on: killed, stalled, stopped and terminated under load.

Losses are counted by sequence number in a stream of known rate: packets lost, divided by the rate, is the time that
was lost. Half a second of traffic before an event and half a second after it belong to each measurement.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

import pytest

from libfp.demo.network import SERVER, Network
from libfp.engine.stats import instances
from libfp.testing.instance import Instance
from libfp.testing.netns import wait_until
from libfp.testing.traffic import StreamResult, UdpStream

pytestmark = pytest.mark.timeout(300)  # a router that nobody has compiled yet takes its time to start

wait_for = functools.partial(wait_until, timeout=20.0)

RATE = 20_000  # datagrams a second
INTERFACES = {"lo", "r0", "r1"}


def lost_ms(result: StreamResult) -> float:
    return 1000 * result.lost / RATE


def through(network: Network) -> UdpStream:
    """The stream, from client to server."""
    return UdpStream(network.client, network.server, SERVER, rate=RATE)


def arrives(stream: UdpStream, datagrams: int = RATE // 2) -> None:
    """Wait until so many more have come."""
    before = stream.received
    wait_for(lambda: stream.received >= before + datagrams, what=f"{datagrams} datagrams more")


def forwards(router: Instance, packets: int = RATE // 4) -> None:
    """Wait until the worker has forwarded so many more."""
    before = router.counters.forwarded
    wait_for(lambda: router.counters.forwarded >= before + packets, what=f"the worker to forward {packets} packets")


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


def test_what_is_looked_for_is_there_while_it_runs(network: Network, fp_router: Callable[..., Instance]) -> None:
    """The contrast to all that follows: `left_behind` can see each of these."""
    router = fp_router()
    found = left_behind(network, router)
    taps = [f"interface lfp{network.router.index(name)}" for name in ("r0", "r1")]
    expected = [*taps, "XDP program on r0", "XDP program on r1", "2 AF_XDP sockets", f"instance {router.name}"]
    assert sorted(found) == sorted(expected)


def test_killed_under_load_linux_forwards_and_nothing_is_left(
    network: Network, fp_router: Callable[..., Instance]
) -> None:
    router = fp_router()
    with through(network) as stream:
        forwards(router)
        arrives(stream)
        router.end(signal.SIGKILL)
        wait_for(lambda: left_behind(network, router) == [], what="nothing to be left")
        arrives(stream)
    print(f"kill -9: {lost_ms(stream.result):.1f} ms lost")
    assert lost_ms(stream.result) <= 200
    assert network.client.ping(SERVER).received == 3
    again = fp_router()  # and nothing stands in the way of the next one
    assert network.client.ping(SERVER).received == 3
    assert again.counters.forwarded >= 6


def test_a_stalled_worker_is_bypassed_until_it_moves_again(network: Network, faulty: Callable[..., Instance]) -> None:
    router = faulty()
    with through(network) as stream:
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
    print(f"stall: {lost_ms(stream.result):.1f} ms lost")
    assert lost_ms(stream.result) <= 200


def test_a_stopped_process_black_holes_until_it_is_continued(
    network: Network, fp_router: Callable[..., Instance]
) -> None:
    """The limit of what a process can do for itself: its watchdog stands still as well."""
    router = fp_router()
    with through(network) as stream:
        forwards(router)
        black_hole(router, stream)
        router.process.send_signal(signal.SIGCONT)
        forwards(router)
        arrives(stream)


def test_a_stopped_process_black_holes_until_it_is_killed(network: Network, fp_router: Callable[..., Instance]) -> None:
    router = fp_router()
    with through(network) as stream:
        forwards(router)
        black_hole(router, stream)
        router.end(signal.SIGKILL)
        arrives(stream)
    assert left_behind(network, router) == []


def black_hole(router: Instance, stream: UdpStream) -> None:
    """Stop the process, and see that nothing arrives of a whole second of traffic."""
    router.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: router.thread_status("State") == "T", what="the process to stop")
    sent = stream.sent
    wait_for(lambda: stream.sent > sent + RATE // 5, what="what was on its way to have arrived")
    sent, received = stream.sent, stream.received
    wait_for(lambda: stream.sent > sent + RATE, what="a second to pass")
    assert stream.received == received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_hands_over_to_linux(
    network: Network, fp_router: Callable[..., Instance], number: signal.Signals
) -> None:
    router = fp_router()
    with through(network) as stream:
        forwards(router)
        arrives(stream)
        assert router.end(number) == 0
        assert left_behind(network, router) == []
        arrives(stream)
    print(f"{number.name}: {stream.result.lost} packets lost")
    assert stream.result.lost <= 64
    assert router.said.splitlines()[-1].startswith("fp router:")  # no traceback


def test_a_worker_restarted_under_load_loses_little(network: Network, faulty: Callable[..., Instance]) -> None:
    router = faulty()
    with through(network) as stream:
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
    print(f"five restarts and a stop: {stream.result.lost} packets lost")
    assert stream.result.lost <= 5 * 64
