"""What a stage's author is told about a mistake: one line with the place, what is wrong, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.errors import StageError
from libfp.jit import INTERPRETED, kernel
from libfp.tables import Hash
from libfp.testing import udp

pytestmark = pytest.mark.timeout(180)  # what is right is compiled first


@stage
def misspelt(packet: Any) -> None:
    if packet.is_ipv5:
        packet.drop("old")


@stage
def misspelt_field(packet: Any) -> None:
    packet.ipv4.srcc = 3


@stage
def unknown(packet: Any) -> None:
    if nowhere:  # type: ignore[name-defined]  # noqa: F821
        packet.drop("x")


@stage
def reason_of_two(packet: Any) -> None:
    packet.drop("short" if packet.length < 100 else "long")


@stage
def number(packet: Any) -> None:
    packet.drop(3)


@stage
def listing(packet: Any) -> None:
    found = [packet.length]
    found.append(2)
    packet.drop("x")


def plain(length: int) -> int:
    return length + 1


@stage
def calls(packet: Any) -> None:
    if plain(packet.length) > 3:
        packet.drop("x")


@stage
def texts(packet: Any) -> None:
    if str(packet.length) == "60":
        packet.drop("x")


@stage
def asks(packet: Any, table: Any) -> None:
    if table.get(1, 2, 3, 4):
        packet.drop("x")


MISTAKES = {
    misspelt: ("Packet has no 'is_ipv5'", "did you mean 'is_ipv"),
    misspelt_field: ("Ipv4 has no 'srcc'", "did you mean 'src'?"),
    unknown: ("name 'nowhere' is not defined", "define it before the stage, or give it to the stage as an argument"),
    reason_of_two: ("packet.drop(a string that only the running stage knows)", 'as in packet.drop("denied")'),
    number: ("packet.drop(3): the reason must be written out", 'as in packet.drop("denied")'),
    listing: ("it makes a list", "a table bound to the stage has room"),
    calls: ("it calls 'plain', which is not compiled", "decorate that with @kernel of libfp.jit"),
    texts: ("str(an integer) cannot be compiled", "the tutorial's `What a stage may do`"),
    asks: ("HashView.get(1, 2, 3, 4) is no call of it", "it takes (key, default)"),
}


@pytest.mark.skipif(INTERPRETED, reason="Python itself says what is wrong")
@pytest.mark.parametrize("wrong", MISTAKES, ids=lambda one: one.__name__)
def test_what_cannot_be_compiled(wrong: Any) -> None:
    what, remedy = MISTAKES[wrong]
    made = Pipeline(wrong(Hash(key="ipv4", capacity=16)) if wrong is asks else wrong)
    with pytest.raises(StageError) as caught:
        made.run_once([udp()])
    text, line = str(caught.value), wrong.function.__code__.co_firstlineno
    line += 0 if wrong is unknown else 2  # of a name, numba does not say where it is
    assert text.startswith(f"stage '{wrong.__name__}' (test_mistakes.py, line {line}): {what}")
    assert remedy in text
    assert "\n" not in text
    assert caught.value.__cause__ is None


@kernel
def helper(length: Any) -> Any:
    assert length < 2000
    return length


def test_nobody_catches_an_exception_and_nobody_reads_what_is_printed() -> None:
    @stage
    def raises(packet: Any) -> None:
        if packet.length > 2000:
            raise ValueError(packet.length)

    @stage
    def asserts(packet: Any) -> None:
        if helper(packet.length) > 100:
            packet.drop("long")

    @stage
    def prints(packet: Any) -> None:
        print(packet.length)

    for wrong, what in ((raises, "it raises an exception"), (asserts, "it raises an exception"), (prints, "it prints")):
        with pytest.raises(StageError, match=rf"^stage '{wrong.__name__}' \(test_mistakes.py, line \d+\): {what}; "):
            Pipeline(wrong)
