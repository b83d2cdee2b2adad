"""A client, a router and a server in namespaces, shared by the tests of a module; each starts its own router there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from libfp.demo.network import SERVER, Network, check_af_xdp
from libfp.engine.stats import Counters, attach
from libfp.errors import Unsupported
from libfp.testing.netns import Host, Lab


class Instance:
    """A process in `host` that runs a pipeline, prints a JSON line with its name when it forwards, and counts."""

    def __init__(self, host: Host, arguments: tuple[str, ...], undo: ExitStack) -> None:
        self._errors = undo.enter_context(tempfile.TemporaryFile("a+"))  # noqa: SIM115 -- it is one
        self.process: subprocess.Popen[str] = host.popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        undo.callback(self.kill)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with status {self.process.wait()}: {self.said}"
        self.name = json.loads(line)["name"]
        self._reader = attach(self.name)
        undo.callback(self._reader.close)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """Everything on its standard error so far."""
        self._errors.seek(0)
        return str(self._errors.read())

    @property
    def counters(self) -> Counters:
        return self._reader.counters()

    @property
    def worker(self) -> dict[str, int]:
        """The counters of its only worker."""
        return self._reader.counters().workers[0]

    def thread_status(self, field: str) -> str:
        """A field of the worker's thread's status in /proc; empty when there is no such thread (any more)."""
        try:
            with open(f"/proc/{self.pid}/task/{self.worker['thread']}/status") as status:
                return next(line.split()[1] for line in status if line.startswith(f"{field}:"))
        except FileNotFoundError:
            return ""

    def tell(self, word: str) -> None:
        """A line to its standard input."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        check_af_xdp()
    except Unsupported as error:
        pytest.skip(str(error))
    with Lab() as lab:
        made = Network(lab)
        made.place()
        assert made.client.ping(SERVER).received  # neighbours are known, and Linux forwards by itself
        yield made


@pytest.fixture(scope="session")
def core() -> int:
    """Where workers run: the core on which `Network.place` puts nothing else, if there are two."""
    return max(os.sched_getaffinity(0))


@pytest.fixture
def start(network: Network) -> Iterator[Callable[..., Instance]]:
    """Start a Python program in the router's namespace; it is killed at the end of the test."""
    with ExitStack() as undo:
        yield lambda *arguments: Instance(network.router, arguments, undo)


@pytest.fixture
def fp_router(start: Callable[..., Instance], core: int) -> Callable[..., Instance]:
    """Start `fp router r0 r1` with these options."""
    return lambda *options: start("-m", "libfp", "router", "r0", "r1", "--json", "--cores", str(core), *options)
