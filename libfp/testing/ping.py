"""ICMP echo over a raw socket, so that tests and the demo need no `ping` program."""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass, field

__all__ = ["PingResult", "internet_checksum", "ping"]

ECHO_REQUEST, ECHO_REPLY, UNREACHABLE, TIME_EXCEEDED = 8, 0, 3, 11
ECHO_REQUEST6, ECHO_REPLY6, UNREACHABLE6, TOO_BIG6, TIME_EXCEEDED6 = 128, 129, 1, 2, 3


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
        """Requests without a reply."""
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
    """Send `count` echo requests of `size` payload bytes on a raw ICMP (or ICMPv6) socket and wait for each answer.

    Each request waits at most `timeout` seconds for its reply or for an ICMP error about it; the next one leaves
    `interval` seconds after the one before at the earliest.
    """
    six = sock.family == socket.AF_INET6
    if ttl is not None and six:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
    elif ttl is not None:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    # IP_MTU_DISCOVER (10), IPV6_MTU_DISCOVER (23): PROBE (3) sets DF and ignores what the kernel thinks the path MTU
    # is; DONT (0) clears DF.
    level, option = (socket.IPPROTO_IPV6, 23) if six else (socket.IPPROTO_IP, 10)
    sock.setsockopt(level, option, 3 if dont_fragment else 0)
    echo = ECHO_REQUEST6 if six else ECHO_REQUEST  # of ICMPv6 the kernel makes the checksum
    result = PingResult()
    payload = bytes(i & 0xFF for i in range(size))
    for sequence in range(count):
        begun = time.monotonic()
        header = struct.pack("!BBHHH", echo, 0, 0, identifier, sequence)
        checksum = internet_checksum(header + payload)
        request = struct.pack("!BBHHH", echo, 0, checksum, identifier, sequence) + payload
        result.sent += 1
        try:
            sock.sendto(request, (address, 0))
        except OSError as error:  # no route, or longer than the local MTU with DF set
            result.errors.append((UNREACHABLE, -1, f"{error.strerror}", 0))
            continue
        if (_await_answer6 if six else _await_answer)(sock, identifier, sequence, begun + timeout, result):
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


def _await_answer6(sock: socket.socket, identifier: int, sequence: int, deadline: float, result: PingResult) -> bool:
    """The same of ICMPv6 (RFC 4443): a raw socket has it without the IPv6 header."""
    ours = struct.pack("!HH", identifier, sequence)
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([sock], [], [], left)[0]:
            return False
        icmp, (sender, *_) = sock.recvfrom(65535)
        if len(icmp) < 8:
            continue
        kind, code, mtu = struct.unpack("!BBxxI", icmp[:8])
        if kind == ECHO_REPLY6 and icmp[4:8] == ours:
            return True
        if kind in (UNREACHABLE6, TOO_BIG6, TIME_EXCEEDED6) and icmp[52:56] == ours:
            result.errors.append((kind, code, sender, mtu if kind == TOO_BIG6 else 0))
            return False
    return False
