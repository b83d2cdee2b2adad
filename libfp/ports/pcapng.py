"""Writing pcapng (draft-ietf-opsawg-pcapng): one section, Ethernet interfaces with names, nanoseconds, comments.

This module loads neither numba nor the rest of libfp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import IO

SECTION, INTERFACE, ENHANCED = 0x0A0D0D0A, 1, 6
BYTE_ORDER = 0x1A2B3C4D
ETHERNET = 1  # LINKTYPE_
END_OF_OPTIONS, COMMENT, IF_NAME, EPB_FLAGS, IF_TSRESOL = 0, 1, 2, 2, 9
USER_APPLICATION = 4
INBOUND, OUTBOUND = 1, 2
_NANOSECONDS = bytes([9])


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _options(options: Iterable[tuple[int, bytes]]) -> bytes:
    made = b"".join(struct.pack("<HH", code, len(value)) + _padded(value) for code, value in options)
    return made + struct.pack("<HH", END_OF_OPTIONS, 0) if made else b""


def _block(kind: int, body: bytes) -> bytes:
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


class PcapngWriter:
    """Writes to `file`, whose closing is the caller's affair. `interfaces` are their names, numbered from 0."""

    def __init__(self, file: IO[bytes], interfaces: Sequence[str], snap: int = 0) -> None:
        self._file = file
        section = struct.pack("<IHHq", BYTE_ORDER, 1, 0, -1) + _options([(USER_APPLICATION, b"libfp")])
        file.write(_block(SECTION, section))
        for name in interfaces:
            options = _options([(IF_NAME, name.encode()), (IF_TSRESOL, _NANOSECONDS)])
            file.write(_block(INTERFACE, struct.pack("<HHI", ETHERNET, 0, snap) + options))

    def write(
        self, interface: int, time_ns: int, data: bytes, length: int = 0, *, direction: int = 0, comment: str = ""
    ) -> None:
        """One frame: `data` is it, or its beginning if it had `length` bytes. `direction` is INBOUND or OUTBOUND."""
        head = struct.pack("<IIIII", interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), max(length, len(data)))
        options: list[tuple[int, bytes]] = []
        if comment:
            options.append((COMMENT, comment.encode()[:65535]))
        if direction:
            options.append((EPB_FLAGS, struct.pack("<I", direction)))
        self._file.write(_block(ENHANCED, head + _padded(data) + _options(options)))
