"""One security association, as the control plane gives it: see `libfp.apps.ipsec.sa`."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from libfp.apps.ipsec import libcrypto, record, replay
from libfp.errors import BadInput
from libfp.jit import load64
from libfp.jit.memory import view
from libfp.jit.primitive import MASK64
from libfp.packet.headers import IPV6_SIZE

_FIRST_SPI = 256  # RFC 4303 section 2.1: those below are reserved
_KEY_SIZES = (16 + libcrypto.SALT_SIZE, 32 + libcrypto.SALT_SIZE)
_OUTER_TTL = 65  # `forward` takes one off


class Secret:
    """Key material that nothing shows, and that is wiped once it has been used."""

    __slots__ = ("_bytes", "wiped")

    def __init__(self, data: bytes | bytearray) -> None:
        self._bytes, self.wiped = bytearray(data), False

    @classmethod
    def from_hex(cls, text: str) -> Secret:
        """Of hexadecimal digits, with or without 0x before them and colons or blanks between. Raises BadInput."""
        try:
            return cls(bytes.fromhex(text.strip().removeprefix("0x").replace(":", "")))
        except (ValueError, AttributeError):
            raise BadInput("a key that is not hexadecimal", "write two digits for each byte") from None

    def __len__(self) -> int:
        return len(self._bytes)

    def use(self) -> bytearray:
        """The bytes themselves: not to be kept."""
        return self._bytes

    def wipe(self) -> None:
        """Overwrite it."""
        self._bytes[:], self.wiped = bytes(len(self._bytes)), True

    def __repr__(self) -> str:
        return "<secret>"

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not for writing down")


class Sa:
    """One direction of the tunnel of that name: SPI, outer addresses of both ends (of one family), key, and how it
    counts. All SAs of one name are one tunnel; the one added last is what it sends by.

    `key` is AES key and salt, see `libcrypto`, and wiped by `SaTable.add`. `esn`: extended sequence numbers. `window`,
    of an inbound one, is the anti-replay window. Raises BadInput.
    """

    def __init__(
        self,
        tunnel: str,
        direction: Literal["in", "out"],
        *,
        spi: int,
        local: str,
        remote: str,
        key: Secret | bytes | bytearray,
        esn: bool = True,
        window: int = 1024,
    ) -> None:
        if direction not in ("in", "out"):
            raise BadInput(f"an SA of direction {direction!r}", 'it is "in" or "out"')
        if type(spi) is not int or not _FIRST_SPI <= spi < 1 << 32:
            raise BadInput(f"an SPI of {spi!r}", f"it is {_FIRST_SPI} to 2**32 - 1")
        if type(window) is not int or not replay.LEAST <= window <= replay.MOST:
            raise BadInput(f"an anti-replay window of {window!r}", f"it is {replay.LEAST} to {replay.MOST}")
        self.tunnel, self.direction, self.spi, self.esn, self.window = tunnel, direction, spi, bool(esn), window
        self.local, self.remote = (_address(one) for one in (local, remote))
        if self.local.version != self.remote.version:
            raise BadInput(f"an SA from {self.local} to {self.remote}", "give two addresses of one family")
        self._key = key if isinstance(key, Secret) else Secret(key)
        if len(self._key) not in _KEY_SIZES:
            self._key.wipe()
            raise BadInput(f"a key of {len(self._key)} bytes for SPI {spi:#x}", libcrypto.KEY_REMEDY)
        self.at, self._left = 0, b""  # of its record; that, once it has been removed
        self.digest, self.key_digest = "", b""  # of SPI and key, and of the key alone

    def _word(self, offset: int) -> int:
        at = self.at
        if at == 0 and not self._left:
            raise BadInput(f"SA {self.spi:#x} is in no table", "add it to a SaTable")
        return load64(at + offset) if at else int.from_bytes(self._left[offset : offset + 8], "little", signed=True)

    def leave(self) -> None:
        """Its record becomes another's, and its key is wiped: it remembers what it counted."""
        self._left, self.at = bytes(view(self.at, record.WINDOW + 8)), 0

    @property
    def sequence(self) -> int:
        """The sequence number sent last, or the highest that has been verified."""
        return self._word(record.SEQUENCE if self.direction == "out" else record.WINDOW) & MASK64

    @property
    def remaining(self) -> int:
        """How many sequence numbers there still are."""
        return (self._word(record.LAST) & MASK64) - self.sequence

    @property
    def exhausted(self) -> bool:
        """An outbound SA that has none left: it sends nothing any more; give both ends a new one."""
        return self.direction == "out" and self.remaining == 0

    @property
    def counters(self) -> dict[str, int]:
        """By name: see `record`."""
        return {name: self._word(record.COUNTERS + 8 * i) for i, name in enumerate(record.COUNTER_NAMES)}

    def __repr__(self) -> str:
        way = f"{self.local} -> {self.remote}" if self.direction == "out" else f"{self.remote} -> {self.local}"
        return f"<SA {self.spi:#x} of {self.tunnel!r}, {self.direction}: {way}>"


def _address(text: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise BadInput(f"{text!r} is not an IP address", "write one, as 198.51.100.1 or 2001:db8::1") from None
    if found.is_multicast or found.is_unspecified or found.is_loopback:
        raise BadInput(f"a tunnel's end at {text}", "give a unicast address")
    return found


def in_packet(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    """16 bytes: as it lies in a packet, with zeros behind."""
    return address.packed.ljust(16, b"\0")


def outer_header(sa: Sa) -> bytes:
    """The outer header of an outbound SA (RFC 4301 section 5.1.2), without length, checksum, and what comes from the
    inner one; 40 bytes, with zeros behind."""
    ends = sa.local.packed + sa.remote.packed
    if sa.local.version == 4:  # DF: nothing is fragmented; so no identification is needed (RFC 6864)
        made = bytes([0x45, 0, 0, 0, 0, 0, 0x40, 0, _OUTER_TTL, record.ESP, 0, 0]) + ends
    else:
        made = bytes([0x60, 0, 0, 0, 0, 0, record.ESP, _OUTER_TTL]) + ends
    return made.ljust(IPV6_SIZE, b"\0")
