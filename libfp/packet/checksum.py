"""The internet checksum (RFC 1071), and its incremental update (RFC 1624, equation 3)."""

from __future__ import annotations

from libfp.jit import bswap16, kernel, load8, load16, load32, load64, mul64, shr64, store16, ult64
from libfp.jit.primitive import signed64

_INVERSE = signed64(pow(65535, -1, 1 << 64))
_QUOTIENTS = ((1 << 64) - 1) // 65535 + 1


@kernel
def _fold(total: int) -> int:
    """A sum of 16-bit words, below 2^48, folded to 16 bits."""
    total = (total & 0xFFFFFFFF) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@kernel
def checksum(at: int, size: int) -> int:
    """The checksum of `size` bytes at `at`, in network order read as a host number; 0 over correct data."""
    total, end = 0, at + size
    while at + 4 <= end:
        total += load32(at)
        at += 4
    if at + 2 <= end:
        total += load16(at)
        at += 2
    if at < end:
        total += load8(at)
    return bswap16(_fold(total) ^ 0xFFFF)


@kernel
def ipv4_checksum_ok(at: int) -> bool:
    """Whether the 20 bytes at `at`, an IPv4 header without options, sum to zero."""
    return is_ipv4_sum(load64(at), load64(at + 8), load32(at + 16))


@kernel
def is_ipv4_sum(low: int, high: int, last: int) -> bool:
    """`ipv4_checksum_ok` of a header that has been loaded: 8, 8 and 4 bytes. Any byte order sums alike."""
    total = (low & 0xFFFFFFFF) + shr64(low, 32) + (high & 0xFFFFFFFF) + shr64(high, 32) + last
    return is_zero_sum(total)


@kernel
def is_zero_sum(total: int) -> bool:
    """Whether a sum of 16- or 32-bit words is zero, folded to 16 bits by one's complement."""
    # It is 0 or 0xFFFF if 65535 divides the total: if total / 65535 modulo 2**64 is a small number.
    return ult64(mul64(total, _INVERSE), _QUOTIENTS) != 0


@kernel
def update16(at: int, old: int, new: int) -> None:
    """Change the checksum at address `at` for a 16-bit word of its data that went from `old` to `new`.

    HC' = ~(~HC + ~m + m'). `old` and `new` are as a 16-bit load in the machine's order gives them.
    """
    total = (load16(at) ^ 0xFFFF) + (old ^ 0xFFFF) + new
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    store16(at, total ^ 0xFFFF)
