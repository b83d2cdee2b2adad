"""Where compiled code is kept, who may write there, and what is removed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from libfp.errors import CacheNotPrivate
from libfp.jit import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; what is generated in it is forgotten afterwards."""
    monkeypatch.setenv("LIBFP_CACHE_DIR", str(tmp_path / "cache"))
    before = set(sys.modules)
    yield tmp_path / "cache"  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if name.startswith("probe"):
            del sys.modules[name]


def test_made_for_its_owner_alone(folder: Path) -> None:
    umask = os.umask(0)
    try:
        assert cache.directory() == folder
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "__pycache__").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("inner", ["", "__pycache__"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_refuses_what_others_can_write(folder: Path, inner: str, mode: int) -> None:
    cache.directory()
    (folder / inner).chmod(mode)
    with pytest.raises(CacheNotPrivate, match=f"{folder / inner}, can be written by others; remove it"):
        cache.generate("probe", "x = 1\n", "")
    assert not list(folder.glob("probe*"))
    (folder / inner).chmod(0o755)
    assert cache.generate("probe", "x = 1\n", "").x == 1


@pytest.mark.parametrize("inner", ["", "__pycache__"])
def test_refuses_another_users(folder: Path, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.directory()
    if os.geteuid() == 0:
        os.chown(folder / inner, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(CacheNotPrivate, match="belongs to user"):
        cache.directory()


@pytest.mark.parametrize("inner", ["", "__pycache__"])
def test_refuses_a_symbolic_link(folder: Path, inner: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    if inner:
        folder.mkdir(0o700)
    (folder / inner).symlink_to(elsewhere)
    with pytest.raises(CacheNotPrivate, match="is a symbolic link"):
        cache.directory()


def test_refuses_a_place_that_others_can_exchange(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(CacheNotPrivate, match=f"anybody can write {tmp_path}"):
        cache.directory()
    tmp_path.chmod(0o1777)  # as /tmp is
    assert cache.directory() == folder


def test_refuses_a_file(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(CacheNotPrivate, match="cannot keep compiled code in"):
        cache.directory()


def test_default_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIBFP_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "libfp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.directory() == tmp_path / "home" / ".cache" / "libfp"


def test_a_module_is_named_by_source_and_inputs(folder: Path) -> None:
    first = cache.generate("probe", "x = y + 1\n", "y is 2", {"y": 2})
    assert (first.x, first.__file__) == (3, str(folder / f"{first.__name__}.py"))
    assert cache.generate("probe", "x = y + 1\n", "y is 2", {"y": 2}) is first
    assert cache.generate("probe", "x = y + 1\n", "y is 3", {"y": 3}).x == 4
    assert cache.generate("probe", "x = y + 2\n", "y is 2", {"y": 2}).x == 4
    assert len(list(folder.glob("probe_*.py"))) == 3
    assert not list(folder.glob(".probe*"))


def test_a_module_that_fails_is_not_kept(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.generate("probe", "x = 1 // 0\n", "")
    assert not [name for name in sys.modules if name.startswith("probe")]


def test_two_threads_make_one_module(folder: Path) -> None:
    """Neither sees the other's half-made one."""
    source = "import threading\ngo.wait(5)\nx = 1\n"
    go, found = threading.Event(), []

    def make() -> None:
        found.append(cache.generate("probe", source, "", {"go": go}))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
    assert found[0].x == 1


def age(path: Path, accessed: float, modified: float) -> None:
    """Set a file's times, in days ago."""
    now = time.time()
    os.utime(path, (now - 86400 * accessed, now - 86400 * modified))


PROGRAM = """
from libfp.jit import cache, kernel
scope = {"__name__": "nowhere"}
exec("def twice(x):\\n    return 2 * x", scope)
source = "from libfp.jit.policy import cached_kernel\\n@cached_kernel\\ndef g(x):\\n    return twice(x)\\n"
module = cache.generate("probe", source, "", {"twice": kernel(scope["twice"])})
print(module.g(21), sum(module.g.stats.cache_hits.values()))
"""


def test_functions_of_no_module_are_loaded_again(folder: Path) -> None:
    runs = [subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout for run in runs] == ["42 0\n", "42 1\n"], runs[-1].stderr


def test_prunes_what_nobody_has_used_for_thirty_days(folder: Path) -> None:
    used, unused = (cache.generate("probe", f"x = {n}\n", "") for n in (1, 2))
    compiled = {module: folder / "__pycache__" / f"{module.__name__}.entry-8.py311.nbi" for module in (used, unused)}
    orphan, partial = folder / "__pycache__" / "probe_gone.step-8.py311.1.nbc", folder / ".probe_gone.1"
    for path in (*compiled.values(), orphan, partial):
        path.write_text("")
    for module in (used, unused):
        age(Path(module.__file__), accessed=31, modified=31)
        age(compiled[module], accessed=31, modified=31)
        del sys.modules[module.__name__]
    age(partial, accessed=31, modified=31)
    cache.generate("probe", "x = 1\n", "")  # used again: a file system that keeps no access times must not matter
    assert Path(unused.__file__).exists(), "only a new module is an occasion to tidy up"
    cache.generate("probe", "x = 3\n", "")
    assert Path(used.__file__).exists()
    assert compiled[used].exists(), "as old as its module once was, but of use"
    for path in (Path(unused.__file__), compiled[unused], orphan, partial):
        assert not path.exists()


def test_using_a_module_leaves_its_content_time(folder: Path) -> None:
    module = cache.generate("probe", "x = 1\n", "")
    path = Path(module.__file__)
    age(path, accessed=20, modified=20)
    before = path.stat()
    del sys.modules[module.__name__]
    cache.generate("probe", "x = 1\n", "")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_atime > before.st_atime


def test_entry_points_are_libfps_own() -> None:
    @cache.entry
    def mine(x: int) -> int:
        return x + 1

    with pytest.raises(TypeError, match="mine"):
        mine(1) if not cache.INTERPRETED else mine._load()


def test_every_hot_folder_is_in_the_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A change of any byte in any of libfp's hot sources makes other names of all modules."""
    root = tmp_path / "libfp"
    for name in cache._HOT:
        (root / name).mkdir(parents=True)
        (root / name / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(cache, "_ROOT", root)
    seen: set[Any] = {cache.base_digest.__wrapped__()}
    for name in cache._HOT:
        (root / name / "a.py").write_text("x = 2\n")
        seen.add(cache.base_digest.__wrapped__())
    assert len(seen) == 1 + len(cache._HOT)
    package = Path(cache.__file__).parents[1]
    with_kernels = {
        path.relative_to(package).parts[0] for path in package.glob("*/**/*.py") if "@kernel" in path.read_text()
    }
    assert with_kernels <= {*cache._HOT, "testing", "apps"}, "applications are hashed as a user's own stages are"


def test_the_processor_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    import llvmlite.binding as llvm

    before = cache.base_digest.__wrapped__()
    assert before == cache.base_digest.__wrapped__()
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "another")
    assert cache.base_digest.__wrapped__() != before


def test_the_processor_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is the same module on every machine, as the code in it is."""
    import llvmlite.binding as llvm
    import numba

    before = cache.base_digest.__wrapped__()
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "")
    named = cache.base_digest.__wrapped__()
    assert named != before
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "another")
    assert cache.base_digest.__wrapped__() == named
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2")
    assert cache.base_digest.__wrapped__() != named
