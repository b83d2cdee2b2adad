"""The demo's network: client, router and server in namespaces, with `fp router` as a process in the middle one."""

from __future__ import annotations

import os
import socket

from libfp.engine.stats import StatsReader, attach
from libfp.errors import Error, MissingCapability, Unsupported
from libfp.testing.netns import Lab
from libfp.testing.router import RouterProcess

CLIENT, SERVER = "10.0.1.2", "10.0.2.2"
BLACKHOLE = "203.0.113.0/24"
PICTURE = "  client 10.0.1.2 ──── r0 fp router r1 ──── 10.0.2.2 server"
AF_XDP = 44
START_LIMIT = 120.0  # seconds; the first start ever compiles, perhaps on a busy machine


class DemoFailed(Error):
    """`fp router` did not become ready, or the traffic did not come through; what the router said is the remedy."""


class Network:
    """Three hosts in a `Lab`; every wire is a veth pair, every address and route is set before the router starts.

    `queues` is how many each end of a wire has: one for each worker.
    """

    def __init__(self, lab: Lab, queues: int = 1) -> None:
        self.client, self.router, self.server = lab.routed(queues=queues)
        self.router.route(BLACKHOLE, type="blackhole")

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


def ready(router: RouterProcess) -> StatsReader:
    """Wait until the router forwards, and return its counters. Raises DemoFailed with the router's own words."""
    try:
        router.wait_ready(START_LIMIT)
    except (ChildProcessError, TimeoutError) as error:
        raise DemoFailed(str(error).partition(":")[0], last_words(router)) from None
    return attach(router.ready["name"])


def last_words(router: RouterProcess) -> str:
    """The router's error; if it has ended without one, the last line it wrote to standard error."""
    lines = router.said().strip().splitlines()
    errors = [line.removeprefix("fp: ") for line in lines if line.startswith("fp: ")]
    return (errors or (lines if router.process.poll() is not None else []) or [""])[-1]


def check_af_xdp() -> None:
    """Raises Unsupported when this kernel has no AF_XDP, MissingCapability when it forbids it to us."""
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW, 0).close()
    except PermissionError as error:
        raise MissingCapability("AF_XDP and namespaces need CAP_NET_RAW, CAP_SYS_ADMIN and more", "as root") from error
    except OSError as error:
        raise Unsupported(f"no AF_XDP here: {error.strerror}", "a kernel with CONFIG_XDP_SOCKETS") from error
