"""Sockets on several ports over one UMEM: all zero-copy, or all copy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, Self

from libfp.errors import Unsupported
from libfp.pyxdp.rings import RingSizes
from libfp.pyxdp.socket import Mode, Socket
from libfp.pyxdp.umem import Umem

log = logging.getLogger("libfp.pyxdp")


class Group:
    """One socket for each (interface, queue) of `ports`, in their order, sharing `umem`.

    The mode belongs to the UMEM. With "auto" every port is tried with zero-copy; when one cannot, all are opened again
    in copy mode, and `reason` names that port. `fill` has, for each port, the frame offsets to give to its kernel side
    (every socket needs some, those that only transmit too). `mode` is what the kernel says it became.
    """

    def __init__(
        self,
        umem: Umem,
        ports: Sequence[tuple[str, int]],
        *,
        mode: Mode = "auto",
        rings: RingSizes = RingSizes(),  # noqa: B008 - immutable
        need_wakeup: bool = True,
        kick: Literal["inline", "helper"] = "inline",
        fill: Sequence[Sequence[int]] | None = None,
        patience: float = 1.0,
    ) -> None:
        self.umem = umem
        self.sockets: list[Socket] = []
        self.reason = ""

        def open_all(one_mode: Mode) -> None:
            try:
                for number, (interface, queue) in enumerate(ports):
                    sock = Socket(
                        interface,
                        queue,
                        umem=umem,
                        mode=one_mode,
                        rings=rings,
                        need_wakeup=need_wakeup,
                        kick=kick,
                        fill=None if fill is None else fill[number],
                        patience=patience,
                    )
                    self.sockets.append(sock)
            except BaseException:
                self.close()
                raise

        if mode == "auto":
            try:
                open_all("zero-copy")
            except Unsupported as refusal:
                self.reason = refusal.what
                log.info("%s; copy mode for all of %s", refusal.what, ", ".join(name for name, _ in ports))
                open_all("copy")
        else:
            open_all(mode)
        self.mode: Literal["zero-copy", "copy"] = (
            "zero-copy" if all(sock.mode == "zero-copy" for sock in self.sockets) else "copy"
        )

    def __getitem__(self, number: int) -> Socket:
        return self.sockets[number]

    def __len__(self) -> int:
        return len(self.sockets)

    def __iter__(self) -> Iterator[Socket]:
        return iter(self.sockets)

    def close(self) -> None:
        """Close every socket, the last first (the first one is the UMEM's). May be called again."""
        while self.sockets:
            self.sockets.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
