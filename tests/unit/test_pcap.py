"""Captures as they are read and written, against scapy's, and whatever else may be in a file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.all import RawPcapNgReader, RawPcapReader, rdpcap

from libfp.errors import BadInput
from libfp.ports.pcap import Capture, PcapWriter
from libfp.ports.pcapng import INBOUND, OUTBOUND, PcapngWriter

PACKETS = [b"first packet", b"", b"x" * 1500, b"odd"]
TIMES = [1_700_000_000_123_456_789, 0, 1 << 60, 5]


def classic(order: str, nanoseconds: bool, packets: list[bytes]) -> bytes:
    magic = 0xA1B23C4D if nanoseconds else 0xA1B2C3D4
    made = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    for number, packet in enumerate(packets):
        made += struct.pack(order + "IIII", 10 + number, 7, len(packet), len(packet) + 1) + packet
    return made


def block(order: str, kind: int, body: bytes) -> bytes:
    body += b"\0" * (-len(body) % 4)
    return struct.pack(order + "II", kind, len(body) + 12) + body + struct.pack(order + "I", len(body) + 12)


def section(order: str) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, name: bytes, resolution: int, kind: int = 1) -> bytes:
    def option(code: int, value: bytes) -> bytes:
        return struct.pack(order + "HH", code, len(value)) + value + b"\0" * (-len(value) % 4)

    options = option(9, bytes([resolution])) + (option(2, name) if name else b"") + option(0, b"")
    return block(order, 1, struct.pack(order + "HHI", kind, 0, 0) + options)


def enhanced(order: str, number: int, time: int, packet: bytes) -> bytes:
    head = struct.pack(order + "IIIII", number, time >> 32, time & 0xFFFFFFFF, len(packet), len(packet))
    return block(order, 6, head + packet)


def read(path: Path) -> list[tuple[bytes, int, int]]:
    with Capture(path) as capture:
        found = [(capture.data[f.at : f.at + f.size], f.time_ns, f.interface) for f in capture]
        assert found == [(capture.data[f.at : f.at + f.size], f.time_ns, f.interface) for f in capture], "again"
    return found


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nanoseconds", [True, False])
def test_the_four_variants_of_pcap(tmp_path: Path, order: str, nanoseconds: bool) -> None:
    path = tmp_path / "in.pcap"
    path.write_bytes(classic(order, nanoseconds, PACKETS))
    unit = 1 if nanoseconds else 1000
    expected = [(data, (10 + i) * 1_000_000_000 + 7 * unit, 0) for i, data in enumerate(PACKETS)]
    assert read(path) == expected


@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_with_sections_interfaces_and_resolutions(tmp_path: Path, order: str) -> None:
    path = tmp_path / "in.pcapng"
    other = {"<": ">", ">": "<"}[order]
    path.write_bytes(
        section(order)
        + interface(order, b"eth0", 9)
        + block(order, 0xBAD, b"unknown")
        + interface(order, b"", 0x80 | 10)
        + enhanced(order, 0, 1 << 40, b"one")
        + enhanced(order, 1, 1 << 20, b"two")
        + section(other)
        + interface(other, b"eth1", 6)
        + enhanced(other, 0, 3, b"three")
        + block(other, 3, struct.pack(other + "I", 4) + b"four")
    )
    assert read(path) == [
        (b"one", 1 << 40, 0), (b"two", (1 << 20) * 1_000_000_000 // 1024, 1),
        (b"three", 3000, 2), (b"four", 0, 2),
    ]  # fmt: skip
    with Capture(path) as capture:
        assert len(list(capture)) == 4
        assert capture.interfaces == ["eth0", "", "eth1"]


def test_what_is_written_scapy_reads(tmp_path: Path) -> None:
    path = tmp_path / "out.pcapng"
    with path.open("wb") as file:
        writer = PcapngWriter(file, ["left", "right"])
        for number, (data, time) in enumerate(zip(PACKETS, TIMES, strict=True)):
            direction, comment = (INBOUND, OUTBOUND)[number % 2], f"drop ü{number}"
            writer.write(number % 2, time, data, len(data) + 9, direction=direction, comment=comment)
    with RawPcapNgReader(str(path)) as reader:
        found = list(reader)
    for number, (data, meta) in enumerate(found):
        assert data == PACKETS[number]
        assert meta.ifname == (b"left", b"right")[number % 2]
        assert (meta.direction, meta.wirelen) == (1 + number % 2, len(data) + 9)
        assert (meta.tshigh << 32 | meta.tslow, meta.tsresol) == (TIMES[number], 1_000_000_000)
        assert b"".join(meta.comments) == f"drop ü{number}".encode()
    assert [(data, time) for data, time, _ in read(path)] == list(zip(PACKETS, TIMES, strict=True)), "and so do we"


def test_what_is_written_as_pcap_scapy_reads(tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    with path.open("wb") as file:
        writer = PcapWriter(file)
        writer.write(0, TIMES[0], PACKETS[0])
    with RawPcapReader(str(path)) as reader:
        ((data, meta),) = list(reader)
    assert (data, meta.sec * 1_000_000_000 + meta.usec) == (PACKETS[0], TIMES[0])
    assert len(rdpcap(str(path))) == 1


MALFORMED = {
    "empty": (b"", 0, "neither pcap nor pcapng"),
    "text": (b"hello, this is a text file, and no capture", 0, "neither pcap nor pcapng"),
    "half a header": (classic("<", False, [])[:20], 0, "neither"),
    "another link": (classic("<", False, [])[:20] + struct.pack("<I", 101), 20, "link type 101"),
    "half a record": (classic("<", False, [b"abc"])[:30], 24, "16 bytes, of which 6"),
    "half a packet": (classic(">", True, [b"abc", b"defgh"])[:-2], 43, "5 bytes, of which 3"),
    "a giant": (classic("<", False, []) + struct.pack("<IIII", 0, 0, 1 << 31, 9), 24, "2147483648 bytes; 65536"),
    "half a block": (section("<") + b"\6\0\0\0", 28, "12 bytes at least, of which 4"),
    "a short block": (section("<") + struct.pack("<III", 6, 8, 8), 28, "a block of 8 bytes"),
    "a block beyond": (section("<") + struct.pack("<III", 6, 1000, 1000), 28, "of 1000 bytes, of which 12"),
    "two lengths": (section("<") + struct.pack("<III", 6, 12, 16), 36, "two lengths differ"),
    "no order": (b"\x0a\x0d\x0d\x0a" + b"\x1c\0\0\0" + b"\0" * 20, 8, "byte order"),
    "no interface": (section("<") + enhanced("<", 0, 0, b"x"), 36, "interface 0; the section has 0"),
    "wifi": (section("<") + interface("<", b"w", 9, kind=105), 36, "link type 105"),
    "a packet beyond": (
        section("<") + interface("<", b"a", 9) + block("<", 6, struct.pack("<IIIII", 0, 0, 0, 9, 9) + b"abcd"),
        76, "9 bytes, of which 4",
    ),
    "an option beyond": (
        section("<") + block("<", 1, struct.pack("<HHIHH", 1, 0, 0, 2, 400)), 44, "400 bytes, of which 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_captures_are_named_with_the_offset(tmp_path: Path, name: str) -> None:
    data, offset, what = MALFORMED[name]
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=f"bad, byte {offset}: .*{what}"):
        read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*none: No such file"):
        Capture(tmp_path / "none")
    with pytest.raises(BadInput, match=r"cannot read .*: Is a directory"):
        Capture(tmp_path)


@given(st.data())
def test_damaged_captures_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    out = io.BytesIO()
    writer = PcapngWriter(out, ["a", "b"])
    for number, packet in enumerate(PACKETS):
        writer.write(number & 1, TIMES[number], packet, comment="c")
    whole = bytearray(data.draw(st.sampled_from([out.getvalue(), classic("<", False, PACKETS)])))
    for _ in range(data.draw(st.integers(0, 5))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 400)))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        with Capture(path) as capture:
            for frame in capture:
                assert 0 <= frame.at <= frame.at + frame.size <= len(capture.data)
                assert frame.interface < len(capture.interfaces)
    except BadInput as error:
        assert "damaged, byte" in str(error)  # noqa: PT017 -- it may not be raised
