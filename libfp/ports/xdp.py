"""A port on an interface, through AF_XDP: `libfp.pyxdp` opens it, compiled code drives its rings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from libfp.errors import BadInput
from libfp.jit import memory
from libfp.ports.frames import FrameMemory, OpenPort
from libfp.ports.rings import RingAddresses
from libfp.pyxdp import Attachment, Group, RingSizes, Steer, Umem
from libfp.pyxdp.device import ETHERNET, check
from libfp.pyxdp.rings import Ring
from libfp.pyxdp.rss import SymmetricHashing

log = logging.getLogger("libfp.ports")


class XdpPort:
    """The interface `name`, and what `steer` takes from it.

    xdp: how the steering program is attached ("auto", "native", "skb"). binding: "auto" is zero-copy for all ports of
    a pipeline or copy for all. `ring_size` entries in each ring. `owner` is told when an application starts and stops.
    """

    is_real = True

    def __init__(
        self,
        name: str,
        steer: Steer | None = None,
        *,
        xdp: Literal["auto", "native", "skb"] = "auto",
        binding: Literal["auto", "zero-copy", "copy"] = "auto",
        ring_size: int = 1024,
        owner: Any = None,
    ) -> None:
        self.name, self.steer, self.ring_size, self.owner = name, steer or Steer(), ring_size, owner
        self.xdp, self.binding = xdp, binding
        self.attachment: Attachment | None = None
        self.hashing: SymmetricHashing | None = None
        self._fds: dict[int, int] = {}

    @property
    def longest(self) -> int:
        """Bytes of the longest frame that the interface carries, without FCS."""
        return check(self.name).mtu + ETHERNET

    @staticmethod
    def open_all(ports: Sequence[XdpPort], queue: int, frames: FrameMemory) -> list[OpenPort]:
        """Open `queue` of every port over one UMEM; the steering programs are attached first, and take nothing yet.

        Raises what `libfp.pyxdp.Socket` and `Steer.attach` raise.
        """
        for port in ports:
            device = check(port.name)
            if queue >= device.queues:
                remedy = f"use at most {device.queues} cores, or ethtool -L {port.name} combined {queue + 1}"
                raise BadInput(f"{port.name} has {device.queues} queues, too few for {queue + 1} workers", remedy)
            if port.attachment is None:  # before binding: some drivers set up their rings for XDP here
                port.attachment = port.steer.attach(port.name, mode=port.xdp)
        umem = Umem(frame_size=frames.frame_size, memory=(frames.address, frames.size))
        fill = [[frames.free.pop() for _ in range(port.ring_size)] for port in ports]
        size = ports[0].ring_size
        group = Group(
            umem,
            [(port.name, queue) for port in ports],
            mode=ports[0].binding,
            rings=RingSizes(size, size, size, size),
            kick="helper",  # compiled code kicks
            fill=fill,
        )
        if group.reason:
            log.info("copy mode: %s", group.reason)
        opened = []
        for number, (port, sock) in enumerate(zip(ports, group, strict=True)):
            port._fds[queue] = sock.fd
            resource = _Closer(group if number == 0 else None, port, queue)
            sized = ((sock.rx, 16), (sock.tx, 16), (sock.fill, 8), (sock.completion, 8))
            rings = tuple(resource.take_over(ring, entry) for ring, entry in sized)
            opened.append(OpenPort(rings, sock.fd, sock.mode == "zero-copy", size, resource))  # type: ignore[arg-type]
        return opened

    def take(self, queue: int) -> None:
        """Redirect the queue's packets to its socket."""
        if self.attachment is not None and queue in self._fds:
            self.attachment.set_socket(queue, self._fds[queue])

    def leave(self, queue: int) -> None:
        """Leave the queue's packets to Linux."""
        if self.attachment is not None:
            self.attachment.clear(queue)

    def hash_symmetrically(self) -> None:
        """Have both directions of a flow come by queues of one number, if the NIC can, until `close`."""
        if self.hashing is None:
            self.hashing = SymmetricHashing(self.name)

    def close(self) -> None:
        """Detach the steering program: all packets go to Linux."""
        if self.hashing is not None:
            self.hashing.restore()
            self.hashing = None
        if self.attachment is not None:
            self.attachment.close()
            self.attachment = None

    def __repr__(self) -> str:
        return f"XdpPort({self.name!r}, {self.steer!r})"


class _Closer:
    """Closes the sockets of one worker: with the first of its ports, which is closed last."""

    def __init__(self, group: Group | None, port: XdpPort, queue: int) -> None:
        self._group, self._port, self._queue = group, port, queue
        self._registered: list[int] = []

    def take_over(self, ring: Ring, entry: int) -> RingAddresses:
        """Declare the ring's memory as such that loads and stores may touch."""
        start = min(ring.producer, ring.consumer, ring.flags)
        memory.register(start, ring.descs + entry * ring.size - start)
        self._registered.append(start)
        return RingAddresses(ring.producer, ring.consumer, ring.flags, ring.descs, ring.size)

    def close(self) -> None:
        while self._registered:
            memory.unregister(self._registered.pop())
        self._port._fds.pop(self._queue, None)
        if self._group is not None:
            self._group.close()
