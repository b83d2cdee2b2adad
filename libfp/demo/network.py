"""The demo's network: client, router and server in namespaces, with `fp router` as a process in the middle one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from types import TracebackType

from libfp.engine.stats import StatsReader, attach, instances
from libfp.errors import Error, MissingCapability, NoSuchInstance, Unsupported
from libfp.testing.netns import Host, Lab
from libfp.testing.wait import wait_until

CLIENT, SERVER = "10.0.1.2", "10.0.2.2"
BLACKHOLE = "203.0.113.0/24"
PICTURE = "  client 10.0.1.2 ──── r0 fp router r1 ──── 10.0.2.2 server"
AF_XDP = 44
START_LIMIT = 120.0  # seconds; the first start ever compiles, perhaps on a busy machine


class DemoFailed(Error):
    """`fp router` did not become ready, or the traffic did not come through; what the router said is the remedy."""


class Network:
    """Three hosts in a `Lab`; every wire is a veth pair, every address and route is set before the router starts."""

    def __init__(self, lab: Lab) -> None:
        self.client, self.router, self.server = (lab.host(name) for name in ("client", "router", "server"))
        lab.link(self.client, "c0", self.router, "r0")
        lab.link(self.router, "r1", self.server, "s0")
        self.client.address("c0", f"{CLIENT}/24")
        self.router.address("r0", "10.0.1.1/24")
        self.router.address("r1", "10.0.2.1/24")
        self.server.address("s0", f"{SERVER}/24")
        self.client.route("default", via="10.0.1.1")
        self.server.route("default", via="10.0.2.1")
        self.router.route(BLACKHOLE, type="blackhole")
        self.router.sysctl("net.ipv4.ip_forward", 1)

    def place(self) -> int | None:
        """Give the router's worker a core, and the ends of the traffic others; the worker's core, if there are two.

        A sender or a receiver on the worker's core would take turns with it, and the demo would measure the scheduler.
        From three cores on the router runs a helper thread, on the first: that one is left alone, too.
        """
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            return None
        for end in (self.client, self.server):
            # of the thread that starts its processes
            end.call(os.sched_setaffinity, 0, cores[1:-1] if len(cores) > 2 else cores[:1])
        return cores[-1]


def _prefer(pid: int) -> None:
    """Let the process (and threads it will start) run before other work that wants its core.

    A receive ring holds a thousand packets: 7 ms of the paced stream, and less than what a busy neighbour on the same
    core may take at once. Where sessions are scheduled as groups (autogroup), it is the group that needs the priority.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, -15)
        with open(f"/proc/{pid}/autogroup", "w") as group:
            group.write("-15")


class RouterProcess:
    """`fp router r0 r1` inside a host."""

    def __init__(self, host: Host, core: int | None, options: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "libfp", "router", "r0", "r1", *options]
        if core is not None:
            command += ["--cores", str(core)]
        self._errors = tempfile.TemporaryFile("a+")  # noqa: SIM115 -- closed by __exit__; "a": we read while it writes
        # Its own session: Ctrl-C in the terminal reaches the demo only, which then ends its parts in order.
        self.process = host.popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        _prefer(self.process.pid)

    def __enter__(self) -> RouterProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._errors.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> StatsReader:
        """Wait until its workers turn, and return its counters. Raises DemoFailed with the router's own words."""

        def ready() -> StatsReader | bool:
            if self.process.poll() is not None:
                raise DemoFailed(f"fp router ended with status {self.process.returncode}", self.said())
            name = next((name for name, (pid, _) in instances().items() if pid == self.process.pid), None)
            if name is None:
                return False
            try:
                reader = attach(name)
            except (NoSuchInstance, OSError):  # its page is not complete yet, or it has just ended
                return False
            if all(worker["heartbeat"] for worker in reader.counters().workers):
                return reader
            reader.close()
            return False

        try:
            found = wait_until(ready, START_LIMIT, "fp router to be ready", interval=0.02)
        except TimeoutError as error:
            raise DemoFailed(f"{error}", self.said()) from None
        assert not isinstance(found, bool)
        return found

    def said(self) -> str:
        """The router's error; if it has ended without one, the last line it wrote to standard error."""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        errors = [line.removeprefix("fp: ") for line in lines if line.startswith("fp: ")]
        return (errors or (lines if self.process.poll() is not None else []) or [""])[-1]

    def stop(self) -> None:
        """SIGTERM, and wait: the router detaches. SIGKILL after five seconds, and the kernel detaches."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def check_af_xdp() -> None:
    """Raises Unsupported when this kernel has no AF_XDP, MissingCapability when it forbids it to us."""
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW, 0).close()
    except PermissionError as error:
        raise MissingCapability("AF_XDP and namespaces need CAP_NET_RAW, CAP_SYS_ADMIN and more", "as root") from error
    except OSError as error:
        raise Unsupported(f"no AF_XDP here: {error.strerror}", "a kernel with CONFIG_XDP_SOCKETS") from error
