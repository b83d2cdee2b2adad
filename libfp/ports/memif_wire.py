"""One port's connection, as its control thread and its workers share it: published, withdrawn, and only then freed.

A worker goes by the link in the LINK word of its block until it has seen another there, and says so in SEEN
(`libfp.ports.memif_rings`). So what has been withdrawn is kept until every worker has seen that, and there is no new
connection before: at any time a worker can have at most one link in use and one yet to be seen. A worker that stands
sees nothing: its peer waits.
"""

from __future__ import annotations

import logging
import threading
import time

from libfp.errors import Error, PeerLied, PeerUnsuitable
from libfp.jit import load16, load64, load_acquire16, load_acquire64, store_release64
from libfp.ports.memif_memory import LINK_TX, NO_INTERRUPT, OURS, Share
from libfp.ports.memif_rings import BROKEN, LINK, SEEN
from libfp.ports.memif_session import Offer, Session

log = logging.getLogger("libfp.memif")

SEEN_SECONDS = 0.2  # for workers that run to have seen a change
_kept: list[Session] = []  # of workers that never came back: what their threads could touch stays


class Wire:
    """The connection of one port, of which `blocks` are the workers' blocks by queue. Thread-safe."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.blocks: dict[int, int] = {}
        self.session: Session | None = None
        #: Of the pool of buffers that the port shares with others.
        self.share: Share | None = None
        #: What went wrong last, and how often the peer has come.
        self.error: Error | None = None
        self.connections = 0
        self._retired: list[Session] = []
        self._kicked: dict[int, int] = {}
        self._lock = threading.RLock()

    @property
    def connected(self) -> bool:
        """Whether there is a peer, and every worker knows it."""
        with self._lock:
            return self.session is not None and self._all_seen()

    def attach(self, queue: int, block: int) -> None:
        with self._lock:
            self.blocks[queue] = block

    def detach(self, queue: int) -> None:
        """The worker of `queue` does not run, and will not."""
        with self._lock:
            self.blocks.pop(queue, None)
            self.sweep()

    def publish(self, session: Session) -> None:
        """Let the workers use `session`, which is connected."""
        with self._lock:
            self.session, self.error = session, None
            self.connections += 1
            self._kicked.clear()
            for queue, block in self.blocks.items():
                store_release64(block + LINK, session.links[queue].address)
        log.info("%s: connected with %s", self.offer.name, session.peer or "a peer")

    def withdraw(self, session: Session) -> None:
        """Let nobody use `session` any more, and close it as soon as nobody does."""
        with self._lock:
            if self.session is not session:
                if session not in self._retired and session not in _kept:
                    session.close()  # it was never published
                return
            self.session = None
            for block in self.blocks.values():
                store_release64(block + LINK, 0)
            self._retired.append(session)
            self.sweep()

    def _all_seen(self) -> bool:
        return all(load_acquire64(block + SEEN) == load64(block + LINK) for block in self.blocks.values())

    def sweep(self) -> bool:
        """Free what has been withdrawn and is not used any more; whether nothing is left of it."""
        with self._lock:
            if self._retired and self._all_seen():
                while self._retired:
                    self._retired.pop().close()
            return not self._retired

    def wait_free(self) -> None:
        """Until there may be a new connection. Raises PeerUnsuitable if there is one, or a worker stands still."""
        if self.session is not None:
            raise PeerUnsuitable("it has a peer already", "one peer an id")
        deadline = time.monotonic() + SEEN_SECONDS
        while not (self.sweep() and self._all_seen()):
            if time.monotonic() > deadline:
                raise PeerUnsuitable("its workers do not run", "come back later")
            time.sleep(0.0005)

    def check(self) -> None:
        """Raises PeerLied if a worker has met an index, or a buffer to send by, that cannot be."""
        with self._lock:
            if self.session is None:
                return
            for queue, link in enumerate(self.session.links):
                if queue in self.blocks and load_acquire64(self.blocks[queue] + BROKEN) == link.address:
                    raise PeerLied(f"an index or a buffer of queue {queue} that cannot be", "the connection is closed")

    def interrupt(self) -> bool:
        """Wake the peer, for each queue on which it wants that and something has been sent; whether it ever wants it.

        A system call, which workers do not make.
        """
        wanted = False
        with self._lock:
            if self.session is None:
                return False
            for queue, link in enumerate(self.session.links):
                if load16(link.flags[LINK_TX]) & NO_INTERRUPT:
                    continue
                wanted = True
                sent = load_acquire16(load64(link.address + LINK_TX + OURS))
                if sent != self._kicked.get(queue, 0):
                    self._kicked[queue] = sent
                    self.session.kick(queue)
        return wanted

    def failed(self, error: Error) -> None:
        """Say it once, however often it is tried again."""
        named = type(error)(f"{self.offer.name}: {error.what}", error.remedy)
        if str(named) != str(self.error):
            log.warning("%s", named)
        self.error = named

    def close(self) -> None:
        """Give everything up; what a worker that never came back could still use is kept for ever."""
        with self._lock:
            if self.session is not None:
                self.withdraw(self.session)
            if self.sweep() and self.share is not None:
                self.share.pool.leave()
            self.share = None
            _kept.extend(self._retired)
            self._retired.clear()
