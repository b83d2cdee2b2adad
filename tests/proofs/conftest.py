"""A client, a router and a server in namespaces, shared by the tests of a module; each starts its own router there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from libfp.demo.network import SERVER, Network, check_af_xdp
from libfp.errors import Unsupported
from libfp.testing.instance import Instance
from libfp.testing.netns import Lab

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def workers() -> int:
    """How many the router has, on as many cores and queues; a module may have others."""
    return 1


@pytest.fixture(scope="module")
def network(workers: int) -> Iterator[Network]:
    try:
        check_af_xdp()
    except Unsupported as error:
        pytest.skip(str(error))
    with Lab() as lab:
        made = Network(lab, queues=workers)
        if workers == 1:
            made.place()
        assert made.client.ping(SERVER).received  # neighbours are known, and Linux forwards by itself
        yield made


@pytest.fixture(scope="session")
def core() -> int:
    """Where workers run: the core on which `Network.place` puts nothing else, if there are two."""
    return max(os.sched_getaffinity(0))


@pytest.fixture
def cores(workers: int, core: int) -> str:
    """Where the workers run: `core` for one."""
    return str(core) if workers == 1 else ",".join(map(str, sorted(os.sched_getaffinity(0))[:workers]))


@pytest.fixture
def fp_router(network: Network, workers: int, cores: str) -> Iterator[Callable[..., Instance]]:
    """Start `fp router` on both ports with these options; it is killed at the end of the test."""
    with ExitStack() as undo:
        ports = ("r0", "r1", "--cores", cores)
        yield lambda *options, **more: Instance.router(
            network.router, undo, *ports, *options, **{**_prefer(workers), **more}
        )


@pytest.fixture
def faulty(network: Network, workers: int, cores: str) -> Iterator[Callable[..., Instance]]:
    """Start the router of `libfp.testing.faulty` with these options; it is killed at the end of the test."""
    with ExitStack() as undo:
        name, ports = f"faulty-{os.getpid()}-{next(_numbers)}", ["r0", "r1"]
        yield lambda options=None, **more: Instance.faulty(
            network.router, undo, name, ports, cores, options or {}, **{**_prefer(workers), **more}
        )


def _prefer(workers: int) -> dict[str, Any]:
    """One worker has a core of its own; several have them all, and share them with the ends of the traffic."""
    return {} if workers == 1 else {"prefer": "nothing"}
