"""What the benches run on a wire's dut: `fp router`, and DPDK's testpmd as the peer of `bench veth`."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from libfp.engine.stats import StatsReader
from libfp.errors import Error
from libfp.testing.netns import Host
from libfp.testing.wait import wait_until

START_LIMIT = 120.0  # seconds; a start that compiles, on a busy machine
TICK = os.sysconf("SC_CLK_TCK")
_numbers = itertools.count(1)
HUGE_PAGE = 2 << 20


def fp() -> list[str]:
    """The command `fp`, beside this interpreter where it is installed."""
    installed = Path(sys.executable).with_name("fp")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "libfp"]


def prefer(pid: int, nice: int = -20) -> None:
    """Let a process (or thread) and what it starts from now on run before all else that wants its core.

    All sides of a bench get this, so that what else runs on the machine disturbs rounds less. Where sessions are
    scheduled as groups (autogroup), it is the group that needs the priority. Nothing happens where we may not.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
        with open(f"/proc/{pid}/autogroup", "w") as group:
            group.write(str(nice))


@contextlib.contextmanager
def preferred(cores: set[int]) -> Iterator[None]:
    """The calling thread, and those it starts, on `cores` and before others, until the block ends."""
    allowed, nice = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    os.sched_setaffinity(0, cores)
    prefer(os.getpid())
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        prefer(os.getpid(), nice)


class Process:
    """A process on a host, pinned to `cores` with all its threads; a context manager that ends it.

    Its output is kept for messages about its failure. Its standard input stays open and empty.
    """

    def __init__(
        self, host: Host, command: Sequence[str], cores: set[int], environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = Path(command[0]).name
        self._output = tempfile.TemporaryFile("a+")  # noqa: SIM115 -- closed by __exit__; "a": read while it writes
        self.began = time.monotonic()
        before = host.call(os.sched_getaffinity, 0)
        host.call(os.sched_setaffinity, 0, cores)  # of the thread that forks
        try:
            self.process = host.popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the bench, which then ends its parts in order
            )
        finally:
            host.call(os.sched_setaffinity, 0, before)
        prefer(self.process.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        self._output.seek(0)
        return self._output.read().strip()

    def check(self) -> None:
        """Raises Error with its last words if it has ended."""
        if self.process.poll() is not None:
            words = (self.said().splitlines() or [""])[-1]
            raise Error(f"{self.command} ended with status {self.process.returncode}: {words}")

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.check()
        self.process.send_signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, user and system."""
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def stop(self) -> None:
        """SIGTERM, five seconds, SIGKILL."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()  # what testpmd waits for
            for one in (signal.SIGTERM, signal.SIGCONT):
                self.process.send_signal(one)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._output.close()


class Router(Process):
    """`fp router d0 d1` on a dut."""

    def __init__(self, dut: Host, cores: set[int], *options: str, cache: str | None = None) -> None:
        environment = {"LIBFP_CACHE_DIR": cache} if cache is not None else None
        super().__init__(dut, [*fp(), "router", "d0", "d1", *options], cores, environment)
        self._reader: StatsReader | None = None

    def forwarded(self) -> int:
        """Packets that its workers have forwarded, by its own counters; 0 until it has any."""
        if self._reader is None and (path := self._page()) is not None:
            with contextlib.suppress(Error, OSError):  # the page is being made
                self._reader = StatsReader("", self.pid, path)
        return self._reader.counters().forwarded if self._reader is not None else 0

    def _page(self) -> str | None:
        """As `libfp.engine.stats.instances`, but of this process alone: looked for often while it starts."""
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{self.pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{self.pid}/fd/{fd}").startswith("/memfd:libfp:"):
                        return f"/proc/{self.pid}/fd/{fd}"
        return None

    def wait_forwarding(self) -> float:
        """Wait for the first packet that its workers forward; seconds since the command was given."""

        def forwards() -> bool:
            self.check()
            return self.forwarded() > 0

        wait_until(forwards, START_LIMIT, "fp router to forward", interval=0.002)
        return time.monotonic() - self.began

    def __exit__(self, *exception: object) -> None:
        if self._reader is not None:
            self._reader.close()
        super().__exit__(*exception)


class Testpmd(Process):
    """dpdk-testpmd on a dut: mac forwarding between d0 and d1, for each of `cores` a thread and a pair of net_af_xdp
    ports on a queue of its own (one port on both queues is refused: a veth has no "combined" channels).

    `huge` is a hugetlbfs folder, None for 4 KiB pages.
    """

    PROGRAM = "dpdk-testpmd"
    MEMORY = 256 << 20

    def __init__(self, dut: Host, cores: Sequence[int], huge: str | None) -> None:
        self._prefix, queues = f"libfp-bench-{os.getpid()}-{next(_numbers)}", len(cores)
        places = [f"0@{cores[-1]}", *(f"{number}@{core}" for number, core in enumerate(cores, 1))]
        ports = [f"net_af_xdp{number},iface=d{number % 2},start_queue={number // 2}" for number in range(2 * queues)]
        memory = ["--huge-dir", huge] if huge is not None else ["--no-huge"]
        command = [
            self.PROGRAM,
            *("--lcores", ",".join(places)),
            *("-m", str(self.MEMORY >> 20), *memory),
            *("--no-pci", "--no-telemetry", "--file-prefix", self._prefix),
            *(f"--vdev={port}" for port in ports),
            "--",
            *("--forward-mode=mac", f"--nb-cores={queues}", f"--total-num-mbufs={16384 * queues}"),
        ]
        super().__init__(dut, command, set(cores))

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(f"/var/run/dpdk/{self._prefix}", ignore_errors=True)  # which DPDK leaves behind

    @classmethod
    def installed(cls) -> bool:
        return shutil.which(cls.PROGRAM) is not None


@contextlib.contextmanager
def huge_pages(host: Host, nbytes: int) -> Iterator[str | None]:
    """2 MiB pages for `nbytes`, as a hugetlbfs folder in the host's mount namespace; None if they cannot be had.

    The system has as many such pages less when the block ends as it got when it began.
    """
    pages = -(-nbytes // HUGE_PAGE)
    with tempfile.TemporaryDirectory(prefix="libfp-huge-") as folder, contextlib.ExitStack() as undo:
        added = add_pages(pages)
        undo.callback(add_pages, -added)
        mounted = added == pages and host.call(_mount, folder)
        if mounted:
            undo.callback(host.call, _unmount, folder)
        yield folder if mounted else None


def add_pages(count: int) -> int:
    """Change the system's number of 2 MiB pages by `count`; by how many it has changed."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    with contextlib.suppress(OSError):
        before = int(setting.read_text())
        setting.write_text(str(max(before + count, 0)))
        return int(setting.read_text()) - before
    return 0


_libc = ctypes.CDLL(None, use_errno=True)


def _mount(folder: str) -> bool:
    return bool(_libc.mount(b"none", folder.encode(), b"hugetlbfs", 0, None) == 0)


def _unmount(folder: str) -> None:
    _libc.umount2(folder.encode(), 2)  # MNT_DETACH
