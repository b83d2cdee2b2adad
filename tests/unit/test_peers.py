"""The C peers of the benches: built where DPDK is, skipped with the command that brings it where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import peers
from libfp.errors import Error
from libfp.jit import Arena

ROOT = peers.HERE.parents[1]
PROGRAM = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"


def without(programs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.shutil, "which", lambda name: None if name in programs else f"/usr/bin/{name}")


def build(compiler: str = "gcc") -> Path:
    return peers._build(compiler, [peers.HERE / "forward.c"])


@pytest.mark.parametrize("program", ["gcc", "pkg-config"])
def test_without_a_compiler_it_is_skipped_with_the_remedy(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without([program], monkeypatch)
    with pytest.raises(peers.Skipped, match=f"{program} is not installed; apt-get install dpdk-dev gcc pkg-config"):
        build()


def test_clang_is_named_where_it_is_clang_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(["clang"], monkeypatch)
    with pytest.raises(peers.Skipped, match="clang is not installed; apt-get install dpdk-dev clang pkg-config"):
        build("clang")


def test_without_dpdk_it_is_skipped_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    without([], monkeypatch)
    refused = subprocess.CompletedProcess((), 1, "", "Package libdpdk was not found")
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(peers.Skipped, match="apt-get install dpdk-dev gcc pkg-config"):
        build()


def test_what_gcc_refuses_is_no_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    if not peers.shutil.which("gcc") or not peers.shutil.which("pkg-config"):
        pytest.skip(peers.INSTALL)
    monkeypatch.setattr(peers, "_FLAGS", ("-shared", "-no-such-flag"))
    try:
        with pytest.raises(Error, match="cannot compile"):
            build()
    except peers.Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(120)  # compiles
def test_a_ring_carries_what_it_is_given() -> None:
    """In a process of its own: EAL is once and for all."""
    environment = os.environ | {"LIBFP_PEERS_MEMORY": str(64 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    assert "a generic x86-64 build" in done.stdout


def main() -> int:
    try:
        ffi, lib = peers.load()
    except peers.Skipped as reason:
        print(reason)
        return 77
    assert peers.load() == (ffi, lib) == peers.found()
    source, words, out = np.arange(16 + 8, dtype=np.uint64) % 16, Arena(256), ffi.new("uint64_t *")
    at = ffi.cast("uint64_t *", source.ctypes.data)
    for multi in (0, 1):
        ring, place = lib.ring_create(b"test", 64, multi), ffi.cast("uint64_t *", words.address)
        words.words[:] = 0
        thread = threading.Thread(target=lib.ring_produce, args=(ring, multi, at, 15, 1024, 8, place))
        thread.start()
        assert lib.ring_consume(ring, multi, 1024, 8, place, out) > 0
        thread.join()
        assert out[0] == 1024 // 16 * sum(range(16))
        lib.ring_free(ring)
    print(peers.about())
    return 0


if __name__ == "__main__":
    sys.exit(main())
