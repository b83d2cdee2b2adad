"""The helper: a thread that makes the system calls of workers that make none.

It watches the rings themselves, which are level-triggered: nothing can be lost between two looks. It spins while a
worker turns, on a core that carries no worker. While all of them are parked it sleeps as they do, in poll(2) on all
their sockets: the packet that wakes a worker wakes it, too, or it looks 10 ms later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from libfp.engine.context import (
    LENDING,
    LIBC_POLL,
    LIBC_RECV,
    LIBC_SENDTO,
    LIBC_WRITE,
    PARKED,
    POLL_FDS,
    PUNT_RING,
    STATISTICS,
    STOPPED,
    Context,
)
from libfp.engine.handoff import rouse, sleeps, waits
from libfp.engine.loop import MSG_DONTWAIT, PARK_MILLISECONDS
from libfp.engine.punt import slots_of
from libfp.jit import Arena, call, entry, kernel, load64, load_acquire64, pause, store64, store_release64
from libfp.ports.rings import FD

_IDLE_TURNS = 2000


@kernel
def _gather(contexts, count, fds):  # type: ignore[no-untyped-def]
    """What poll(2) is to watch, to the array at `fds`: the sockets of the workers that run. How many there are."""
    n = 0
    for worker in range(count):
        context = Context(load64(contexts + 8 * worker))
        stopped = load_acquire64(load64(context.at + STATISTICS) + PARKED) == STOPPED
        for port in range(context.port_count):
            store64(fds + 8 * n, -1 if stopped else load64(load64(context.at + POLL_FDS) + 8 * port))
            n += 1
    return n


@entry
def _help(control, contexts, count, woken, fds):  # type: ignore[no-untyped-def]
    calls, idle = 0, 0
    while load_acquire64(control) == 0:
        before, parked = calls, 0
        for worker in range(count):
            context = Context(load64(contexts + 8 * worker))
            parked += int(load_acquire64(load64(context.at + STATISTICS) + PARKED) != 0)
            for port in range(context.port_count):
                rings = context.rings(port)
                if rings.wants_tx_kick():
                    call(load64(context.at + LIBC_SENDTO), load64(rings.at + FD), 0, 0, MSG_DONTWAIT, 0, 0)
                    calls += 1
                if rings.wants_rx_kick():
                    call(load64(context.at + LIBC_RECV), load64(rings.at + FD), 0, 0, MSG_DONTWAIT, 0, 0)
                    calls += 1
            ring = load64(context.at + PUNT_RING)
            if ring != 0 and slots_of(ring).sleeper():
                call(load64(context.at + LIBC_WRITE), load64(ring + 24), ring + 32, 8, 0, 0, 0)
                calls += 1
            lending = load64(context.at + LENDING)
            if lending != 0 and sleeps(lending):  # and packets are handed off to it
                if load64(woken + 8 * worker) == 0 and waits(context):
                    rouse(context, lending)
                    store64(woken + 8 * worker, 1)
                    calls += 1
            else:
                store64(woken + 8 * worker, 0)
        store_release64(control + 64, calls)
        idle = 0 if calls != before else idle + 1
        if idle > _IDLE_TURNS and parked == count:
            call(load64(load64(contexts) + LIBC_POLL), fds, _gather(contexts, count, fds), PARK_MILLISECONDS, 0, 0, 0)
        else:
            pause()


class Helper:
    """Kicks for the workers whose contexts it is given, pinned to `core` if one is named."""

    def __init__(self, contexts: Sequence[Context], core: int | None) -> None:
        ports = sum(context.port_count for context in contexts)
        self._arena = Arena(128 + 16 * len(contexts) + 8 * ports)
        self._at, self._core = self._arena.address, core
        for number, context in enumerate(contexts):
            store64(self._at + 128 + 8 * number, context.at)
        words = self._at + 128, len(contexts), self._at + 128 + 8 * len(contexts)
        self._arguments = (self._at, *words, words[2] + 8 * len(contexts))
        store64(self._at, 1)
        _help(*self._arguments)  # compiles, and returns at once
        store64(self._at, 0)
        self._thread = threading.Thread(target=self._run, name="libfp-helper", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})
        _help(*self._arguments)

    @property
    def calls(self) -> int:
        """System calls made so far."""
        return load_acquire64(self._at + 64)

    def close(self) -> None:
        """Stop it and wait for it."""
        store_release64(self._at, 1)
        self._thread.join()
        self._arena.close()
