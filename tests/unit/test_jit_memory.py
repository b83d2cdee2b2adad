"""Arenas: guard pages that fault, bounds that are checked, memory that is given back."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from libfp import jit
from libfp.jit import Arena, memory
from libfp.jit.memory import HUGE_PAGE, PAGE


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter runs `code`."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def mapped(address: int) -> str:
    """The permissions of the mapping that holds `address`, "" if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        first, last = (int(one, 16) for one in span.split("-"))
        if first <= address < last:
            return permissions
    return ""


@pytest.mark.parametrize("size", [1, 8, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE])
@pytest.mark.parametrize("flush_end", [False, True])
def test_size_zeros_and_guards(size: int, flush_end: bool) -> None:
    arena = Arena(size, flush_end=flush_end)
    assert (arena.size, len(arena.buffer), len(arena.words)) == (size, size, size // 8)
    assert not any(arena.buffer)
    assert arena.address % (8 if flush_end else PAGE) == 0
    arena.buffer[:] = b"\xff" * size
    assert mapped(arena.address).startswith("rw-p")
    assert mapped(arena.address // PAGE * PAGE - 1).startswith("---")
    assert mapped(-(-(arena.address + size) // PAGE) * PAGE).startswith("---")
    if flush_end:
        assert -(arena.address + size) % PAGE < 8
    arena.close()


def test_huge_arenas_are_aligned() -> None:
    arena = Arena(3 * HUGE_PAGE + 8, huge=True)
    assert arena.address % HUGE_PAGE == 0
    assert mapped(arena.address - 1).startswith("---")
    assert mapped(arena.address + 4 * HUGE_PAGE).startswith("---")


def test_memory_is_populated_by_use() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    before = resident()
    arena = Arena(1 << 34)
    assert resident() - before < 1 << 22
    arena.close()


def test_what_has_been_freed_is_not_shown() -> None:
    arena = Arena(100)
    arena.close()
    for name in ("buffer", "words"):
        with pytest.raises(ValueError, match="100 bytes that has been freed"):
            getattr(arena, name)


@pytest.mark.parametrize("by", ["close", "collection"])
def test_given_back(by: str) -> None:
    arena = Arena(100)
    address = arena.address
    assert mapped(address)
    if by == "close":
        arena.close()
        arena.close()
    else:
        del arena
        gc.collect()
    assert not mapped(address)
    with pytest.raises(IndexError):
        jit.load8(address)


@pytest.mark.parametrize("size", [0, -1])
def test_no_empty_arenas(size: int) -> None:
    with pytest.raises(ValueError):
        Arena(size)


def test_no_memory() -> None:
    with pytest.raises(MemoryError):
        Arena(1 << 60)


ACCESSES = {
    "load8": (1, lambda at: jit.load8(at)),
    "load16be": (2, lambda at: jit.load16be(at)),
    "load32": (4, lambda at: jit.load32(at)),
    "load64be": (8, lambda at: jit.load64be(at)),
    "load_acquire32": (4, lambda at: jit.load_acquire32(at)),
    "store16": (2, lambda at: jit.store16(at, 1)),
    "store_release64": (8, lambda at: jit.store_release64(at, 1)),
    "compare_and_swap64": (8, lambda at: jit.compare_and_swap64(at, 0, 1)),
    "fetch_add64": (8, lambda at: jit.fetch_add64(at, 1)),
    "copy to": (5, lambda at: jit.copy(at, SOURCE.address, 5)),
    "copy from": (5, lambda at: jit.copy(SOURCE.address, at, 5)),
}
SOURCE = Arena(64)


@pytest.mark.parametrize("name", ACCESSES)
def test_python_checks_every_access(name: str) -> None:
    size, access = ACCESSES[name]
    arena = Arena(96)
    access(arena.address)
    access(arena.address + 96 - size)
    for outside in (arena.address - 1, arena.address + 96 - size + 1, arena.address + 96, 0, -1):
        with pytest.raises(IndexError):
            access(outside)


def test_regions_side_by_side_are_apart() -> None:
    """An access must lie in one region: the byte after a region is another's, not ours."""
    arena = Arena(128)
    memory.unregister(arena.address)
    memory.register(arena.address, 64)
    memory.register(arena.address + 64, 64)
    jit.load64(arena.address + 56)
    jit.load64(arena.address + 64)
    with pytest.raises(IndexError):
        jit.load64(arena.address + 60)
    memory.unregister(arena.address + 64)
    memory.unregister(arena.address)
    with pytest.raises(ValueError):
        memory.unregister(arena.address)
    memory.register(arena.address, 128)


FAULT = """
from libfp.jit import Arena, kernel, load8, store8
{definition}
arena = Arena(4096)
print("before", flush=True)
access(arena.address + {offset})
print("after", flush=True)
"""
LOAD = "@kernel\ndef access(at): return load8(at)"
STORE = "@kernel\ndef access(at): store8(at, 1)"


@pytest.mark.skipif(jit.INTERPRETED, reason="about compiled code")
@pytest.mark.parametrize("definition", [LOAD, STORE], ids=["load", "store"])
@pytest.mark.parametrize("offset", [-1, 4096])
def test_guard_pages_fault(definition: str, offset: int) -> None:
    ended = run(FAULT.format(definition=definition, offset=offset))
    assert (ended.returncode, ended.stdout) == (-signal.SIGSEGV, "before\n"), ended.stderr


@pytest.mark.skipif(jit.INTERPRETED, reason="about compiled code")
def test_the_boundscheck_build_stops_one_byte_outside() -> None:
    """Without a guard page in reach: 100 bytes, and the 101st is in the same page."""
    code = FAULT.replace("Arena(4096)", "Arena(100)")
    inside = run(code.format(definition=STORE, offset=99), LIBFP_BOUNDSCHECK="1")
    assert (inside.returncode, inside.stdout) == (0, "before\nafter\n"), inside.stderr
    for definition in (LOAD, STORE):
        outside = run(code.format(definition=definition, offset=100), LIBFP_BOUNDSCHECK="1")
        assert outside.stdout == "before\n"
        assert outside.returncode in (-signal.SIGILL, -signal.SIGTRAP), outside.stderr
    assert run(code.format(definition=STORE, offset=100)).returncode == 0, "the page is there: only the check sees it"


def test_the_interpreted_world_raises() -> None:
    ended = run(FAULT.format(definition=STORE, offset=4096), NUMBA_DISABLE_JIT="1")
    assert ended.returncode == 1
    assert "IndexError: 1 bytes at 0x" in ended.stderr


def test_a_collected_umem_with_guards_leaves_no_region_behind() -> None:
    """Frames are registered one by one; stale ones would shadow whatever is mapped there next."""
    from libfp.ports.frames import FrameMemory

    frames = FrameMemory(4, guard="end")
    address = frames.address
    memory.check(address + frames.stride, 8)
    del frames
    with pytest.raises(IndexError):
        memory.check(address + 2 * 4096, 8)


def test_memory_that_has_gone_untold_hides_no_part_of_what_is_there_now() -> None:
    """A mapping may end with the object that holds it, and what it was declared as stay behind."""
    arena = Arena(4096)
    memory.unregister(arena.address)
    for start in (-64, 512, 1024, 4064):
        memory.register(arena.address + start, 128)
    memory.register(arena.address, 4096)
    memory.check(arena.address + 768, 8)
    memory.check(arena.address + 4088, 8)
    assert not {one for one in memory.known() if arena.address < one[1] <= arena.address + 4192} - {
        (arena.address, arena.address + 4096)
    }
