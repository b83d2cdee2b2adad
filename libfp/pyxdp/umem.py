"""The memory that packets live in, shared with the kernel, and who has which frame of it."""

from __future__ import annotations

import errno
import mmap
import socket
import struct
from typing import TYPE_CHECKING, Any

from libfp.errors import BadInput, Error, MissingCapability
from libfp.pyxdp.mapped import SOL_XDP
from libfp.pyxdp.system import PAGE, ffi, has_capability

if TYPE_CHECKING:
    from libfp.pyxdp.socket import Socket

XDP_UMEM_REG = 4
FREE, FILLED, HELD, SENT = range(4)  # who has a frame: nobody, the kernel to receive, the program, the kernel to send


class Umem:
    """`frames` slots of `frame_size` bytes (2048 or 4096), in memory of its own or at a given place.

    A frame is named by its offset; `address` is where offset 0 lies, `buffer` is all of it as a writable memoryview.
    `memory=(address, size)` uses page-aligned memory that the caller keeps mapped until all sockets are closed. The
    sockets of one Umem can pass frames to each other without a copy. Own memory is freed when the last view is gone.
    """

    def __init__(
        self, frames: int = 4096, frame_size: int = 2048, *, headroom: int = 0, memory: tuple[int, int] | None = None
    ) -> None:
        if frame_size not in (2048, 4096):
            raise BadInput(f"frames of {frame_size} bytes", "AF_XDP frames are 2048 or 4096 bytes")
        if memory is not None:
            frames = memory[1] // frame_size
        if frames < 1:
            raise BadInput(f"a UMEM of {frames} frames", "it needs one at least")
        if not 0 <= headroom < frame_size - 256:
            raise BadInput(f"a headroom of {headroom} bytes", f"a frame of {frame_size} bytes holds less")
        self.frames, self.frame_size, self.headroom = frames, frame_size, headroom
        self.size = frames * frame_size
        if memory is None:
            self.buffer = memoryview(mmap.mmap(-1, -(-self.size // PAGE) * PAGE))[: self.size]
            self.address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.buffer)))
        else:
            self.address = memory[0]
            if self.address % PAGE:
                raise BadInput(f"UMEM at {self.address:#x}", f"it must start at a page ({PAGE} bytes)")
            self.buffer = memoryview(ffi.buffer(ffi.cast("char *", self.address), self.size))
        self.sockets: list[Socket] = []  # bound to this memory, oldest first
        self._state = bytearray(frames)
        self._owner: list[Socket | None] = [None] * frames
        self._free = list(range((frames - 1) * frame_size, -1, -frame_size))

    def register(self, sock: socket.socket) -> None:
        """Make this the socket's own UMEM. Raises MissingCapability when the memory may not be locked."""
        registration = struct.pack("=QQIIII", self.address, self.size, self.frame_size, self.headroom, 0, 0)
        try:
            sock.setsockopt(SOL_XDP, XDP_UMEM_REG, registration)
        except OSError as error:
            if error.errno == errno.ENOBUFS and not has_capability("CAP_IPC_LOCK"):
                raise MissingCapability(
                    f"locking {self.size >> 10} KiB of packet memory needs CAP_IPC_LOCK",
                    "run as root, or raise the limit: ulimit -l",
                ) from error
            raise Error(f"the kernel refuses {self.size >> 10} KiB of packet memory: {error}") from error

    # -- frames, for sockets driven from Python; all addresses from the kernel are checked here

    @property
    def free(self) -> int:
        """Frames that no socket has."""
        return len(self._free)

    def take(self, owner: Socket, state: int) -> int | None:
        """A free frame's offset for `owner`; None when there is none."""
        if not self._free:
            return None
        offset = self._free.pop()
        index = offset // self.frame_size
        self._state[index], self._owner[index] = state, owner
        return offset

    def change(
        self, offset: int, owner: Socket, before: int, after: int, new_owner: Socket | None = None
    ) -> int | None:
        """Hand a frame on; `offset` may point anywhere into it. Returns the frame's own offset.

        None, and nothing is changed, when the offset is outside the UMEM or the frame is not in that state.
        """
        if not 0 <= offset < self.size:
            return None
        index = offset // self.frame_size
        if self._state[index] != before or self._owner[index] is not owner:
            return None
        self._state[index] = after
        if after == FREE:
            self._owner[index] = None
            self._free.append(index * self.frame_size)
        else:
            self._owner[index] = new_owner or owner
        return index * self.frame_size

    def view(self, offset: int, length: int) -> memoryview | None:
        """The bytes of a packet; None when they do not lie within one frame."""
        if not (0 <= offset < self.size and 0 <= length <= self.frame_size - offset % self.frame_size):
            return None
        return self.buffer[offset : offset + length]

    def join(self, member: Socket) -> None:
        """Add a bound socket."""
        self.sockets.append(member)

    def leave(self, member: Socket) -> None:
        """Remove a closed socket; all its frames are free again."""
        if member in self.sockets:
            self.sockets.remove(member)
        for index, owner in enumerate(self._owner):
            if owner is member:
                self._state[index], self._owner[index] = FREE, None
                self._free.append(index * self.frame_size)

    def __repr__(self) -> str:
        return f"Umem({self.frames}, {self.frame_size})"

    def __reduce__(self) -> Any:
        raise TypeError("packet memory cannot be pickled")
