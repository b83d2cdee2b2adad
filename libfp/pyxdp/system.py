"""The C library by cffi in ABI mode (no compiler needed): the few calls that Python's own modules lack."""

from __future__ import annotations

import os
import platform
import threading
from typing import Any

import cffi

from libfp.errors import MissingCapability, Unsupported

ffi = cffi.FFI()
ffi.cdef("""
    long syscall(long number, ...);
    void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset);
    int munmap(void *address, size_t length);
    int bind(int fd, const void *address, uint32_t length);
    int ioctl(int fd, unsigned long request, ...);
    struct xdp_desc { uint64_t addr; uint32_t len; uint32_t options; };
""")
libc: Any = ffi.dlopen(None)

PAGE = os.sysconf("SC_PAGE_SIZE")
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_POPULATE = 0x01, 0x8000

_CAPABILITIES = {
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_IPC_LOCK": 14,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_BPF_NUMBERS = {"x86_64": 321, "aarch64": 280}


def failed(what: str) -> OSError:
    """The OSError for the C library call that has just failed."""
    return OSError(ffi.errno, f"{what}: {os.strerror(ffi.errno)}")


def bpf_number() -> int:
    """The number of the bpf(2) system call here. Raises Unsupported on other processors."""
    machine = platform.machine()
    if machine not in _BPF_NUMBERS:
        raise Unsupported(f"no bpf(2) system call number is known for {machine}", "x86-64 and arm64 are supported")
    return _BPF_NUMBERS[machine]


def map_shared(fd: int, length: int, offset: int) -> int:
    """Map `length` bytes of `fd` at `offset`, readable and writable, and return the address. Raises OSError."""
    at = libc.mmap(ffi.NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset)
    address = int(ffi.cast("intptr_t", at))
    if address == -1:
        raise failed("mmap")
    return address


def unmap(address: int, length: int) -> None:
    """Undo map_shared. Nothing may look at the memory afterwards."""
    if libc.munmap(ffi.cast("void *", address), length) != 0:
        raise failed("munmap")


def words32(address: int) -> Any:
    """The memory at `address` as a `uint32_t *`."""
    return ffi.cast("uint32_t *", address)


def words64(address: int) -> Any:
    """The memory at `address` as a `uint64_t *`."""
    return ffi.cast("uint64_t *", address)


_fence_lock = threading.Lock()


def _full_fence() -> None:
    # Two critical sections: no access moves from before the first to after the second, or back.
    with _fence_lock:
        pass
    with _fence_lock:
        pass


def _no_fence() -> None:
    """x86-64 keeps stores in order and loads in order, which is all that a single-producer ring asks for."""


fence = _no_fence if platform.machine() == "x86_64" else _full_fence


def has_capability(name: str) -> bool:
    """True when the calling thread's effective set holds the capability ("CAP_NET_ADMIN", ...)."""
    with open("/proc/thread-self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return bool(effective >> _CAPABILITIES[name] & 1)


def missing_capability(what: str, *names: str) -> MissingCapability:
    """The error for `what` refused with EPERM: it names the first of `names` that this thread lacks."""
    name = next((name for name in names if not has_capability(name)), "")
    if not name:  # all held, so they are held in a user namespace that does not own this network
        return MissingCapability(
            f"{what}: not permitted, though {' and '.join(names)} are held",
            "run in the host's own user namespace (a container needs --privileged)",
        )
    return MissingCapability(f"{what} needs {name}", f"run as root, or with {' and '.join(names)}")
