"""How a running instance answers other processes of its user: JSON lines over a unix socket in the abstract namespace.

    application.control.add("verify", handler)          in the instance
    with connect("edge") as instance:                    in another process
        print(instance.ask("verify", limit=10))

A request is ``{"command": NAME, ...}``; a handler is called with it and with the `Caller`. What it returns, a dict, is
the answer; a generator is one answer in parts (``instance.parts("verify")``), and what it returns is the last. A
`libfp.Error` that it raises is raised at the caller, of the same type. Handlers run in one thread of the instance's
process, one at a time; the workers do not know of it. A generator is resumed between other requests: a long one
delays nobody for longer than one of its steps.

The name is made of the process id and the instance's name, so a killed process leaves nothing behind. Both sides look
at SO_PEERCRED (unix(7)): only the same user, and root, may ask, and only such a process may answer.

This module loads neither numba nor the rest of the engine.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import hashlib
import json
import logging
import os
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

from libfp import errors
from libfp.engine.stats import StatsReader, attach
from libfp.errors import BadInput, Error, MissingCapability, NoAnswer, NoSuchInstance

log = logging.getLogger("libfp.control")

LINE = 64 * 1024  # bytes of a request at most
BACKLOG = 1 << 20  # bytes not yet read by a caller, after which a generator waits for it
MOST = 1 << 24  # and after which the caller is dropped
FILES = 253  # descriptors in one message (SCM_MAX_FD)
TIMEOUT = 5.0
CLONE_NEWNET = 0x40000000

Handler = Callable[[dict[str, Any], "Caller"], "dict[str, Any] | Generator[dict[str, Any], None, Any] | None"]


def address(pid: int, name: str) -> str:
    """The abstract name on which process `pid` answers for its instance `name`."""
    return f"\0libfp/{pid}/{hashlib.blake2s(name.encode(), digest_size=8).hexdigest()}"


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user id of the other end."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class Caller:
    """The instance's side of one connection: who it is, and what it wants done when it goes away."""

    def __init__(self, connection: socket.socket, pid: int, uid: int) -> None:
        self.connection, self.pid, self.uid = connection, pid, uid
        self.pending: deque[Generator[dict[str, Any], None, Any]] = deque()
        self._received = b""
        self._out: deque[tuple[bytes, list[int]]] = deque()
        self._files: list[int] = []
        self._closers: list[Callable[[], None]] = []

    def attach(self, *files: int) -> None:
        """Send these file descriptors with the answer; the caller gets duplicates."""
        self._files += files

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call this when the connection ends, for whatever reason, and when the instance does."""
        self._closers.append(callback)

    @property
    def waiting(self) -> int:
        """Bytes that it has not yet taken."""
        return sum(len(data) for data, _ in self._out)

    def lines(self) -> list[bytes]:
        """The whole lines that have come. Raises EOFError at the end, BadInput for one that is too long."""
        data = self.connection.recv(LINE)
        if not data:
            raise EOFError
        *whole, self._received = (self._received + data).split(b"\n")
        if len(self._received) > LINE:
            raise BadInput(f"a request of more than {LINE} bytes")
        return whole

    def say(self, answer: dict[str, Any]) -> None:
        self._out.append((json.dumps(answer).encode() + b"\n", self._files))
        self._files = []
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes. Raises OSError when the other end is gone or does not read."""
        while self._out:
            data, files = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
            try:
                sent = self.connection.sendmsg([data], rights)
            except BlockingIOError:
                break
            self._out.popleft()
            if sent < len(data):
                self._out.appendleft((data[sent:], []))
        if self.waiting > MOST:
            raise BlockingIOError(f"{self.waiting} bytes are not read")

    def close(self) -> None:
        self.connection.close()
        for one in self.pending:
            one.close()
        while self._closers:
            try:
                self._closers.pop()()
            except Exception:
                log.exception("clean-up after a caller")


class Control:
    """The commands of one instance, and the thread that answers. `open` before anybody can ask; `close` ends it."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {"ping": lambda request, caller: {"pid": os.getpid()}}
        self._callers: dict[int, Caller] = {}
        self._thread: threading.Thread | None = None

    def add(self, command: str, handler: Handler) -> None:
        """Answer `command` by calling `handler`. May be called at any time."""
        self._handlers[command] = handler

    def open(self, name: str) -> None:
        """Answer for the instance `name` in the network namespace of the calling thread."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(address(os.getpid(), name))
            self._listener.listen(16)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._selector.register(self._wake, selectors.EVENT_READ)
        except BaseException:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="libfp-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; what callers wanted done at the end is done. May be called again."""
        if self._thread is None:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._thread = None

    # -- in the thread

    def _serve(self) -> None:
        try:
            while True:
                busy = any(one.pending and one.waiting < BACKLOG for one in self._callers.values())
                for key, events in self._selector.select(0 if busy else None):
                    if key.fileobj == self._wake:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif (caller := self._callers.get(key.fd)) is not None:
                        self._turn(caller, events)
                for caller in [one for one in self._callers.values() if one.pending]:
                    self._guarded(caller, self._resume)
        finally:
            for caller in list(self._callers.values()):
                self._drop(caller)
            self._selector.close()
            self._listener.close()
            os.close(self._wake)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        caller = Caller(connection, *_peer(connection))
        self._callers[connection.fileno()] = caller
        self._selector.register(connection, selectors.EVENT_READ)

    def _turn(self, caller: Caller, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._guarded(caller, Caller.flush)
        if events & selectors.EVENT_READ and caller.connection.fileno() >= 0:
            self._guarded(caller, self._read)

    def _guarded(self, caller: Caller, action: Callable[[Caller], None]) -> None:
        """`action`, and the end of the connection if that fails."""
        try:
            action(caller)
        except (EOFError, OSError, BadInput):
            self._drop(caller)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.waiting else 0)
        if self._selector.get_key(caller.connection).events != wanted:
            self._selector.modify(caller.connection, wanted)

    def _read(self, caller: Caller) -> None:
        for line in caller.lines():
            caller.say(answer) if (answer := self._answer(line, caller)) is not None else None

    def _answer(self, line: bytes, caller: Caller) -> dict[str, Any] | None:
        try:
            if caller.uid not in (0, os.geteuid()):
                log.warning("process %d of user %d asked: refused", caller.pid, caller.uid)
                raise MissingCapability(f"user {caller.uid} may not ask this instance", "be its user, or root")
            request = json.loads(line)
            if not isinstance(request, dict) or not isinstance(command := request.get("command"), str):
                raise BadInput("a request that is no object with a command")
            handler = self._handlers.get(command)
            if handler is None:
                known = ", ".join(sorted(self._handlers))
                raise BadInput(
                    f"this instance knows no command {command!r} (it knows {known})",
                    "is it another application, or version?",
                )
            found = handler(request, caller)
        except Error as error:
            return _error(error)
        except ValueError as error:
            return _error(BadInput(f"a request that does not parse: {error}"))
        except Exception as error:
            log.exception("a request failed: %r", line)
            return _error(Error(f"the request failed in the instance: {error!r}", "its log says more"))
        if isinstance(found, Generator):
            caller.pending.append(found)
            return None
        return {"ok": found or {}}

    def _resume(self, caller: Caller) -> None:
        """The next part of the answer that this caller waits for."""
        if caller.waiting >= BACKLOG:
            return
        try:
            caller.say({"part": next(caller.pending[0])})
            return
        except StopIteration as end:
            answer = {"ok": end.value or {}}
        except Error as error:
            answer = _error(error)
        except (OSError, EOFError):
            raise
        except Exception as error:
            log.exception("a request failed")
            answer = _error(Error(f"the request failed in the instance: {error!r}", "its log says more"))
        caller.pending.popleft()
        caller.say(answer)

    def _drop(self, caller: Caller) -> None:
        if self._callers.pop(caller.connection.fileno(), None) is not None:
            self._selector.unregister(caller.connection)
        caller.close()


def _error(error: Error) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "what": error.what, "remedy": error.remedy}}


class Connection:
    """A caller's side: ask the instance that `reader` shows. A context manager, which closes the reader too.

    Raises NoAnswer when it says nothing for `timeout` seconds.
    """

    def __init__(self, reader: StatsReader, timeout: float = TIMEOUT) -> None:
        self.reader, self.name, self.description = reader, reader.name, reader.description
        self._files: list[int] = []
        self._received = b""
        self._socket = _connect(reader, timeout)

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return the answer; parts that come before it are skipped."""
        parts = self.parts(command, **fields)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                return dict(end.value)

    def parts(self, command: str, **fields: Any) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Send a request; yield the parts of the answer, and return the last."""
        self._checked(self._socket.sendall, json.dumps({"command": command, **fields}).encode() + b"\n")
        while "part" in (answer := self._line()):
            yield answer["part"]
        if "error" in answer:
            told = answer["error"]
            kind = getattr(errors, str(told.get("type")), Error)
            raise kind(told["what"], told["remedy"]) if issubclass(kind, Error) else Error(told["what"])
        return dict(answer["ok"])

    def take_files(self) -> list[int]:
        """The file descriptors that came with the answers; the caller closes them."""
        files, self._files = self._files, []
        return files

    def fileno(self) -> int:
        """To wait for the instance's end: the socket becomes readable."""
        return self._socket.fileno()

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data, files, _, _ = self._checked(socket.recv_fds, self._socket, 1 << 16, FILES)
            self._files += files
            if not data:
                raise NoSuchInstance(f"instance {self.name!r} ended before it answered", "look at its log")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def _checked(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except TimeoutError:
            raise _no_answer(self.reader) from None
        except OSError as error:
            raise NoSuchInstance(f"instance {self.name!r} has gone: {error.strerror}", "look at its log") from None

    def close(self) -> None:
        for file in self.take_files():
            os.close(file)
        self._socket.close()
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(name: str | None = None, timeout: float = TIMEOUT) -> Connection:
    """Ask the instance `name`, or the only one there is.

    Raises NoSuchInstance (none, several, one whose page is all that is left), NoAnswer, MissingCapability.
    """
    reader = attach(name)
    try:
        return Connection(reader, timeout)
    except BaseException:
        reader.close()
        raise


def _connect(reader: StatsReader, timeout: float) -> socket.socket:
    with _namespace_of(reader):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout)
        connection.connect(address(reader.description["pid"], reader.name))
        pid, uid = _peer(connection)
        if uid not in (0, os.geteuid()):
            raise NoSuchInstance(f"user {uid} (process {pid}) answers for instance {reader.name!r}", "do not trust it")
    except ConnectionRefusedError:
        connection.close()
        what = (
            f"the page of instance {reader.name!r} is stale: process {reader.pid} holds it and does not answer for it"
        )
        raise NoSuchInstance(what, "it is starting, stopping, or what is left of one: end that process") from None
    except (TimeoutError, BlockingIOError):
        connection.close()
        raise _no_answer(reader) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _no_answer(reader: StatsReader) -> NoAnswer:
    return NoAnswer(f"instance {reader.name!r} (process {reader.pid}) does not answer", "is it stopped, or starved?")


@contextlib.contextmanager
def _namespace_of(reader: StatsReader) -> Iterator[None]:
    """Inside, this thread is in the network namespace of the instance, to which its socket's name belongs."""
    ours, theirs = "/proc/thread-self/ns/net", f"/proc/{reader.pid}/ns/net"
    with contextlib.ExitStack() as undo:
        try:
            if os.stat(ours).st_ino != os.stat(theirs).st_ino:
                before, there = os.open(ours, os.O_RDONLY), os.open(theirs, os.O_RDONLY)
                undo.callback(os.close, before)
                undo.callback(os.close, there)
                _setns(there)
                undo.callback(_setns, before)
        except FileNotFoundError:
            raise NoSuchInstance(f"instance {reader.name!r} has ended", "start it again") from None
        except PermissionError:
            what = f"instance {reader.name!r} is in another network namespace, which takes CAP_SYS_ADMIN to enter"
            raise MissingCapability(what, "be root, or enter it with: ip netns exec") from None
        yield


def _setns(file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
