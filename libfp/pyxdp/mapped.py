"""An AF_XDP socket as the kernel has it: a descriptor, four rings mapped, bound to a queue or not yet."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Sequence
from typing import TypeVar

from libfp.errors import Unsupported
from libfp.pyxdp.device import Device
from libfp.pyxdp.rings import CompletionRing, FillRing, Ring, RingSizes, RxRing, TxRing
from libfp.pyxdp.system import failed, ffi, libc, map_shared, missing_capability, unmap

AF_XDP, SOL_XDP = 44, 283
XDP_MMAP_OFFSETS = 1
OPTIONS = {"rx": 2, "tx": 3, "fill": 5, "completion": 6}
PAGE_OFFSETS = {"rx": 0, "tx": 0x8000_0000, "fill": 0x1_0000_0000, "completion": 0x1_8000_0000}
R = TypeVar("R", bound=Ring)


class Rings:
    """An unbound AF_XDP socket and its four rings, mapped. `close` returns queue and memory to the kernel."""

    def __init__(self, sizes: RingSizes) -> None:
        sizes.check()
        self._mapped: list[tuple[Ring, int, int]] = []
        self.socket = _create()
        try:
            for name, size in sizes._asdict().items():
                self.socket.setsockopt(SOL_XDP, OPTIONS[name], size)
            offsets = self.socket.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, 128)
            places = struct.unpack("=16Q", offsets[:128])  # rx, tx, fill, completion: producer, consumer, descs, flags
            self.rx = self._map("rx", sizes.rx, places[0:4], RxRing)
            self.tx = self._map("tx", sizes.tx, places[4:8], TxRing)
            self.fill = self._map("fill", sizes.fill, places[8:12], FillRing)
            self.completion = self._map("completion", sizes.completion, places[12:16], CompletionRing)
        except BaseException:
            self.close()
            raise

    def _map(self, name: str, size: int, place: Sequence[int], ring: type[R]) -> R:
        producer, consumer, descs, flags = place
        length = descs + size * (16 if name in ("rx", "tx") else 8)
        base = map_shared(self.socket.fileno(), length, PAGE_OFFSETS[name])
        made = ring(base + producer, base + consumer, base + flags, base + descs, size)
        self._mapped.append((made, base, length))
        return made

    def bind(self, device: Device, queue: int, flags: int, shared_fd: int, patience: float) -> None:
        """Bind; while the queue is busy, try again for `patience` seconds (a closed socket's queue is freed late).

        Raises OSError.
        """
        address = struct.pack("=HHIII", AF_XDP, flags, device.index, queue, shared_fd)
        until = time.monotonic() + patience
        while libc.bind(self.socket.fileno(), ffi.from_buffer(address), len(address)) != 0:
            error = failed(f"binding queue {queue} of {device.name}")
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise error
            time.sleep(0.005)

    def close(self) -> None:
        """Close the descriptor and unmap: the kernel keeps the queue until both are done. May be called again."""
        self.socket.close()
        while self._mapped:
            ring, base, length = self._mapped.pop()
            ring.close()
            unmap(base, length)


def _create() -> socket.socket:
    try:
        created = socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        created.setblocking(False)  # or Python waits inside send and recv where a default timeout is set
        return created
    except OSError as error:
        if error.errno == errno.EPERM:
            raise missing_capability("opening an AF_XDP socket", "CAP_NET_RAW") from error
        if error.errno in (errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT):
            raise Unsupported("this kernel has no AF_XDP", "it needs CONFIG_XDP_SOCKETS") from error
        raise
