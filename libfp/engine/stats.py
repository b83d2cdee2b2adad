"""The statistics of a running instance: a memfd the workers count into and other processes read.

It is called ``libfp:NAME`` and found through ``/proc/*/fd``, so nothing can be left behind by a process that was
killed. Layout: magic, length of the description, the description (JSON), then a block of whole pages a worker: its
counters, 64 bytes a port, 8 a reason (`libfp.engine.context`, `libfp.ports.rings`). Every word has one writer and is
read as it stands.

This module loads neither numba nor the rest of the engine: ``fp stats`` uses it.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from libfp.errors import AlreadyRunning, NoSuchInstance

_MAGIC = b"libfp 01"
_DESCRIPTION = 16
_HEADER = 64 * 1024
_PREFIX = "libfp:"
PAGE = 4096
_LOOKS = 5  # for an instance that begins to run a program, which has its page for a moment
_TRIES = 100  # two milliseconds apart, for a description that is being written


class Counters(Mapping[str, int]):
    """A snapshot. Indexed by reason, summed over workers (0 for a reason that never occurred):
    ``counters["denied"]``; and in parts:

    `drops`, `punts` by reason; `ports`, a dict a port; `workers`, a dict a worker, with these sums too;
    `received`, `forwarded`, `dropped`, `punted`, `consumed` packets in all.
    """

    def __init__(self, description: dict[str, Any], words: list[list[int]]) -> None:
        names, fields = description["ports"], description["port_counters"]
        first, stride = description["first_port"] // 8, description["port_stride"] // 8
        self.workers = [dict(zip(description["worker_counters"], block, strict=False)) for block in words]
        self.ports: dict[str, dict[str, int]] = {}
        for p, name in enumerate(names):
            at = first + p * stride
            self.ports[name] = {field: sum(block[at + k] for block in words) for k, field in enumerate(fields)}
        at = first + len(names) * stride
        kinds = [kind for kind, _ in description["reasons"]]
        rx, tx = (fields.index(name) if name in fields else -1 for name in ("rx_packets", "tx_packets"))
        for worker, block in zip(self.workers, words, strict=True):
            for name, k in (("received", rx), ("forwarded", tx)):
                worker[name] = sum(block[first + p * stride + k] for p in range(len(names))) if k >= 0 else 0
            for name, kind in (("dropped", "drop"), ("punted", "punt")):
                worker[name] = sum(block[at + n] for n, one in enumerate(kinds) if one == kind)
        self.drops: dict[str, int] = {}
        self.punts: dict[str, int] = {}
        for number, (kind, reason) in enumerate(description["reasons"]):
            total = sum(block[at + number] for block in words)
            if total:
                (self.drops if kind == "drop" else self.punts)[reason] = total
        self.received = sum(port["rx_packets"] for port in self.ports.values())
        self.forwarded = sum(port["tx_packets"] for port in self.ports.values())
        self.dropped, self.punted = sum(self.drops.values()), sum(self.punts.values())
        self.consumed = sum(worker["consumed"] for worker in self.workers)
        self._reasons = {reason for _, reason in description["reasons"]}

    def __getitem__(self, reason: str) -> int:
        if reason not in self._reasons:
            raise KeyError(reason)
        return self.drops.get(reason, 0) + self.punts.get(reason, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.drops, *self.punts}))

    def __len__(self) -> int:
        return len({*self.drops, *self.punts})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "received": self.received,
            "forwarded": self.forwarded,
            "dropped": self.dropped,
            "punted": self.punted,
            "consumed": self.consumed,
            "drops": self.drops,
            "punts": self.punts,
            "ports": self.ports,
            "workers": self.workers,
        }


def _read(page: mmap.mmap) -> tuple[dict[str, Any], list[list[int]]]:
    description = _describe(page)
    size = description["block"]
    words = [
        list(struct.unpack_from(f"<{size // 8}Q", page, _HEADER + w * size)) for w in range(description["workers"])
    ]
    return description, words


def _describe(page: mmap.mmap) -> dict[str, Any]:
    """The description, read again as long as it changes under the reader's eyes: it may just be being written."""
    for _ in range(_TRIES):
        head = page[:_DESCRIPTION]
        text = page[_DESCRIPTION : _DESCRIPTION + min(struct.unpack_from("<Q", head, 8)[0], _HEADER)]
        if head[:8] == _MAGIC and head + text == page[: len(head) + len(text)]:
            found: dict[str, Any] = json.loads(text)
            return found
        if head[:8] not in (_MAGIC, b"\0" * 8):
            break
        time.sleep(0.002)
    raise NoSuchInstance("the statistics page is of another version of libfp", "restart that instance")


class StatsPage:
    """The writer's side: the page of one instance, removed with the process.

    `description` has at least `ports`, `reasons`, `workers`, `worker_counters`, `port_counters`, `first_port`,
    `port_stride`, and perhaps `room` (for how many workers); raises AlreadyRunning if another process holds the name.
    """

    def __init__(self, name: str, description: dict[str, Any]) -> None:
        if name in instances():
            pid = instances()[name][0]
            raise AlreadyRunning(f"an instance named {name!r} is running (process {pid})", "choose another --name")
        words = description["first_port"] + len(description["ports"]) * description["port_stride"]
        block = -(-(words + 8 * len(description["reasons"])) // PAGE) * PAGE
        self.name = name
        self.description = {**description, "name": name, "pid": os.getpid(), "block": block}
        self.fd = os.memfd_create(_PREFIX + name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _HEADER + block * max(description["workers"], description.get("room", 0)))
        self.page = mmap.mmap(self.fd, 0)
        self.describe()

    def describe(self, **more: Any) -> None:
        """Add to the description."""
        self.description.update(more)
        text = json.dumps(self.description).encode()
        if len(text) > _HEADER - _DESCRIPTION:
            raise ValueError(f"a description of {len(text)} bytes")
        self.page[:8] = b"\0" * 8  # a reader that comes now tries again
        self.page[_DESCRIPTION : _DESCRIPTION + len(text)] = text
        self.page[8:16] = struct.pack("<Q", len(text))
        self.page[:8] = _MAGIC

    def block_offset(self, worker: int) -> int:
        """Where the worker's block begins in the page."""
        return _HEADER + worker * int(self.description["block"])

    def counters(self) -> Counters:
        return Counters(*_read(self.page))

    def close(self) -> None:
        """Let go of the name; the memory goes with the last mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class StatsReader:
    """A running instance's statistics, read from outside: `name`, `pid`, `description`, `counters()`."""

    def __init__(self, name: str, pid: int, path: str) -> None:
        self.name, self.pid = name, pid
        fd = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size == 0:
                raise NoSuchInstance(f"instance {name!r} is just starting", "look again")
            self._page = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.description = _read(self._page)[0]

    def counters(self) -> Counters:
        return Counters(*_read(self._page))

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return os.path.exists(f"/proc/{self.pid}")

    def close(self) -> None:
        self._page.close()


def instances() -> dict[str, tuple[int, str]]:
    """The running instances this user may see: name -> (process id, path of its page)."""
    found: dict[str, tuple[int, str]] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{fd}"
                target = os.readlink(path)
                # whoever only reads it, as `fp stats` does, is not the instance
                if target.startswith(f"/memfd:{_PREFIX}") and os.lstat(path).st_mode & stat.S_IWUSR:
                    found[target.removeprefix(f"/memfd:{_PREFIX}").removesuffix(" (deleted)")] = (int(pid), path)
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


def attach(name: str | None = None) -> StatsReader:
    """Open the statistics of the instance `name`, or of the only one. Raises NoSuchInstance naming those there are."""
    for _ in range(_LOOKS):
        running = instances()
        if name is None and len(running) == 1:
            name = next(iter(running))
        if name not in running:
            break
        try:
            return StatsReader(name, *running[name])
        except FileNotFoundError:  # it has ended, or the process that was found was a program that it began to run
            pass
    else:
        raise NoSuchInstance(f"instance {name!r} has just ended", "start it again")
    there = ", ".join(sorted(running)) or "none"
    if name is None:
        what = "no libfp instance is running" if not running else f"several instances are running: {there}"
        raise NoSuchInstance(what, "name one" if running else "start one, and look as the same user or as root")
    raise NoSuchInstance(f"no instance named {name!r} is running (there are: {there})", "name one of those")
