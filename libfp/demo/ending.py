"""Ending on a signal without an exception out of nowhere.

KeyboardInterrupt may appear between any two bytecodes: between a lock's acquisition and the `try` that would release
it, for one (seen here: `Popen.wait` then waits for ever). So the work runs in a thread of its own, the handler only
takes a note, and the main thread makes the work fail where it waits.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK = 0.1  # seconds between two looks at the note


@contextlib.contextmanager
def noted() -> Iterator[threading.Event]:
    """The event is set when SIGINT, SIGTERM or SIGHUP comes; for the main thread only."""
    asked = threading.Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(work: Callable[[], T], abort: Callable[[], None]) -> T:
    """Run `work` to its end in a thread; return what it returns, raise what it raises.

    On a signal `abort` is called, again and again, until the work has ended; then KeyboardInterrupt is raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def worker() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    with noted() as asked:
        thread = threading.Thread(target=worker, name="libfp-demo")
        thread.start()
        while thread.is_alive():
            if asked.is_set():
                abort()
            thread.join(LOOK)
        if asked.is_set():
            raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return results[0]
