"""Receive hashing by which both directions of a flow come by the queue of one number, where the NIC can do that.

By ETHTOOL_GRSSH and ETHTOOL_SRSSH (Linux, include/uapi/linux/ethtool.h, struct ethtool_rxfh). From Linux 6.8 on a
driver may offer "symmetric-xor": it hashes addresses and ports each xored with the other. Elsewhere a Toeplitz key
that repeats itself every 16 bits does it, since exchanging such halves moves bits of the input by multiples of 16
(Woo, Park: Scalable TCP session monitoring with symmetric receive-side scaling, KAIST 2012).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
from dataclasses import dataclass

from libfp.pyxdp.ethtool import Ethtool

GRSSH, SRSSH = 0x46, 0x47
TOEPLITZ = 1  # of hfunc, a bit each; 0 in a request changes nothing
SYMMETRIC = 0b11  # of input_xfrm: symmetric-xor, and symmetric-or-xor
SYMMETRIC_XOR = 1
KEY = b"\x6d\x5a"
_TABLE_AS_IT_IS = 0xFFFFFFFF

# cmd, rss_context, indir_size, key_size, hfunc, input_xfrm (reserved before 6.8), reserved; then the table and the key
_HEADER = struct.Struct("=IIIIBBHI")
_REFUSED = (errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)

log = logging.getLogger("libfp.pyxdp")


@dataclass(frozen=True)
class Hashing:
    """How a NIC hashes: `function` is a bit of the kernel's, `transform` what comes before, `table` queues by hash."""

    function: int
    transform: int
    table: tuple[int, ...]
    key: bytes

    @property
    def symmetric(self) -> bool:
        periodic = bool(self.key) and self.key == (KEY * len(self.key))[: len(self.key)]
        return self.transform & SYMMETRIC != 0 or (self.function == TOEPLITZ and periodic)


def read(nic: Ethtool) -> Hashing | None:
    """None where the driver does not tell. Raises OSError where it fails."""
    sizes = bytearray(_HEADER.pack(GRSSH, 0, 0, 0, 0, 0, 0, 0))
    try:
        nic.call(sizes)
        _, _, entries, key_size, *_ = _HEADER.unpack_from(sizes)
        buffer = bytearray(_HEADER.pack(GRSSH, 0, entries, key_size, 0, 0, 0, 0) + bytes(4 * entries + key_size))
        nic.call(buffer)
    except OSError as error:
        if error.errno in _REFUSED:
            return None
        raise
    _, _, _, _, function, transform, _, _ = _HEADER.unpack_from(buffer)
    table, key_at = struct.unpack_from(f"={entries}I", buffer, _HEADER.size), _HEADER.size + 4 * entries
    return Hashing(function, transform, table, bytes(buffer[key_at : key_at + key_size]))


def change(nic: Ethtool, transform: int, key: bytes = b"") -> None:
    """Set the transformation and, if one is given, the key. Raises OSError where the kernel or the driver refuses."""
    nic.call(bytearray(_HEADER.pack(SRSSH, 0, _TABLE_AS_IT_IS, len(key), 0, transform, 0, 0) + key))


class SymmetricHashing:
    """From now until `restore`, if the NIC takes it. `how`: "symmetric-xor", "key", "already", or "" if it does not."""

    def __init__(self, interface: str, nic: Ethtool | None = None) -> None:
        self._nic = nic or Ethtool(interface)
        self.how = ""
        self._before: Hashing | None = None
        with contextlib.suppress(OSError):
            self._before = read(self._nic)
            if self._before is not None:
                self.how = "already" if self._before.symmetric else self._set(self._before)
        if self.how:
            log.info("%s: receive hashing is symmetric (%s)", interface, self.how)
        else:
            log.info("%s: receive hashing cannot be made symmetric: directions of a flow may arrive apart", interface)

    def _set(self, before: Hashing) -> str:
        wanted = [("symmetric-xor", SYMMETRIC_XOR, b"")]
        if before.function == TOEPLITZ and before.key:
            wanted.append(("key", before.transform, (KEY * len(before.key))[: len(before.key)]))
        for how, transform, key in wanted:
            with contextlib.suppress(OSError):
                change(self._nic, transform, key)
                now = read(self._nic)
                if now is not None and now.symmetric:
                    return how
                change(self._nic, before.transform, before.key if key else b"")
        return ""

    def restore(self) -> None:
        """As it was before; nothing when the interface is gone. May be called again."""
        how, self.how = self.how, ""
        with self._nic, contextlib.suppress(OSError):
            if self._before is not None and how in ("symmetric-xor", "key"):
                change(self._nic, self._before.transform, self._before.key if how == "key" else b"")
