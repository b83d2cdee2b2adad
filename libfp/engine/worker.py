"""A worker: a pinned thread that runs a pipeline's loop over its queue of every port."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from libfp.engine.context import HEARTBEAT, PARKED, STATISTICS, STOPPED, THREAD
from libfp.engine.state import WorkerState
from libfp.errors import Error
from libfp.jit import load64, load_acquire64, store64

log = logging.getLogger("libfp.worker")

STALL_SECONDS = 0.1
LENT_SECONDS = 0.3  # for frames to come back from other workers
STOP_SECONDS = 2.0  # for a stage to return: a burst takes microseconds


class Worker:
    """Worker `number`, on `core`, of `Application.workers`. Traffic comes to it between `start` and `stop`.

    `stop`, `start` and `restart` may be called while the other workers forward, which lose nothing by it: they touch
    this worker's queues and memory only. While it stands, Linux forwards what its queues receive. Thread-safe.
    """

    def __init__(self, number: int, core: int, state: WorkerState, ports: list[Any], loop: Callable[..., Any]) -> None:
        self.number, self.core, self.state = number, core, state
        self.error: BaseException | None = None
        self._ports, self._loop = ports, loop
        self._statistics = load64(state.memory.arena.address + STATISTICS)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # between the keeper, which watches, and whoever starts and stops
        self._switch = threading.RLock()  # among those who start and stop
        self._taking = self._stalled = False
        self._seen = (0, 0.0)

    def prepare(self) -> None:
        """Compile the loop, or load it: run it with the stop flag up. Raises StageError."""
        self.state.memory.stop(True)
        self.state.pipeline.first_call(self._loop, self.state.direct_arguments())

    @property
    def heartbeat(self) -> int:
        """Turns of the loop."""
        return load_acquire64(self._statistics + HEARTBEAT)

    @property
    def running(self) -> bool:
        """Its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def dead(self) -> bool:
        """Told to stop, and still in a stage that does not return: its traffic is Linux's, its memory may be in use."""
        return self.running and self.state.memory.stopping

    @property
    def parked(self) -> bool:
        """Asleep for want of packets, or stopped."""
        return load_acquire64(self._statistics + PARKED) != 0

    def start(self, timeout: float = 60.0, *, traffic: bool = True) -> None:
        """Start the thread, wait until its loop turns, then let its queues' packets come to it.

        Without `traffic` only what other workers hand off to it comes, until `take`.

        Nothing happens when it runs already. Raises Error when its thread fails, does not turn within `timeout`
        seconds, or has not returned since it was told to stop.
        """
        with self._switch:
            if self.dead:
                raise self._not_back()
            if not self.running:
                self._start(timeout)
                if traffic:
                    self.take()
                elif self.state.member is not None:
                    self.state.member.takes(True)

    def take(self) -> None:
        """Let its queues' packets come to it. It has been started."""
        with self._lock:
            self._take(True)

    def leave(self) -> None:
        """Leave its queues to Linux, before `stop`: until then others may hand packets off to it."""
        with self._lock:
            for port in self._ports:
                port.leave(self.number)

    def _not_back(self) -> Error:
        return Error(f"worker {self.number} has not come back from a stage", "look for the loop in it that never ends")

    def _start(self, timeout: float) -> None:
        self.state.replicas.reset()
        if self.state.member is not None:
            self.state.member.recover()
        self.state.memory.stop(False)
        began, self.error = self.heartbeat, None
        arguments = self.state.direct_arguments()
        self._thread = threading.Thread(
            target=self._run, args=(arguments,), name=f"libfp-worker-{self.number}", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + timeout
        while self.heartbeat == began:
            if self.error is not None:
                raise Error(f"worker {self.number} on core {self.core} failed: {self.error}") from self.error
            if time.monotonic() > deadline:
                raise Error(f"worker {self.number} did not start within {timeout:.0f} s", "look at the core's load")
            time.sleep(0.0005)

    def _run(self, arguments: list[Any]) -> None:
        try:
            os.sched_setaffinity(0, {self.core})
            store64(self._statistics + THREAD, threading.get_native_id())
            store64(self._statistics + PARKED, 0)
            self._loop(*arguments)
        except BaseException as error:
            self.error = error
            log.exception("worker %d on core %d failed", self.number, self.core)

    def _take(self, yes: bool) -> None:
        if yes != self._taking:
            self._taking = yes
            self._seen = (self.heartbeat, time.monotonic())
            if self.state.member is not None:
                self.state.member.takes(yes)
            for port in self._ports:
                (port.take if yes else port.leave)(self.number)

    def stop(self, timeout: float = STOP_SECONDS) -> bool:
        """Leave the queues to Linux, finish what has arrived, end the thread; whether it has ended.

        Waits `timeout` seconds for a stage that does not return. After that the worker is `dead`: all that its thread
        could still touch is kept, and `start` raises until it has come back. Nothing happens when it stands already.
        """
        with self._switch:
            return self._thread is None or self._stop(self._thread, timeout)

    def _stop(self, thread: threading.Thread, timeout: float) -> bool:
        with self._lock:
            self._stalled = False
            self._take(False)
        began, member = self.heartbeat, self.state.member
        deadline = time.monotonic() + (0.05 if member is None else LENT_SECONDS)
        beats = member.beats() if member is not None else []
        while self.running and time.monotonic() < deadline:  # a few turns more, for packets that were in the rings
            if self.heartbeat >= began + 64 and (member is None or member.is_quiet(beats)):
                break
            time.sleep(0.0005)
        told = self.dead
        self.state.memory.stop(True)
        thread.join(0 if told else timeout)
        if thread.is_alive():
            if not told:
                log.error("%s: its traffic stays with Linux", self._not_back())
            return False
        self._thread = None
        if member is not None:
            member.give_up()
        store64(self._statistics + PARKED, STOPPED)  # its word is ours now: nobody need stay awake for it
        self.state.replicas.stop()
        return True

    def restart(self) -> None:
        """Stop and start, with fresh replicas; the other workers never notice. Raises what `start` raises."""
        with self._switch:
            self.stop()
            self.start()

    def watch(self) -> None:
        """The watchdog's look: a loop that stands still for 100 ms loses its traffic to Linux until it moves again."""
        with self._lock:
            beat, now = self.heartbeat, time.monotonic()
            if beat != self._seen[0]:
                self._seen = (beat, now)
                if self._stalled:
                    self._stalled = False
                    log.warning("worker %d moves again: its traffic comes back", self.number)
                    self._take(True)
            elif self._taking and now - self._seen[1] > STALL_SECONDS:
                stood = 1000 * (now - self._seen[1])
                log.warning("worker %d has stood still for %.0f ms: Linux takes its traffic", self.number, stood)
                self._stalled = True
                self._take(False)
