"""A process of workers that forward by the full table while routes change, and the handle of who measures it.

``python -m bench.team '{"cores": [0, 1], ...}'`` runs one; it says in JSON lines when it is ready and what it has
measured, and is stopped (SIGSTOP) whenever another side is measured. It needs nothing but numba and numpy.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench import rib
from bench.changes import AT_ONCE, Changes
from bench.far_end import FarEnds, Reading, far_end
from libfp.engine.application import Application
from libfp.engine.listen import Stopwatch
from libfp.engine.pipeline import Pipeline
from libfp.errors import Error
from libfp.jit import clock_hz, load64, store64
from libfp.ports.memory import MemoryPort
from libfp.stages import Forward, Routes, forward, parse
from libfp.testing.netns import marked

RING = 512
KEYS = 1 << 20
NEXT_HOPS = 64
LEAD = 0.3  # seconds from when a process is let run until it is measured
START_LIMIT = 180.0


class Bed:
    """The pipeline, on two memory ports whose far ends the workers play themselves; `routes` are at most so many."""

    def __init__(self, routes: int | None = None) -> None:
        addresses, lengths, self.origin = rib.ipv4()
        addresses, lengths = addresses[:routes], lengths[:routes]
        self.count = len(addresses)
        self.routes = Routes(routes=max(len(addresses), 1024))
        hops = [self.routes.next_hops.add(_hop(number)) for number in range(NEXT_HOPS)]
        drawn = np.random.default_rng(3).integers(0, NEXT_HOPS, len(addresses))
        self.routes.fib.load(addresses, lengths, np.array(hops)[drawn])
        self.changes = Changes(self.routes.fib, addresses, lengths)
        keys = rib.inside(addresses, lengths, KEYS).astype(np.uint32)
        self.ports = [MemoryPort(name, ring_size=RING) for name in ("a", "b")]
        self.ends = FarEnds(self.ports, keys)
        self.pipeline = Pipeline(parse, forward(self.routes), far_end(self.ends))


def _hop(number: int) -> Forward:
    dst, src = b"\x02\0\0\0\1" + bytes([number]), b"\x02\0\0\0\0" + bytes([number & 1])
    return Forward(number & 1, dst, src, 1500)


def share(app: Application, leaders: Sequence[int]) -> None:
    """Have each worker read the replica of its leader, by number, from now on; leaders keep their own.

    What changes free is then not used again: nobody asks the others whether they are done with it. And a table is not
    copied afresh. So this is for measuring, and for a while.
    """
    for worker, leader in zip(app.workers, leaders, strict=True):
        own, lead = worker.state.replicas, app.workers[leader].state.replicas
        if own is lead:
            own.passed = lambda table, mark: False
            continue
        own.deliver = lambda table, log, count: None
        own.refresh = lambda table: None
        for table in own.tables:
            store64(own._cell[id(table)], load64(lead._cell[id(table)]))


def _rate(before: Reading, after: Reading, ran: float) -> float:
    """Mpps of a worker in its own time: without the far end's, and without that in which others had its core."""
    there = min(ran / max((after.stamp - before.stamp) / clock_hz(), 1e-9), 1.0)
    return 1e-6 * (after.packets - before.packets) / (max(after.worked - before.worked, 1) * there / clock_hz())


class Running:
    """A bed with its workers on `cores`; `rate` route changes a second. Inside the process that is measured."""

    def __init__(self, bed: Bed, cores: list[int], *, rate: int, leaders: Sequence[int] | None, isolated: bool) -> None:
        self.bed, self.rate, self.isolated = bed, rate, isolated
        kind = Application
        if isolated:
            from libfp.testing.isolation import IsolatedApplication

            kind = IsolatedApplication
        bed.changes.make()  # compiles
        self.app = kind(bed.pipeline, bed.ports, cores)
        self._ended = threading.Event()
        self._control = threading.Thread(target=self._change, daemon=True)
        self.app.start()
        if leaders is not None:
            share(self.app, leaders)
        if rate:
            self._control.start()

    def _change(self) -> None:
        """Make changes as time goes on; what was due while nobody ran is forgotten."""
        each, due = AT_ONCE / self.rate, time.monotonic()
        while not self._ended.wait(max(due - time.monotonic(), 0)):
            due = max(due, time.monotonic() - each) + each
            self.bed.changes.make()

    def read(self) -> list[Reading]:
        return [part.read() for part in self.bed.ends.parts]

    def measure(self, begin: float, seconds: float) -> dict[str, Any]:
        """What each worker does between two points in time (of the monotonic clock)."""
        copies = [worker.state.replicas.copies for worker in self.app.workers]
        time.sleep(max(begin - time.monotonic(), 0))
        before, ran, made, used = self.read(), self._ran(), self.bed.changes.made, time.process_time()
        time.sleep(max(begin + seconds - time.monotonic(), 0))
        after, ran_since, used_since = self.read(), self._ran(), time.process_time()
        if failed := next((worker.error for worker in self.app.workers if worker.error), None):
            raise Error(str(failed))
        if (now := [worker.state.replicas.copies for worker in self.app.workers]) != copies:
            raise Error(f"replicas were copied afresh ({copies}, {now}): not every change came by the log")
        ran = [b - a for a, b in zip(ran, ran_since, strict=True)]
        rates = [_rate(a, b, share) for a, b, share in zip(before, after, ran, strict=True)]
        control = used_since - used - (0 if self.isolated else sum(ran))
        changes = self.bed.changes.made - made
        return {"Mpps": rates, "changes": changes / seconds, "control": control / seconds}

    def _ran(self) -> list[float]:
        """Seconds of processor time that each worker has had: clock_getcpuclockid(3), of a thread or a process."""
        threads = [worker["thread"] for worker in self.app.counters.workers]
        return [time.clock_gettime(~number << 3 | (2 if self.isolated else 6)) for number in threads]

    def profile(self, begin: float, seconds: float) -> dict[str, Any]:
        """`Stopwatch.lap` over that time."""
        from libfp.engine.control import connect

        time.sleep(max(begin - time.monotonic(), 0))
        with connect(self.app.name) as connection:
            watch = Stopwatch(connection)
            time.sleep(max(begin + seconds - time.monotonic(), 0))
            lap = watch.lap()
            watch.close()
        return lap

    def close(self) -> None:
        self._ended.set()
        if self._control.is_alive():
            self._control.join()
        self.app.stop()


def main(asked: dict[str, Any]) -> None:
    """The process: measure whenever a line on standard input says so, until it ends."""
    logging.getLogger("libfp").setLevel(logging.ERROR)  # the watchdog sees us stand still
    clock_hz()
    bed = Bed(asked["routes"])
    how = {name: asked[name] for name in ("rate", "leaders", "isolated")}
    running = Running(bed, asked["cores"], **how)
    _say({"routes": bed.count, "origin": bed.origin, "replica": bed.routes.fib.replica_bytes})
    for line in sys.stdin:
        given = json.loads(line)
        try:
            _say(getattr(running, given["do"])(given["begin"], given["seconds"]))
        except Error as error:
            _say({"error": str(error)})
    running.close()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


class Team:
    """Processes with workers, `cores` of each; all of them run, or all are stopped. A context manager that ends them.

    around: the cores on which all other threads run. The rest is that of `Running` and `Bed`.
    """

    def __init__(
        self,
        cores: Sequence[Sequence[int]],
        around: Sequence[int],
        *,
        rate: int = 0,
        routes: int | None = None,
        leaders: Sequence[int] | None = None,
        isolated: bool = False,
    ) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, around)
        try:
            for one in cores:
                asked = {"cores": list(one), "rate": rate, "routes": routes, "leaders": leaders, "isolated": isolated}
                self._processes.append(self._start(asked))
            self.about = [self._hear(process) for process in self._processes][-1]
        except BaseException:
            self.close()
            raise
        finally:
            os.sched_setaffinity(0, before)
        self._signal(signal.SIGSTOP, len(cores))

    @staticmethod
    def _start(asked: dict[str, Any]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bench.team", json.dumps(asked)]
        pipe, here = subprocess.PIPE, Path(__file__).parent.parent
        first: Any = {"start_new_session": True, "preexec_fn": _prefer}
        return subprocess.Popen(command, env=marked(), stdin=pipe, stdout=pipe, text=True, cwd=here, **first)

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Error(f"a process of workers ended with status {process.wait()}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise Error(said["error"])
        return said

    def _signal(self, number: int, count: int) -> None:
        for process in self._processes[:count]:
            os.killpg(process.pid, number)

    def ask(self, what: str, seconds: float, count: int | None = None) -> list[dict[str, Any]]:
        """Let the first `count` processes (all) run, and have each do that, all over the same time."""
        some = self._processes[:count]
        self._signal(signal.SIGCONT, len(some))
        try:
            begin = time.monotonic() + LEAD
            for process in some:
                assert process.stdin is not None
                process.stdin.write(json.dumps({"do": what, "begin": begin, "seconds": seconds}) + "\n")
                process.stdin.flush()
            return [self._hear(process) for process in some]
        finally:
            self._signal(signal.SIGSTOP, len(some))

    def close(self) -> None:
        while self._processes:
            process = self._processes.pop()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _prefer() -> None:
    from bench.processes import prefer

    prefer(os.getpid())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
