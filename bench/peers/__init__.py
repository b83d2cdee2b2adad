"""The C libraries that benches compare with: DPDK's, in this process, over the same arrays.

Every ``*.c`` in this folder is compiled with gcc -O3 -march=native into one library, and `by_clang` compiles one file
alone; both are kept beside libfp's own compiled code under the hash of sources, flags and DPDK's version. A file
declares what Python calls in a comment that holds a line ``cdef``, as C declarations from the next line to the
comment's end. Loops are timed in C.

    try:
        ffi, lib = peers.load()
    except peers.Skipped as reason: ...      # a case without a peer; `peers.found` does just this

`about` says what the peer got: DPDK's version, the pages its memory is made of.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cffi

from bench.processes import HUGE_PAGE, add_pages
from libfp.errors import Error
from libfp.jit import cache

INSTALL = "apt-get install dpdk-dev gcc pkg-config"
HERE = Path(__file__).parent
#: Bytes that DPDK may use, in 2 MiB pages if the system can spare them.
MEMORY = int(os.environ.get("LIBFP_PEERS_MEMORY", 2560 << 20))
#: rte_fib's lookup functions by number, as rte_fib.h has them.
FIB = {1: "scalar macro", 2: "scalar inline", 3: "scalar uni", 4: "avx512"}
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-Wall", "-Werror", "-DALLOW_EXPERIMENTAL_API")
_about = ""


class Skipped(Error):
    """There is no peer to compare with here; the remedy is the command that brings it."""


@functools.cache
def load() -> tuple[Any, Any]:
    """(ffi, lib) of all peers, EAL initialised. Raises Skipped where there is no DPDK, Error if gcc finds fault."""
    ffi = cffi.FFI()
    for path in _sources("*.c"):
        for declared in re.findall(r"/\*[^/]*?\bcdef\n(.*?)\*/", path.read_text(), re.DOTALL):
            ffi.cdef(declared)
    lib = ffi.dlopen(str(_build("gcc", _sources("*.c"))))
    _start(ffi, lib)
    return ffi, lib


@functools.cache
def by_clang(name: str) -> Any:
    """The library of one file compiled by clang, over what `load` has started. Raises Skipped."""
    ffi, _lib = load()
    return ffi.dlopen(str(_build("clang", [HERE / name])))


@functools.cache
def found() -> tuple[Any, Any] | None:
    """What `load` returns; None, after one line on standard error, where that is skipped."""
    try:
        return load()
    except Skipped as reason:
        print(f"bench: without its peers: {reason}", file=sys.stderr)
        return None


def about() -> str:
    """What `load` got, for the line that a bench says of itself."""
    return _about


def _sources(pattern: str) -> list[Path]:
    return sorted(HERE.glob(pattern))


def _build(compiler: str, files: list[Path]) -> Path:
    """The library's path; compiled if this is the first time."""
    for program in (compiler, "pkg-config"):
        if shutil.which(program) is None:
            raise Skipped(f"{program} is not installed", INSTALL.replace("gcc", compiler))
    version = _output("pkg-config", "--modversion", "libdpdk")
    digest = hashlib.sha256(f"{_FLAGS} {version} {_output(compiler, '--version')}".encode())
    digest.update(cache.base_digest().encode())  # the processor, among others
    for path in (*files, *_sources("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    library = cache.directory() / f"peers-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        flags = _output("pkg-config", "--cflags", "libdpdk").split()
        partial = library.with_suffix(f".{os.getpid()}")
        libraries = _output("pkg-config", "--libs", "libdpdk").split()
        command = [
            compiler,
            *flags,
            *_FLAGS,
            *map(str, files),
            "-o",
            str(partial),
            *libraries,
        ]  # the last -march counts
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Error(f"{compiler} cannot compile bench/peers: {done.stderr.strip()}")
        partial.rename(library)
    return library


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Skipped(f"{' '.join(command)} found no DPDK to compile with", INSTALL)
    return done.stdout.strip()


def _start(ffi: Any, lib: Any) -> None:
    """Initialise EAL, on 2 MiB pages if so many can be had. The calling thread keeps its cores."""
    global _about
    pages = -(-MEMORY // HUGE_PAGE)
    added = add_pages(pages)
    atexit.register(add_pages, -added)
    if added != pages:
        add_pages(-added)
        added = 0
        atexit.unregister(add_pages)
    memory = ["--in-memory"] if added else ["--no-huge", "-m", str(MEMORY >> 20)]
    core = min(os.sched_getaffinity(0))
    arguments = ["libfp-bench", "--no-pci", "--no-telemetry", "--log-level=3", "-l", str(core), *memory]
    texts = [ffi.new("char[]", one.encode()) for one in arguments]
    allowed = os.sched_getaffinity(0)
    try:
        started = lib.peers_start(len(texts), ffi.new("char *[]", texts))
    finally:
        os.sched_setaffinity(0, allowed)
    if started < 0:
        raise Skipped(f"DPDK does not start: {ffi.string(lib.peers_error()).decode()}", "run as root")
    atexit.register(lib.peers_stop)  # before the pages are given back
    kind = "2 MiB pages" if added else "4 KiB pages, since no 2 MiB ones could be had"
    version = ffi.string(lib.peers_version()).decode()
    _about = f"{version} (Debian's, a generic x86-64 build) on {kind}"
