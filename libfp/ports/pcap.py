"""Reading captures: pcap (draft-ietf-opsawg-pcap) in its four variants, pcapng (draft-ietf-opsawg-pcapng) in both byte
orders. Ethernet only. Writing pcap is here too; writing pcapng is `libfp.ports.pcapng`.

Every length is held against the file before it is used. This module loads neither numba nor the rest of libfp.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn, Self

from libfp.errors import BadInput
from libfp.ports.pcapng import BYTE_ORDER, ENHANCED, ETHERNET, IF_NAME, IF_TSRESOL, INTERFACE, SECTION

#: Magic of a classic file: byte order, nanoseconds a unit of the time stamps.
_MAGIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
_HEADER, _RECORD = 24, 16
SIMPLE, OBSOLETE = 3, 2
MOST = 1 << 16  # bytes of a packet


class Frame(NamedTuple):
    """One packet of a capture: `at` and `size` say where its bytes are, `length` what it had on the wire."""

    at: int
    size: int
    length: int
    time_ns: int
    interface: int


class Capture:
    """The capture at `path`: a context manager. Iterating gives its `Frame`s, in order; `data` holds their bytes.

    `interfaces` are the names seen so far, "" for one without. It can be iterated over again. Raises BadInput that
    names the file and the offset.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self.interfaces: list[str] = []
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.data: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
                    if size and Path(path).is_file()
                    else file.read()
                )
        except OSError as error:
            raise BadInput(f"cannot read {self.path}: {error.strerror}", "name a capture: pcap or pcapng") from None
        try:
            magic = self.data[:4]
            if len(self.data) < _HEADER or (magic not in _MAGIC and magic != SECTION.to_bytes(4, "big")):
                self._wrong(0, "this is neither pcap nor pcapng")
            self._classic = _MAGIC.get(bytes(magic))
            if self._classic is not None:
                self._link_type(self._classic[0])
        except BaseException:
            self.close()
            raise

    def _wrong(self, at: int, what: str) -> NoReturn:
        raise BadInput(f"{self.path}, byte {at}: {what}", "is it complete? tcpdump -r says more")

    def __iter__(self) -> Iterator[Frame]:
        self.interfaces = [""] if self._classic is not None else []
        if self._classic is None:
            return self._pcapng()
        order, unit = self._classic
        return self._records(struct.Struct(order + "IIII"), unit)

    # -- pcap

    def _link_type(self, order: str) -> None:
        network = struct.unpack_from(order + "I", self.data, 20)[0] & 0xFFFF
        if network != ETHERNET:
            self._wrong(20, f"link type {network}; only Ethernet (1) can be forwarded")

    def _records(self, header: struct.Struct, unit: int) -> Iterator[Frame]:
        data, at, end = self.data, _HEADER, len(self.data)
        while at < end:
            if end - at < _RECORD:
                self._wrong(at, f"a record's header of 16 bytes, of which {end - at} are there")
            seconds, fraction, size, length = header.unpack_from(data, at)
            if size > MOST:
                self._wrong(at, f"a packet of {size} bytes; {MOST} are the most")
            if end - at - _RECORD < size:
                self._wrong(at, f"a packet of {size} bytes, of which {end - at - _RECORD} are there")
            yield Frame(at + _RECORD, size, max(length, size), seconds * 1_000_000_000 + fraction * unit, 0)
            at += _RECORD + size

    # -- pcapng

    def _pcapng(self) -> Iterator[Frame]:
        data, at, end, order = self.data, 0, len(self.data), "<"
        first, units = 0, list[tuple[int, int]]()  # of the section: number of its first interface, units of time
        while at < end:
            if end - at < 12:
                self._wrong(at, f"a block of 12 bytes at least, of which {end - at} are there")
            if data[at : at + 4] == SECTION.to_bytes(4, "big"):
                magic = data[at + 8 : at + 12]
                order = {BYTE_ORDER.to_bytes(4, "little"): "<", BYTE_ORDER.to_bytes(4, "big"): ">"}.get(magic, "")
                if not order:
                    self._wrong(at + 8, "a section whose byte order cannot be told")
                first, units = len(self.interfaces), []
            kind, total = struct.unpack_from(order + "II", data, at)
            if total < 12 or total % 4 or end - at < total:
                self._wrong(at, f"a block of {total} bytes, of which {end - at} are there")
            if struct.unpack_from(order + "I", data, at + total - 4)[0] != total:
                self._wrong(at + total - 4, "a block whose two lengths differ")
            body, size = at + 8, total - 12
            if kind == INTERFACE:
                units.append(self._interface(order, body, size))
            elif kind in (ENHANCED, OBSOLETE, SIMPLE):
                yield self._packet(order, kind, body, size, first, units)
            at += total

    def _interface(self, order: str, at: int, size: int) -> tuple[int, int]:
        """Take in an interface; its unit of time in nanoseconds, as a fraction."""
        if size < 8:
            self._wrong(at, "an interface block of less than 8 bytes")
        kind = struct.unpack_from(order + "H", self.data, at)[0]
        if kind != ETHERNET:
            self._wrong(at, f"link type {kind}; only Ethernet (1) can be forwarded")
        name, unit = "", (1000, 1)
        end, at = at + size, at + 8
        while at + 4 <= end:
            code, length = struct.unpack_from(order + "HH", self.data, at)
            at += 4
            if code == 0:
                break
            if at + length > end:
                self._wrong(at - 4, f"an option of {length} bytes, of which {end - at} are there")
            value = self.data[at : at + length]
            if code == IF_NAME:
                name = value.decode(errors="replace").rstrip("\0")
            elif code == IF_TSRESOL and length == 1:
                exponent = value[0] & 0x7F
                unit = (1_000_000_000, 2**exponent if value[0] & 0x80 else 10**exponent)
            at += (length + 3) & ~3
        self.interfaces.append(name)
        return unit

    def _packet(self, order: str, kind: int, at: int, size: int, first: int, units: list[tuple[int, int]]) -> Frame:
        head = 4 if kind == SIMPLE else 20
        if size < head:
            self._wrong(at, "a packet block without a whole header")
        if kind == SIMPLE:
            interface, time, length = 0, 0, struct.unpack_from(order + "I", self.data, at)[0]
            kept = min(length, size - head)
        elif kind == ENHANCED:
            interface, high, low, kept, length = struct.unpack_from(order + "IIIII", self.data, at)
            time = high << 32 | low
        else:
            interface, _, high, low, kept, length = struct.unpack_from(order + "HHIIII", self.data, at)
            time = high << 32 | low
        if interface >= len(units):
            self._wrong(at, f"a packet of interface {interface}; the section has {len(units)}")
        if kept > MOST:
            self._wrong(at, f"a packet of {kept} bytes; {MOST} are the most")
        if kept > size - head:
            self._wrong(at, f"a packet of {kept} bytes, of which {size - head} are there")
        times, over = units[interface]
        return Frame(at + head, kept, max(length, kept), time * times // over, first + interface)

    def close(self) -> None:
        """Unmap the file; `data` is not to be used after."""
        if isinstance(self.data, mmap.mmap):
            self.data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PcapWriter:
    """Writes a classic pcap with nanoseconds to `file`, whose closing is the caller's affair."""

    def __init__(self, file: IO[bytes]) -> None:
        self._write = file.write
        file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, MOST, ETHERNET))

    def write(self, interface: int, time_ns: int, data: bytes, *, comment: str = "") -> None:
        """One frame. `interface` and `comment` have no place in this format."""
        seconds, fraction = divmod(time_ns, 1_000_000_000)
        self._write(struct.pack("<IIII", seconds & 0xFFFFFFFF, fraction, len(data), len(data)) + data)
