"""Python reads flows while their worker makes, changes, ends and evicts them: no flow is ever seen half."""

from __future__ import annotations

import os
import threading

import pytest

from libfp.jit import INTERPRETED, Arena, call, kernel, load64, load_acquire64, store_release64
from libfp.jit.libc import address_of
from libfp.tables import Flow
from libfp.tables.flow_wheel import turn

pytestmark = [pytest.mark.stress, pytest.mark.timeout(180)]
FLOWS = 3_000 if INTERPRETED else int(os.environ.get("LIBFP_STRESS", 2_000_000)) // 10 + 1_800_000
SCHED_YIELD = address_of("sched_yield")
STOP, MADE = 0, 8


@kernel
def _worker(view, shared, flows, ticks, sched_yield):  # type: ignore[no-untyped-def]
    """Makes flows whose every part is told by one number, in a table that is full after a few dozen; then waits."""
    made = 0
    while made < flows and load_acquire64(shared + STOP) == 0:
        made += 1
        number = (made * 7919) & 0x3FFF  # each comes back: also as the next of a slot
        flow = view.enter4(number, number, number + (1 << 20), number, number & 0xFF)
        if flow.found:
            flow.set_value(0, number * 3)
            flow.set_value(1, number * 5)
            flow.keep(1 + (number & 3))
            if made & 3 == 0:
                flow.remove()
        turn(view.four, made * ticks)
        if made & 0xFFF == 0:
            store_release64(shared + MADE, made)
            call(sched_yield, 0, 0, 0, 0, 0, 0)
    store_release64(shared + MADE, made)


@pytest.mark.parametrize(("capacity", "ticks"), [(2, 14), (50, 3)])
def test_a_reader_never_sees_half_a_flow(capacity: int, ticks: int) -> None:
    flows = Flow(capacity=capacity, value=("u64", "u64"), capacity6=0)
    part, shared = flows.join(0), Arena(64)
    _worker(part.view, shared.address, 0, ticks, SCHED_YIELD)  # compile
    worker = threading.Thread(target=_worker, args=(part.view, shared.address, FLOWS, ticks, SCHED_YIELD), daemon=True)
    seen = 0
    worker.start()
    try:
        while worker.is_alive():
            for key, flow in part.items():
                number = key.sport
                wanted = (number, number, number & 0xFF)
                assert (int(key.src.rpartition(".")[2]), key.dport, key.protocol) == (number & 0xFF, *wanted[1:])
                assert (key.src, key.dst) == (_text(number), _text(number + (1 << 20)))
                assert flow.value[0] in (0, number * 3), "each value is this flow's, before or after it was set"
                assert flow.value[1] in (0, number * 5)
                seen += 1
                if seen % 16 == 0 and (again := part.get(key)) is not None:
                    assert again.value[0] in (0, number * 3)
    finally:
        store_release64(shared.address + STOP, 1)
        worker.join(60)
    assert load64(shared.address + MADE) == FLOWS
    assert seen > 0
    counts = part.counts
    assert counts.evicted
    assert counts.removed
    assert counts.expired
    assert len(part) == counts.created - counts.expired - counts.evicted - counts.removed
    flows.leave(part)


def _text(number: int) -> str:
    return ".".join(str(number >> shift & 0xFF) for shift in (24, 16, 8, 0))
