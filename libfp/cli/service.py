"""What a service owes its manager: sd_notify(3), the watchdog, and SIGHUP. Nothing happens without a manager."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Self

log = logging.getLogger("libfp.service")

LOOK = 0.5  # seconds between looks at what has been asked for
SYNC_LOOK = 0.02  # at whether all routes are in the tables by now
STATUS_EVERY, PROGRESS_EVERY = 5.0, 1.0
SYNC_PATIENCE = 60  # seconds that a start which makes progress may take longer


def notify(*lines: str, patience: float = 5.0) -> bool:
    """Send lines such as ``READY=1`` to the socket that NOTIFY_SOCKET names; False where there is none.

    A manager that does not read for `patience` seconds does not get them: it must not stop us.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(patience)
            manager.connect(address)
            manager.sendall("\n".join(lines).encode())
    except OSError as error:
        if patience:
            log.warning("cannot tell the service manager %s: %s", lines[0], error.strerror or "it does not read")
        return False
    return True


def watchdog() -> float:
    """Seconds within which the manager wants to hear of us, 0 if it does not."""
    pid = os.environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return 0.0
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isdecimal() else 0.0


class Service:
    """Keeps the manager informed while an application starts and runs, and acts on SIGHUP: a context manager.

    `asked` says whether the process has been told to end. `reload` is called for each SIGHUP, if `hup` says so.
    """

    def __init__(self, asked: Callable[[], bool], *, hup: bool = False) -> None:
        self.reload: Callable[[], None] = lambda: None
        self._asked, self._hup = asked, hup
        self._hung_up = False
        self._before: Any = None
        self._told = 0.0
        self._running = False

    def __enter__(self) -> Self:
        if self._hup:
            self._before = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hup:
            signal.signal(signal.SIGHUP, self._before)

    def _hang_up(self, number: int, frame: Any) -> None:
        self._hung_up = True

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell the manager how far the start is, and that it may take its time."""
        if time.monotonic() > self._told + PROGRESS_EVERY:
            self._told = time.monotonic()
            status = f"{done} of {total} {what} are in the tables" if total else f"reading Linux's {what}: {done}"
            longer = [f"EXTEND_TIMEOUT_USEC={SYNC_PATIENCE * 1_000_000}"] * (not self._running)
            notify(f"STATUS={status}", *longer, patience=0.0)

    def run(
        self,
        app: Any,
        status: str,
        synced: Callable[[], bool] = lambda: True,
        when_synced: Callable[[], None] = lambda: None,
    ) -> None:
        """Until the application ends, or the process has been asked to. Raises what `app.wait` raises.

        The manager is told at once that we are ready: packets are forwarded. `when_synced` is called once `synced` says
        that all routes are in the tables.
        """
        self._running = True
        notify("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")
        try:
            self._run(app, status, synced, when_synced)
        except KeyboardInterrupt:
            log.info("interrupted: leaving the traffic to Linux")
        finally:
            notify("STOPPING=1")

    def _run(self, app: Any, status: str, synced: Callable[[], bool], when_synced: Callable[[], None]) -> None:
        patience = watchdog()
        interval = min(LOOK, patience / 3) if patience else LOOK
        beats, told = [worker.heartbeat for worker in app.workers], 0.0
        complete = False
        while not self._asked() and not app.ended:
            if not complete and synced():
                complete = True
                when_synced()
            app.wait(interval if complete else SYNC_LOOK)
            if self._hung_up:
                self._hung_up = False
                notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
                self.reload()
                notify("READY=1")
            now = [worker.heartbeat for worker in app.workers]
            # only if every worker's loop has turned since the last look
            if patience and len(now) == len(beats) and all(map(int.__ne__, now, beats)):
                notify("WATCHDOG=1")
            beats = now
            if time.monotonic() > told + STATUS_EVERY:
                told, counters = time.monotonic(), app.counters
                done = f"{counters.forwarded} forwarded, {counters.dropped} dropped, {counters.punted} punted"
                notify(f"STATUS={status}: {done}", patience=0.0)
