"""`libfp.tables.Array`: its values, its errors, and its replicas against a list."""

from __future__ import annotations

import random

import pytest

from libfp.engine.replicas import Replicas, drain
from libfp.errors import BadInput
from libfp.jit import kernel
from libfp.tables import Array
from libfp.testing.tables import catch_up, same_words


@kernel
def _at(view, index):  # type: ignore[no-untyped-def]
    return view[index]


def test_values_are_of_its_type() -> None:
    macs = Array(3, value="mac")
    macs[0], macs[-1] = "02:00:00:00:00:01", bytes.fromhex("020000000003")
    assert list(macs) == ["02:00:00:00:00:01", "00:00:00:00:00:00", "02:00:00:00:00:03"]
    assert macs[2] == macs[-1] == "02:00:00:00:00:03"
    assert len(macs) == 3
    view = macs.view()
    assert [_at(view, i) for i in range(3)] == [0x020000000001, 0, 0x020000000003]
    numbers = Array(1)
    numbers[0] = (1 << 64) - 1
    assert (numbers[0], _at(numbers.view(), 0)) == ((1 << 64) - 1, -1)


def test_beyond_its_ends_a_stage_finds_zero() -> None:
    array = Array(2)
    array.load([7, 8])
    assert [_at(array.view(), i) for i in (-(1 << 63), -1, 0, 1, 2, 1 << 40)] == [0, 0, 7, 8, 0, 0]


def test_what_fails_changes_nothing() -> None:
    array = Array(2, value="u8")
    array.load([1, 2])
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"number {index} of an array of 2"):
            array[index] = 1
        with pytest.raises(IndexError):
            array[index]
    with pytest.raises(BadInput, match="256 is not of type u8"):
        array[0] = 256
    with pytest.raises(BadInput, match="not of type u8"):
        array.load([3, -1])
    for count in (0, 1, 3):
        with pytest.raises(BadInput, match=f"{count} values for an array of 2"):
            array.load([9] * count)
    assert list(array) == [1, 2]
    with pytest.raises(BadInput, match="an array of 0 values"):
        Array(0)
    for wide in ("ipv6", ("u8", "u8")):
        with pytest.raises(BadInput, match="one word"):
            Array(1, value=wide)


def test_replicas_follow() -> None:
    rng, size = random.Random(1), 5000
    array, model = Array(size), [0] * size
    replicas = Replicas([array], mailbox=64)
    replicas.reset()
    try:
        for step in range(300):
            index, value = rng.randrange(size), rng.getrandbits(64)
            if rng.random() < 0.05:
                model = [value if rng.random() < 0.5 else one for one in model]
                array.load(model)
            else:
                array[index] = model[index] = value
            if rng.random() < 0.3:
                drain(replicas.mailbox, rng.choice([1, 16, 512]))
                replicas.flush()
            if step % 50 == 49:
                catch_up(replicas)
                assert same_words(replicas, array)
                assert list(array) == model
    finally:
        replicas.stop()
        replicas.close()


def test_loading_the_same_again_sends_nothing() -> None:
    array = Array(100)
    replicas = Replicas([array], mailbox=64)
    replicas.reset()
    try:
        catch_up(replicas)
        array.load(range(100))
        assert not replicas.acknowledged()
        catch_up(replicas)
        array.load(range(100))
        assert replicas.acknowledged()
    finally:
        replicas.stop()
        replicas.close()
