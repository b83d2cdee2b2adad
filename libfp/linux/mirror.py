"""The mirror: a thread that keeps `Routes` what Linux has in its links, addresses, neighbours, settings and routes.

Two states. SYNCING: dump everything, replay the notifications that arrived meanwhile, act on what differs from what was
known. LIVE: act on notifications. Whatever goes wrong (notifications lost, a message that cannot be) leads back to
SYNCING, which is an ordinary event: the tables keep their contents until the new dump is whole, then change where it
differs. Where a dump cannot be had at all, or the tables are full, every packet is left to Linux until it can.

Many changes are written in steps (`libfp.linux.fib`), and between two of them the mirror listens. Packets may be
forwarded from the first step on: no earlier, since of a dump that is not whole nobody knows what longer prefix is to
come; and not before the listener, which knows of policies, has been told what the dump says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from libfp.errors import Error, TableFull
from libfp.linux import rtnetlink as rt
from libfp.linux.fib import Fib
from libfp.linux.netlink import Interrupted, Malformed, Message, Netlink, Overrun, readable
from libfp.linux.state import Changes, State
from libfp.stages.routes import Routes

log = logging.getLogger("libfp.mirror")

SYNCING, LIVE, FAILED = "syncing", "live", "failed"
GROUPS = (
    rt.GROUP_LINK,
    rt.GROUP_NEIGH,
    rt.GROUP_TC,
    rt.GROUP_IPV4_ADDRESS,
    rt.GROUP_IPV4_ROUTE,
    rt.GROUP_IPV4_RULE,
    rt.GROUP_IPV4_NETCONF,
    rt.GROUP_IPV6_ADDRESS,
    rt.GROUP_IPV6_ROUTE,
    rt.GROUP_IPV6_RULE,
    rt.GROUP_IPV6_NETCONF,
    rt.GROUP_NEXTHOP,
)
# In this order: what a route means depends on the rest. The bodies are struct ifinfomsg, ifaddrmsg, netconfmsg, ...
_ROUTES = "=BBBBBBBBI"  # struct rtmsg
DUMPS = (
    ("links", rt.RTM_GETLINK, bytes(16)),
    ("addresses", rt.RTM_GETADDR, struct.pack("=BBBBI", rt.AF_INET, 0, 0, 0, 0)),
    ("settings", rt.RTM_GETNETCONF, struct.pack("=B3x", rt.AF_INET)),
    ("neighbours", rt.RTM_GETNEIGH, bytes(12)),
    ("routes", rt.RTM_GETROUTE, struct.pack(_ROUTES, rt.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)),
)
DUMPS6 = (
    ("addresses", rt.RTM_GETADDR, struct.pack("=BBBBI", rt.AF_INET6, 0, 0, 0, 0)),
    ("settings", rt.RTM_GETNETCONF, struct.pack("=B3x", rt.AF_INET6)),
    ("routes", rt.RTM_GETROUTE, struct.pack(_ROUTES, rt.AF_INET6, 0, 0, 0, 0, 0, 0, 0, 0)),
)
BUFFER = 64 << 20  # bytes of notifications that may wait while a full table is taken in
BATCH = 4096  # datagrams acted on together at most
# Seconds before each dump, if those before it changed while they ran, or notifications were lost meanwhile: the storm
# may pass, and forwarding goes on. After the last, it is taken as it is and another follows.
PATIENCE = (0.0, 0.0, 0.02, 0.1, 0.3)
RETRY = 1.0  # seconds between dumps that follow one another without need for haste

T = TypeVar("T")
Job = tuple[Callable[[], Any], Future[Any]]
Listener = Callable[[State, Changes], None]
Progress = Callable[[str, int, int], None]


class Mirror:
    """Mirrors the calling thread's network namespace into `routes`, from `start` to `close`.

    `ports` maps link indexes to port numbers. `listener` is called in the mirror's thread with the new state for each
    batch of changes, before they are in the tables, `on_suspend` when `suspended` has changed. `progress` is told of
    the first synchronisation, there too: ("routes", done, total), where the total is 0 while it is not known.
    """

    def __init__(
        self,
        routes: Routes,
        ports: Mapping[int, int],
        listener: Listener | None = None,
        on_suspend: Callable[[], None] | None = None,
        progress: Progress | None = None,
        buffer: int = BUFFER,
    ) -> None:
        self.fib = Fib(routes, ports)
        self.phase = SYNCING
        self.error: BaseException | None = None
        self.resyncs = 0  # dumps taken in
        self._listener = listener
        self._on_suspend = on_suspend
        self._progress = progress
        self._buffer = buffer
        self._watched: dict[Netlink, Callable[[], None]] = {}
        self._every: list[tuple[float, Callable[[], None]]] = []
        self._notifications = Netlink(groups=GROUPS, buffer=buffer)
        self._pending: deque[bytes] = deque()  # datagrams
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._waiting: list[threading.Event] = []
        self._jobs: list[Job] = []
        self._held: tuple[list[threading.Event], list[Job]] = [], []  # of these, those who wait for what is written now
        self._resync_at: float | None = 0.0  # when the next dump is due, on the monotonic clock; None: not at all
        self._stale = False  # the notification socket has lost something
        self._suspended: dict[str, str] = {}
        self._stopped = self._closing = False
        self._begun, self._synced = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="libfp-mirror", daemon=True)

    @property
    def state(self) -> State:
        """What is known of Linux. Belongs to the mirror's thread: look, do not touch."""
        return self.fib.state

    def every(self, seconds: float, function: Callable[[], None]) -> None:
        """Have `function` called in the mirror's thread about every so many seconds; before `start`."""
        self._every.append((seconds, function))

    def watch(self, netlink: Netlink, function: Callable[[], None]) -> None:
        """Have `function` called in the mirror's thread when this socket has something to read; before `start`."""
        self._watched[netlink] = function

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close its sockets. The tables keep their contents."""
        self._closing = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._notifications.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def wait_begun(self, timeout: float | None = None) -> None:
        """Wait until the first routes are in the tables and packets may be forwarded; raises as `wait_synced` does."""
        self._wait(self._begun, timeout)

    def wait_synced(self, timeout: float | None = None) -> None:
        """Wait until the first dump has been taken in. Raises what went wrong with it, TimeoutError after `timeout`."""
        self._wait(self._synced, timeout)

    def _wait(self, event: threading.Event, timeout: float | None) -> None:
        if not event.wait(timeout):
            raise TimeoutError("the first synchronisation with Linux is not over")
        if self.error is not None:
            raise self.error

    @property
    def synced(self) -> bool:
        """Whether the first dump has been taken in."""
        return self._synced.is_set() and self.error is None

    def barrier(self, timeout: float = 10.0) -> None:
        """Return when everything that Linux did before this call is in the tables. Raises TimeoutError."""
        done = threading.Event()
        with self._lock:
            if self._stopped:
                raise self.error or Error("the mirror is closed")
            self._waiting.append(done)
        os.eventfd_write(self._wake, 1)
        if not done.wait(timeout):
            raise TimeoutError(f"the mirror has not caught up within {timeout:g} s")

    def resync(self) -> None:
        """Have everything dumped again, and return at once; `barrier` waits for it."""
        self._resync_at = 0.0
        os.eventfd_write(self._wake, 1)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Have `function` called in the mirror's thread, when what Linux has told by then is in the tables."""
        job: Future[T] = Future()
        with self._lock:
            if self._stopped:
                raise self.error or Error("the mirror is closed")
            self._jobs.append((function, job))
        os.eventfd_write(self._wake, 1)
        return job

    def call(self, function: Callable[[], T], timeout: float | None = None) -> T:
        """`submit`, and wait for the result. Raises what it raises, TimeoutError after so many seconds."""
        return self.submit(function).result(timeout)

    # -- in the thread

    def fresh(self) -> State:
        """A new copy of the kernel's state, to compare with `state`: both know what was told until now.

        Raises as a dump does; forwarding, and `state`, are not disturbed.
        """
        fresh = self._dump()
        told = list(self._pending)
        self._act()
        while self.fib.busy:
            self._step()
        self._pending.extend(told)
        self._replay(fresh, Changes())
        return fresh

    @property
    def suspended(self) -> bool:
        """Whether every packet is left to Linux at the moment."""
        return bool(self._suspended) or not self._begun.is_set() or self.error is not None

    def suspend(self, reason: str, why: str) -> None:
        """Leave all packets to Linux until `resume(reason)`; in the mirror's thread only. Logged when it is new."""
        if self._suspended.get(reason) != why:
            log.warning("Linux forwards alone: %s", why)
        self._suspended[reason] = why
        if not self.fib.publisher.suspended:
            self.fib.publisher.suspend(True)
            if self._on_suspend is not None:
                self._on_suspend()

    def resume(self, reason: str) -> None:
        """The reason has gone; when it was the last, forwarding goes on. In the mirror's thread only."""
        if self._suspended.pop(reason, None) is not None and not self._suspended:
            log.warning("forwarding again")
            self.fib.publisher.suspend(False)
            if self._on_suspend is not None:
                self._on_suspend()

    def _run(self) -> None:
        due = [(time.monotonic() + seconds, seconds, function) for seconds, function in self._every]
        try:
            while not self._closing:
                if self._resync_at is not None and time.monotonic() >= self._resync_at:
                    self._synchronise()
                moments = [moment for moment, _, _ in due]
                if self._resync_at is not None:
                    moments.append(self._resync_at)
                self._turn(max(0.0, min(moments, default=time.monotonic() + 60.0) - time.monotonic()))
                for i, (moment, seconds, function) in enumerate(due):
                    if time.monotonic() >= moment and self.phase != FAILED:
                        due[i] = (time.monotonic() + seconds, seconds, function)
                        function()
        except BaseException as error:
            self.error, self.phase = error, FAILED
            if self._begun.is_set() and not self._closing:  # otherwise wait_begun raises it
                log.exception("the mirror has stopped")
                self.suspend("mirror", f"the mirror has stopped: {error}")
        finally:
            self._begun.set()
            self._synced.set()
            with self._lock:
                self._stopped = True
            self._hold()
            waiting, jobs = self._held
            for event in waiting:
                event.set()
            for _, job in jobs:
                job.set_exception(Error("the mirror is closed"))

    def _hold(self) -> None:
        """Note who waits by now."""
        with self._lock:
            self._held[0].extend(self._waiting)
            self._held[1].extend(self._jobs)
            self._waiting, self._jobs = [], []

    def _turn(self, timeout: float) -> None:
        """Wait for something, take in what is there, write some of it, and let those who wait for all of it go on."""
        watched = [netlink.fileno() for netlink in self._watched]
        found = readable([self._notifications.fileno(), self._wake, *watched], 0.0 if self.fib.busy else timeout)
        if self._wake in found:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        self._hold()
        try:
            while self._receive():
                self._act()
        except (Overrun, Malformed) as error:
            log.info("synchronising again: %s", error)
            self._stale, self._resync_at = True, 0.0
        if any(self._held) and self._resync_at == 0.0:
            self._synchronise()
        for netlink, function in self._watched.items():
            if netlink.fileno() in found or (self._held[0] and netlink.ready()):
                function()
        if self.fib.busy:
            self._step()
        if self.fib.busy:
            return
        (waiting, jobs), self._held = self._held, ([], [])
        for event in waiting:
            event.set()
        for job in jobs:
            self._do(*job)

    def _do(self, function: Callable[[], Any], job: Future[Any]) -> None:
        try:
            job.set_result(function())
        except Exception as error:  # the caller's to deal with
            job.set_exception(error)
        if self._stale:
            self._resync_at = 0.0

    def _receive(self) -> bool:
        """Take waiting datagrams, a batch at most, off the notification socket; False when there was none."""
        for taken in range(BATCH):
            datagram = self._notifications.datagram(wait=False)
            if datagram is None:
                return taken > 0
            self._pending.append(bytes(datagram))
        return True

    def _act(self) -> None:
        changes = Changes()
        try:
            self._replay(self.state, changes)
        finally:  # what came before a message that cannot be has changed the state, and counts
            self._update(self.state, changes)
            self.state.numbering.tidy()

    def _replay(self, state: State, changes: Changes) -> None:
        try:
            while self._pending:
                state.take(self._pending.popleft(), changes)
        finally:
            state.harvest(changes)
        if changes.resync and self._resync_at is None:
            self._resync_at = time.monotonic() + RETRY

    def _update(self, state: State, changes: Changes) -> None:
        if not changes:
            return
        self.fib.begin(state, changes)
        if self._listener is not None:
            self._listener(state, changes)
        self._step()

    def _step(self) -> None:
        try:
            self.fib.step()
        except TableFull as error:
            if not self._begun.is_set():  # at start it is an error
                raise
            self.suspend("full", str(error))
        else:
            if not self.fib.busy:
                self.resume("full")
            if self.fib.fits:
                self._begin()
        if not self._synced.is_set() and self._progress is not None:
            self._progress("routes", self.fib.done, self.fib.done + self.fib.left)
        if not self.fib.busy and self.phase == SYNCING:
            self._live()

    def _begin(self) -> None:
        """Have packets forwarded: what finds a route in the tables finds the right one."""
        if not self._begun.is_set():
            self._begun.set()
            if self._on_suspend is not None:
                self._on_suspend()

    def _live(self) -> None:
        """What has been dumped is in the tables."""
        self._begin()
        self.phase = LIVE
        self.resume("mirror")
        self._synced.set()

    def _synchronise(self) -> None:
        """One dump: SYNCING, then LIVE when it is in the tables, or another attempt soon."""
        self.phase, self._resync_at = SYNCING, None
        try:
            fresh = self._dump()
            self._replay(fresh, Changes())
            self.resyncs += 1
            self._update(fresh, fresh.differences(self.state))  # which are never none
        except (Error, OSError) as error:
            if self._closing or not self._begun.is_set():
                raise
            self.phase, self._resync_at = FAILED, time.monotonic() + RETRY
            self.suspend("mirror", f"no dump of the kernel's state: {error}")
            return

    def _dump(self) -> State:
        """Everything, from the kernel; notifications that arrive meanwhile are left in `_pending`."""
        state = State(self.state)
        wanted = DUMPS + (DUMPS6 if os.path.exists("/proc/sys/net/ipv6") else ())
        for pause in PATIENCE:
            time.sleep(pause)
            try:
                if self._stale:
                    self._reopen()
                state, whole = State(self.state), True
                with Netlink(buffer=1 << 21) as dumps:
                    for name, kind, body in wanted:
                        whole &= self._take(state, dumps, name, kind, body)
                if whole:
                    return state
            except Overrun as error:
                log.info("synchronising again: %s", error)
                self._stale = True
        if self._stale:
            raise Overrun("netlink notifications come faster than they can be taken in")
        # It changes all the time. What this dump missed, if anything, comes with the next.
        self._resync_at = time.monotonic() + RETRY
        return state

    def _take(self, state: State, dumps: Netlink, name: str, kind: int, body: bytes) -> bool:
        """One dump into `state`; False when something changed while it ran. Raises Overrun, Malformed, OSError."""
        changes = Changes()

        def take(datagram: memoryview, sequence: int) -> tuple[int, list[Message]]:
            return state.take(datagram, changes, dump=True, sequence=sequence)

        try:
            for _ in dumps.dump_into(take, kind, body):
                self._receive()
                if self._progress is not None and not self._synced.is_set():
                    self._progress(name, len(state.rib) + len(state.rib6), 0)
                if self._closing:
                    raise Error("closed while synchronising")
        except Interrupted:
            return False
        return True

    def _reopen(self) -> None:
        """A new notification socket: after an overrun, what the old one still holds is older than what it lost."""
        fresh = Netlink(groups=GROUPS, buffer=self._buffer)
        self._notifications.close()
        self._notifications, self._stale = fresh, False
        self._pending.clear()
