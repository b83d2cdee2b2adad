"""DPDK's l3fwd as a device of `bench memif`: IPv4 forwarding by rte_lpm; TTL, checksum and MAC addresses rewritten.

It is one of DPDK's examples, which Debian does not package: the environment variable L3FWD names the program, or it is
called dpdk-l3fwd. 23.11.1 is the first that takes ports which verify no checksums (--relax-rx-offload), as memif's are.
It has room for 1,024 routes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.processes import prefer
from libfp.errors import Error
from libfp.testing.netns import marked
from libfp.testing.testpmd import Vdev
from libfp.testing.wait import wait_until

#: A route for each port; the generator's packets take the second one.
ROUTES4 = "R198.18.0.0/16 0\nR198.19.0.0/16 1\n"
ROUTES6 = "R2001:0002:0000:8000:0000:0000:0000:0000/49 1\n"
POLLS = "entering main loop"


def program() -> str | None:
    """The program; None if there is none."""
    return os.environ.get("L3FWD") or shutil.which("dpdk-l3fwd")


class L3fwd:
    """It, with the ports `vdevs`, on `core`, which it polls once it has waited for its links."""

    def __init__(self, stack: ExitStack, vdevs: Sequence[Vdev], core: int, memory: Sequence[str]) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libfp-l3fwd-")))
        rules = {"rule_ipv4": ROUTES4, "rule_ipv6": ROUTES6}
        for name, text in rules.items():
            (folder / name).write_text(text)
        self._log = folder / "log"
        queues = ",".join(f"({number},0,0)" for number in range(len(vdevs)))
        command = [
            *(str(program()), *memory, "--file-prefix", folder.name, "--no-pci", "--no-telemetry"),
            *("--lcores", f"0@{core}", *(one.argument(number) for number, one in enumerate(vdevs))),
            *("--", "-p", hex((1 << len(vdevs)) - 1), "-P", f"--config={queues}", "--no-numa", "--parse-ptype"),
            *("--relax-rx-offload", *(f"--{name}={folder / name}" for name in rules)),
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, env=marked(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(self._close)
        self._wait_said("Checking link status")  # its sockets are there

    def _wait_said(self, what: str) -> None:
        def said() -> bool:
            self.check()
            return what in self._log.read_text()

        wait_until(said, 20, f"l3fwd to say {what!r}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        if (status := self._process.poll()) is not None:
            raise Error(f"l3fwd has ended with status {status}: {self._log.read_text()[-300:]}")

    def forward(self) -> None:
        self._wait_said(POLLS)
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            prefer(int(thread))

    def _close(self) -> None:
        self._process.kill()
        self._process.wait()
