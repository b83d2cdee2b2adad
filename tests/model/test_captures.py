"""Every packet of tcpdump's own test captures, most of them broken on purpose, through the router.

In a process of its own, with a page that cannot be touched right behind each packet, and then right before it: an
access outside a packet kills that process, and the packet is looked for and named. What became of each packet is
compared with the oracle.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.data, pytest.mark.timeout(300)]

ROOM = 4096  # a guarded frame is a page
ETHERNET, RAW_IP = 1, (12, 14, 101, 228)  # link types of libpcap

RUN = """
import pickle, sys
from libfp import Pipeline
from libfp.stages import Forward, Routes, forward, parse

routes = Routes(routes=1000, next_hops=16)
hop = Forward(1, bytes.fromhex("020000000b02"), bytes.fromhex("020000000b01"), 1500)
routes.fib["0.0.0.0/0"] = routes.fib6["::/0"] = routes.next_hops.add(hop)
pipeline = Pipeline(parse, forward(routes))
guard, size, source, target = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
frames = pickle.load(open(source, "rb"))
outcomes = []
for first in range(0, len(frames), size):
    print(first, flush=True)
    outcomes += [(str(o), o.frame) for o in pipeline.run_once(frames[first : first + size], guard=guard)]
pickle.dump(outcomes, open(target, "wb"))
"""


class Captured(NamedTuple):
    name: str
    frame: bytes


def read(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Link type and bytes of every packet of a capture. Some files are broken on purpose: as far as they go."""
    for order in "<>":
        magic = struct.unpack_from(order + "I", data)[0]
        if magic in (0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34):
            return read_pcap(data, order, 24 if magic == 0xA1B2CD34 else 16)
    if data[:4] == b"\x0a\x0d\x0d\x0a":
        return read_pcapng(data, "<" if data[8:12] == b"\x4d\x3c\x2b\x1a" else ">")
    return iter(())


def read_pcap(data: bytes, order: str, header: int) -> Iterator[tuple[int, bytes]]:
    link, at = struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF, 24
    while at + header <= len(data):
        size = struct.unpack_from(order + "I", data, at + 8)[0]
        yield link, data[at + header : at + header + size]
        at += header + size


def read_pcapng(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    links, at = list[int](), 0
    while at + 12 <= len(data):
        kind, total = struct.unpack_from(order + "II", data, at)
        if kind == 1:
            links.append(struct.unpack_from(order + "H", data, at + 8)[0])
        elif kind == 6:
            interface, size = struct.unpack_from(order + "I8xI", data, at + 8)
            yield links[interface], data[at + 28 : at + 28 + size]
        elif kind == 3:
            yield links[0], data[at + 12 : at + total - 4]
        at += max(total, 12)


@pytest.fixture(scope="module")
def captured(data: Path) -> list[Captured]:
    """Ethernet packets as they are, raw IP packets behind an Ethernet header; all others as any bytes might come."""
    found, files = [], 0
    with tarfile.open(data / "pcap/tcpdump-4.99.6-test-captures.tar.xz") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            if stream is None or not member.name.endswith((".pcap", ".pcapng", ".cap", ".dmp")):
                continue
            files += 1
            for number, (link, packet) in enumerate(read(stream.read())):
                if link in RAW_IP:
                    packet = bytes(12) + (b"\x08\x00" if packet[:1] < b"\x50" else b"\x86\xdd") + packet
                found.append(Captured(f"{member.name}:{number}", packet[:ROOM]))
    assert files > 600, "the archive holds 715 captures"
    assert len(found) > 5000
    return found


def run(folder: Path, frames: list[bytes], guard: str, batch: int = 64, **environment: str) -> tuple[int, int, str]:
    """Exit status, the first packet of the batch that was reached last, and what was said."""
    (folder / "frames").write_bytes(pickle.dumps(frames))
    (folder / "outcomes").unlink(missing_ok=True)
    command = [sys.executable, "-c", RUN, guard, str(batch), str(folder / "frames"), str(folder / "outcomes")]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280)
    reached = done.stdout.split()
    return done.returncode, int(reached[-1]) if reached else -1, done.stderr


def check(folder: Path, captured: list[Captured], guard: str, oracle: Callable, **environment: str) -> Counter[str]:
    frames = [one.frame for one in captured]
    status, reached, said = run(folder, frames, guard, **environment)
    if status != 0 and reached >= 0:  # which of the 64 was it?
        alone = captured[reached : reached + 64]
        status, reached, said = run(folder, [one.frame for one in alone], guard, 1, **environment)
        pytest.fail(f"{alone[reached].name}: exit status {status}\n{alone[reached].frame.hex()}\n{said}")
    assert status == 0, said
    outcomes = pickle.loads((folder / "outcomes").read_bytes())
    seen = Counter[str]()
    for one, outcome in zip(captured, outcomes, strict=True):
        assert outcome == oracle(one.frame), f"{one.name}: {one.frame.hex()}"
        seen[outcome[0]] += 1
    return seen


@pytest.mark.parametrize("guard", ["end", "start"])
def test_every_packet_between_guard_pages(
    tmp_path: Path, captured: list[Captured], guard: str, oracle: Callable
) -> None:
    seen = check(tmp_path, captured, guard, oracle)
    assert seen["forward"] > 100
    assert {"drop ipv4-truncated", "drop ipv4-checksum", "punt ttl-expired", "punt not-ip", "punt multicast"} <= set(
        seen
    )


@pytest.mark.parametrize("variable", ["NUMBA_DISABLE_JIT", "LIBFP_BOUNDSCHECK"])
def test_some_packets_with_every_access_checked(
    tmp_path: Path, captured: list[Captured], variable: str, oracle: Callable
) -> None:
    step = len(captured) // (500 if variable == "NUMBA_DISABLE_JIT" else 5000) or 1
    check(tmp_path, captured[::step], "end", oracle, **{variable: "1"})


def test_an_access_outside_a_packet_is_found(tmp_path: Path, oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the guard pages guard nothing: a stage that reads one byte too many of some packets."""
    careless = RUN.replace("Pipeline(parse, forward(routes))", "Pipeline(careless)")
    careless = careless.replace("\nroutes", "\nfrom careless import careless\nroutes", 1)
    monkeypatch.setattr(sys.modules[__name__], "RUN", careless)
    (tmp_path / "careless.py").write_text(
        "from libfp import stage\nfrom libfp.jit import load8\n\n@stage\ndef careless(packet):\n"
        "    if packet.length == 60:\n        packet.mark = load8(packet.data + 60)\n"
    )
    good = Captured("good", struct.pack("!14x20s", b"E"))
    frames = [good] * 70 + [Captured("bad", bytes(60))] + [good]
    with pytest.raises(pytest.fail.Exception, match="bad: exit status -11"):
        check(tmp_path, frames, "end", oracle, PYTHONPATH=str(tmp_path))
