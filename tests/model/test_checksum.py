"""Checksums against scapy's, against the definition, and against published corner cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scapy.utils import checksum as scapy_checksum

from libfp import Pipeline
from libfp.jit import INTERPRETED, Arena, kernel
from libfp.packet import checksum, ipv4_checksum_ok, update16
from libfp.stages import Forward, Routes, forward, parse
from libfp.testing import ethernet

pytestmark = pytest.mark.timeout(300)  # compiling takes long on a busy machine

Checksum = Callable[[bytes], int]
ROOM = 2048


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The three functions compiled, over an arena; and interpreted where nothing is compiled."""

    @kernel
    def whole(at: int, size: int) -> int:
        return checksum(at, size)

    @kernel
    def header(at: int) -> bool:
        return ipv4_checksum_ok(at)

    @kernel
    def update(at: int, old: int, new: int) -> None:
        update16(at, old, new)

    return SimpleNamespace(whole=whole, header=header, update=update, arena=Arena(ROOM, flush_end=True))


def put(arena: Arena, data: bytes) -> int:
    """Data at the very end of the arena: a byte too much faults."""
    arena.buffer[ROOM - len(data) :] = data
    return arena.address + ROOM - len(data)


def test_checksum(kernels: Any, internet_checksum: Checksum) -> None:
    @given(st.binary(max_size=1500))
    @example(b"")
    @example(b"\xff" * 1500)
    @example(b"\xff" * 1499)
    @example(b"\0" * 7)
    def agree(data: bytes) -> None:
        found = kernels.whole(put(kernels.arena, data), len(data))
        assert found == internet_checksum(data) == scapy_checksum(data)

    agree()


def test_ipv4_header(kernels: Any, internet_checksum: Checksum) -> None:
    @given(st.binary(min_size=20, max_size=20), st.booleans())
    @example(b"E" + b"\xff" * 19, False)
    def agree(data: bytes, correct: bool) -> None:
        data = b"E" + data[1:]
        if correct:
            zeroed = data[:10] + b"\0\0" + data[12:]
            data = zeroed[:10] + internet_checksum(zeroed).to_bytes(2, "big") + zeroed[12:]
        assert kernels.header(put(kernels.arena, data)) == (internet_checksum(data) == 0)
        assert not correct or internet_checksum(data) == 0

    agree()


def test_update(kernels: Any, internet_checksum: Checksum) -> None:
    """RFC 1624, equation 3: as if computed anew, unless all the data are zeros, of which no packet consists."""

    @given(st.binary(min_size=2, max_size=60).filter(lambda b: len(b) % 2 == 0), st.data())
    @example(bytes.fromhex("55558888"), None)
    def agree(data: bytes, choose: Any) -> None:
        at = 0 if choose is None else 2 * choose.draw(st.integers(0, len(data) // 2 - 1))
        new = b"\x32\x85" if choose is None else choose.draw(st.binary(min_size=2, max_size=2))
        changed = data[:at] + new + data[at + 2 :]
        assume(any(data) and any(changed))
        place = put(kernels.arena, internet_checksum(data).to_bytes(2, "big"))
        kernels.update(place, int.from_bytes(data[at : at + 2], "little"), int.from_bytes(new, "little"))
        assert bytes(kernels.arena.buffer[ROOM - 2 :]) == internet_checksum(changed).to_bytes(2, "big")

    agree()


def test_update_in_the_example_of_the_rfc(kernels: Any) -> None:
    place = put(kernels.arena, bytes.fromhex("dd2f"))
    kernels.update(place, 0x5555, 0x8532)
    assert bytes(kernels.arena.buffer[ROOM - 2 :]) == b"\0\0", "RFC 1624 section 4; equation 2 would say ffff"


@pytest.fixture(scope="module")
def router() -> Pipeline:
    routes = Routes(routes=1000, next_hops=16)
    routes.fib["0.0.0.0/0"] = routes.next_hops.add(Forward(1, b"\2\0\0\0\0\2", b"\2\0\0\0\0\1", 1500))
    return Pipeline(parse, forward(routes))


def test_forwarding_corner_case(router: Pipeline) -> None:
    """10.250.40.40 to 10.156.190.188, TTL 122, checksum 0xff00: leaves with 0x0001."""
    packet = ethernet(bytes.fromhex("458404d0000040007a2fff000afa28280a9cbebc") + bytes(1212))
    (outcome,) = router.run_once([packet])
    assert outcome == "forward"
    assert (outcome.frame[22], outcome.frame[24:26]) == (121, b"\0\1")


@pytest.mark.data
def test_forwarding_vectors(router: Pipeline, data: Path) -> None:
    cases = json.loads((data / "vectors/ipv4-checksum-corner-cases.json").read_text())["cases"]
    assert len(cases) >= 4
    for case in cases:
        header = bytes.fromhex(case["ip_header_in"])
        (outcome,) = router.run_once([ethernet(header + bytes(case["ip_total_len"] - 20))])
        if case["expect"] == "either" and outcome == "drop ipv4-checksum":
            continue
        assert outcome == "forward", case["name"]
        assert outcome.frame[22] == case["ttl_out"]
        assert outcome.frame[24:26].hex() == case["checksum_out"], case["name"]


@pytest.mark.data
def test_rfc_vectors(kernels: Any, data: Path) -> None:
    first, second = json.loads((data / "vectors/ipv4-checksum-corner-cases.json").read_text())["rfc"]
    content = bytes.fromhex(first["bytes"])
    assert kernels.whole(put(kernels.arena, content), len(content)) == int(first["checksum"], 16)
    place = put(kernels.arena, bytes.fromhex(second["HC"]))
    old, new = (int.from_bytes(bytes.fromhex(second[name]), "little") for name in ("m", "m_new"))
    kernels.update(place, old, new)
    assert bytes(kernels.arena.buffer[ROOM - 2 :]).hex() == second["HC_new_eqn3"]


def test_every_checksum_survives_the_router(router: Pipeline, internet_checksum: Checksum) -> None:
    """All 65,536 of them, one identification each: what leaves has the checksum that computing it anew gives."""
    count = 256 if INTERPRETED else 1 << 16
    frames, base = [], bytes.fromhex("450000140000000040fd0000c6336401cb007105")
    for number in range(count):
        header = bytearray(base)
        header[4:6] = number.to_bytes(2, "big")
        header[10:12] = internet_checksum(bytes(header)).to_bytes(2, "big")
        frames.append(ethernet(bytes(header)))
    for outcome in router.run_once(frames):
        assert outcome == "forward"
        header = bytearray(outcome.frame[14:34])
        found, header[10:12] = bytes(header[10:12]), b"\0\0"
        assert found == internet_checksum(bytes(header)).to_bytes(2, "big")
