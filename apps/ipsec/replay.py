"""The anti-replay window of an inbound SA: RFC 4303 section 3.4.3 and appendix A2, its bitmap that of RFC 6479.

A window of `size` sequence numbers ends at `top`, the highest that has been verified. The bitmap is a ring of 64-bit
blocks, one more than the window needs: when the top moves on, whole blocks are cleared and nothing is shifted.

    0    top                     16   blocks - 1, blocks being a power of two
    8    size, 64 to 4,096       64   the blocks
"""

from __future__ import annotations

from libfp.errors import BadInput
from libfp.jit import load64, native, shl64, shr64, store64, ult64, word
from libfp.jit.primitive import signed64

LEAST, MOST = 64, 4096
_TOP, _SIZE, _MASK, _BLOCKS = 0, 8, 16, 64
SIZE = _BLOCKS + 2 * MOST // 8


@native
class Window:
    """The window at address `at`. Sequence numbers are 64 bits, unsigned; 0 is none's. One thread uses it."""

    at: word

    @property
    def top(self) -> int:
        """The highest sequence number that has been verified."""
        return load64(self.at)

    def infer(self, low: int) -> int:
        """Appendix A2.2: the sequence number that ends in the 32 bits `low`, 0 if there can be none.

        The one that is neither below the window nor 2^32 or more above its lower end.
        """
        top, size = load64(self.at), load64(self.at + 8)
        lowest = top - size + 1
        found = lowest + (low - lowest & 0xFFFFFFFF)
        if ult64(top, size - 1):  # `lowest` is below 0
            return found if found > 0 else 0
        return 0 if ult64(found, lowest) else found  # beyond 2^64

    def is_new(self, sequence: int) -> bool:
        """Whether a packet with that sequence number may come: it is not below the window, and has not been seen."""
        top = load64(self.at)
        if sequence == 0:
            return False
        if ult64(top, sequence):
            return True
        if ult64(top - sequence, load64(self.at + 8)) == 0:
            return False
        block = shr64(sequence, 6) & load64(self.at + 16)
        return shr64(load64(self.at + 64 + 8 * block), sequence) & 1 == 0

    def accept(self, sequence: int) -> None:
        """A packet with that sequence number, which `is_new`, has been verified."""
        top, mask = load64(self.at), load64(self.at + 16)
        if ult64(top, sequence):
            block = shr64(top, 6)
            for k in range(1, min(shr64(sequence, 6) - block, mask + 1) + 1):
                store64(self.at + 64 + 8 * (block + k & mask), 0)
            store64(self.at, sequence)
        at = self.at + 64 + 8 * (shr64(sequence, 6) & mask)
        store64(at, load64(at) | shl64(1, sequence))


def make(at: int, size: int, top: int = 0, seen: bool = True) -> Window:
    """A window of `size` in the `SIZE` bytes at `at`, that ends at `top`; `seen`: whatever is in it is a replay."""
    if not LEAST <= size <= MOST:
        raise BadInput(f"an anti-replay window of {size}", f"it is {LEAST} to {MOST}")
    store64(at + _TOP, signed64(top))
    store64(at + _SIZE, size)
    store64(at + _MASK, (1 << (-(-size // 64)).bit_length()) - 1)
    window = Window(at)
    blocks = load64(at + _MASK) + 1
    for block in range(blocks):
        store64(at + _BLOCKS + 8 * block, 0)
    if seen:
        for k in range(min(top, size)):
            one = top - k
            word_at = at + _BLOCKS + 8 * (one >> 6 & blocks - 1)
            store64(word_at, signed64(load64(word_at) | 1 << (one & 63)))
    else:
        if top:
            word_at = at + _BLOCKS + 8 * (top >> 6 & blocks - 1)
            store64(word_at, signed64(1 << (top & 63)))
    return window
