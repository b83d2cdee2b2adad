"""bpf(2): maps, programs, links to XDP and tcx, and who owns what is loaded. Objects close their file descriptor."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from libfp.errors import Error, Unsupported
from libfp.pyxdp.system import bpf_number, failed, ffi, has_capability, libc, missing_capability

MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY = 0, 1, 2, 3, 4
PROG_LOAD, PROG_TEST_RUN, PROG_FD_BY_ID, OBJ_INFO_BY_FD, PROG_QUERY, LINK_CREATE = 5, 10, 13, 15, 16, 28
ARRAY, LPM_TRIE, XSKMAP = 2, 11, 17  # map types
NO_PREALLOC = 1
PROG_TYPE_SCHED_CLS, PROG_TYPE_XDP = 3, 6
ATTACH_XDP, ATTACH_TCX_INGRESS, ATTACH_TCX_EGRESS = 37, 46, 47
SKB_MODE, NATIVE_MODE = 1 << 1, 1 << 2  # XDP_FLAGS_*_MODE
# Without CAP_PERFMON the verifier allows no packet offset that is not a constant.
LOADING = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")
_ATTRIBUTES = 128  # bytes: more than any command here uses; the kernel wants the rest zero


def _bpf(command: int, attributes: bytes) -> int:
    return _bpf_in_place(command, bytearray(attributes.ljust(_ATTRIBUTES, b"\0")))


def _bpf_in_place(command: int, attributes: bytearray) -> int:
    buffer = ffi.from_buffer(attributes)
    result = libc.syscall(
        bpf_number(), ffi.cast("long", command), ffi.cast("void *", buffer), ffi.cast("unsigned long", _ATTRIBUTES)
    )
    if result < 0:
        raise failed("bpf")
    return int(result)


def _address(buffer: Any) -> int:
    return int(ffi.cast("uintptr_t", buffer))


def _explain(error: OSError, what: str) -> Error | OSError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return missing_capability(what, *LOADING)
    if error.errno == errno.ENOSYS:
        return Unsupported("this kernel has no bpf(2)", "it needs CONFIG_BPF_SYSCALL")
    return error


class _Object:
    """Something behind a file descriptor of bpf(2)."""

    fd = -1

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor; the kernel frees what nobody else holds. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def info(self) -> bytes:
        """The kernel's description (struct bpf_map_info, bpf_prog_info or bpf_link_info), at most 256 bytes."""
        return _info(self.fd)


class Map(_Object):
    """A BPF map; keys and values are bytes exactly as the program sees them."""

    def __init__(self, kind: int, key_size: int, value_size: int, entries: int, name: str, flags: int = 0) -> None:
        self.key_size, self.value_size, self.entries = key_size, value_size, entries
        attributes = struct.pack("=IIIIIII", kind, key_size, value_size, entries, flags, 0, 0)
        try:
            super().__init__(_bpf(MAP_CREATE, attributes + _name(name)))
        except OSError as error:
            raise _explain(error, f"creating the BPF map {name!r}") from error

    def _call(self, command: int, key: bytes, value: bytes) -> bytes:
        if len(key) != self.key_size or len(value) != self.value_size:
            raise ValueError(f"this map has keys of {self.key_size} and values of {self.value_size} bytes")
        key_buffer, value_buffer = ffi.from_buffer(key), ffi.new("char[]", value)
        at = 0 if command == MAP_DELETE else _address(value_buffer)  # fields that a command does not use must be zero
        _bpf(command, struct.pack("=IxxxxQQQ", self.fd, _address(key_buffer), at, 0))
        return bytes(ffi.buffer(value_buffer, self.value_size))

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """Add or replace. Raises OSError: E2BIG or ENOSPC when the map is full."""
        self._call(MAP_UPDATE, key, value)

    def __getitem__(self, key: bytes) -> bytes:
        """Raises KeyError when there is none. A longest-prefix map answers as it answers the program."""
        try:
            return self._call(MAP_LOOKUP, key, bytes(self.value_size))
        except OSError as error:
            raise KeyError(key) if error.errno == errno.ENOENT else error from None

    def discard(self, key: bytes) -> bool:
        """Remove a key; False when there is none."""
        try:
            self._call(MAP_DELETE, key, bytes(self.value_size))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True


class Program(_Object):
    """A loaded program, for the hook `attach`: ATTACH_XDP, ATTACH_TCX_INGRESS or ATTACH_TCX_EGRESS.

    Raises MissingCapability, and OSError with the verifier's words when the kernel rejects the code.
    """

    def __init__(self, code: bytes, name: str, attach: int = ATTACH_XDP) -> None:
        if not code or len(code) % 8:
            raise ValueError("BPF instructions are 8 bytes each")
        self.name, self.attach = name, attach
        kind = PROG_TYPE_XDP if attach == ATTACH_XDP else PROG_TYPE_SCHED_CLS
        instructions, licence = ffi.from_buffer(code), ffi.new("char[]", b"GPL")

        def attributes(log: Any) -> bytes:
            size = 0 if log is None else ffi.sizeof(log)
            at = 0 if log is None else _address(log)
            head = struct.pack("=IIQQ", kind, len(code) // 8, _address(instructions), _address(licence))
            head += struct.pack("=IIQII", 1 if size else 0, size, at, 0, 0)
            return head + _name(name) + struct.pack("=II", 0, attach)

        try:
            fd = _bpf(PROG_LOAD, attributes(None))
        except OSError as error:
            # EACCES is also the verifier's answer: with the capabilities in place, it is about the code.
            if error.errno != errno.EACCES or not all(map(has_capability, LOADING)):
                explained = _explain(error, f"loading the BPF program {name!r}")
                if explained is not error:
                    raise explained from error
            log = ffi.new("char[]", 1 << 16)
            try:
                fd = _bpf(PROG_LOAD, attributes(log))
            except OSError as again:
                words = ffi.string(log).decode(errors="replace").strip()
                raise OSError(again.errno, f"the kernel refuses the BPF program {name!r}: {words[-2000:]}") from again
        super().__init__(fd)

    @property
    def id(self) -> int:
        return _program(self.info()).id

    def run(self, frame: bytes) -> tuple[int, bytes]:
        """Run an XDP program on one frame (14 bytes or more) that goes nowhere: its action, and what it made of it."""
        data, out = ffi.from_buffer(frame), ffi.new("char[]", len(frame) + 256)
        # prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, and what is not used
        head = struct.pack("=IIIIQQI", self.fd, 0, len(frame), len(out), _address(data), _address(out), 1)
        attributes = bytearray(head.ljust(_ATTRIBUTES, b"\0"))
        _bpf_in_place(PROG_TEST_RUN, attributes)
        action, size = struct.unpack_from("=I4xI", attributes, 4)
        return action, bytes(ffi.buffer(out, size))


class Link(_Object):
    """A program attached to an interface, at its hook, for as long as this descriptor (or a copy of it) lives.

    `flags` is NATIVE_MODE or SKB_MODE for XDP, 0 for tcx (Linux 6.6). Raises OSError; EBUSY means that an XDP program
    is attached already.
    """

    def __init__(self, program: Program, index: int, flags: int = 0) -> None:
        super().__init__(_bpf(LINK_CREATE, struct.pack("=IIII", program.fd, index, program.attach, flags)))

    @property
    def id(self) -> int:
        return int(struct.unpack_from("=II", self.info())[1])


def _name(name: str) -> bytes:
    return name.encode()[:15].ljust(16, b"\0")


def _info(fd: int) -> bytes:
    buffer = ffi.new("char[]", 256)
    _bpf(OBJ_INFO_BY_FD, struct.pack("=IIQ", fd, 256, _address(buffer)))
    return bytes(ffi.buffer(buffer, 256))


@dataclass(frozen=True)
class ProgramInfo:
    """A program somebody has loaded."""

    id: int
    name: str


def _program(info: bytes) -> ProgramInfo:
    # struct bpf_prog_info: type, id, tag[8], ..., name[16] at 64
    return ProgramInfo(struct.unpack_from("=I", info, 4)[0], info[64:80].split(b"\0")[0].decode(errors="replace"))


def program_info(number: int) -> ProgramInfo:
    """What the kernel tells about a program id; the name is empty where we may not ask (it needs CAP_SYS_ADMIN)."""
    try:
        fd = _bpf(PROG_FD_BY_ID, struct.pack("=III", number, 0, 0))
    except OSError:
        return ProgramInfo(number, "")
    try:
        return _program(_info(fd))
    finally:
        os.close(fd)


def attached(index: int, attach: int) -> list[int]:
    """The ids of the programs at a tcx hook of an interface; none where the kernel has no tcx, or we may not ask."""
    numbers = ffi.new("uint32_t[]", 64)
    # target_ifindex, attach_type, query_flags, attach_flags, prog_ids, count; the kernel writes the count back
    attributes = bytearray(struct.pack("=IIIIQI", index, attach, 0, 0, _address(numbers), 64).ljust(_ATTRIBUTES, b"\0"))
    try:
        _bpf_in_place(PROG_QUERY, attributes)
    except OSError:
        return []
    return list(numbers[0 : min(64, struct.unpack_from("=I", attributes, 24)[0])])


def holders(program_id: int) -> Iterator[int]:
    """The pids of processes that hold the program, or a link to it, as far as /proc shows them to us."""
    wanted = f"prog_id:\t{program_id}\n"
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):
                    if "bpf" not in os.readlink(f"/proc/{name}/fd/{fd}"):
                        continue
                    with open(f"/proc/{name}/fdinfo/{fd}") as file:
                        if wanted in file.read():
                            yield int(name)
                            break
