"""`Flow` against a dict with deadlines: whatever is made, touched, removed and left alone, at whatever time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.jit import INTERPRETED, kernel
from libfp.tables import Flow, FlowPart
from libfp.tables import flow_record as record
from libfp.tables.flow_wheel import turn

TCP = 6
TIMEOUTS = (1, 3, 100)
CROWD = -1
FIND, ENTER, TOUCH, KEEP, STATE, ASSURE, ADD, REMOVE = range(8)
HIGH_WORD = (0xFD00 << 48) - (1 << 64)


@kernel
def _do(flow, what, value):  # type: ignore[no-untyped-def]
    """Do it; what the flow is then: bits, state, assured, value."""
    bits = flow.bits
    if bits & 1:
        if what == TOUCH:
            flow.touch()
        elif what == KEEP:
            flow.keep(value)
        elif what == STATE:
            flow.state = value
        elif what == ASSURE:
            flow.assured = value & 1
        elif what == ADD:
            flow.add(0, value)
        elif what == REMOVE:
            flow.remove()
    return bits, flow.state, flow.assured, flow.value(0)


@kernel
def _call4(view, what, value, src, sport, dst, dport):  # type: ignore[no-untyped-def]
    if what == ENTER:
        return _do(view.enter4(src, sport, dst, dport, TCP), what, value)
    return _do(view.find4(src, sport, dst, dport, TCP), what, value)


@kernel
def _call6(view, what, value, src, sport, dst, dport):  # type: ignore[no-untyped-def]
    if what == ENTER:
        return _do(view.enter6((HIGH_WORD, src), sport, (HIGH_WORD, dst), dport, TCP), what, value)
    return _do(view.find6((HIGH_WORD, src), sport, (HIGH_WORD, dst), dport, TCP), what, value)


@kernel
def _turn(view, now):  # type: ignore[no-untyped-def]
    more = turn(view.four, now)
    return more | turn(view.six, now)


class Model:
    """What a dict knows: key -> [began, deadline, state, assured, value]."""

    def __init__(self, part: FlowPart, call: Any) -> None:
        self.part, self.call, self.now = part, call, 0
        self.flows: dict[tuple[Any, ...], list[Any]] = {}

    def live(self, key: tuple[Any, ...]) -> bool:
        return key in self.flows and self.flows[key][1] > self.now

    def do(self, what: int, value: int, src: int, sport: int, dst: int, dport: int) -> None:
        ends = (src, sport), (dst, dport)
        key = tuple(sorted(ends))
        before = self.part.counts
        bits, state, assured, total = self.call(self.part.view, what, value, src, sport, dst, dport)
        after = self.part.counts
        known, expected = self.live(key), 0
        if known:
            expected = record.FOUND | (record.REPLY if self.flows[key][0] != ends[0] else 0)
        elif what == ENTER and after.refused == before.refused:
            expected = record.FOUND | record.NEW
            self.flows[key] = [ends[0], self.now + 100 * TIMEOUTS[0], 0, False, 0]
        assert bits == expected
        assert after.created - before.created == (expected & record.NEW != 0)
        if after.evicted != before.evicted:
            self.lose_one(key)
        if expected:
            self.change(self.flows[key], what, value)
            if what == REMOVE:
                del self.flows[key]
            else:
                assert [state, assured, total] == self.flows[key][2:]

    def change(self, flow: list[Any], what: int, value: int) -> None:
        if what == TOUCH:
            flow[1] = self.now + 100 * TIMEOUTS[min(flow[2], 2)]
        elif what == KEEP:
            flow[1] = self.now + max(1, 100 * value)
        elif what == STATE:
            flow[2] = value & 15
        elif what == ASSURE:
            flow[3] = bool(value & 1)
        elif what == ADD:
            flow[4] += value

    def lose_one(self, but: tuple[Any, ...]) -> None:
        """One that was not assured made room, though it had not expired; and no other."""
        gone = [key for key in self.flows if key != but and self.live(key) and not self.seen(key)]
        assert len(gone) == 1
        assert not self.flows.pop(gone[0])[3]

    def seen(self, key: tuple[Any, ...]) -> bool:
        (src, sport), (dst, dport) = key
        return bool(self.call(self.part.view, FIND, 0, src, sport, dst, dport)[0])

    def check(self) -> None:
        """What Python reads is what there is."""
        shown = {}
        for key, flow in self.part.items():
            ends = [(key.src, key.sport), (key.dst, key.dport)]
            ends = [(int(address.rpartition(":" if ":" in address else ".")[2]), port) for address, port in ends]
            shown[tuple(sorted(ends))] = [
                ends[0],
                self.now + round(100 * flow.left),
                flow.state,
                flow.assured,
                flow.value,
            ]
        assert shown == {key: flow for key, flow in self.flows.items() if flow[1] > self.now}
        counts = self.part.counts
        assert len(self.part) == counts.created - counts.expired - counts.evicted - counts.removed

    def pass_time(self, ticks: int) -> None:
        self.now += ticks
        _turn(self.part.view, self.now)


# few endpoints, so that flows meet their answers; and an endpoint that talks to itself
ends = st.tuples(st.integers(1, 6), st.integers(1, 2))
steps = st.lists(
    st.tuples(st.sampled_from([FIND, ENTER, ENTER, ENTER, *range(2, 8)]), st.sampled_from([0, 1, 2, 7, 60]), ends, ends)
    | st.sampled_from([CROWD, 0, 1, 50, 99, 100, 101, 299, 4096, 5000, 20_000]),
    max_size=120,
)


@pytest.mark.parametrize("family", [4, 6])
@settings(max_examples=30 if INTERPRETED else 150, deadline=None)
@given(steps=steps)
def test_flows_are_what_a_dict_with_deadlines_has(family: int, steps: list[Any]) -> None:
    flows = Flow(capacity=5, value="i64", timeouts=TIMEOUTS)  # 16 slots, and up to 78 flows that want one
    part = flows.join(0)
    model = Model(part, _call4 if family == 4 else _call6)
    try:
        for step in steps:
            if step == CROWD:
                for sport in range(10, 40):
                    model.do(ENTER, 0, 1, sport, 2, 1)
            elif isinstance(step, int):
                model.pass_time(step)
            else:
                what, value, one, two = step
                model.do(what, value, *one, *two)
        model.check()
        for _ in range(3):  # all of them end, and the wheel gives their slots back, in two revolutions at most
            model.now += 100 * 110 + record.WHEEL_SLOTS
            while _turn(part.view, model.now):
                pass
        assert len(part) == 0
        assert list(part) == []
    finally:
        flows.leave(part)
