"""What the tests of the router share: each module of them runs with one worker, and with two on wires of two queues."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def workers(request: pytest.FixtureRequest) -> int:
    """How many workers the router has."""
    count: int = request.param
    if len(os.sched_getaffinity(0)) < count:
        pytest.skip(f"{count} workers need as many cores")
    return count
