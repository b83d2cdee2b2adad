"""One guest for all tests of this folder, and what it has seen."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vm import guest, image
from tests.vm.machine import MEMORY, Machine, Seen

LIMIT = 400.0  # seconds for the guest; a quiet machine needs 80

# Compiles what the guest will run, for any x86-64 processor: 18 s, and over 240 s in the guest.
WARM = """
from libfp.testing.netns import Lab
from libfp.testing.router import Crossroads, RouterProcess

with Lab() as lab:
    net = Crossroads(lab)
    with RouterProcess(net.router, "r0", "r1", "--kick", "inline"):
        pass
"""


@pytest.fixture(scope="session")
def seen(request: pytest.FixtureRequest) -> Seen:
    """Boot the guest, once, let it do everything, and collect what it says; skip where that is not possible."""
    if os.environ.get("LIBFP_VM", "") in ("", "0"):
        pytest.skip("boots a guest, which takes minutes: make test-vm")
    began = time.monotonic()
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\nvm: {time.monotonic() - began:4.0f} s  {text}", end="", flush=True)

    image.CACHE.mkdir(parents=True, exist_ok=True)
    with (image.CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another guest to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder = image.CACHE / "run"  # one of all runs: what one that was killed has left goes with the next
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            return _boot(folder, say)
        except image.Unavailable as reason:
            pytest.skip(str(reason))
        finally:
            say("")
            shutil.rmtree(folder)


def _boot(folder: Path, say: Callable[[str], None]) -> Seen:
    emulator = image.require(MEMORY)
    unpacked = image.kernel(say)
    initrd = folder / "initrd"
    image.image(unpacked, warm(say), initrd, say)
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    wires = [(guest.WIRES["c0"], guest.WIRES["r0"]), (guest.WIRES["r1"], guest.WIRES["s0"])]
    say(f"booting {kernel.name}")
    seen = Seen()
    with Machine(emulator, kernel, initrd, folder, wires) as machine:
        seen.listen(machine, LIMIT, say)
    return seen


def warm(say: Callable[[str], None]) -> list[Path]:
    """The files of the pipeline's compiled code. Raises Unavailable when this machine cannot run it."""
    if os.geteuid() != 0:
        raise image.Unavailable("needs root: fp router runs in namespaces first, to compile what the guest will run")
    say("compiling for the guest")
    began = time.time()
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "LIBFP_CACHE_DIR": str(image.CODE)}
    command = [sys.executable, "-c", WARM]
    done = subprocess.run(
        command, env=environment, cwd=image.ROOT, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise image.Unavailable(f"this machine cannot compile for the guest: {said[-1]}")
    used = [path for path in image.CODE.glob("*.py") if path.stat().st_atime >= began]  # libfp marks them so
    modules = {path.stem for path in used}
    return used + [path for path in image.CODE.glob("__pycache__/*.nb?") if path.name.partition(".")[0] in modules]
