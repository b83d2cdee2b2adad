"""A client, a router and a server in namespaces, shared by the tests of a module; each starts its own router there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from libfp.demo.network import SERVER, Network, check_af_xdp
from libfp.errors import Unsupported
from libfp.testing.instance import Instance
from libfp.testing.netns import Lab

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        check_af_xdp()
    except Unsupported as error:
        pytest.skip(str(error))
    with Lab() as lab:
        made = Network(lab)
        made.place()
        assert made.client.ping(SERVER).received  # neighbours are known, and Linux forwards by itself
        yield made


@pytest.fixture(scope="session")
def core() -> int:
    """Where workers run: the core on which `Network.place` puts nothing else, if there are two."""
    return max(os.sched_getaffinity(0))


@pytest.fixture
def fp_router(network: Network, core: int) -> Iterator[Callable[..., Instance]]:
    """Start `fp router` on both ports with these options; it is killed at the end of the test."""
    with ExitStack() as undo:
        ports = ("r0", "r1", "--cores", str(core))
        yield lambda *options, **more: Instance.router(network.router, undo, *ports, *options, **more)


@pytest.fixture
def faulty(network: Network, core: int) -> Iterator[Callable[..., Instance]]:
    """Start the router of `libfp.testing.faulty` with these options; it is killed at the end of the test."""
    with ExitStack() as undo:
        name, ports = f"faulty-{os.getpid()}-{next(_numbers)}", ["r0", "r1"]
        yield lambda options=None, **more: Instance.faulty(
            network.router, undo, name, ports, core, options or {}, **more
        )
