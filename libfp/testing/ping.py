"""ICMP echo over a raw socket, so that tests and the demo need no `ping` program."""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass, field

ECHO_REQUEST, ECHO_REPLY, UNREACHABLE, TIME_EXCEEDED = 8, 0, 3, 11


def internet_checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`, in host order, ready for struct's "!H"."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass
class PingResult:
    """What came of a series of echo requests.

    `errors` holds the ICMP errors that our requests caused, as (type, code, address of the sender, next-hop MTU);
    the MTU is 0 except for "fragmentation needed". `times` are round trips in seconds.
    """

    sent: int = 0
    received: int = 0
    times: list[float] = field(default_factory=list)
    errors: list[tuple[int, int, str, int]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.sent - self.received


def ping(
    sock: socket.socket,
    address: str,
    count: int = 3,
    interval: float = 0.02,
    timeout: float = 2.0,
    size: int = 56,
    ttl: int | None = None,
    dont_fragment: bool = False,
    identifier: int = 0x6670,
) -> PingResult:
    """Send `count` echo requests of `size` payload bytes on a raw ICMP socket and wait for each answer.

    Each request waits at most `timeout` seconds for its reply or for an ICMP error about it; the next one leaves
    `interval` seconds after the one before at the earliest.
    """
    if ttl is not None:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    # IP_MTU_DISCOVER (10): PROBE (3) sets DF and ignores what the kernel thinks the path MTU is; DONT (0) clears DF.
    sock.setsockopt(socket.IPPROTO_IP, 10, 3 if dont_fragment else 0)
    result = PingResult()
    payload = bytes(i & 0xFF for i in range(size))
    for sequence in range(count):
        begun = time.monotonic()
        header = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, identifier, sequence)
        checksum = internet_checksum(header + payload)
        request = struct.pack("!BBHHH", ECHO_REQUEST, 0, checksum, identifier, sequence) + payload
        result.sent += 1
        try:
            sock.sendto(request, (address, 0))
        except OSError as error:  # no route, or longer than the local MTU with DF set
            result.errors.append((UNREACHABLE, -1, f"{error.strerror}", 0))
            continue
        if _await_answer(sock, identifier, sequence, begun + timeout, result):
            result.received += 1
            result.times.append(time.monotonic() - begun)
        if sequence + 1 < count:
            pause = begun + interval - time.monotonic()
            if pause > 0:
                time.sleep(pause)
    return result


def _await_answer(sock: socket.socket, identifier: int, sequence: int, deadline: float, result: PingResult) -> bool:
    """True when the reply to (identifier, sequence) came; an ICMP error about it is recorded and ends the wait."""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([sock], [], [], left)[0]:
            return False
        packet, (sender, _) = sock.recvfrom(65535)
        icmp = packet[(packet[0] & 15) * 4 :]
        if len(icmp) < 8:
            continue
        kind, code, _, ident, seq = struct.unpack("!BBHHH", icmp[:8])
        if kind == ECHO_REPLY and (ident, seq) == (identifier, sequence):
            return True
        if kind in (UNREACHABLE, TIME_EXCEEDED) and len(icmp) >= 36:
            inner = icmp[8:]
            ours = inner[(inner[0] & 15) * 4 :][4:8]
            if ours == struct.pack("!HH", identifier, sequence):
                mtu = seq if (kind, code) == (UNREACHABLE, 4) else 0
                result.errors.append((kind, code, sender, mtu))
                return False
    return False
