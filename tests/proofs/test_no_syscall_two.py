"""Two workers that make no system call, on two cores that they share with their helper and the ends of the traffic."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import pytest

from libfp.demo.network import SERVER, Network
from libfp.testing.instance import Instance
from libfp.testing.netns import wait_until
from libfp.testing.traffic import stream_by

pytestmark = [
    pytest.mark.timeout(300),  # a router that nobody has compiled yet takes its time to start
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores"),
]

wait_for = functools.partial(wait_until, timeout=30.0)

SEALED = {"kick": "helper", "idle": "spin", "sealed": True}
RATE = 1000


@pytest.fixture(scope="module")
def workers() -> int:
    return 2


def test_two_sealed_workers_carry_traffic(network: Network, faulty: Callable[..., Instance]) -> None:
    router = faulty(SEALED)

    def forwarded(worker: int) -> int:
        return router.counters.workers[worker]["forwarded"]

    with contextlib.ExitStack() as stack:
        for worker in (0, 1):
            assert router.is_sealed(worker)
            ends = (network.client, network.server, SERVER, RATE, 5100 + 32 * worker)
            stack.enter_context(stream_by(functools.partial(forwarded, worker), *ends))
        before = [forwarded(worker) for worker in (0, 1)]
        for worker in (0, 1):
            wait_for(lambda worker=worker: forwarded(worker) >= before[worker] + 2 * RATE)  # type: ignore[misc]
    for number, counters in enumerate(router.counters.workers):
        assert router.is_sealed(number)
        assert counters["syscalls"] == 0
