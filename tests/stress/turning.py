"""A compiled worker that turns in a thread while the control plane changes its tables."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from libfp.engine.replicas import Replicas
from libfp.jit import call, load_acquire64, store64, store_release64
from libfp.jit.libc import address_of

STOP, TURNS = 0, 8  # words of what the two share: the worker ends when the first is not 0, and counts in the second
SCHED_YIELD = address_of("sched_yield")


@contextlib.contextmanager
def turning(worker: Any, replicas: Replicas, tables: list[Any], shared: int) -> Iterator[None]:
    """`worker(mailbox, view of each table, shared, sched_yield)` meanwhile; at the end it has all changes, and has
    turned with them."""
    replicas.reset()
    arguments = replicas.mailbox, *map(replicas.view, tables), shared, SCHED_YIELD
    store64(shared + STOP, 1)
    worker(*arguments)  # compile
    store64(shared + STOP, 0)
    thread = threading.Thread(target=worker, args=arguments, daemon=True)
    thread.start()
    try:
        yield
        until(lambda: replicas.flush() and replicas.acknowledged())
        seen = load_acquire64(shared + TURNS)
        until(lambda: load_acquire64(shared + TURNS) > seen + 1)
    finally:
        store_release64(shared + STOP, 1)
        thread.join(30)


def until(done: Callable[[], object]) -> None:
    """Wait for the worker, which may have the same core."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline, "the worker does not answer"
        call(SCHED_YIELD, 0, 0, 0, 0, 0, 0)
