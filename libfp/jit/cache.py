"""Compiled code on disk, without numba's traps.

numba keys its cache on the source file of the one function that carries ``cache=True``: a changed helper, global or
class layout goes unnoticed. So only generated modules are cached, and the name of a generated module is a hash of
everything it reaches: libfp's own sources, the sources of the functions given to it and of those they call, the
values of the globals they read, the versions of numba, llvmlite and Python, and the processor.

The index numba writes beside a module is a pickle, so the directory must be writable by its owner alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba

from libfp.errors import CacheNotPrivate
from libfp.jit.policy import BOUNDSCHECK, INTERPRETED, cannot_keep, kernel

_ROOT = Path(__file__).resolve().parents[1]
_HOT = ("jit", "packet", "ports", "engine", "stages", "rings", "tables", "linux", "gen")
KEEP_SECONDS = 30 * 24 * 3600
_generating = threading.RLock()

# Where functions are whose module is not in `sys.modules` (run by exec, or from a file by importlib), says numba; and
# it imports that module when it loads them again.
sys.modules.setdefault("<dynamic>", ModuleType("<dynamic>"))


def directory() -> Path:
    """Where compiled code is kept: ``$LIBFP_CACHE_DIR``, else ``$XDG_CACHE_HOME/libfp``, else ``~/.cache/libfp``.

    Raises CacheNotPrivate if another user owns it or can write to it.
    """
    named = os.environ.get("LIBFP_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(named) if named else home / "libfp"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one in (path, path / "__pycache__"):
            one.mkdir(mode=0o700, exist_ok=True)
            refuse_shared(one)
        _refuse_open_parents(path)
    except OSError as error:
        raise cannot_keep(path, error) from None
    return path


def refuse_shared(path: Path) -> None:
    """Raises CacheNotPrivate if another user owns the directory or can write to it."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        why = "is a symbolic link: name the directory itself"
    elif status.st_uid != os.geteuid():
        why = f"belongs to user {status.st_uid}, and you are user {os.geteuid()}"
    elif status.st_mode & 0o022:
        why = "can be written by others"
    else:
        return
    # not chmod: what others have put there already would stay
    remedy = "remove it, or set LIBFP_CACHE_DIR to a directory that only you can write"
    raise CacheNotPrivate(f"the directory of compiled code, {path}, {why}", remedy)


def _refuse_open_parents(path: Path) -> None:
    """In a directory that anybody can write, and that is not sticky, anybody can put another in its place."""
    for parent in path.resolve().parents:
        if parent.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            what = f"the directory of compiled code, {path}, can be replaced by others: anybody can write {parent}"
            raise CacheNotPrivate(what, "set LIBFP_CACHE_DIR to a directory that only you can write")


@functools.cache
def base_digest() -> str:
    """The hash of libfp's hot sources, the compilers and the processor: part of every generated module's name."""
    digest = hashlib.sha256(_sources(*_HOT).encode())
    for text in (numba.__version__, llvmlite.__version__, sys.version, *_processor()):
        digest.update(text.encode() + b"\0")
    digest.update(bytes([BOUNDSCHECK]))
    return digest.hexdigest()


def _sources(*folders: str) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((_ROOT / folder).glob("**/*.py")):
            digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _processor() -> tuple[str, str]:
    """Name and features of the processor that is compiled for: this one, or that which numba's own NUMBA_CPU_NAME and
    NUMBA_CPU_FEATURES name, so that code can be made here for another ("generic" runs on every x86-64)."""
    name, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    return (
        llvm.get_host_cpu_name() if name is None else name,
        llvm.get_host_cpu_features().flatten() if features is None else features,
    )


def is_hot(module: str) -> bool:
    """Whether the module's source is part of `base_digest`."""
    package, _, rest = module.partition(".")
    return package == "libfp" and rest.partition(".")[0] in _HOT


@functools.cache
def digest_of(module: str) -> str:
    """Of all the source that code of this module can be made of, where that is libfp's; else empty."""
    if module.startswith("libfp.apps."):
        return base_digest() + _sources("apps")
    return base_digest() if is_hot(module) else ""


def generate(name: str, source: str, inputs: str, scope: dict[str, Any] | None = None) -> ModuleType:
    """Write `source` as a module named by `name` and the hash of `source`, `inputs` and `base_digest`; import it.

    A module that is there already is used as it is, so numba finds its compiled code. `scope` are further globals of
    the module, which `inputs` must describe. Modules that nobody has used for thirty days are removed.
    """
    digest = hashlib.sha256("\0".join((source, inputs, base_digest())).encode()).hexdigest()[:24]
    module_name = f"{name}_{digest}"
    with _generating:
        if module_name not in sys.modules:
            _import(module_name, _written(module_name, source), scope or {})
        return sys.modules[module_name]


def _written(module_name: str, source: str) -> Path:
    """The path of the module, which whoever comes first writes."""
    folder = directory()
    path = folder / f"{module_name}.py"
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now, also where reading leaves no mark
    except FileNotFoundError:
        partial = folder / f".{module_name}.{os.getpid()}"
        try:
            partial.write_text(source)
            path.hardlink_to(partial)
        except FileExistsError:
            pass  # another process was faster
        except OSError as error:
            raise cannot_keep(folder, error) from None
        finally:
            partial.unlink(missing_ok=True)
        _prune(folder)
    return path


def _import(module_name: str, path: Path, scope: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(scope)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _prune(folder: Path) -> None:
    """Remove modules that are old, then numba's files that have lost their module."""
    oldest = time.time() - KEEP_SECONDS
    compiled = list((folder / "__pycache__").iterdir())  # before the modules: each was there before its files
    kept = set()
    for path in [*folder.glob("*.py"), *folder.glob(".*")]:
        try:
            status = path.stat()
            if max(status.st_atime, status.st_mtime) >= oldest:
                kept.add(path.stem)
            elif stat.S_ISREG(status.st_mode):
                path.unlink()
        except FileNotFoundError:
            continue  # another process prunes too
    for path in compiled:
        if path.name.partition(".")[0] not in kept:
            path.unlink(missing_ok=True)


class Entry:
    """A control-plane function, compiled in a generated module of its own so that a second start compiles nothing.

    Callable from Python; `kernel` is the same for compiled callers.
    """

    def __init__(self, function: FunctionType) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.kernel = kernel(function)
        self._compiled: Callable[..., Any] | None = function if INTERPRETED else None

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._load()
        return self._compiled(*arguments)

    @property
    def dispatcher(self) -> Any:
        """The cached numba dispatcher (or the plain function when interpreted)."""
        if self._compiled is None:
            self._compiled = self._load()
        return self._compiled

    def _load(self) -> Callable[..., Any]:
        function = self.function
        if not is_hot(function.__module__):
            raise TypeError(f"{function.__qualname__}: only libfp's hot sources are part of an entry point's name")
        names = ", ".join(inspect.signature(function).parameters)
        source = (
            f'"""Generated by libfp: the entry point {function.__module__}.{function.__qualname__}."""\n'
            f"from libfp.jit.policy import cached_kernel\n"
            f"from {function.__module__} import {function.__qualname__} as _entry\n\n"
            f"_kernel = _entry.kernel\n\n\n"
            f"@cached_kernel\ndef entry({names}):\n    return _kernel({names})\n"
        )
        module = generate(f"entry_{function.__module__.replace('.', '_')}_{function.__name__}", source, "")
        return module.entry


def entry(function: Callable[..., Any]) -> Entry:
    """Decorate a module-level control-plane function: compiled on its first call, cached on disk.

    For libfp's own modules: the cache knows when their sources change. The first call of another's raises TypeError.
    """
    assert isinstance(function, FunctionType)
    return Entry(function)
