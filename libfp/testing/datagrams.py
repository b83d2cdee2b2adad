"""The processes that send and receive numbered UDP datagrams: ``python -m libfp.testing.datagrams send|receive``.

They are processes, not threads, so that neither the other end nor a live display takes turns with them on the GIL, and
they use sendmmsg and recvmmsg, because one system call a packet is what limits a plain Python sender. Each prints JSON
lines: the receiver {"ready": true} once it is bound; both their counts ten times a second; and their final counts, with
"done": true, after SIGTERM or their time. `libfp.testing.traffic` is the comfortable way to use them.

A datagram starts with its sequence number, 64 bits in network byte order; the rest is zero.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import signal
import socket
import sys
import time
from typing import Any

import numpy as np

BATCH = 64
REPORT = 0.1  # seconds between two reports
MSG_DONTWAIT, MSG_WAITFORONE = 0x40, 0x10000
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
RECEIVE_BUFFER = 256 << 20  # a scheduling pause of the receiver must not look like a loss on the path
# What a path that is being changed under load answers with: the datagram was not sent, the next one may be.
TRANSIENT = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENOBUFS, errno.EPERM}

_libc = ctypes.CDLL(None, use_errno=True)


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class MMsgHdr(ctypes.Structure):
    _fields_ = (("hdr", MsgHdr), ("len", ctypes.c_uint))


class Batch:
    """Buffers and headers for up to `BATCH` datagrams of `size` bytes; `sequence` is a view of their numbers."""

    def __init__(self, size: int) -> None:
        room = max(size, 8)
        self.data = np.zeros((BATCH, (room + 7) // 8 * 8), np.uint8)
        self.sequence = self.data.view(">u8")[:, 0]
        self.vectors = (IoVec * BATCH)()
        self.headers = (MMsgHdr * BATCH)()
        for i in range(BATCH):
            self.vectors[i].base = self.data.ctypes.data + i * self.data.strides[0]
            self.vectors[i].len = room
            self.headers[i].hdr.iov = ctypes.addressof(self.vectors[i])
            self.headers[i].hdr.iovlen = 1

    def send(self, fd: int, count: int) -> int:
        """Send the first `count` datagrams; how many the kernel took, or minus errno when it took none."""
        sent = _libc.sendmmsg(fd, self.headers, count, 0)
        return sent if sent >= 0 else -ctypes.get_errno()

    def receive(self, fd: int) -> int:
        """Wait for a datagram (as long as the socket's timeout allows) and take what else is there."""
        count = _libc.recvmmsg(fd, self.headers, BATCH, MSG_WAITFORONE, None)
        return count if count >= 0 else -ctypes.get_errno()


class Stop:
    """True once SIGTERM has come."""

    def __init__(self) -> None:
        self.now = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: Any) -> None:
        self.now = True


def report(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def send(address: str, port: int, rate: float, seconds: float, size: int, count: int, ttl: int) -> None:
    """Send at `rate` datagrams a second (0: as fast as possible) for `seconds` or until `count` (0: no limit).

    Pacing is a token bucket as deep as one batch and 2 ms: after a scheduling pause the missed datagrams are not all
    sent at once (that would measure the queues, not the path); they are simply never offered.
    """
    stop = Stop()
    batch = Batch(size)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
        if ttl:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        sock.connect((address, port))
        sent = errors = 0
        depth = BATCH + rate * 0.002
        begun = last = reported = time.perf_counter()
        tokens = 1.0
        numbers = np.arange(BATCH, dtype=np.uint64)
        while not stop.now:
            now = time.perf_counter()
            if now - begun >= seconds or (count and sent >= count):
                break
            if now - reported >= REPORT:
                reported = now
                report(sent=sent, errors=errors, seconds=now - begun)
            room = min(BATCH, count - sent) if count else BATCH
            if rate:
                tokens = min(depth, tokens + (now - last) * rate)
                last = now
                room = min(room, int(tokens))
                if room == 0:
                    time.sleep(min((1.0 - tokens) / rate + 50e-6, 0.05))
                    continue
            batch.sequence[:room] = numbers[:room] + np.uint64(sent)
            taken = batch.send(sock.fileno(), room)
            if taken > 0:
                sent += taken
                tokens -= taken
            elif -taken in TRANSIENT:
                errors += 1
                tokens -= 1
            elif taken != -errno.EINTR:
                raise OSError(-taken, os.strerror(-taken))
        report(done=True, sent=sent, errors=errors, seconds=time.perf_counter() - begun)


class Tally:
    """Which sequence numbers have come, how often, in what order, and with what pauses."""

    def __init__(self) -> None:
        self.seen = np.zeros(1 << 16, np.bool_)
        self.datagrams = self.unique = self.reordered = 0
        self.highest = -1
        self.longest_gap = 0.0
        self.first = self.last = 0.0

    def add(self, sequence: np.ndarray[Any, Any], now: float) -> None:
        highest = int(sequence.max())
        if highest >= self.seen.size:
            self.seen = np.concatenate([self.seen, np.zeros(max(self.seen.size, highest), np.bool_)])
        before = np.concatenate([[self.highest], sequence[:-1]])
        self.reordered += int((sequence < np.maximum.accumulate(before)).sum())
        fresh = sequence[~self.seen[sequence]]
        self.seen[sequence] = True
        self.unique += np.unique(fresh).size
        self.datagrams += sequence.size
        self.highest = max(self.highest, highest)
        if self.first:
            self.longest_gap = max(self.longest_gap, now - self.last)
        else:
            self.first = now
        self.last = now

    def counts(self) -> dict[str, Any]:
        return {
            "received": self.unique,
            "duplicates": self.datagrams - self.unique,
            "reordered": self.reordered,
            "longest_gap": self.longest_gap,
            "seconds": self.last - self.first,
        }


def receive(address: str, port: int, size: int) -> None:
    """Count until SIGTERM, then until the path has been silent for a tenth of a second."""
    stop = Stop()
    batch, tally = Batch(size), Tally()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        # SO_RCVTIMEO, not settimeout: recvmmsg must block in the kernel, outside Python.
        wait = np.array([0, 100_000], np.int64).tobytes()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        sock.bind((address, port))
        report(ready=True)
        reported = time.perf_counter()
        while True:
            count = batch.receive(sock.fileno())
            now = time.perf_counter()
            if count > 0:
                tally.add(batch.sequence[:count].astype(np.int64), now)
            elif -count in (errno.EAGAIN, errno.EINTR):
                if stop.now and -count == errno.EAGAIN:
                    break
            else:
                raise OSError(-count, os.strerror(-count))
            if now - reported >= REPORT:
                reported = now
                report(**tally.counts())
        report(done=True, **tally.counts())


def main() -> None:
    parser = argparse.ArgumentParser(description="send or count numbered UDP datagrams")
    parser.add_argument("role", choices=["send", "receive"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=0.0, help="datagrams a second; 0: as fast as possible")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--size", type=int, default=18, help="bytes of UDP payload; 18 makes a 60-byte frame")
    parser.add_argument("--ttl", type=int, default=0)
    args = parser.parse_args()
    if args.role == "send":
        send(args.address, args.port, args.rate, args.seconds, args.size, args.count, args.ttl)
    else:
        receive(args.address, args.port, args.size)


if __name__ == "__main__":
    main()
