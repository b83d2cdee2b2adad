"""A guest under qemu's software emulation: started, listened to, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MEMORY = 3072  # MiB
CONSOLE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable random.trust_cpu=on"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Machine:
    """A guest with pairs of virtio-net interfaces, a wire between the two of each pair; nothing leads out of it.

    `wires` are pairs of MAC addresses. What it writes to its second serial line, JSON lines, are `events`.
    """

    def __init__(self, emulator: str, kernel: Path, initrd: Path, folder: Path, wires: list[tuple[str, str]]) -> None:
        self.console, self.results = folder / "console", folder / "results"
        self._read = 0
        command = [emulator, "-accel", "tcg,thread=multi,tb-size=512", "-M", "q35", "-cpu", "max", "-smp", "2"]
        command += ["-m", str(MEMORY), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-serial", f"file:{self.console}", "-serial", f"file:{self.results}"]
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", CONSOLE]
        for number, pair in enumerate(wires):
            # The kernel drops zero-copy silently without iommu_platform and queue_reset; TCP keeps the order of frames.
            port = _free_port()
            for end, (mac, role) in enumerate(zip(pair, ("listen", "connect"), strict=True)):
                name = f"n{number}{end}"
                command += ["-netdev", f"socket,id={name},{role}=127.0.0.1:{port}"]
                options = "disable-legacy=on,iommu_platform=on,queue_reset=on,rx_queue_size=1024"
                command += ["-device", f"virtio-net-pci,netdev={name},mac={mac},romfile=,{options}"]
        if setpriv := shutil.which("setpriv"):  # killed with this process, however that ends
            command = [setpriv, "--pdeathsig", "KILL", *command]
        self._errors = (folder / "qemu").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors, start_new_session=True
        )

    def events(self, limit: float) -> Iterator[dict[str, Any]]:
        """What the guest reports until it is off. Raises TimeoutError after `limit` seconds."""
        deadline = time.monotonic() + limit
        while True:
            over = self._process.poll() is not None
            yield from self._new()
            if over:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest was not done after {limit:g} s")
            time.sleep(0.1)

    def _new(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), self.results.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._read += len(whole) + len(newline)
            for line in whole.splitlines():
                yield json.loads(line)

    def said(self) -> str:
        """Its console, and qemu's own words."""
        self._errors.seek(0)
        console = self.console.read_text(errors="replace") if self.console.exists() else ""
        return f"{self._errors.read()}{console}"

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # qemu may be deaf to anything else
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Seen:
    """What a guest has reported, by check."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.console = self.trouble = ""

    def listen(self, machine: Machine, limit: float, say: Callable[[str], None]) -> None:
        """Until the guest is off."""
        try:
            for event in machine.events(limit):
                self.events[event["name"]] = event
                say(f"{event['name']}{': FAILED' if 'error' in event else ''}")
        except TimeoutError as error:
            self.trouble = str(error)
        self.console = machine.said()

    def __call__(self, check: str) -> dict[str, Any]:
        """What the check has seen. Fails the test when it did not come so far, with the guest's own words."""
        event = self.events.get(check, {})
        if "seen" not in event:
            error = event.get("error") or self.events.get("failed", {}).get("error") or self.trouble
            pytest.fail(
                f"{error or 'no report'}\nthe guest's console ends with:\n{self.console[-4000:]}", pytrace=False
            )
        print(f"{check}: {event['seen']}")  # pytest shows it when an assertion fails
        return dict(event["seen"])
