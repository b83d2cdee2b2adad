"""Hit marks without packets: whom Linux is asked to find, and how often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.linux.decide import Via
from libfp.linux.neighbours import MOST_PATIENCE, SHORTEST, HitMarks

DEAD, OTHER = Via(2, bytes([10, 0, 2, 9])), Via(3, bytes([10, 0, 3, 9]))


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    marks: Any = HitMarks()
    marks.asked = []
    monkeypatch.setattr(marks, "_use", lambda link, address, flags: marks.asked.append((link, address)))
    yield marks
    marks.close()


def test_a_gateway_that_does_not_answer_is_asked_less_and_less_often(marks: Any) -> None:
    times = []
    for look in range(400):
        before = len(marks.asked)
        marks.resolve([DEAD, DEAD._replace(mtu=1400)], now=SHORTEST * look)
        if len(marks.asked) > before:
            times.append(SHORTEST * look)
    assert marks.asked == [DEAD[:2]] * len(times), "once, whatever routes lead there"
    assert times[:7] == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5]
    assert {later - sooner for sooner, later in itertools.pairwise(times[6:])} == {MOST_PATIENCE}


def test_each_gateway_for_itself_and_anew_after_an_answer(marks: Any) -> None:
    for look in range(20):
        marks.resolve([DEAD], now=SHORTEST * look)
    marks.asked.clear()
    marks.resolve([DEAD, OTHER], now=10.0)
    assert marks.asked == [OTHER[:2]]
    marks.resolve([OTHER], now=10.5)  # the other has answered
    marks.resolve([DEAD, OTHER], now=11.0)
    assert marks.asked == [OTHER[:2], OTHER[:2], DEAD[:2]]


def test_when_a_link_changes_all_are_asked_at_once(marks: Any) -> None:
    for look in range(20):
        marks.resolve([DEAD], now=SHORTEST * look)
    marks.asked.clear()
    marks.retry()
    marks.resolve([DEAD], now=10.0)
    assert marks.asked == [DEAD[:2]]
