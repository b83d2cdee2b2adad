"""An AF_XDP socket on one queue of one interface."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from libfp.errors import BadInput, Error, InterfaceBusy, InterfaceDown, NoSuchInterface, Unsupported
from libfp.pyxdp.device import check, check_frame
from libfp.pyxdp.mapped import SOL_XDP, Rings
from libfp.pyxdp.rings import RingSizes
from libfp.pyxdp.steer import Attachment, Steer
from libfp.pyxdp.umem import FILLED, FREE, HELD, SENT, Umem

XDP_STATISTICS, XDP_OPTIONS, XDP_MAX_TX_SKB_BUDGET = 7, 8, 9
SHARED_UMEM, COPY, ZEROCOPY, USE_NEED_WAKEUP = 1, 2, 4, 8
OPTIONS_ZEROCOPY = 1
TX_BUDGET = 256  # packets a call in copy mode, where the kernel lets us choose; 32 elsewhere
LOOK_AGAIN = 0.25  # seconds: poll(2) does not report an interface that was removed
Mode = Literal["auto", "zero-copy", "copy"]


@dataclass(frozen=True)
class Statistics:
    """The kernel's counters of one socket, in packets (struct xdp_statistics)."""

    rx_dropped: int = 0
    rx_invalid_descs: int = 0
    tx_invalid_descs: int = 0
    rx_ring_full: int = 0
    rx_fill_ring_empty_descs: int = 0
    tx_ring_empty_descs: int = 0


class Socket:
    """An AF_XDP socket on one queue, with the frames it receives into already given to the kernel.

        with Socket("eth0", queue=0, steer="udp dport 4789") as sock:
            for frame in sock:                      # a memoryview, valid until the next turn
                print(len(frame), bytes(frame[:14]).hex())

    `umem` is made when none is given; sockets with the same `Umem` share it, and its mode. `steer` decides which
    packets come here: a filter or a `Steer` (attached now, detached by `close`), or an `Attachment` that others share;
    without it nothing is received until somebody puts `fd` into an `Attachment`. A filter that names no family brings
    IPv4 and IPv6; of IPv6 only the header's own next header is looked at, extension headers are not followed.

    `mode` is "auto" (zero-copy where the driver can, with `reason` saying why it cannot), "zero-copy" or "copy". `fill`
    is for those who keep account of frames themselves: the offsets for the fill ring. `kick="helper"` means that
    somebody else calls `kick` when `wants_kick`; with "inline" sending does it.

    The rings `rx`, `tx`, `fill` and `completion` hold their addresses for compiled code. One thread at a time; only
    `stop` and `kick` may be called from another.

    Raises NoSuchInterface, UnsuitableInterface, InterfaceDown, InterfaceBusy, BadInput (no such queue), FrameTooSmall,
    MissingCapability, Unsupported, and what `Steer.attach` raises.
    """

    def __init__(
        self,
        interface: str,
        queue: int = 0,
        *,
        umem: Umem | None = None,
        steer: str | Steer | Attachment | None = None,
        mode: Mode = "auto",
        rings: RingSizes = RingSizes(),  # noqa: B008 - immutable
        need_wakeup: bool = True,
        kick: Literal["inline", "helper"] = "inline",
        fill: Sequence[int] | None = None,
        patience: float = 1.0,
    ) -> None:
        if mode not in ("auto", "zero-copy", "copy"):
            raise BadInput(f"no mode {mode!r}", "use auto, zero-copy or copy")
        self.interface, self.queue = interface, queue
        self.umem = umem if umem is not None else Umem()
        self.mode: Literal["zero-copy", "copy"] = "copy"
        self.reason = ""
        self.invalid_descriptors = 0  # what the kernel returned and was not ours to have back: ignored, and counted
        self._inline = kick == "inline"
        self._held: tuple[memoryview, int] | None = None  # the frame of this turn, and where its packet starts
        self._stopped = False
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self.device = check(interface, queue)
            check_frame(self.device, self.umem.frame_size, self.umem.headroom)
            if isinstance(steer, str):
                steer = Steer(steer)
            # Attached before binding: drivers set up their rings for XDP at that point, some only then.
            self.attachment = undo.enter_context(steer.attach(interface)) if isinstance(steer, Steer) else steer
            self._open(mode, rings, need_wakeup, fill, patience, undo)
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._wake)
            if self.attachment is not None:
                self.attachment.set_socket(queue, self.fd)
                undo.callback(self.attachment.clear, queue)
            self._closing = undo.pop_all()

    def _open(
        self,
        mode: Mode,
        sizes: RingSizes,
        need_wakeup: bool,
        fill: Sequence[int] | None,
        patience: float,
        undo: contextlib.ExitStack,
    ) -> None:
        shared = self.umem.sockets[0] if self.umem.sockets else None
        wakeup = USE_NEED_WAKEUP if need_wakeup else 0
        tries = {"auto": (ZEROCOPY, COPY), "zero-copy": (ZEROCOPY,), "copy": (COPY,)}[mode]
        if shared is not None:  # the mode is the UMEM's, and a shared bind takes no flag
            if mode not in ("auto", shared.mode):
                raise BadInput(f"{mode} on a UMEM in {shared.mode} mode", "sockets that share a UMEM share its mode")
            wakeup, tries = 0, (SHARED_UMEM,)
        for flags in tries:
            rings = Rings(sizes)
            undo.callback(rings.close)
            undo.callback(self.umem.leave, self)
            try:
                if shared is None:
                    self.umem.register(rings.socket)
                self._rings = rings
                self.rx, self.tx, self.fill, self.completion = rings.rx, rings.tx, rings.fill, rings.completion
                self.fill.put_first(self._first_frames(sizes.fill) if fill is None else fill)
                rings.bind(self.device, self.queue, flags | wakeup, shared.fd if shared else 0, patience)
                break
            except OSError as error:
                refused = self._bind_refused(error, flags, shared)
                if flags == tries[-1] or not isinstance(refused, Unsupported):
                    raise refused from error
                self.reason = refused.what
                rings.close()
                self.umem.leave(self)
        options = rings.socket.getsockopt(SOL_XDP, XDP_OPTIONS, 4)
        self.mode = "zero-copy" if struct.unpack("=I", options)[0] & OPTIONS_ZEROCOPY else "copy"
        if self.mode == "copy":
            with contextlib.suppress(OSError):  # kernels before 6.17
                rings.socket.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, min(TX_BUDGET, sizes.tx))
        self.umem.join(self)

    def _first_frames(self, limit: int) -> list[int]:
        # Half of what is free, so that some is left to send from and for other sockets.
        count = max(1, min(limit, self.umem.free // 2))
        frames = [self.umem.take(self, FILLED) for _ in range(count)]
        return [frame for frame in frames if frame is not None]

    def _bind_refused(self, error: OSError, flags: int, shared: Socket | None) -> Error | OSError:
        where = f"queue {self.queue} of {self.interface}"
        if error.errno == errno.EBUSY:
            return InterfaceBusy(f"{where} has an AF_XDP socket already", "close it, or use another queue")
        if error.errno == errno.ENODEV:
            return NoSuchInterface(f"{self.interface} is gone")
        if error.errno == errno.ENETDOWN:
            return InterfaceDown(f"{self.interface} is down", f"ip link set {self.interface} up")
        zero_copy = flags & ZEROCOPY or (shared is not None and shared.mode == "zero-copy")
        if shared is not None and error.errno == errno.EINVAL and not zero_copy:
            return InterfaceBusy(f"{where} already has a socket of this UMEM", "use another queue")
        if zero_copy:
            return Unsupported(f"{where} cannot do zero-copy ({os.strerror(error.errno or 0)})", "use copy mode")
        return error

    # -- state

    @property
    def fd(self) -> int:
        """The socket's file descriptor; -1 once closed."""
        return self._rings.socket.fileno()

    @property
    def statistics(self) -> Statistics:
        """The kernel's counters since the socket was opened."""
        data = self._rings.socket.getsockopt(SOL_XDP, XDP_STATISTICS, 48)
        return Statistics(*struct.unpack(f"={len(data) // 8}Q", data))

    @property
    def wants_kick(self) -> bool:
        """Packets wait in the transmit ring, or frames in the fill ring, and the kernel sleeps. Level-triggered."""
        return (self.tx.need_wakeup and len(self.tx) > 0) or (self.fill.need_wakeup and self.mode == "zero-copy")

    def close(self) -> None:
        """Detach own steering (packets go to Linux), then close and unmap. May be called again."""
        self._stopped = True
        self._drop_view()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Socket {self.interface} queue {self.queue}, {self.mode}, fd {self.fd}>"

    def _alive(self) -> None:
        if self.fd < 0:
            raise ValueError("this AF_XDP socket is closed")

    # -- waiting and waking

    def kick(self) -> None:
        """Have the kernel look at the transmit ring; it may send a part (32 packets in copy mode) of what is there.

        Raises InterfaceDown.
        """
        self._call(lambda: self._rings.socket.send(b"", socket.MSG_DONTWAIT))

    def kick_fill(self) -> None:
        """Have a driver that sleeps for want of frames look at the fill ring. Raises InterfaceDown."""
        self._call(lambda: self._rings.socket.recv(0, socket.MSG_DONTWAIT))

    def _call(self, call: Any) -> None:
        try:
            call()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EBUSY, errno.ENOBUFS):
                return  # busy or out of buffers for a moment: the ring keeps what is in it
            if error.errno == errno.ENETDOWN:
                raise InterfaceDown(f"{self.interface} is down", f"ip link set {self.interface} up") from error
            if error.errno == errno.ENXIO:
                raise self._gone() from error
            raise

    def _gone(self) -> Error:
        return NoSuchInterface(f"{self.interface} was removed", "open the socket again when it is back")

    def poll(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for a packet or `stop`. True when there is a packet.

        Raises NoSuchInterface when the interface is removed meanwhile; while it is only down, this waits.
        """
        return self._wait(select.POLLIN, timeout, lambda: self.rx.ready > 0)

    def _wait(self, event: int, timeout: float | None, done: Any) -> bool:
        self._alive()
        until = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.fd, event)
        poller.register(self._wake, select.POLLIN)
        while not done():
            left = LOOK_AGAIN if until is None else until - time.monotonic()
            if self._stopped or left < 0:
                return False
            self._collect()
            poller.poll(min(left, LOOK_AGAIN) * 1000)
            if not done() and (self._rings.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                raise self._gone()
        return True

    def stop(self) -> None:
        """End the iteration and every wait, from any thread or a signal handler, for good."""
        self._stopped = True
        os.eventfd_write(self._wake, 1)

    # -- receiving

    def __iter__(self) -> Iterator[memoryview]:
        """Received frames, Ethernet header first, until `stop`. Each may be changed, and is valid until the next turn;
        then its frame goes back to the kernel, unless `reply` or `forward` has sent it."""
        while not self._stopped:
            frame = self._next()
            if frame is not None:
                yield frame
            else:
                self.poll()
        self._release()

    def recv(self, timeout: float | None = None) -> bytes | None:
        """One received frame as bytes; None after `timeout` seconds (None: wait for ever) or `stop`."""
        self._alive()
        frame = self._next()
        if frame is None and self.poll(timeout):
            frame = self._next()
        if frame is None:
            return None
        data = bytes(frame)
        self._release()
        return data

    def _next(self) -> memoryview | None:
        self._alive()
        self._release()
        while (found := self.rx.take()) is not None:
            offset, length = found
            view = self.umem.view(offset, length)
            if view is not None and self.umem.change(offset, self, FILLED, HELD) is not None:
                self._held = view, offset
                return view
            self.invalid_descriptors += 1
        return None

    def _drop_view(self) -> int | None:
        if self._held is None:
            return None
        view, offset = self._held
        self._held = None
        with contextlib.suppress(BufferError):  # somebody made an object of it: that keeps reading the frame
            view.release()
        return offset

    def _release(self) -> None:
        """Give the frame of the last turn back to the kernel."""
        offset = self._drop_view()
        if offset is not None:
            self.umem.change(offset, self, HELD, FREE)
        self._refill()

    def _refill(self) -> None:
        while self.fill.room and (frame := self.umem.take(self, FILLED)) is not None:
            self.fill.put((frame,))
        if self._inline and self.mode == "zero-copy" and self.fill.need_wakeup:
            self.kick_fill()

    # -- sending

    def send(self, data: bytes | bytearray | memoryview, timeout: float | None = 1.0) -> None:
        """Send a copy of a whole Ethernet frame. Waits for room, up to `timeout` seconds, then raises TimeoutError.

        Raises BadInput for a frame that is too short or too long, InterfaceDown.
        """
        self._alive()
        self._check_length(len(data))
        frame = self._frame_to_send(timeout)
        self.umem.buffer[frame : frame + len(data)] = data
        self._transmit(self, frame, len(data), timeout)

    def reply(self, frame: memoryview, length: int | None = None) -> None:
        """Send the frame of this turn, as changed in place, out of the interface it came in by, without a copy.

        `length` may be more or less than was received. The view is invalid afterwards.
        """
        self.forward(frame, self, length)

    def forward(self, frame: memoryview, to: Socket, length: int | None = None) -> None:
        """Send the frame of this turn out of another socket of the same UMEM, without a copy.

        Raises BadInput when `frame` is not the one of this turn, or `to` has other memory; TimeoutError when `to` has
        no room for a second.
        """
        self._alive()
        if self._held is None or self._held[0] is not frame:
            raise BadInput("not the frame of this turn", "pass the memoryview that the iteration gave")
        if to.umem is not self.umem:
            raise BadInput("the sockets do not share a UMEM", "give both the same Umem, or use send")
        offset = self._held[1]
        length = len(frame) if length is None else length
        self._check_length(length)
        if self.umem.view(offset, length) is None:
            raise BadInput(f"{length} bytes do not fit behind the start of this frame", "send a copy")
        self._transmit(to, offset, length, 1.0)
        self._drop_view()

    def flush(self, timeout: float = 1.0) -> bool:
        """Kick until the kernel has taken everything out of the transmit ring; False after `timeout` seconds."""
        until = time.monotonic() + timeout
        while len(self.tx):
            if time.monotonic() > until:
                return False
            self.kick()
            self._collect()
        self._collect()
        return True

    def _check_length(self, length: int) -> None:
        if not 14 <= length <= self.umem.frame_size:
            raise BadInput(f"a frame of {length} bytes", f"frames are 14 to {self.umem.frame_size} bytes")

    def _frame_to_send(self, timeout: float | None) -> int:
        found: list[int] = []

        def take() -> bool:
            self._collect()
            frame = self.umem.take(self, HELD)
            if frame is not None:
                found.append(frame)
            return frame is not None

        if not take() and not self._wait(select.POLLOUT, timeout, take):
            raise TimeoutError(f"{self.interface}: no free frame to send from")
        return found[0]

    def _transmit(self, to: Socket, offset: int, length: int, timeout: float | None) -> None:
        to._collect()
        if not to.tx.put(offset, length):
            to.kick()
            if not to._wait(select.POLLOUT, timeout, lambda: to.tx.room > 0):
                if self._held is None or self._held[1] != offset:
                    self.umem.change(offset, self, HELD, FREE)
                raise TimeoutError(f"{to.interface}: the transmit ring stays full")
            to.tx.put(offset, length)
        self.umem.change(offset, self, HELD, SENT, to)
        if to._inline and to.tx.need_wakeup:
            to.kick()

    def _collect(self) -> None:
        """Take back what has been transmitted."""
        while addresses := self.completion.take():
            for address in addresses:
                if self.umem.change(address, self, SENT, FREE) is None:
                    self.invalid_descriptors += 1
