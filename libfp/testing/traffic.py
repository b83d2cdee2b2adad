"""Real traffic between two hosts of a `Lab`: a TCP transfer, numbered UDP streams, the rate that a path carries.

    with UdpStream(client, server, "10.0.2.2", rate=20_000) as stream:
        router.route("10.0.2.0/24", via="10.0.3.2", command="replace")
    assert stream.result.lost == 0

Neither end needs a program installed: TCP runs in threads, UDP in processes of `libfp.testing.datagrams`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from libfp.testing.netns import Host
from libfp.testing.wait import wait_until

__all__ = ["StreamResult", "TcpResult", "UdpStream", "stream_by", "tcp_transfer"]


@dataclass(frozen=True)
class TcpResult:
    """A finished TCP transfer: payload bytes sent, seconds from connect to the last byte, equal at both ends or not."""

    bytes: int
    seconds: float
    intact: bool

    @property
    def mbit_s(self) -> float:
        """Payload bits a second, in millions."""
        return self.bytes * 8 / self.seconds / 1e6


def tcp_transfer(
    sender: Host, receiver: Host, address: str, nbytes: int, port: int = 5001, timeout: float = 30.0
) -> TcpResult:
    """Send `nbytes` of random data from `sender` to `address`, a local address of `receiver`; compare the digests.

    Raises TimeoutError (or another OSError) when the transfer does not finish, or its peer resets it.
    """
    block = random.Random(nbytes).randbytes(1 << 20)
    received = hashlib.blake2b()
    failure: list[OSError] = []

    def take(listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(timeout)
                while data := connection.recv(1 << 18):
                    received.update(data)
                connection.sendall(b"\1")  # the sender's clock stops when the last byte has been read
        except OSError as error:
            failure.append(error)

    sent = hashlib.blake2b()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with receiver.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.settimeout(timeout)
        listener.bind((address, port))
        listener.listen(1)
        thread = threading.Thread(target=take, args=(listener,), name="tcp-receiver")
        thread.start()
        try:
            with sender.socket(family, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                begun = time.monotonic()
                connection.connect((address, port))
                for offset in range(0, nbytes, len(block)):
                    piece = block[: min(len(block), nbytes - offset)]
                    connection.sendall(piece)
                    sent.update(piece)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
                seconds = time.monotonic() - begun
        finally:
            thread.join(timeout)
    if failure:
        raise failure[0]
    return TcpResult(nbytes, seconds, sent.digest() == received.digest())


class _Reporter:
    """A process that prints JSON lines: the latest line is `.latest`, the last one has "done"."""

    def __init__(self, host: Host, *arguments: object) -> None:
        command = [sys.executable, "-m", "libfp.testing.datagrams", *(str(a) for a in arguments)]
        self.command = " ".join(command[1:])
        self.latest: dict[str, Any] = {}
        # Their own session: Ctrl-C in a terminal reaches the one that started them, which then ends them in order.
        self.process = host.popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._thread = threading.Thread(target=self._read, name="udp-reports", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a killed process may leave half a line
                self.latest = json.loads(line)

    def get(self, key: str) -> Any:
        return self.latest.get(key, 0)

    def finish(self, timeout: float = 10.0) -> dict[str, Any]:
        """End it (SIGTERM: it prints its final counts) and return those."""
        self.process.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float) -> dict[str, Any]:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.command} did not end in {timeout:g} s") from None
        self._thread.join(timeout)
        if not self.latest.get("done"):
            raise ChildProcessError(f"{self.command} ended with status {self.process.returncode}")
        return self.latest

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join(1.0)


@dataclass(frozen=True)
class StreamResult:
    """A finished UDP stream, in datagrams and seconds. `received` counts each sequence number once."""

    offered: int
    received: int
    duplicates: int
    reordered: int
    longest_gap: float
    seconds: float
    send_errors: int

    @property
    def lost(self) -> int:
        """Datagrams sent and not received."""
        return self.offered - self.received

    @property
    def offered_rate(self) -> float:
        """Datagrams sent a second."""
        return self.offered / self.seconds

    @property
    def received_rate(self) -> float:
        """Datagrams received a second."""
        return self.received / self.seconds


class UdpStream:
    """Numbered datagrams from `sender` to `address` of `receiver`, as long as the block lasts.

    `rate` is in datagrams a second, 0 as fast as the sender can; `size` is bytes of payload (18 makes a 60-byte frame,
    the smallest Ethernet has). `sent` and `received` are at most a tenth of a second old while the stream runs;
    `result` is exact and is there after the block, or after `stop()`.
    """

    def __init__(
        self,
        sender: Host,
        receiver: Host,
        address: str,
        rate: float,
        port: int = 5002,
        size: int = 18,
        seconds: float = 3600.0,
        count: int = 0,
        ttl: int = 0,
    ) -> None:
        self.result: StreamResult
        self._limit = seconds
        self._receiver = _Reporter(receiver, "receive", address, port, "--size", size)
        try:
            # Any line will do: a report may have followed the one that says "ready" before we look.
            wait_until(lambda: self._receiver.latest or self._receiver.process.poll() is not None, 20, "the receiver")
            if not self._receiver.latest:
                raise ChildProcessError(f"cannot receive at {address}:{port}")
            options = ["--rate", rate, "--size", size, "--seconds", seconds, "--count", count, "--ttl", ttl]
            self._sender = _Reporter(sender, "send", address, port, *options)
        except BaseException:
            self._receiver.kill()
            raise

    @property
    def sent(self) -> int:
        """Datagrams sent so far."""
        return int(self._sender.get("sent"))

    @property
    def received(self) -> int:
        """Datagrams received so far."""
        return int(self._receiver.get("received"))

    @property
    def running(self) -> bool:
        """The sender has not ended."""
        return self._sender.process.poll() is None

    def wait(self, timeout: float | None = None) -> StreamResult:
        """Let the sender finish its `seconds` or `count`, then `stop`."""
        self._sender.wait(self._limit + 10.0 if timeout is None else timeout)
        return self.stop()

    def stop(self) -> StreamResult:
        """End the sender, let the receiver take what is still on the way, and return the exact counts."""
        if not hasattr(self, "result"):
            try:
                sent = self._sender.finish() if self.running else self._sender.wait(1.0)
                taken = self._receiver.finish()
            except BaseException:
                self.kill()
                raise
            self.result = StreamResult(
                offered=sent["sent"],
                received=taken["received"],
                duplicates=taken["duplicates"],
                reordered=taken["reordered"],
                longest_gap=taken["longest_gap"],
                seconds=sent["seconds"],
                send_errors=sent["errors"],
            )
        return self.result

    def kill(self) -> None:
        """End both processes at once; there is no result then."""
        self._sender.kill()
        self._receiver.kill()

    def __enter__(self) -> UdpStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()


@contextlib.contextmanager
def stream_by(
    counter: Callable[[], int], sender: Host, receiver: Host, address: str, rate: float, first_port: int = 5100
) -> Iterator[UdpStream]:
    """A stream that makes `counter` grow: of the worker whose queue it is to come by, which must have no other.

    The sender's kernel chooses a queue by ports and addresses, so ports are tried from `first_port` on.
    """
    for port in range(first_port, first_port + 32):
        before = counter()
        with UdpStream(sender, receiver, address, rate, port=port) as stream:
            wait_until(lambda: stream.received > 100, timeout=20)
            if counter() > before + 50:
                yield stream
                return
    raise AssertionError("32 streams, and none by that queue")
