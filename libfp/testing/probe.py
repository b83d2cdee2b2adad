"""Looking at single packets: frames put on a wire and taken off it, ICMP errors, and arrivals by the clock.

Addresses are of IPv4 or of IPv6, and the sockets of their family.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from libfp.testing.netns import Host

__all__ = ["Arrivals", "IcmpError", "Trickle", "Wire", "udp_probe"]

ETH_P_ALL = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, DONT, PROBE = 10, 23, 0, 3
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35
UDP = 17


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Wire:
    """One end of a wire: `send` puts whole Ethernet frames out by an interface, `receive` takes what comes in."""

    def __init__(self, host: Host, interface: str) -> None:
        self.mac = host.mac(interface)
        self._socket = host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self._socket.bind((interface, ETH_P_ALL))

    def send(self, *frames: bytes) -> None:
        """Put frames on the wire, in order."""
        for frame in frames:
            self._socket.send(frame)

    def receive(self, wanted: Callable[[bytes], object], timeout: float = 2.0) -> bytes | None:
        """The next frame for which `wanted` is true, others are forgotten; None after `timeout` seconds.

        With 0, None after those that are there.
        """
        deadline = time.monotonic() + timeout
        while select.select([self._socket], [], [], max(deadline - time.monotonic(), 0))[0]:
            frame = self._socket.recv(65535)
            if wanted(frame):
                return frame
        return None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class IcmpError:
    """An ICMP or ICMPv6 error: its type and code, who sent it, and the MTU that a "fragmentation needed" or "packet too
    big" tells, else 0."""

    kind: int
    code: int
    sender: str
    mtu: int = 0


def udp_probe(
    host: Host, address: str, *, ttl: int = 64, size: int = 32, dont_fragment: bool = False, timeout: float = 2.0
) -> IcmpError | None:
    """Send one UDP datagram of `size` payload bytes to a port that nobody listens on, and return the ICMP error.

    The program traceroute does this with TTLs from 1 on. None when nothing comes within `timeout` seconds. To an IPv6
    address the TTL is the hop limit, and `dont_fragment` means that what is larger than the path's known MTU is sent.
    Linux sends each host one ICMPv6 error a second, unless net.ipv6.icmp.ratelimit is 0.
    """
    family = _family(address)
    six = family == socket.AF_INET6
    with (
        host.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP) as errors,
        host.socket(family) as sender,
    ):
        if six:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
            sender.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PROBE if dont_fragment else DONT)
        else:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PROBE if dont_fragment else DONT)
        sender.bind(("", 0))
        ports = struct.pack("!HH", sender.getsockname()[1], 33434)
        sender.sendto(bytes(size), (address, 33434))
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0 and select.select([errors], [], [], left)[0]:
            packet, (source, *_) = errors.recvfrom(65535)
            icmp = packet if six else packet[(packet[0] & 15) * 4 :]  # an IPv6 raw socket gives no header
            kind, code, mtu = struct.unpack_from("!BB4xH", icmp)
            if _is_about(icmp[8:], ports, six):
                return IcmpError(kind, code, source, mtu if (kind, code) == ((2, 0) if six else (3, 4)) else 0)
    return None


def _is_about(packet: bytes, ports: bytes, six: bool) -> bool:
    """Whether the packet in an ICMP error is the UDP datagram with these ports."""
    if len(packet) < (48 if six else 28) or packet[6 if six else 9] != UDP:
        return False
    return packet[40 if six else (packet[0] & 15) * 4 :][:4] == ports


class Arrivals:
    """Numbered datagrams to a UDP port, each with the time at which the kernel took it in; the kernel keeps them."""

    def __init__(self, host: Host, address: str = "0.0.0.0", port: int = 5003) -> None:
        self._socket = host.socket(_family(address))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind((address, port))
        self._socket.setblocking(False)
        self._taken: dict[int, float] = {}

    def take(self) -> dict[int, float]:
        """All that have come since the beginning: number to seconds since the epoch (`time.time`)."""
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(64, 64)
            except BlockingIOError:
                return self._taken
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
            self._taken[int.from_bytes(data[:8], "big")] = seconds + nanoseconds / 1e9

    def close(self) -> None:
        """Close the socket; what `take` has returned stays."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Trickle:
    """Numbered datagrams from a host to `address`, about a thousand a second, while the block lasts.

    `sent` counts them. Errors of the sender's own kernel (no route, ...) are counted in `errors` and not sent again.
    """

    def __init__(self, host: Host, address: str, port: int = 5003, rate: float = 1000.0) -> None:
        self.sent = self.errors = 0
        self._socket, self._to, self._pause = host.socket(_family(address)), (address, port), 1 / rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trickle", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self._socket.sendto(self.sent.to_bytes(8, "big"), self._to)
                self.sent += 1
            except OSError:
                self.errors += 1

    def stop(self) -> None:
        """Send no more, and wait until the sender has ended."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._socket.close()
