"""What packets create: memory of which each worker has its own, and which nobody else writes.

A table is the control plane's, and workers have replicas of it (`libfp.tables.table`). Flows, buckets of a rate
limiter, replay windows and counters are the other way round: the worker writes, the control plane reads. There is no
log and no master; a `PerWorker` is only the declaration, bound to stages as a table is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar


class Part(Protocol):
    """One worker's own."""

    @property
    def view(self) -> Any:
        """The native object that the worker's stages receive."""

    def close(self) -> None:
        """Free everything. The worker has ended."""


P = TypeVar("P", bound=Part)


class PerWorker(Generic[P]):
    """Base of what a stage is given to keep state in. Methods may be called from any thread.

        class Counters(PerWorker):
            def make(self, worker):
                return SomePart(...)     # has `view`, what stages of that worker receive, and `close`

    A part is made when the worker is, survives its stops and restarts, and is closed with the pipeline's end. If the
    class of its view has a method ``each_turn``, the worker's loop calls it once a turn, packets or not: what it
    returns says whether there is more to do (then the worker does not sleep yet).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[P] = []

    def make(self, worker: int) -> P:
        """The part of worker number `worker`."""
        raise NotImplementedError

    @property
    def parts(self) -> list[P]:
        """The parts there are, in the order in which the workers came: with one application, by worker number."""
        with self._lock:
            return list(self._parts)

    def join(self, worker: int) -> P:
        """Called by the engine: a worker is being made."""
        part = self.make(worker)
        with self._lock:
            self._parts.append(part)
        return part

    def leave(self, part: P) -> None:
        """Called by the engine: the worker has ended for good."""
        with self._lock:
            self._parts.remove(part)
        part.close()

    def stage_tables(self) -> tuple[PerWorker[P]]:
        """A stage that is given this needs a part of it for each worker."""
        return (self,)

    def stage_view(self, replica: Callable[[Any], Any]) -> Any:
        """What the stage is given: its worker's part, as compiled code sees it."""
        return replica(self)
