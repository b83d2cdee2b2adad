"""What every ring is from Python: the calls of its view, with lists and arrays for addresses."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit import Arena, entry
from libfp.jit.primitive import signed64


@entry
def _enqueue(ring, source, count, bulk):  # type: ignore[no-untyped-def]
    return ring.enqueue_bulk(source, count) if bulk else ring.enqueue_burst(source, count)


@entry
def _dequeue(ring, target, count, bulk):  # type: ignore[no-untyped-def]
    return ring.dequeue_bulk(target, count) if bulk else ring.dequeue_burst(target, count)


class Ring:
    """A ring of `size` elements of `element` bytes. `view` is the same ring for compiled code.

    Elements are 64-bit integers, or pairs of them. All calls return at once. The view holds addresses only: keep the
    ring while a view is in use.
    """

    view: Any
    arena: Arena
    _ends: tuple[str, ...] = ("view",)  # attributes that `close` takes away

    def __init__(self, size: int, element: int) -> None:
        """Raises BadInput for sizes that no ring has."""
        if size < 2 or size > 1 << 31 or size & (size - 1):
            raise BadInput(f"a ring of {size} elements", "its size must be a power of two, 2 to 2**31")
        if element not in (8, 16):
            raise BadInput(f"ring elements of {element} bytes", "they have 8 or 16")
        self._size, self._element = size, element
        self._staging = threading.local()  # any number of threads may be producers

    @property
    def size(self) -> int:
        """How many elements fit."""
        return self._size

    @property
    def element(self) -> int:
        """Bytes an element."""
        return self._element

    def enqueue(self, value: Any) -> bool:
        """Put in one element (an int, or a pair of ints); False if the ring is full."""
        return self.enqueue_bulk([value]) == 1

    def dequeue(self) -> Any:
        """Take out one element (an int, or a pair of ints); None if the ring is empty."""
        taken = self.dequeue_burst(1).tolist()
        return (tuple(taken[0]) if self.element == 16 else taken[0]) if taken else None

    def enqueue_burst(self, values: Any) -> int:
        """Put in as many of `values` as fit, in order; return how many. Shape (n,), or (n, 2) for pairs."""
        return int(_enqueue(self.view, *self._staged(values), 0))

    def enqueue_bulk(self, values: Any) -> int:
        """Put in all of `values`, or none: returns their number or 0."""
        return int(_enqueue(self.view, *self._staged(values), 1))

    def dequeue_burst(self, count: int) -> np.ndarray:
        """Take out up to `count` elements: int64, shape (n,), or (n, 2) for pairs."""
        return self._dequeue(min(count, self.size), 0)

    def dequeue_bulk(self, count: int) -> np.ndarray:
        """Take out exactly `count` elements, or none."""
        return self._dequeue(count if count <= self.size else 0, 1)

    def __len__(self) -> int:
        return len(self.view)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size}, element={self.element})"

    def close(self) -> None:
        """Free the memory. Every other call raises BadInput then; compiled code must not use a view of it any more."""
        self.arena.close()
        for name in self._ends:
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        if name in self._ends:
            raise BadInput(f"{self!r} is closed", "make another one")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def _array(self) -> Arena:
        """Room for a ring's content, one for each thread."""
        if not hasattr(self._staging, "arena"):
            self._staging.arena = Arena(self.size * self.element)
        return self._staging.arena

    def _dequeue(self, count: int, bulk: int) -> np.ndarray:
        arena = self._array()
        taken = _dequeue(self.view, arena.address, max(count, 0), bulk)
        words = arena.words[: taken * self.element // 8].copy()
        return words if self.element == 8 else words.reshape(-1, 2)

    def _staged(self, values: Any) -> tuple[int, int]:
        """Address and number of `values`."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            given = values.astype(np.int64)
        elif self.element == 8:  # ints one by one: numpy would make floats of some
            given = np.array([signed64(one) for one in values], np.int64)
        else:
            given = np.array([[signed64(one) for one in pair] for pair in values], np.int64).reshape(-1, 2)
        shape = (len(given),) if self.element == 8 else (len(given), 2)
        if given.shape != shape:
            raise BadInput(f"elements of shape {given.shape}", f"this ring takes {shape}")
        arena, count = self._array(), len(given)
        given = given[: self.size]  # a bulk this large never fits; a burst is cut
        arena.words[: given.size] = given.reshape(-1)
        return arena.address, count
