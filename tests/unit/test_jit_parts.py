"""Functions of libfp's that are kept on disk, compiled: others are linked from them, and compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from libfp.jit import BOUNDSCHECK, INTERPRETED, kernel, native, word

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(INTERPRETED or BOUNDSCHECK, reason="about compiled code that is kept"),
]

RUN = """
import json, sys
from libfp.jit import Arena, kernel, parts
from libfp.packet.checksum import ipv4_checksum_ok

loaded, load = [], parts.load

def look(name, *more):
    made = load(name, *more)
    if made is not None:
        loaded.append(name.rpartition("_")[0])
    return made

parts.load = look

@kernel
def mine(at, more):
    return ipv4_checksum_ok(at) + more

arena = Arena(64)
for at, byte in enumerate(bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")):
    arena.buffer[at] = byte
right = mine(arena.address, 10)
arena.buffer[3] = 0
print(json.dumps({"results": [right, mine(arena.address, 10)], "loaded": loaded}))
"""


def run(cache: Path, code: str = RUN) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LIBFP_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_what_another_process_has_compiled_is_linked(tmp_path: Path) -> None:
    """Also by other code; and what cannot be read is compiled again."""
    assert run(tmp_path) == {"results": [11, 10], "loaded": []}
    other = RUN.replace("+ more", "- more")
    assert run(tmp_path, other) == {"results": [-9, -10], "loaded": ["ipv4_checksum_ok"]}
    kept = [path for path in tmp_path.glob("parts/*/*") if path.is_file()]
    assert kept
    assert {path.stat().st_mode & 0o077 for path in [tmp_path / "parts", *(tmp_path / "parts").iterdir()]} == {0}
    for path in kept:
        path.write_bytes(path.read_bytes()[:-50])
    assert run(tmp_path) == {"results": [11, 10], "loaded": []}
    assert run(tmp_path)["loaded"] == ["ipv4_checksum_ok"], "and kept again"
    (tmp_path / "parts").chmod(0o777)
    assert run(tmp_path) == {"results": [11, 10], "loaded": []}, "others can have written it"


@native
class Mine:
    at: word


def test_only_what_is_libfp_s_own_is_kept() -> None:
    """The name says all that the code depends on, and what cannot be said so is compiled each time."""
    from numba import njit
    from numba.core import types
    from numba.core.compiler import Flags

    from libfp.jit.parts import name_of
    from libfp.packet.burst import Packet
    from libfp.packet.checksum import checksum, update16

    function, one = checksum.py_func, (types.int64, types.int64)
    name, flags = name_of(function, one, Flags()), Flags()
    assert name.startswith("checksum_")
    assert name == name_of(function, one, Flags())
    flags.boundscheck = True
    others = [
        name_of(update16.py_func, one, Flags()),
        name_of(function, (types.int64, types.int32), Flags()),
        name_of(function, (Packet._native_type(()), types.int64), Flags()),
        name_of(function, one, flags),
    ]
    assert len({name, *others, ""}) == len(others) + 2, "all of them have one, and none another's"

    def foreign(at: int) -> int:
        return at

    made: Any = type(function)(function.__code__, {**function.__globals__, "_fold": foreign})
    made.__module__ = function.__module__
    assert not name_of(foreign, (types.int64,), Flags())
    assert not name_of(made, one, Flags()), "has globals of its own"
    assert not name_of(function, (Mine._native_type(()), types.int64), Flags())
    assert not name_of(function, (types.Dispatcher(njit(foreign)), types.int64), Flags())
    assert kernel(foreign)(7) == 7
