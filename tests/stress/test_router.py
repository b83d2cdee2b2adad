"""The router for some seconds under more than it can carry, then the books: every packet counted, every frame found.

A frame lost now and then is what stops a router after a week.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from libfp.demo.network import CLIENT, SERVER, Network, check_af_xdp
from libfp.errors import Unsupported
from libfp.testing.instance import Instance
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.traffic import UdpStream

pytestmark = [
    pytest.mark.root,
    pytest.mark.stress,
    pytest.mark.timeout(300),  # a router that nobody has compiled yet takes its time to start
]

wait_for = functools.partial(wait_until, timeout=20.0)

CORE = max(os.sched_getaffinity(0))
KEPT = 2  # frames a port that the kernel may keep, taken from the fill ring for the packet that comes next
POLICIES = [{"kick": "inline"}, {"kick": "helper", "idle": "spin"}]
QUIET = threading.Event()  # never set: to wait on
_numbers = itertools.count(1)


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        check_af_xdp()
    except Unsupported as error:
        pytest.skip(str(error))
    with Lab() as lab:
        made = Network(lab)
        made.place()
        assert made.client.ping(SERVER).received
        yield made


@pytest.fixture
def start(network: Network) -> Iterator[Callable[..., Instance]]:
    with ExitStack() as undo:
        name = f"stress-{os.getpid()}-{next(_numbers)}"
        yield lambda **options: Instance.faulty(
            network.router,
            undo,
            name,
            ["r0", "r1"],
            CORE,
            options,
            prefer="process" if options["kick"] == "inline" else "worker",
        )


@contextmanager
def sending(host: Host, address: str, *options: object) -> Iterator[None]:
    """Datagrams to an address where nobody counts them."""
    command = [sys.executable, "-m", "libfp.testing.datagrams", "send", address, "5003", *map(str, options)]
    process = host.popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


@contextmanager
def flood(network: Network) -> Iterator[UdpStream]:
    stream = UdpStream(network.client, network.server, SERVER, rate=0)
    try:
        yield stream
    finally:
        stream.kill()


def forwarding(router: Instance) -> None:
    before = router.counters.forwarded
    wait_for(lambda: router.counters.forwarded > before + 5000, what="the worker to forward")


def standing(router: Instance, what: str) -> None:
    """Wait until a counter stays as it is for a tenth of a second of a turning loop."""

    def quiet() -> bool:
        before = router.counters
        wait_for(lambda: router.worker["heartbeat"] > before.workers[0]["heartbeat"] + 2, what="the loop to turn")
        return bool(getattr(router.counters, what) == getattr(before, what))

    wait_for(lambda: quiet() and not QUIET.wait(0.1) and quiet(), what=f"nothing to be {what} any more")


def check_books(router: Instance) -> None:
    """Every packet received has become something, and every frame is somewhere, once."""
    standing(router, "received")
    frames = router.tell("account")
    counters = router.counters
    assert counters.received == counters.forwarded + counters.dropped + counters.punted + counters.consumed
    assert frames["twice"] == 0
    assert frames["to_send"] == frames["received"] == 0
    assert frames["unseen"] <= 2 * KEPT, frames


@pytest.mark.parametrize("options", POLICIES, ids=["inline", "helper"])
def test_forwards_drops_and_punts_under_load_add_up(
    network: Network, start: Callable[..., Instance], options: dict[str, str]
) -> None:
    router = start(**options)
    client, server = network.client, network.server

    def enough() -> bool:
        now = router.counters
        return (
            now.forwarded > 100_000
            and now["ttl-expired"] > 500
            and now["punt-rate"] > 1000
            and now["blackhole"] > 1000
            and min(port["tx_packets"] for port in now.ports.values()) > 1000
        )

    with (
        flood(network),
        sending(server, CLIENT, "--rate", 5000),
        sending(client, SERVER, "--ttl", 1, "--rate", 5000),  # punted, beyond the rate limit
        sending(client, "203.0.113.9", "--rate", 5000),  # a black hole
    ):
        wait_for(enough, what="some of everything", timeout=40.0)
    check_books(router)


@pytest.mark.parametrize("options", POLICIES, ids=["inline", "helper"])
def test_a_port_that_goes_down_under_load_loses_no_frame(
    network: Network, start: Callable[..., Instance], options: dict[str, str]
) -> None:
    router = start(**options)
    with flood(network):
        for name in ("r0", "r1", "r0", "r1"):
            forwarding(router)
            network.router.down(name)
            standing(router, "forwarded")
            assert router.tell("account")["twice"] == 0
            network.router.up(name)
        forwarding(router)
    check_books(router)


@pytest.mark.parametrize("options", POLICIES, ids=["inline", "helper"])
def test_a_transmit_ring_that_is_full_while_its_port_is_down_empties_when_it_is_up(
    network: Network, start: Callable[..., Instance], options: dict[str, str]
) -> None:
    """The kernel answers ENETDOWN and leaves the ring as it is. Routes would be gone before it is full: held still."""
    router = start(**options)
    router.tell("unfollow")
    with flood(network):
        forwarding(router)
        network.router.down("r1")
        full = router.counters["tx-full"]
        wait_for(lambda: router.counters["tx-full"] > full + 1000, what="the transmit ring to be full")
        standing(router, "forwarded")
        frames = router.tell("account")
        assert frames["to_send"] > 1000
        assert frames["twice"] == 0
        network.router.up("r1")
        forwarding(router)
    check_books(router)


def test_a_port_whose_other_end_goes_down_under_load_loses_no_frame(
    network: Network, start: Callable[..., Instance]
) -> None:
    router = start(kick="inline")
    with flood(network):
        for _ in range(3):
            forwarding(router)
            network.server.down("s0")
            standing(router, "forwarded")
            network.server.up("s0")
        forwarding(router)
    check_books(router)


def test_a_port_that_vanishes_under_load_is_survived(network: Network, start: Callable[..., Instance]) -> None:
    router = start(kick="inline")
    with flood(network):
        forwarding(router)
        network.server.netlink("link", "del", index=network.server.index("s0"))  # as when the other end's host dies
        wait_for(lambda: "port r1 is gone" in router.said, what="the log to say so")
        standing(router, "forwarded")
        received = router.counters.received
        wait_for(lambda: router.counters.received > received + 1000, what="the other port to receive")
    assert network.client.ping("10.0.1.1").received == 3
    frames = router.tell("account")
    assert frames["twice"] == 0
    router.tell("stop")
    assert router.process.stdin is not None
    router.process.stdin.close()
    assert router.process.wait(20) == 0, router.said
