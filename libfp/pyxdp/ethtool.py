"""Device features and channels by ethtool's ioctl, and features switched off for as long as somebody needs that."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from libfp.pyxdp.system import failed, ffi, libc, missing_capability

SIOCETHTOOL, SIOCGIFNAME = 0x8946, 0x8910
GSTRINGS, GSSET_INFO, GFEATURES, SFEATURES, GCHANNELS = 0x1B, 0x37, 0x3A, 0x3B, 0x3C
SS_FEATURES, STRING = 4, 32
log = logging.getLogger("libfp.pyxdp")


@dataclass(frozen=True)
class Feature:
    """One offload: whether it is on, and whether it can be changed."""

    on: bool
    changeable: bool


class Ethtool:
    """An interface's settings. Holds a socket of the namespace it was made in, so that any thread may use it."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._index = socket.if_nametoindex(name)
            self._names = self._feature_names()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The interface's name now: it may have been renamed. Raises OSError (ENODEV) when it is gone."""
        request = struct.pack("16si", b"", self._index).ljust(40, b"\0")
        return fcntl.ioctl(self._socket, SIOCGIFNAME, request)[:16].split(b"\0")[0].decode()

    def call(self, buffer: bytearray) -> int:
        """The command in `buffer`, answered into it. Returns ethtool's result flags."""
        data = ffi.from_buffer(buffer)
        request: Any = ffi.new("char[]", self.name.encode().ljust(40, b"\0"))
        ffi.cast("void **", request + 16)[0] = ffi.cast("void *", data)
        result = libc.ioctl(self._socket.fileno(), ffi.cast("unsigned long", SIOCETHTOOL), ffi.cast("void *", request))
        if result < 0:
            raise failed("ethtool")
        return int(result)

    def _feature_names(self) -> list[str]:
        info = bytearray(struct.pack("=IIQI", GSSET_INFO, 0, 1 << SS_FEATURES, 0))
        try:
            self.call(info)
            (count,) = struct.unpack_from("=I", info, 16)
            strings = bytearray(struct.pack("=III", GSTRINGS, SS_FEATURES, count) + bytes(count * STRING))
            self.call(strings)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise
        texts = (strings[12 + i * STRING : 12 + (i + 1) * STRING] for i in range(count))
        return [bytes(text).split(b"\0")[0].decode() for text in texts]

    def features(self) -> dict[str, Feature]:
        """Every feature by the kernel's name ("rx-gro", "rx-vlan-hw-parse", ...); empty where there are none."""
        blocks = (len(self._names) + 31) // 32
        buffer = bytearray(struct.pack("=II", GFEATURES, blocks) + bytes(blocks * 16))
        if blocks:
            self.call(buffer)
        found = {}
        for position, name in enumerate(self._names):
            block, bit = divmod(position, 32)
            available, _requested, active, never = struct.unpack_from("=IIII", buffer, 8 + block * 16)
            changeable = bool(available >> bit & 1 and not never >> bit & 1)
            found[name] = Feature(bool(active >> bit & 1), changeable)
        return found

    def set(self, wanted: Mapping[str, bool]) -> None:
        """Ask for features to be on or off. The driver may still decide otherwise: read them back.

        Raises MissingCapability, and OSError where the driver fails.
        """
        blocks = (len(self._names) + 31) // 32
        masks = [[0, 0] for _ in range(blocks)]  # which, and their values
        for name, on in wanted.items():
            block, bit = divmod(self._names.index(name), 32)
            masks[block][0] |= 1 << bit
            masks[block][1] |= on << bit
        packed = b"".join(struct.pack("=II", *mask) for mask in masks)
        try:
            self.call(bytearray(struct.pack("=II", SFEATURES, blocks) + packed))
        except OSError as error:
            if error.errno == errno.EPERM:
                raise missing_capability("changing device features", "CAP_NET_ADMIN") from error
            raise

    def queues(self) -> tuple[int, int] | None:
        """(receive, transmit) queues in use; None where the driver does not tell."""
        buffer = bytearray(struct.pack("=9I", GCHANNELS, *(0,) * 8))
        try:
            self.call(buffer)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
                return None
            raise
        rx, tx, _other, combined = struct.unpack_from("=4I", buffer, 20)
        return rx + combined, tx + combined


class SwitchedOff:
    """Features off from now until `restore`: exactly those that were on and that this switched off.

    `left_on` names those that the driver kept on.
    """

    def __init__(self, interface: str, names: Iterable[str]) -> None:
        self._ethtool = Ethtool(interface)
        self.names: tuple[str, ...] = ()
        try:
            before = self._ethtool.features()
            on = [name for name in names if name in before and before[name].on]
            self.names = tuple(name for name in on if before[name].changeable)
            if self.names:
                self._ethtool.set(dict.fromkeys(self.names, False))
            after = self._ethtool.features()
            self.names = tuple(name for name in self.names if not after[name].on)
            self.left_on = tuple(name for name in on if after[name].on)
            if self.names:
                log.info("%s: switched off %s", interface, ", ".join(self.names))
            if self.left_on:
                log.warning("%s: the driver keeps %s on", interface, ", ".join(self.left_on))
        except BaseException:  # Ctrl-C, too
            self.restore()
            raise

    def restore(self) -> None:
        """Switch on again what this switched off; nothing when the interface is gone. May be called again."""
        names, self.names = self.names, ()
        with self._ethtool, contextlib.suppress(OSError):
            if names:
                self._ethtool.set(dict.fromkeys(names, True))
