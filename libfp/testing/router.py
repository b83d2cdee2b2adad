"""`fp router`, or another application, between namespaces: the process, the network around it, and what it could have
left behind.

    with Lab() as lab:
        net = Crossroads(lab)
        with RouterProcess(net.router, "r0", "r1", "r2") as router:
            assert net.client.ping(net.SERVER).received == 3
            assert router.counters().forwarded
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from libfp.engine.stats import Counters, StatsReader, attach
from libfp.pyxdp.device import look
from libfp.pyxdp.ethtool import Ethtool
from libfp.testing.instance import go_first
from libfp.testing.netns import Host, Lab
from libfp.testing.wait import wait_until

START_LIMIT = 60.0  # seconds; the first start after a change of libfp compiles


class Crossroads:
    """A router with three neighbours, each on a wire and in a network of its own; nothing runs on it yet.

        client 10.0.1.2 (c0) -- r0 10.0.1.1 router r1 10.0.2.1 -- (s0) 10.0.2.2 server
                                                   r2 10.0.3.1 -- (o0) 10.0.3.2 other

    The neighbours' default routes lead to the router, which forwards. They take what comes to UDP port 9 (discard) and
    do not answer. In a lab with IPv6 the same with 2001:db8:N::1 and ::2 in place of 10.0.N.1 and .2.

    `workers` is how many queues each wire has; `options` are those of `fp router` for as many workers.
    """

    CLIENT, SERVER, OTHER = "10.0.1.2", "10.0.2.2", "10.0.3.2"
    CLIENT6, SERVER6, OTHER6 = "2001:db8:1::2", "2001:db8:2::2", "2001:db8:3::2"
    PORTS = ("r0", "r1", "r2")

    def __init__(self, lab: Lab, workers: int = 1) -> None:
        self.lab, self.router, self.workers = lab, lab.host("router"), workers
        #: Of the workers, where there are several; one worker finds its own.
        self.cores = sorted(os.sched_getaffinity(0))[:workers] if workers > 1 else None
        self.options = ("--cores", ",".join(map(str, self.cores)), "--kick", "inline") if self.cores else ()
        self._sinks: list[socket.socket] = []
        for scope in ("all", "default"):  # not what this machine happens to have
            self.router.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 0)
        self.router.sysctl("net.ipv4.icmp_ratemask", 0)
        self.client, self.server, self.other = (
            self._neighbour(number, name) for number, name in enumerate(("client", "server", "other"))
        )
        self.router.sysctl("net.ipv4.ip_forward", 1)
        if lab.ipv6:
            self.router.sysctl("net.ipv6.conf.all.forwarding", 1)

    def _neighbour(self, number: int, name: str) -> Host:
        host, end, port = self.lab.host(name), f"{name[0]}0", f"r{number}"
        host.sysctl("net.ipv4.icmp_ratemask", 0)
        if self.lab.ipv6:
            host.sysctl("net.ipv6.icmp.ratelimit", 0)
            host.sysctl("net.ipv6.conf.all.accept_dad", 0)
        self.lab.link(host, end, self.router, port, queues=self.workers)
        self.router.address(port, f"10.0.{number + 1}.1/24")
        host.address(end, f"10.0.{number + 1}.2/24")
        host.route("default", via=f"10.0.{number + 1}.1")
        if self.lab.ipv6:
            self.router.sysctl("net.ipv6.icmp.ratelimit", 0)
            self.router.address(port, f"2001:db8:{number + 1}::1/64")
            host.address(end, f"2001:db8:{number + 1}::2/64")
            host.route("::/0", via=f"2001:db8:{number + 1}::1")
        sink = host.socket(socket.AF_INET6 if self.lab.ipv6 else socket.AF_INET)  # of IPv6: takes both
        sink.bind(("", 9))
        self._sinks.append(sink)
        return host


class AppProcess:
    """``fp APPLICATION ARGUMENTS --json`` inside a host; ready when the constructor returns, unless `wait` is false.

    `command` starts `fp`; `environment` is added to this process's.

    `forwarding`, `ready` and `end` are what it printed then. Raises ChildProcessError, with its own words, when it ends
    before it is ready. The end of the block is a SIGTERM, and SIGKILL after five seconds.
    """

    def __init__(
        self,
        host: Host,
        application: str,
        *arguments: str,
        wait: bool = True,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "libfp"),
    ) -> None:
        self._called = f"fp {application}"
        self._errors = tempfile.TemporaryFile("a+")  # noqa: SIM115 -- closed by `close`
        self._events: dict[str, dict[str, Any]] = {}
        self._reader: StatsReader | None = None
        self.process = host.popen(
            [*command, "-v", application, *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C in a terminal is for the test, which then ends this in order
        )
        go_first(self.process.pid)
        self._thread = threading.Thread(target=self._listen, name="fp-events", daemon=True)
        self._thread.start()
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a killed process may leave half a line
                event = json.loads(line)
                self._events[event.pop("event")] = event

    @property
    def forwarding(self) -> dict[str, Any]:
        """Name, and how many routes were in the tables when it began to forward; empty before."""
        return self._events.get("forwarding", {})

    @property
    def ready(self) -> dict[str, Any]:
        """Name, ports, cores, kick, zero_copy, routes; empty before."""
        return self._events.get("ready", {})

    @property
    def end(self) -> dict[str, Any]:
        """The final counters; empty before, and when it was killed."""
        return self._events.get("end", {})

    def wait_ready(self, timeout: float = START_LIMIT) -> None:
        """Until it forwards and has all routes. Raises TimeoutError, or ChildProcessError when it ends before."""
        wait_until(lambda: self.ready or self.process.poll() is not None, timeout, f"{self._called} to be ready")
        if not self.ready:
            raise self._ended()

    def _ended(self) -> ChildProcessError:
        return ChildProcessError(f"{self._called} ended with status {self.process.returncode}: {self.said().strip()}")

    def said(self) -> str:
        """Everything on its standard error so far."""
        self._errors.seek(0)
        return self._errors.read()

    def wait_said(self, text: str, timeout: float = START_LIMIT) -> None:
        """Until `text` is in what it said. Raises TimeoutError, or ChildProcessError when it ends without."""

        def look() -> bool:
            over = self.process.poll() is not None
            if text in self.said():
                return True
            if over:
                raise self._ended()
            return False

        wait_until(look, timeout, f"{self._called} to say {text!r}")

    def counters(self) -> Counters:
        """Its counters now, read from outside as `fp stats` does."""
        if self._reader is None:
            self._reader = attach(self.forwarding["name"])
        return self._reader.counters()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 5.0) -> int:
        """Send the signal and wait for the end; returns the exit status. Raises subprocess.TimeoutExpired."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 5.0) -> int:
        """Wait for the end; returns the exit status."""
        status: int = self.process.wait(timeout)
        self._thread.join(timeout)
        return status

    def close(self) -> None:
        """End it, if it has not ended, and let go of everything. May be called again."""
        if self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.stop(signal.SIGKILL)
        self._thread.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None and not self._errors.closed:
            value.add_note(f"{self._called} said:\n{self.said().strip()}")
        self.close()


class RouterProcess(AppProcess):
    """``fp router ARGUMENTS --json``: see `AppProcess`."""

    def __init__(self, host: Host, *arguments: str, **more: Any) -> None:
        super().__init__(host, "router", *arguments, **more)


def footprint(host: Host) -> dict[str, Any]:
    """What a fast path changes on a host while it runs: interfaces, XDP programs on them, and their features.

    Equal before and after means that nothing was left behind.
    """

    def features(name: str) -> dict[str, bool]:
        with Ethtool(name) as ethtool:
            return {feature: value.on for feature, value in ethtool.features().items()}

    return {name: (host.call(look, name).programs, host.call(features, name)) for name in host.interfaces()}
