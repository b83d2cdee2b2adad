"""What the tests of the router share: each module of them runs with one worker, and with two on wires of two queues."""

from __future__ import annotations

import os

import pytest

# Less is the workers' in these than in the others, and they take minutes.
LATER = ("test_router_changes", "test_router_ipv6", "test_router_punts", "test_router_watch")


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def workers(request: pytest.FixtureRequest) -> int:
    """How many workers the router has."""
    count: int = request.param
    if len(os.sched_getaffinity(0)) < count:
        pytest.skip(f"{count} workers need as many cores")
    if count > 1 and request.path.stem in LATER and not os.environ.get("LIBFP_FULL"):
        pytest.skip("with two workers only if LIBFP_FULL is set")
    return count
