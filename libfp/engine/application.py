"""A running pipeline: its workers, their statistics, and the keeper that watches over them."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from libfp.engine import context, observe
from libfp.engine.control import Control
from libfp.engine.crew import Crew
from libfp.engine.helper import Helper
from libfp.engine.state import WorkerState
from libfp.engine.stats import Counters, StatsPage
from libfp.engine.tap import Taps
from libfp.engine.worker import Worker
from libfp.errors import BadInput, Error
from libfp.jit import memory
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE

if TYPE_CHECKING:
    from libfp.engine.pipeline import Pipeline

log = logging.getLogger("libfp.engine")

KEEPER_SECONDS, KEEPER_PARKED_SECONDS = 0.02, 0.05  # between two looks, and while every worker is parked


class Application:
    """A pipeline on its ports. A context manager; `Pipeline.start` makes it.

    `workers` are its `Worker`s, each of which can be stopped, started and restarted while the others forward, and
    `add_worker` makes one more.

    ports: of one kind, from `Linux.ports` or `MemoryPort`s. cores: one worker each, the first allowed core if None.
    name: how `fp stats` finds it. kick: who makes AF_XDP's system calls, "inline" (the worker, at most one a burst),
    "helper" (a thread, workers make none), or "auto": helper if two more cores than workers are free.
    idle: "park" (sleep in poll while there is nothing to do) or "spin". sealed: workers under a seccomp filter that
    kills the thread at its first system call, even in order to end; needs helper and spin: for proofs.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        ports: Sequence[Any],
        cores: Sequence[int] | None = None,
        *,
        name: str | None = None,
        kick: str = "auto",
        idle: str = "park",
        frame_size: int = 2048,
        sealed: bool = False,
    ) -> None:
        allowed = self._allowed = sorted(os.sched_getaffinity(0))
        self.cores = list(cores) if cores else allowed[:1]
        self.pipeline, self.ports = pipeline, list(ports)
        self.name = name or _name()
        self.real = any(getattr(port, "is_real", False) for port in self.ports)
        spare = len(set(allowed) - set(self.cores))
        self.kick, self.idle = _choose_kick(kick, self.real, spare), idle if self.real else "spin"
        self.frame_size, self.sealed = frame_size, sealed
        _check(self)
        self.workers: list[Worker] = []
        self.page: StatsPage | None = None
        self.helper: Helper | None = None
        self.control = Control()  # what other processes may ask: `fp trace` and the like
        self._owner = getattr(self.ports[0], "owner", None)
        self._states: list[WorkerState] = []
        self._crew: Crew | None = None
        self._changing = threading.Lock()  # among those who add workers and who stops
        self.taps = Taps(lambda: [(w.state.memory, w.running) for w in self.workers], len(pipeline.stages))
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    def start(self) -> Self:
        """Open, compile, run. On any failure, and on Ctrl-C, everything is given up again."""
        try:
            self._open()
            for worker in self.workers:
                worker.prepare()
            self._help()
            if self._owner is not None:
                self._owner.started([state.punt_ring for state in self._states])
            for worker in self.workers:  # none has packets for one that does not run yet
                worker.start(traffic=False)
            for worker in self.workers:
                worker.take()
            observe.offer(self)
            self.control.open(self.name)
        except BaseException:
            self.stop()
            raise
        self._keeper = threading.Thread(target=self._keep, name="libfp-keeper", daemon=True)
        self._keeper.start()
        return self

    def _open(self) -> None:
        self.page = StatsPage(
            self.name,
            {
                "ports": [port.name for port in self.ports],
                "reasons": self.pipeline.reasons.names,
                "workers": len(self.cores),
                "room": len(self._allowed),
                "cores": self.cores,
                "worker_counters": context.WORKER_COUNTERS,
                "port_counters": COUNTER_NAMES,
                "first_port": context.FIRST_PORT,
                "port_stride": COUNTERS_SIZE,
                "kick": self.kick,
                "idle": self.idle,
            },
        )
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.page.page))
        memory.register(start, len(self.page.page))
        self._page_start = start
        if self.pipeline.hands_off:
            self._crew = Crew(len(self._allowed))
        self._began_with = len(self.cores)
        for number in range(len(self.cores)):
            self._states.append(self._state(number))
        if self._crew is not None and len(self.cores) > 1:
            for port in self.ports:
                if self.real:
                    port.hash_symmetrically()
        self._loop = self.pipeline.module(kick=self.kick, idle=self.idle, sealed=self.sealed).loop
        for number, (core, state) in enumerate(zip(self.cores, self._states, strict=True)):
            self.workers.append(Worker(number, core, state, self.ports, self._loop))
        self.page.describe(zero_copy=self.zero_copy)

    def _state(self, number: int) -> WorkerState:
        assert self.page is not None
        return WorkerState(
            self.pipeline,
            type(self.ports[0]).open_all,
            self.ports,
            number,
            self._page_start + self.page.block_offset(number),
            frame_size=self.frame_size,
            punt=self._owner is not None,
            workers=self._began_with,
            crew=self._crew,
        )

    def _help(self) -> None:
        """A helper for all the workers there are, in place of the one before: what it missed, it sees."""
        if self.kick != "helper":
            return
        if self.helper is not None:
            helper, self.helper = self.helper, None
            helper.close()
        spare = [core for core in self._allowed if core not in self.cores]
        self.helper = Helper([state.memory.context for state in self._states], spare[0] if spare else None)

    def add_worker(self, core: int) -> Worker:
        """One more worker, on `core`, for the next queue of every port; return it when it forwards.

        The others go on meanwhile. Raises BadInput for a core that this process may not use or that has a worker, and
        where a port has no further queue; Error when the application does not run; what `Worker.start` raises. Nothing
        has changed then.
        """
        with self._changing:
            if self.page is None or self._keeper is None or self._ended.is_set():
                raise Error("a worker for an application that does not run", "call start() first")
            _check_core(core, self._allowed)
            if core in self.cores:
                raise BadInput(f"core {core} has a worker already", "one worker a core")
            state = self._state(len(self._states))
            worker = Worker(len(self._states), core, state, self.ports, self._loop)
            self.cores.append(core)
            self._states.append(state)
            handed = False
            try:
                worker.prepare()
                self._help()
                worker.start()
                if self._owner is not None:
                    handed = True
                    self._owner.started([state.punt_ring])
            except BaseException:
                ended = worker.stop()
                self.cores.remove(core)
                self._states.remove(state)
                self._help()
                if self._crew is not None and state.member is not None:
                    ended &= self._crew.dismiss(state.member)
                state.close() if ended and not handed else _keep([worker, self.page, self._crew])
                raise
            self.workers.append(worker)
            self.page.describe(workers=len(self.workers), cores=self.cores, zero_copy=self.zero_copy)
            return worker

    @property
    def zero_copy(self) -> bool:
        """Whether every port's packets are in our memory from wire to wire. Memory ports count as such."""
        return all(port.zero_copy for state in self._states for port in state.open_ports)

    def _keep(self) -> None:
        pause = KEEPER_SECONDS
        while not self._ended.wait(pause):
            pause = KEEPER_PARKED_SECONDS if all(worker.parked for worker in self.workers) else KEEPER_SECONDS
            for worker in self.workers:
                worker.watch()
                worker.state.replicas.flush()

    @property
    def counters(self) -> Counters:
        """A snapshot, summed over the workers: ``counters["denied"]``, `forwarded`, `ports`, ..."""
        if self.page is None:
            raise Error("the application has not been started", "call start()")
        return self.page.counters()

    @property
    def ended(self) -> bool:
        """Whether `stop` has been called."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Until Ctrl-C, until `stop` is called from elsewhere, or for `timeout` seconds.

        True if those have passed and it runs on: ``while app.wait(1): ...``. Raises Error if a worker failed.
        """
        try:
            while not self._ended.wait(0.2 if timeout is None else min(timeout, 0.2)):
                for worker in self.workers:
                    if worker.error is not None:
                        raise Error(f"worker {worker.number} failed: {worker.error}") from worker.error
                if timeout is not None and (timeout := timeout - 0.2) <= 0:
                    return True
        except KeyboardInterrupt:
            log.info("interrupted: leaving the traffic to Linux")
        return False

    def stop(self) -> None:
        """Leave the traffic to Linux, stop the workers, close everything that `start` opened. Can be repeated.

        A worker that does not come back from a stage is given two seconds (see `Worker.stop`). Its traffic is Linux's
        then, but what it could still touch stays until the process ends: memory, and its sockets on its queues.
        """
        self._ended.set()
        self.control.close()
        if self._keeper is not None:
            self._keeper.join()
        with self._changing:
            self._stop()

    def _stop(self) -> None:
        if self._crew is not None:  # none has packets for one that has ended
            self._drain()
        dead = [worker for worker in self.workers if not worker.stop()]
        if self.helper is not None:
            self.helper.close()
            self.helper = None
        if self._owner is not None:
            self._owner.stopped()
        lent = dead and self._crew is not None  # what is dead may have any other's frames
        if dead:
            _keep([self.taps, self.page, dead, self._crew, list(self._states) if lent else []])
        elif self._states:
            self.taps.close_all()
        while self._states:
            state = self._states.pop()
            if not lent and all(worker.state is not state for worker in dead):
                state.close()
        if self._crew is not None and not dead:
            self._crew.close()
            self._crew = None
        for port in self.ports:
            port.close()
        if self.page is not None and self.page.fd >= 0:
            if not dead:
                memory.unregister(self._page_start)
            self.page.close()

    def _drain(self) -> None:
        """Leave all queues to Linux, and let every worker finish what has come."""
        for worker in self.workers:
            worker.leave()
        ends, deadline = {worker: worker.heartbeat + 64 for worker in self.workers}, time.monotonic() + 0.05
        while time.monotonic() < deadline:
            if all(worker.heartbeat >= end for worker, end in ends.items() if worker.running):
                break
            time.sleep(0.0005)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


_numbers = itertools.count(1)


def _name() -> str:
    """Of a pipeline that is given none: pipeline-PID, then pipeline-PID-2 and so on."""
    number = next(_numbers)
    return f"pipeline-{os.getpid()}" + (f"-{number}" if number > 1 else "")


def _choose_kick(asked: str, real: bool, spare: int) -> str:
    if not real:
        return "none"
    if asked == "auto":
        chosen = "helper" if spare >= 2 else "inline"
        if chosen == "inline":
            log.info("kick: inline, since no core is free for a helper beside Linux and the workers")
        return chosen
    if asked not in ("inline", "helper"):
        raise BadInput(f"no kick policy {asked!r}", "inline, helper or auto")
    return asked


def _keep(what: object) -> None:
    """Never free it, nor what it refers to, not even while the interpreter ends: a thread may still use it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))


def _check_core(core: int, allowed: list[int]) -> None:
    if core not in allowed:
        raise BadInput(f"no core {core} for a worker", f"this process may use {', '.join(map(str, allowed))}")


def _check(app: Application) -> None:
    if not app.ports:
        raise BadInput("no ports", "name at least one")
    if len({type(port) for port in app.ports}) > 1:
        kinds = ", ".join(sorted({type(port).__name__ for port in app.ports}))
        raise BadInput(f"ports of several kinds in one pipeline ({kinds})", "give it ports of one kind")
    for core in app.cores:
        _check_core(core, app._allowed)
    if len(set(app.cores)) != len(app.cores):
        raise BadInput(f"cores {app.cores} name a core twice", "one worker a core")
    if app.idle not in ("park", "spin"):
        raise BadInput(f"no idle policy {app.idle!r}", "park or spin")
    if app.sealed and app.real and (app.kick, app.idle) != ("helper", "spin"):
        raise BadInput("a sealed worker makes no system call", "kick='helper', idle='spin'")
