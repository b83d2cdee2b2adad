"""Security associations (RFC 4301 section 4.4.2): what the control plane gives, and the table that stages read.

    with SaTable(state="/var/lib/libfp/ipsec.json") as sas:
        sas.add(Sa("office", "out", spi=0x1001, local="198.51.100.1", remote="203.0.113.9", key=Secret.from_hex(text)))
        sas.start()

ESP in tunnel mode (RFC 4303) with AES-GCM and a 16-byte ICV (RFC 4106), with extended sequence numbers or without. Each
SA is one worker's: `to_tunnel` and `to_sa` hand its packets to that one, so that its sequence numbers and its window
have one writer and its cipher one user.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from libfp.apps.ipsec import libcrypto, record, replay
from libfp.apps.ipsec.association import Sa, Secret, in_packet, outer_header
from libfp.apps.ipsec.state import StateFile
from libfp.errors import BadInput, TableFull
from libfp.jit import Arena, load64, store64, store_release64
from libfp.jit.memory import view
from libfp.jit.primitive import MASK64, signed64
from libfp.packet.headers import IPV6_SIZE
from libfp.tables.hash import Hash
from libfp.tables.per_worker import PerWorker

#: Sequence numbers reserved ahead: at least; at most, so that a crash never makes the peer infer a wrong high half, nor
#: costs much of 2^32; and how many times what was used since the last look.
_LEAST_AHEAD, _MOST_AHEAD, _AHEAD = 1 << 20, 1 << 24, 16
_LOOK, _WRITE = 0.05, 1.0  # seconds between looks, and at most between writes of what windows have moved on
_SPREAD = 0x9E3779B9

__all__ = ["Sa", "SaTable", "Secret"]


class _Turns(PerWorker[Any]):
    """How often each worker has turned its loop."""

    def make(self, worker: int) -> _Turn:
        return _Turn()


class _Turn:
    def __init__(self) -> None:
        self._arena = Arena(64)
        self.view = self._arena.address  # a word, which `record.SasView` counts up
        self.close = self._arena.close


class SaTable:
    """The SAs of one application, at most `capacity` at a time. Methods may be called from any thread.

    One that has been removed counts until all workers have turned their loops twice: then none has it in its hands, its
    key is wiped, and another may take its place.

    With `state`, the path of a file, sequence numbers and IVs go on where they were, see `state`: then somebody must
    call `keep`, or `start` a thread that does. Without, each start of the process begins at 1, which no peer with a
    window will take twice. IVs do not depend on the file alone: they begin at the clock's nanoseconds.

    `close`, after the application has ended, frees the ciphers, which wipes the keys.
    """

    def __init__(self, state: Path | str | None = None, capacity: int = 1024) -> None:
        self._functions = libcrypto.functions()
        self._file = StateFile(state) if state is not None else None
        self._lock = threading.RLock()
        self._spis = Hash(capacity=capacity)
        self._records = Arena(record.SIZE * capacity)
        self._shared = Arena(record.TUNNELS_AT + 8 * (capacity + 1))
        self.capacity, self._turns = capacity, _Turns()
        self._free = list(range(capacity))[::-1]  # numbers of records
        self._ciphers: dict[int, tuple[Sa, libcrypto.Cipher]] = {}  # by record, of removed SAs, too
        self._leaving: list[tuple[int, dict[int, int]]] = []  # those, and where each worker was then
        self._holders = 0  # of records, one after the other: what tickets tell apart
        self._sas: dict[str, Sa] = {}  # by digest
        self._tunnels: dict[str, int] = {}
        self._used = dict[str, int]()
        self._written = 0.0
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def __enter__(self) -> SaTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Sa]:
        with self._lock:
            return iter(list(self._sas.values()))

    def __len__(self) -> int:
        return len(self._sas)

    def tunnel(self, name: str) -> int:
        """The number of a tunnel, 1 and above; given to a new name. Raises TableFull."""
        with self._lock:
            if name not in self._tunnels and len(self._tunnels) == self.capacity:
                raise TableFull(f"more than {self.capacity} tunnels", "make the SaTable larger")
            return self._tunnels.setdefault(name, len(self._tunnels) + 1)

    def add(self, sa: Sa) -> None:
        """Use `sa` from now on. Raises BadInput if its SPI (inbound) or its key is another's, TableFull; and changes
        nothing then, but that its key is wiped."""
        try:
            with self._lock:
                self._add(sa)
        finally:
            sa._key.wipe()

    def _add(self, sa: Sa) -> None:
        if sa._key.wiped:  # by an `add`, whatever came of it
            raise BadInput(f"{sa!r} has been added before", "make another Sa")
        key = sa._key.use()
        digest = hmac.new(key, b"libfp " + sa.direction.encode() + sa.spi.to_bytes(4), hashlib.sha256).hexdigest()[:32]
        same = hmac.new(key, b"libfp", hashlib.sha256).digest()
        for other in self._sas.values():
            if other.direction == sa.direction == "in" and other.spi == sa.spi:
                raise BadInput(f"two inbound SAs with SPI {sa.spi:#x}", "give one of them another SPI")
            if other.key_digest == same:
                what = f"SAs {other.spi:#x} and {sa.spi:#x} have the same key"
                raise BadInput(what, "give each direction of each tunnel a key of its own")
        self._let_go()
        if not self._free:
            raise TableFull(f"more than {self.capacity} SAs", "make the SaTable larger")
        tunnel, number = self.tunnel(sa.tunnel), self._free[-1]
        at = self._records.address + record.SIZE * number
        before = self._file.entries.get(digest) if self._file else None
        cipher = libcrypto.Cipher(key, at, decrypting=sa.direction == "in")
        try:
            self._fill_in(sa, number, tunnel, before or {})
            sa.at, sa.digest, sa.key_digest = at, digest, same
            self._sas[digest] = sa
            if sa.direction == "out":
                self.keep()  # numbers that may be used, before there is anybody to use them
            self._know_local(in_packet(sa.local))
            if sa.direction == "in":
                self._spis[sa.spi] = at
        except BaseException:
            self._forget(sa)
            if self._file is not None and before is None:
                self._file.entries.pop(digest, None)
            sa.at = 0
            cipher.close()
            raise
        self._ciphers[self._free.pop()] = sa, cipher
        if sa.direction == "out":
            store_release64(self._shared.address + record.TUNNELS_AT + 8 * tunnel, at)

    def _forget(self, sa: Sa) -> None:
        self._sas.pop(sa.digest, None)
        self._used.pop(sa.digest, None)

    def _ticket(self, number: int) -> int:
        """A mark that nobody's packet has."""
        self._holders += 1
        return record.MARK | (self._holders & 0xFFFFFF) << 24 | number

    def _let_go(self) -> None:
        """Wipe the keys of removed SAs that no worker can have in its hands any more, and have their records back."""
        waiting = self._leaving
        self._leaving = []
        for number, since in waiting:
            now = self._now()
            if any(now.get(worker, turn + 2) < turn + 2 for worker, turn in since.items()):
                self._leaving.append((number, since))
                continue
            sa, cipher = self._ciphers.pop(number)
            cipher.close()
            sa.leave()
            self._free.append(number)

    def _now(self) -> dict[int, int]:
        """The turns of each worker, by the address of their count."""
        return {part.view: load64(part.view) for part in self._turns.parts}

    def _fill_in(self, sa: Sa, number: int, tunnel: int, before: dict[str, int]) -> None:
        """The record, but for the cipher. Nobody knows of it yet."""
        at = self._records.address + record.SIZE * number
        sequence, outbound = before.get("sequence", 0), sa.direction == "out"
        first = max(time.time_ns(), before.get("iv", 0) + 1)
        words = {
            record.SEQUENCE: sequence,
            record.LAST: MASK64 if sa.esn else 0xFFFFFFFF,
            record.LIMIT: sequence if self._file else (MASK64 if sa.esn else 0xFFFFFFFF),
            record.IV: first - sequence - 1,
            record.SPI: sa.spi,
            record.FLAGS: (record.ESN if sa.esn else 0) | (0 if outbound else record.INBOUND),
            record.SHARE: (number * _SPREAD) & 0xFFFFFFFF,
            record.TUNNEL: tunnel,
            record.OUTER: 20 if sa.local.version == 4 else IPV6_SIZE,
            record.TICKET: self._ticket(number),
        }
        words |= {record.COUNTERS + 8 * i: 0 for i in range(len(record.COUNTER_NAMES))}
        for offset, value in words.items():
            store64(at + offset, signed64(value & MASK64))
        view(at + record.LOCAL, 16)[:] = in_packet(sa.local)
        view(at + record.HEADER, IPV6_SIZE)[:] = outer_header(sa)
        if not outbound:
            replay.make(at + record.WINDOW, sa.window, sequence)

    def _know_local(self, address: bytes) -> None:
        shared, count = self._shared.address, load64(self._shared.address + record.LOCALS)
        known = bytes(view(shared + record.LOCAL_AT, 16 * count)) if count else b""
        if address in (known[at : at + 16] for at in range(0, len(known), 16)):
            return
        if count == record.MOST_LOCALS:
            raise TableFull(f"more than {count} local addresses", "let tunnels share some")
        view(shared + record.LOCAL_AT + 16 * count, 16)[:] = address
        store_release64(shared + record.LOCALS, count + 1)

    def remove(self, sa: Sa) -> None:
        """Use `sa` no more: its packets are dropped as "esp-unknown-spi" or "no-sa". KeyError if it is not there."""
        with self._lock:
            del self._sas[sa.digest]
            self._note(sa, exactly=sa.direction == "in")
            self._forget(sa)
            number = (sa.at - self._records.address) // record.SIZE
            if sa.direction == "in":
                del self._spis[sa.spi]
            else:
                word = self._shared.address + record.TUNNELS_AT + 8 * self._tunnels[sa.tunnel]
                others = [one.at for one in self._sas.values() if one.direction == "out" and one.tunnel == sa.tunnel]
                store_release64(word, others[-1] if others else 0)
                store_release64(sa.at + record.LIMIT, 0)
                store_release64(sa.at + record.TICKET, self._ticket(number))  # for what is on its way to its worker
            store_release64(sa.at + record.SPI, 0)  # for replicas that do not know yet
            self._leaving.append((number, self._now()))

    def _note(self, sa: Sa, exactly: bool) -> None:
        """Write into the entries, not yet the file, how far `sa` may have got."""
        if self._file is None:
            return
        sequence = sa.sequence
        if sa.direction == "out" and not exactly:
            sequence = load64(sa.at + record.LIMIT) & MASK64
        iv = (sequence + load64(sa.at + record.IV)) & MASK64 if sa.direction == "out" else 0
        self._file.entries[sa.digest] = {"sequence": sequence, "iv": iv}

    def keep(self) -> None:
        """Reserve sequence numbers where few are left, and have the state on disk first. About every 50 ms."""
        with self._lock:
            self._let_go()
            if self._file is None:
                return
            grants = list[tuple[Sa, int]]()
            moved = False
            for sa in self._sas.values():
                used = sa.sequence
                before, self._used[sa.digest] = self._used.get(sa.digest, used), used
                if sa.direction == "in":
                    moved |= self._file.entries.get(sa.digest, {}).get("sequence") != used
                    continue
                ahead = min(max(_AHEAD * (used - before), _LEAST_AHEAD), _MOST_AHEAD)
                limit, last = (load64(sa.at + offset) & MASK64 for offset in (record.LIMIT, record.LAST))
                if limit < last and limit - used < ahead // 2:
                    grants.append((sa, min(used + ahead, last)))
            if not grants and not (moved and time.monotonic() - self._written >= _WRITE):
                return
            for sa in self._sas.values():
                self._note(sa, exactly=False)
            for sa, limit in grants:
                self._file.entries[sa.digest] = {
                    "sequence": limit,
                    "iv": (limit + load64(sa.at + record.IV)) & MASK64,
                }
            self._file.write()
            self._written = time.monotonic()
            for sa, limit in grants:
                store_release64(sa.at + record.LIMIT, signed64(limit))

    def start(self, failed: Callable[[Exception], None] = lambda error: None) -> None:
        """`keep` now, and from now on in a thread. `failed` is told of an error there (a disk that is full): what has
        been reserved is used up then, and no packet leaves until it works again."""
        self.keep()

        def work() -> None:
            while not self._ending.wait(_LOOK):
                try:
                    self.keep()
                except Exception as error:
                    failed(error)

        if self._file is not None and self._thread is None:
            self._thread = threading.Thread(target=work, name="ipsec-state", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write down exactly how far each SA has got; free and wipe everything. The application has ended."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            try:
                if self._file is not None:
                    for sa in self._sas.values():
                        self._note(sa, exactly=True)
                    self._file.write()
            finally:
                if self._file is not None:
                    self._file.close()
                    self._file = None
                while self._ciphers:
                    _, (sa, cipher) = self._ciphers.popitem()
                    sa.at = 0
                    cipher.close()
                self._sas = {}

    def stage_tables(self) -> tuple[Any, ...]:
        """See `libfp.engine.decorator.Bindable`."""
        return self._spis, self._turns

    def stage_view(self, replica: Callable[[Any], Any]) -> record.SasView:
        """See `libfp.engine.decorator.Bindable`."""
        spis, turns = replica(self._spis), replica(self._turns)
        shared = self._shared.address
        return record.SasView(spis.cell, spis.buckets, self._records.address, shared, self._functions, turns)
