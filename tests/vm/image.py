"""What the guest boots: a newer kernel of Debian's, and this Python environment as an initramfs.

Everything is kept in ``~/.cache/libfp/vm``. Nothing is installed: the kernel's package is unpacked there, and the
guest's files are copies of this machine's, so a guest can change nothing here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "libfp" / "vm"
CODE = CACHE / "code"
SUITE = "trixie-backports"
TRIED = "6.18.15+deb13-cloud-amd64"  # other kernels from 6.13 on (zero-copy in virtio-net, both ways) should do as well
KERNEL = re.compile(r"linux-image-(6\.(?:1[3-9]|[2-9]\d)\.\S+-cloud-amd64) ")
MODULES = ("virtio_net", "veth", "tun", "vrf", "8021q")
WITHOUT = {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages"}
Say = Callable[[str], None]


class Unavailable(Exception):
    """What the machine lacks for a guest: the reason to skip."""


# -- the kernel


def kernel(say: Say) -> Path:
    """The unpacked package of a kernel, downloaded when there is none. Raises Unavailable."""
    unpacked = CACHE / "kernel"
    if not list(unpacked.glob("boot/vmlinuz-*")):
        for program in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(program) is None:
                raise Unavailable(f"no {program} to get a kernel of Debian's with")
        package = _download(say)
        partial = CACHE / "kernel.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _run("dpkg-deb", "-x", str(package), str(partial))
        shutil.rmtree(unpacked, ignore_errors=True)
        partial.rename(unpacked)
        package.unlink()
    return unpacked


def _download(say: Say) -> Path:
    """Download with lists and a cache of our own: the machine's package sources stay as they are."""
    say(f"downloading a kernel from Debian {SUITE} (50 MB, once)")
    apt = CACHE / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    if not os.path.exists(keys):
        raise Unavailable(f"no {keys} (package debian-archive-keyring) to check Debian's kernel with")
    (apt / "debian.sources").write_text(
        f"Types: deb\nURIs: {_mirror()}\nSuites: {SUITE}\nComponents: main\nArchitectures: amd64\nSigned-By: {keys}\n"
    )
    options: list[str] = []
    for name, value in {
        "Dir::Etc::sourcelist": str(apt / "debian.sources"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": str(apt / "lists"),
        "Dir::Cache": str(apt / "cache"),
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
    }.items():
        options += ["-o", f"{name}={value}"]
    _run("apt-get", "-qq", *options, "update")
    found = KERNEL.findall(_run("apt-cache", *options, "search", "^linux-image-.*-cloud-amd64$"))
    if not found:
        raise Unavailable(f"{_mirror()} {SUITE} has no cloud kernel from 6.13 on (or cannot be reached)")
    version = TRIED if TRIED in found else max(found, key=lambda one: [int(n) for n in re.findall(r"\d+", one)])
    for old in CACHE.glob("*.deb"):
        old.unlink()
    _run("apt-get", "-qq", *options, "download", f"linux-image-{version}", cwd=CACHE)
    (package,) = CACHE.glob("*.deb")
    return package


def _mirror() -> str:
    """The mirror this machine uses."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if path.exists() and (found := re.search(r"https?://\S+/debian/?(?=\s)", path.read_text())):
            return found[0]
    return "http://deb.debian.org/debian"


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} was not done after {error.timeout:g} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise Unavailable(f"{command[0]} failed: {last}")
    return done.stdout


def _modules(unpacked: Path) -> Iterable[tuple[str, bytes]]:
    """The modules and what they need, in the order in which they load."""
    paths = {path.name.partition(".")[0].replace("-", "_"): path for path in unpacked.glob("usr/lib/modules/**/*.ko*")}
    done: dict[str, bytes] = {}

    def load(name: str) -> None:
        path = paths.get(name)
        if name in done or path is None:  # built in
            return
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in (depends[1].decode() if depends else "").split(","):
            load(needed.replace("-", "_"))
        done[name] = data

    for name in MODULES:
        load(name)
    return done.items()


# -- the initramfs


class Archive:
    """A cpio archive as the kernel unpacks it ("newc": Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._known: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"", mtime: float = 0, device: tuple[int, int] = (0, 0)) -> None:
        name = name.lstrip("/")
        if name in self._known:
            return
        parent = os.path.dirname(name)
        if parent:
            self.add(parent, stat.S_IFDIR | 0o755)
        self._known.add(name)
        fields = (len(self._known), mode, 0, 0, 1, int(mtime), len(data), 0, 0, *device, len(name) + 1, 0)
        header = "070701" + "".join(f"{field:08x}" for field in fields) + name + "\0"
        self._file.write(header.encode() + bytes(-len(header.encode()) % 4))
        self._file.write(data)
        self._file.write(bytes(-len(data) % 4))

    def file(self, path: Path | str, name: str = "") -> None:
        """A file of this machine, at the same place; of a symbolic link, what it leads to."""
        status = os.stat(path)
        self.add(name or str(path), stat.S_IFREG | status.st_mode & 0o777, Path(path).read_bytes(), status.st_mtime)

    def tree(self, folder: Path, without: Iterable[str] = ()) -> None:
        for at, folders, files in os.walk(folder):
            folders[:] = [one for one in folders if one not in without]
            for one in files:
                if (path := Path(at, one)).exists():
                    self.file(path)

    def close(self) -> None:
        self.add("TRAILER!!!", 0)
        self._file.write(bytes(-self._file.tell() % 512))


def base(unpacked: Path, say: Say) -> Path:
    """The part of the initramfs that stays as it is: Python, what libfp depends on, modules."""
    packages = sorted(_distributions(), key=lambda one: one.metadata["Name"])
    named = [f"{one.metadata['Name']} {one.version}" for one in packages]
    (boot,) = unpacked.glob("boot/vmlinuz-*")
    key = "\0".join((*named, boot.name, sys.version, sys.prefix, Path(__file__).read_text()))
    path = CACHE / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cpio"
    if path.exists():
        return path
    say("making the guest's file system (once)")
    for old in CACHE.glob("base-*"):
        old.unlink()
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        archive = Archive(file)
        for folder in ("proc", "sys", "dev", "tmp", "run", "root", "dev/shm"):
            archive.add(folder, stat.S_IFDIR | 0o755)
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        for number, (name, data) in enumerate(_modules(unpacked)):
            archive.add(f"modules/{number:02d}-{name}.ko", stat.S_IFREG | 0o644, data)
        stdlib = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})
        configuration = {one.name for one in Path(stdlib).glob("config-*")}
        archive.tree(Path(stdlib), WITHOUT | configuration)
        archive.file(os.path.realpath(sys.executable))
        archive.file(os.path.realpath(sys.executable), sys.executable)
        if sys.prefix != sys.base_prefix:
            archive.file(Path(sys.prefix, "pyvenv.cfg"))
        libraries = [os.path.realpath(sys.executable), *map(str, Path(stdlib).glob("lib-dynload/*.so"))]
        for package in packages:
            for one in package.files or ():
                where = Path(str(one.locate()))
                if where.is_file() and not WITHOUT.intersection(one.parts):
                    archive.file(where.resolve())
                    if ".so" in where.name:
                        libraries.append(str(where.resolve()))
        for library in sorted(_needed(libraries)):
            archive.file(library)
        archive.close()
    partial.rename(path)
    return path


def _distributions() -> list[importlib.metadata.Distribution]:
    """What libfp depends on, and what that depends on; libfp itself comes from the checkout."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_names = ["libfp"]
    while open_names:
        name = open_names.pop()
        try:
            one = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if one.metadata["Name"] not in found:
            found[one.metadata["Name"]] = one
            open_names += [
                re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in one.requires or () if "extra ==" not in need
            ]
    found.pop("libfp", None)
    return list(found.values())


def _needed(libraries: list[str]) -> set[str]:
    """The shared libraries that these load, as the dynamic linker finds them."""
    done = subprocess.run(["ldd", *libraries], capture_output=True, text=True, check=False)
    return set(re.findall(r"(?:=> |^\t)(/\S+) \(0x", done.stdout, re.MULTILINE))


def image(unpacked: Path, code: list[Path], path: Path, say: Say) -> None:
    """Write the guest's initramfs to `path`: the base, this checkout, and compiled code.

    The kernel unpacks one archive after the other. Compiled code comes as a tar file: numba compares times to the
    nanosecond, and cpio keeps seconds.
    """
    shutil.copyfile(base(unpacked, say), path)
    with path.open("ab") as file:
        archive = Archive(file)
        for folder in ("libfp", "rings", "tables", "apps"):
            for at, folders, files in os.walk(ROOT / folder):
                folders[:] = [one for one in folders if one != "__pycache__"]
                for one in (*folders, *files):
                    where = Path(at, one)
                    if where.is_symlink():
                        archive.add(str(where), stat.S_IFLNK | 0o777, os.readlink(where).encode())
                    elif where.is_file():
                        archive.file(where)
        guest = Path(__file__).with_name("guest.py")
        archive.add("guest.py", stat.S_IFREG | 0o644, guest.read_bytes())
        start = f"#!{sys.executable} -B\nimport sys\nsys.path[:0] = ['/', {str(ROOT)!r}]\nimport guest\nguest.main()\n"
        archive.add("init", stat.S_IFREG | 0o755, start.encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for one in code:
                tar.add(one, arcname=str(one.relative_to(CODE)))
        archive.add("code.tar", stat.S_IFREG | 0o644, packed.getvalue())
        archive.close()


def require(memory: int) -> str:
    """The emulator. Raises Unavailable when this machine cannot run a guest with `memory` MiB."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"the guest is Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    emulator = shutil.which("qemu-system-x86_64")
    if emulator is None:
        raise Unavailable("no qemu-system-x86_64 (apt-get install qemu-system-x86)")
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable"))
    if available < memory + 512:
        raise Unavailable(f"the guest has {memory} MiB of memory, and of this machine's {available} MiB are free")
    return emulator
