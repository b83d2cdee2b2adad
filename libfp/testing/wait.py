"""Waiting for an event with a limit, so that no test ever sleeps for a guessed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout: float = 15.0, what: str = "", interval: float = 0.005) -> T:
    """Call `predicate` until it returns something true, and return that.

    `timeout` and `interval` are in seconds; the predicate is always tried at least once, and once more at the end.
    Raises TimeoutError naming `what` (by default the predicate) when the time is over.
    """
    deadline = time.monotonic() + timeout
    while True:
        over = time.monotonic() >= deadline
        result = predicate()
        if result:
            return result
        if over:
            name = what or getattr(predicate, "__qualname__", repr(predicate))
            raise TimeoutError(f"waited {timeout:g} s for {name}")
        time.sleep(interval)
