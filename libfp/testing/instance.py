"""Processes that run a pipeline, seen from outside: their counters, their worker's thread, what is left of them.

with ExitStack() as undo:
    router = Instance.router(host, undo, "r0", "r1", "--kick", "inline")
    wait_until(lambda: router.counters.forwarded > 0)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import Any, Literal, Self

from libfp.engine.stats import Counters, StatsReader, attach, instances
from libfp.errors import NoSuchInstance
from libfp.testing.netns import Host

__all__ = ["Instance"]

NICE = -15


class Instance:
    """``python ARGUMENTS...`` in `host`: a program that prints a JSON line with its "name" once it forwards.

    It is killed, and waited for, when `undo` is closed. It runs before other work that wants its core, as if that core
    were its own: a test that shares a machine then measures the router and not the scheduler. `prefer="worker"` is for
    one with a helper where that has to share its core with the ends of the traffic, and with the kernel's threads that
    carry it between them: only the worker goes first. `prefer="nothing"` is for one with a worker on every core.
    """

    def __init__(
        self, host: Host, undo: ExitStack, *arguments: str, prefer: Literal["process", "worker", "nothing"] = "process"
    ) -> None:
        self._errors = undo.enter_context(tempfile.TemporaryFile("a+"))  # noqa: SIM115 -- it is one
        self.process: subprocess.Popen[str] = host.popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=prefer == "process",  # the scheduler groups by sessions, where it does (autogroup)
        )
        undo.callback(self.kill)
        if prefer == "process":
            go_first(self.process.pid)
        self.name = str(self._answer()["name"])
        self._reader = attach(self.name)
        undo.callback(self._reader.close)
        if prefer == "worker":
            os.setpriority(os.PRIO_PROCESS, self.worker["thread"], NICE)

    @classmethod
    def router(cls, host: Host, undo: ExitStack, *arguments: str, **more: Any) -> Self:
        """`fp router ARGUMENTS...`"""
        return cls(host, undo, "-m", "libfp", "router", "--json", *arguments, **more)

    @classmethod
    def faulty(
        cls,
        host: Host,
        undo: ExitStack,
        name: str,
        ports: list[str],
        core: int | str,
        options: dict[str, Any],
        **more: Any,
    ) -> Self:
        """The router of `libfp.testing.faulty` on this core, or "0,1", with these options of `Application`."""
        arguments = [name, ",".join(ports), str(core), json.dumps(options)]
        return cls(host, undo, "-m", "libfp.testing.faulty", *arguments, **more)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def said(self) -> str:
        """Everything on its standard error so far."""
        self._errors.seek(0)
        return str(self._errors.read())

    @property
    def counters(self) -> Counters:
        """Its counters now."""
        return self._reader.counters()

    @property
    def worker(self) -> dict[str, int]:
        """The counters of its first worker."""
        return self._reader.counters().workers[0]

    def thread_status(self, field: str, worker: int = 0) -> str:
        """A field of a worker's thread in /proc/PID/task/TID/status; empty when there is no such thread."""
        thread = self.counters.workers[worker]["thread"]
        try:
            with open(f"/proc/{self.pid}/task/{thread}/status") as status:
                return next(line.split()[1] for line in status if line.startswith(f"{field}:"))
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def is_sealed(self, worker: int = 0) -> bool:
        """Whether a worker's thread is under a seccomp filter that the process has not; False when there is none."""
        with open(f"/proc/{self.pid}/status") as status:
            [filters] = [line.split()[1] for line in status if line.startswith("Seccomp_filters:")]
        return self.thread_status("Seccomp_filters", worker) == str(int(filters) + 1)

    def tell(self, command: str) -> dict[str, Any]:
        """A line to its standard input; returns what it answers, one JSON line."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChildProcessError(f"ended with status {self.process.wait(10)}: {self.said}")
        return dict(json.loads(line))

    def end(self, signal: int) -> int:
        """Send it a signal that ends it; returns its exit status."""
        self.process.send_signal(signal)
        return self.process.wait(20)

    def kill(self) -> None:
        """SIGKILL it, and wait for its end. May be called again."""
        self.process.kill()
        self.process.wait(10)


def go_first(pid: int) -> None:
    """Let a process, and threads it will start, run before other work: tests share their few cores with much else, and
    a receive ring holds a thousand packets, less than what a busy neighbour on the same core may take at once.

    Where sessions are scheduled as groups (autogroup), it is the group that needs the priority.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        with open(f"/proc/{pid}/autogroup", "w") as group:
            group.write(str(NICE))


def running(process: subprocess.Popen[Any]) -> StatsReader | None:
    """The statistics of the instance in a process that may say nothing, once all its workers turn; None before."""
    for name, (pid, _) in instances().items():
        if pid == process.pid:
            with contextlib.suppress(NoSuchInstance, OSError):
                reader = attach(name)
                if all(worker["heartbeat"] for worker in reader.counters().workers):
                    return reader
                reader.close()
    return None
