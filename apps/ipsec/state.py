"""What must outlive a gateway that has fixed keys: how far each SA's sequence numbers and IVs may have got.

With the same key, the same IV must never come twice (RFC 4106 section 2): it would give away both packets and the key
of the authentication. And the peer's window drops what it takes for old. So numbers are reserved ahead: they are
written down, and on disk, before a packet may use them; whatever ends the process, the next start goes on above.

A file of JSON that is replaced as a whole, and a lock beside it that one process holds. SAs are known by a digest of
their key, so the numbers of one whose key has changed begin anew; entries are never forgotten, so that a key which
comes back later goes on, too. There is nothing in it that helps to find a key.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

from libfp.errors import AlreadyRunning, BadInput

_VERSION = 1
_FIELDS = ("sequence", "iv")


class StateFile:
    """The file at `path`, made if there is none; `entries` by digest. Held until `close`.

    Raises BadInput where it cannot be used safely, AlreadyRunning while another process holds it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = self._open_lock()
        try:
            self.entries = self._read()
            self.write()  # say so now, if it cannot be
        except BaseException:
            os.close(self._lock)
            raise

    def _open_lock(self) -> int:
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(self.path, error.strerror) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            what = f"the IPsec state {self.path} is in use by another process"
            raise AlreadyRunning(what, "end that one, or give this one a file of its own") from None
        return file

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unusable(self.path, error.strerror) from None
        if not stat.S_ISREG((status := os.fstat(file)).st_mode):
            os.close(file)
            raise _unusable(self.path, "it is no file")
        with open(file, "rb") as opened:
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise _unusable(self.path, "others can read or write it, or own it")
            try:
                return _checked(json.loads(opened.read()))
            except (ValueError, TypeError, KeyError, AttributeError):
                what = f"{self.path} does not hold IPsec sequence numbers"
                remedy = "restore it; or give all SAs new keys, on both sides, and remove it"
                raise BadInput(what, remedy) from None

    def write(self) -> None:
        """Replace the file by `entries`; on disk when this returns. Raises BadInput."""
        partial = self.path.with_name(self.path.name + ".new")
        text = json.dumps({"version": _VERSION, "sas": self.entries}, indent=1)
        try:
            partial.unlink(missing_ok=True)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise _unusable(self.path, error.strerror) from None

    def close(self) -> None:
        """Let go of it. The lock's own file stays: removing it would let two processes hold two."""
        os.close(self._lock)


def _unusable(path: Path, why: str | None) -> BadInput:
    return BadInput(f"cannot keep IPsec state in {path} ({why})", "name a file in a folder that is yours alone")


def _checked(found: Any) -> dict[str, dict[str, int]]:
    if found["version"] != _VERSION:
        raise ValueError
    entries: dict[str, dict[str, int]] = found["sas"]
    for entry in entries.values():
        for field in _FIELDS:
            if type(entry[field]) is not int or not 0 <= entry[field] < 1 << 64:
                raise ValueError
    return entries
