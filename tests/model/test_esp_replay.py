"""The anti-replay window against a set, and RFC 4303 appendix A2's cases."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libfp.apps.ipsec import replay
from libfp.apps.ipsec.replay import Window
from libfp.errors import BadInput
from libfp.jit import Arena, kernel
from libfp.jit.primitive import MASK64, signed64

A2 = Path(os.environ.get("LIBFP_DATA", "")) / "vectors" / "vpp-antireplay-rfc4303-A2.json"


@kernel
def infer(at, low):  # type: ignore[no-untyped-def]
    return Window(at).infer(low)


@kernel
def is_new(at, sequence):  # type: ignore[no-untyped-def]
    return Window(at).is_new(sequence)


@kernel
def accept(at, sequence):  # type: ignore[no-untyped-def]
    return Window(at).accept(sequence)


@pytest.fixture(scope="module")
def memory() -> Iterator[Arena]:
    arena = Arena(replay.SIZE, flush_end=True)
    yield arena
    arena.close()


class Real:
    """The window that stages use."""

    def __init__(self, arena: Arena, size: int, top: int, esn: bool, seen: bool = False) -> None:
        self.at, self.esn = arena.address, esn
        replay.make(self.at, size, top, seen)

    def infer(self, low: int) -> int:
        return (infer(self.at, low) & MASK64) if self.esn else low

    def is_new(self, sequence: int) -> bool:
        return bool(is_new(self.at, signed64(sequence)))

    def accept(self, sequence: int) -> None:
        accept(self.at, signed64(sequence))


class Model:
    """RFC 4303 appendix A2, with a set."""

    def __init__(self, size: int, top: int, esn: bool, seen: bool = False) -> None:
        self.size, self.top, self.esn = size, top, esn
        self.seen = set(range(max(top - size + 1, 0), top + 1)) if seen else {top}

    def infer(self, low: int) -> int:
        if not self.esn:
            return low
        high, under = self.top >> 32, self.top & 0xFFFFFFFF
        if under >= self.size - 1:  # case A
            high += low < under - self.size + 1
        else:  # case B: the window reaches into the subspace below
            high -= low >= (under - self.size + 1) & 0xFFFFFFFF
        return high << 32 | low if 0 <= high < 1 << 32 else 0

    def is_new(self, sequence: int) -> bool:
        return sequence != 0 and sequence > self.top - self.size and sequence not in self.seen

    def accept(self, sequence: int) -> None:
        self.seen.add(sequence)
        self.top = max(self.top, sequence)


@pytest.mark.skipif(not A2.is_file(), reason="needs LIBFP_DATA/vectors")
def test_rfc4303_appendix_a2(memory: Arena) -> None:
    """Packets and counts of VPP's test of it; `integ_fail` is where the receiver infers another high half."""
    cases = json.loads(A2.read_text())["cases"]
    assert len(cases) == 10
    for case in cases:
        esn, size = case["esn"], case["window"]
        window, counts = Real(memory, size, 0, esn), {"replay": 0, "integ_fail": 0}
        for event in case["events"]:
            if event["op"] == "set_rx_window_top":
                window = Real(memory, size, event["seq"], esn)
            elif event["op"] == "expect_counter_total":
                assert counts[event["counter"]] == event["value"], (case["name"], size, event)
            for sequence in event.get("seqs", ()) if event["op"] == "recv" else ():
                found = window.infer(sequence & 0xFFFFFFFF)
                if not window.is_new(found):
                    what = "replay"
                elif found != sequence:
                    what = "integ_fail"
                else:
                    window.accept(sequence)
                    what = ""
                assert (what == "") == (event["expect"] == "accept"), (case["name"], size, sequence)
                if what:
                    counts[what] += 1


TOPS = st.one_of(
    st.integers(0, 1 << 13),
    st.sampled_from([1 << 32, 1 << 33, 5 << 32, 1 << 63, (1 << 64) - 1]).flatmap(
        lambda around: st.integers(max(around - 9000, 0), min(around + 9000, (1 << 64) - 1))
    ),
)


@given(st.integers(replay.LEAST, replay.MOST), TOPS, st.booleans(), st.booleans(), st.data())
def test_like_a_set(memory: Arena, size: int, top: int, esn: bool, seen: bool, data: st.DataObject) -> None:
    top = top if esn else top & 0xFFFFFFFF
    window, model = Real(memory, size, top, esn, seen), Model(size, top, esn, seen)
    steps = st.one_of(st.integers(-size - 70, 200), st.sampled_from([-size, 1 - size, -1, 0, 1, 63, 64, 65, 1 << 31]))
    for step in data.draw(st.lists(steps, max_size=60)):
        low = (model.top + step) & 0xFFFFFFFF
        sequence = model.infer(low)
        assert window.infer(low) == sequence
        assert window.is_new(sequence) == model.is_new(sequence)
        if model.is_new(sequence):
            window.accept(sequence)
            model.accept(sequence)
            assert not window.is_new(sequence)


def test_sizes(memory: Arena) -> None:
    for size in (63, 4097, 0):
        with pytest.raises(BadInput, match=f"an anti-replay window of {size}; it is 64 to 4096"):
            replay.make(memory.address, size)
