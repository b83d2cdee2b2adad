"""DPDK's testpmd as the peer of memif ports, driven by its prompt.

    with Testpmd([Vdev("wire", "client")], mode="macswap", core=1) as peer:
        peer.wait_connected()
        peer.start()
        ...
        peer.statistics()[0]["rx"]

It polls from `start` on, on `core`; its prompt is served elsewhere. (DPDK 22.11's server ends with a fault when it
polls without a client, so `start` waits for the links.)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from libfp.errors import BadInput, Error, PeerGone
from libfp.testing.netns import marked
from libfp.testing.wait import wait_until

__all__ = ["Testpmd", "Vdev", "installed"]

PROGRAM = "dpdk-testpmd"
SMALL_PAGES = ("--no-huge", "-m", "256", "--no-shconf")  # EAL's
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Vdev:
    """One of its ports: `socket` as `MemifPort` has it ("@name" for an abstract one)."""

    socket: str
    role: str
    id: int = 0
    ring_log2: int = 10
    buffer_size: int = 2048
    secret: str = ""

    def argument(self, number: int) -> str:
        """As EAL wants it. A path must exist as a socket, if it is to be a client's."""
        abstract = self.socket.startswith("@")
        options = {
            "role": self.role,
            "id": self.id,
            "socket": self.socket.removeprefix("@"),
            "socket-abstract": "yes" if abstract else "no",
            "rsize": self.ring_log2,
            "bsize": self.buffer_size,
            **({"secret": self.secret} if self.secret else {}),
        }
        return ",".join([f"--vdev=net_memif{number}", *(f"{key}={value}" for key, value in options.items())])


def installed() -> bool:
    """Whether there is a testpmd."""
    return shutil.which(PROGRAM) is not None


class Testpmd:
    """A testpmd with the ports `vdevs`, not yet forwarding: a context manager. `mode` is one of its forwarding modes.

    queues: of each port, all served by `core`. options: more of its own. memory: options of EAL's. Raises BadInput
    without the program, Error with what it said if it does not come up.
    """

    __test__ = False  # pytest, it is none of yours

    def __init__(
        self,
        vdevs: Sequence[Vdev],
        *,
        mode: str = "macswap",
        core: int = 1,
        queues: int = 1,
        options: Iterable[str] = (),
        memory: Iterable[str] = SMALL_PAGES,
    ) -> None:
        if not installed():
            raise BadInput(f"{PROGRAM} is not installed", "apt-get install dpdk")
        self._prefix, self._said, self._count = f"libfp-{os.getpid()}-{next(_numbers)}", "", len(vdevs)
        cores = min(os.sched_getaffinity(0)), core
        command = [
            *(PROGRAM, *memory, "--file-prefix", self._prefix, "--no-pci"),
            *("--no-telemetry", "--lcores", f"0@{cores[0]},1@{cores[1]}"),
            *(one.argument(number) for number, one in enumerate(vdevs)),
            *("--", "-i", f"--forward-mode={mode}", "--nb-cores=1", "--total-num-mbufs=16384"),
            *(f"--rxq={queues}", f"--txq={queues}", *options),
        ]
        self._screen, far = os.openpty()  # to a pipe it would print in blocks
        try:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, env=marked(), stdin=pipe, stdout=far, stderr=far, bufsize=0)
        finally:
            os.close(far)
        self._reader = threading.Thread(target=self._read, name="testpmd", daemon=True)
        self._reader.start()
        try:
            self._expect(r"testpmd> ", 0, 20)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO at its end
            while data := os.read(self._screen, 65536):
                self._said += data.decode(errors="replace").replace("\r", "")

    @property
    def said(self) -> str:
        """All it has printed."""
        return self._said

    def _expect(self, pattern: str, start: int, timeout: float = 10.0) -> re.Match[str]:
        def look() -> re.Match[str] | bool | None:
            found = re.compile(pattern, re.DOTALL).search(self._said, start)
            return found or self.process.poll() is not None

        try:
            found = wait_until(look, timeout)
        except TimeoutError:
            raise Error(f"{PROGRAM} does not say {pattern!r}: {self._said[start:][-500:]}") from None
        if not isinstance(found, re.Match):
            self._reader.join()
            raise PeerGone(f"{PROGRAM} has ended with status {self.process.returncode}: {self._said[-1500:]}")
        return found

    def ask(self, command: str, pattern: str) -> re.Match[str]:
        """Type `command`; what it prints then must hold `pattern`. Raises PeerGone, Error."""
        start = len(self._said)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_expect` says what became of it
            os.write(self.process.stdin.fileno(), command.encode() + b"\n")
        return self._expect(pattern, start)

    @property
    def connected(self) -> bool:
        """Whether all its links are up."""
        return all(self.ask(f"show port info {k}", r"Link status: (\w+)")[1] == "up" for k in range(self._count))

    def wait_connected(self, timeout: float = 10.0) -> None:
        """Raises TimeoutError."""
        wait_until(lambda: self.connected, timeout, f"{PROGRAM} to be connected")

    def start(self, *, first: bool = False) -> None:
        """Forward, once all links are up. `first`: send a burst first, which then goes round and round."""
        self.wait_connected()
        self.ask("start tx_first" if first else "start", r"(packet forwarding - ports=\d+).*testpmd> ")

    def stop(self) -> None:
        """Forward no more."""
        self.ask("stop", r"Done\.\s")

    def statistics(self) -> list[dict[str, int]]:
        """Packets received ("rx") and sent ("tx") by each port."""
        found = []
        for number in range(self._count):
            said = self.ask(f"show port stats {number}", r"RX-packets: (\d+).*TX-packets: (\d+).*testpmd> ")
            found.append({"rx": int(said[1]), "tx": int(said[2])})
        return found

    def kill(self) -> None:
        """As the kernel would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.close(self._screen)
        shutil.rmtree(f"/var/run/dpdk/{self._prefix}", ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
