"""Who has which frame: nothing the kernel's rings may hold makes Python touch memory outside the UMEM."""

from __future__ import annotations

import mmap
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libfp.errors import BadInput
from libfp.pyxdp.system import PAGE, ffi
from libfp.pyxdp.umem import FILLED, FREE, HELD, SENT, Umem

ONE, OTHER = object(), object()
addresses = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 16 * 2048))


@given(addresses, st.integers(0, 2**32 - 1))
def test_a_view_is_within_one_frame_or_none(offset, length):
    umem = Umem(8)
    view = umem.view(offset, length)
    inside = offset < umem.size and offset % 2048 + length <= 2048
    assert (view is not None) == inside
    if view is not None:
        assert len(view) == length


@given(st.lists(addresses, max_size=50))
def test_completions_that_nobody_sent_change_nothing(offsets):
    umem = Umem(8)
    for offset in offsets:
        assert umem.change(offset, ONE, SENT, FREE) is None
    assert umem.free == 8


def test_a_frame_is_completed_once_and_by_its_owner_only():
    umem = Umem(8)
    frame = umem.take(ONE, SENT)
    assert umem.change(frame + 300, OTHER, SENT, FREE) is None
    assert umem.change(frame + 300, ONE, SENT, FREE) == frame  # unaligned, as the kernel may return it
    assert umem.change(frame, ONE, SENT, FREE) is None
    assert umem.free == 8


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_neither_lost_nor_doubled(seed):
    rng, umem, held = random.Random(seed), Umem(16), []
    for _ in range(2000):
        if rng.random() < 0.5:
            frame = umem.take(ONE, FILLED)
            assert (frame is None) == (len(held) == 16)
            if frame is not None:
                assert frame not in held
                held.append(frame)
        elif held:
            frame = held.pop(rng.randrange(len(held)))
            assert umem.change(frame + 256, ONE, FILLED, HELD) == frame
            assert umem.change(frame, ONE, HELD, FREE) == frame
        assert umem.free + len(held) == 16


def test_a_socket_that_leaves_gives_its_frames_back():
    umem = Umem(8)
    for _ in range(5):
        umem.take(ONE, SENT)
    kept = umem.take(OTHER, FILLED)
    umem.leave(ONE)
    assert umem.free == 7
    assert kept not in {umem.take(ONE, HELD) for _ in range(7)}


def test_memory_of_ones_own_outlives_its_umem_and_external_memory_is_used_in_place():
    view = Umem(4).view(2048, 4)
    view[:] = b"abcd"
    assert bytes(view) == b"abcd"

    area = mmap.mmap(-1, 4 * PAGE)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(area)))
    umem = Umem(frame_size=4096, memory=(address, 4 * PAGE))
    assert (umem.frames, umem.size, umem.address) == (4 * PAGE // 4096, 4 * PAGE, address)
    umem.view(4096, 3)[:] = b"xyz"
    assert area[4096:4099] == b"xyz"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Umem(frame_size=1024),
        lambda: Umem(frame_size=3000),
        lambda: Umem(0),
        lambda: Umem(headroom=2048),
        lambda: Umem(memory=(PAGE + 16, PAGE)),
        lambda: Umem(memory=(PAGE, 100)),
    ],
)
def test_bad_geometry_is_refused(make):
    with pytest.raises(BadInput):
        make()
