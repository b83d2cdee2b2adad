"""Symmetric receive hashing, asked of a NIC that is made of the kernel's struct ethtool_rxfh and its rules."""

from __future__ import annotations

import errno
import logging
import random
import struct
from typing import Any

import pytest

from libfp.pyxdp.rss import KEY, SymmetricHashing, read

RANDOM_KEY = random.Random(1).randbytes(40)
TABLE = tuple(n % 3 for n in range(128))
# struct ethtool_rxfh: offsets of its members (Linux 6.8, include/uapi/linux/ethtool.h)
CMD, CONTEXT, INDIR_SIZE, KEY_SIZE, HFUNC, INPUT_XFRM, RSVD8, RSVD32, CONFIG = 0, 4, 8, 12, 16, 17, 18, 20, 24
NO_CHANGE = 0xFFFFFFFF


class Nic:
    """What net/ethtool/ioctl.c makes of a request, for a driver with or without symmetric-xor, on a kernel that knows
    `input_xfrm` or for which it is reserved. `deaf`: its driver ignores keys."""

    def __init__(self, *, xor: bool = False, old: bool = False, hfunc: int = 1, deaf: bool = False) -> None:
        self.xor, self.old, self.hfunc, self.deaf = xor, old, hfunc, deaf
        self.key, self.xfrm, self.sets, self.closed = RANDOM_KEY, 0, 0, False

    def call(self, buffer: bytearray) -> int:
        def word(at: int) -> int:
            return int(struct.unpack_from("=I", buffer, at)[0])

        assert (word(CONTEXT), buffer[RSVD8], buffer[RSVD8 + 1], word(RSVD32)) == (0, 0, 0, 0)
        indir, key = word(INDIR_SIZE), word(KEY_SIZE)
        if word(CMD) == 0x46:
            assert (indir, key) in ((0, 0), (len(TABLE), len(self.key)))
            assert len(buffer) == CONFIG + 4 * indir + key
            struct.pack_into("=II", buffer, INDIR_SIZE, len(TABLE), len(self.key))
            buffer[HFUNC], buffer[INPUT_XFRM] = self.hfunc, self.xfrm
            if key:
                struct.pack_into(f"={len(TABLE)}I", buffer, CONFIG, *TABLE)
                buffer[CONFIG + 4 * len(TABLE) :] = self.key
            return 0
        assert word(CMD) == 0x47
        assert (indir, buffer[HFUNC]) == (NO_CHANGE, 0), "the table and the function stay"
        assert key in (0, len(self.key))
        assert len(buffer) == CONFIG + key, "without a table the key follows at once"
        xfrm = buffer[INPUT_XFRM]
        if self.old and (xfrm or not key):
            raise OSError(errno.EINVAL, "reserved, or nothing to change")
        if xfrm and not self.xor:
            raise OSError(errno.EOPNOTSUPP, "no such transformation")
        self.sets += 1
        self.xfrm = xfrm
        if key and not self.deaf:
            self.key = bytes(buffer[CONFIG:])
        return 0

    def __enter__(self) -> Nic:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True


def make(nic: Any) -> SymmetricHashing:
    return SymmetricHashing("eth9", nic)


@pytest.mark.parametrize(
    ("nic", "how"),
    [(Nic(xor=True), "symmetric-xor"), (Nic(), "key"), (Nic(old=True), "key"), (Nic(hfunc=2), ""),
     (Nic(deaf=True), "")],
    ids=["xor", "key", "old kernel", "another function", "driver ignores keys"],
)  # fmt: skip
def test_it_is_set_and_restored(nic: Any, how: str) -> None:
    made = make(nic)
    assert made.how == how
    assert (nic.xfrm, nic.key) == (int(how == "symmetric-xor"), KEY * 20 if how == "key" else RANDOM_KEY)
    assert read(nic).table == TABLE  # type: ignore[union-attr]
    made.restore()
    assert (nic.xfrm, nic.key, nic.closed) == (0, RANDOM_KEY, True)
    made.restore()


def test_what_is_symmetric_already_is_left_alone() -> None:
    for nic in (Nic(xor=True), Nic()):
        nic.xfrm, nic.key = int(nic.xor), RANDOM_KEY if nic.xor else KEY * 20
        made = make(nic)
        assert (made.how, nic.sets) == ("already", 0)
        made.restore()
        assert nic.sets == 0


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.EIO])
def test_a_refusal_is_a_line_and_no_error(number: int, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Nic):
        def call(self, buffer: bytearray) -> int:
            raise OSError(number, "will not")

    with caplog.at_level(logging.INFO, "libfp"):
        made = make(Refusing())
    assert made.how == ""
    assert [one[:46] for one in caplog.messages] == ["eth9: receive hashing cannot be made symmetric"]
    made.restore()


def test_the_repeated_key_is_symmetric() -> None:
    """Toeplitz: the xor of the 32 bits of the key from each set bit of the input on."""
    key = int.from_bytes(KEY * 20)

    def toeplitz(data: bytes) -> int:
        bits, found = int.from_bytes(data), 0
        for i in range(8 * len(data)):
            if bits >> (8 * len(data) - 1 - i) & 1:
                found ^= key >> (320 - 32 - i) & 0xFFFFFFFF
        return found

    dice = random.Random(2)
    for size in (4, 16):
        a, b, p, q = dice.randbytes(size), dice.randbytes(size), dice.randbytes(2), dice.randbytes(2)
        assert toeplitz(a + b + p + q) == toeplitz(b + a + q + p)
        assert toeplitz(a + b) == toeplitz(b + a)
