"""The four rings of an AF_XDP socket: single producer, single consumer, shared with the kernel.

Indexes are 32 bits, run freely and wrap; the place in the ring is the index masked by the size. The addresses are
for compiled code, which reads and writes the words itself with acquire and release. The methods are for Python, one
thread at a time; a ring is driven either by its methods or through its addresses, not by both, since each keeps
copies of the indexes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from libfp.errors import BadInput
from libfp.pyxdp.system import fence, ffi, words32, words64

NEED_WAKEUP = 1
WORD = 0xFFFF_FFFF


class RingSizes(NamedTuple):
    """Entries in each ring: powers of two. Larger rings push packets out of the processor's cache."""

    rx: int = 1024
    tx: int = 1024
    fill: int = 1024
    completion: int = 1024

    def check(self) -> None:
        """Raises BadInput for a size that is no power of two."""
        for name, size in self._asdict().items():
            if size < 1 or size & (size - 1):
                raise BadInput(f"a {name} ring of {size} entries", "ring sizes are powers of two")


class _Closed:
    """Instead of words that are not mapped any more."""

    def __getitem__(self, index: int) -> int:
        raise ValueError("this AF_XDP socket is closed")


class Ring:
    """Where a ring lies in memory.

    `producer`, `consumer` and `flags` are the addresses of 32-bit words; `descs` is the address of the entries: 64-bit
    frame addresses (fill, completion), or 16 bytes of address, length and options (rx, tx). `size` counts entries.
    """

    def __init__(self, producer: int, consumer: int, flags: int, descs: int, size: int) -> None:
        self.producer, self.consumer, self.flags, self.descs, self.size = producer, consumer, flags, descs, size
        self._producer, self._consumer, self._flags = words32(producer), words32(consumer), words32(flags)
        self._mask = size - 1

    def __len__(self) -> int:
        """Entries produced and not yet consumed."""
        return int(self._producer[0] - self._consumer[0] & WORD)

    @property
    def need_wakeup(self) -> bool:
        """The kernel sleeps until a system call wakes it (tx: send; fill: recv or poll)."""
        return bool(self._flags[0] & NEED_WAKEUP)

    def close(self) -> None:
        """It is about to be unmapped: the methods raise ValueError from now on."""
        self._producer = self._consumer = self._flags = _Closed()


class _Producer(Ring):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self._next = self._producer[0]

    @property
    def room(self) -> int:
        """Entries that can be put now."""
        free: int = self.size - (self._next - self._consumer[0] & WORD)
        fence()  # an entry is written only after the kernel's word that it has read it
        return free

    def _publish(self, count: int) -> None:
        self._next = self._next + count & WORD
        fence()  # the entries are written before the index that shows them
        self._producer[0] = self._next


class _Consumer(Ring):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self._next = self._consumer[0]

    @property
    def ready(self) -> int:
        """Entries that can be taken now."""
        count: int = self._producer[0] - self._next & WORD
        fence()  # the entries are read after the index that shows them
        return min(count, self.size)

    def _release(self, count: int) -> None:
        self._next = self._next + count & WORD
        fence()  # the entries have been read before the kernel may write them again
        self._consumer[0] = self._next


class FillRing(_Producer):
    """Frames given to the kernel to receive into."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self._entries: Any = words64(self.descs)

    def put(self, addresses: Sequence[int]) -> int:
        """Give frames (offsets into the UMEM); returns how many found room, from the first on."""
        count = min(len(addresses), self.room)
        for i in range(count):
            self._entries[self._next + i & self._mask] = addresses[i]
        self._publish(count)
        return count

    def put_first(self, addresses: Sequence[int]) -> None:
        """Fill an empty ring that no kernel side consumes yet, all at once."""
        if len(addresses) > self.size:
            raise BadInput(f"{len(addresses)} frames for a fill ring of {self.size}", "give at most one per entry")
        data = array("Q", addresses).tobytes()
        ffi.memmove(self._entries, data, len(data))
        self._publish(len(addresses))


class CompletionRing(_Consumer):
    """Frames that the kernel has transmitted."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self._entries: Any = words64(self.descs)

    def take(self, limit: int = 64) -> list[int]:
        """Up to `limit` addresses, as the kernel wrote them: possibly inside a frame, and not to be trusted."""
        count = min(self.ready, limit)
        found = [self._entries[self._next + i & self._mask] for i in range(count)]
        self._release(count)
        return found


class TxRing(_Producer):
    """Packets to transmit."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self._entries: Any = ffi.cast("struct xdp_desc *", self.descs)

    def put(self, address: int, length: int) -> bool:
        """One packet of `length` bytes at `address` in the UMEM; False when the ring is full."""
        if not self.room:
            return False
        entry = self._entries[self._next & self._mask]
        entry.addr, entry.len, entry.options = address, length, 0
        self._publish(1)
        return True


class RxRing(_Consumer):
    """Packets received."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self._entries: Any = ffi.cast("struct xdp_desc *", self.descs)

    def take(self) -> tuple[int, int] | None:
        """One packet's (address, length), as the kernel wrote them; None when there is none."""
        if not self.ready:
            return None
        entry = self._entries[self._next & self._mask]
        found = int(entry.addr), int(entry.len)
        self._release(1)
        return found
