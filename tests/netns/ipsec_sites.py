"""The network of the tests of `fp ipsec`: two hosts, two gateways, and a wire that shows what is on it.

    a 10.1.0.2 -- l1 10.1.0.1 gw1 198.51.100.1 w1 -- wire (a bridge) -- w2 198.51.100.2 gw2 10.2.0.1 l2 -- 10.2.0.2 b

The same with IPv6, 2001:db8:1::2 and so on, through a tunnel of its own over IPv6. Linux has all routes: without the
gateways, and without what they leave in the kernel, everything goes in clear.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any, Self

from libfp.cli import main
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.router import AppProcess

A, B, A6, B6 = "10.1.0.2", "10.2.0.2", "2001:db8:1::2", "2001:db8:2::2"
GW1, GW2, GW16, GW26 = "10.1.0.1", "10.2.0.1", "2001:db8:1::1", "2001:db8:2::1"
OUTER = {4: ("198.51.100.1", "198.51.100.2"), 6: ("2001:db8:ff::1", "2001:db8:ff::2")}
NETS = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("2001:db8:1::/48", "2001:db8:2::/48")}
CROSS = ("10.1.88.0/24", "10.2.88.0/24")  # IPv4 through the tunnel over IPv6
CLEAR = ("10.1.99.0/24", "10.2.99.0/24")  # of what is to be bypassed
SPIS = {4: (0x1004, 0x2004), 6: (0x1006, 0x2006)}  # to gw2, to gw1
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
ESP, MARKER = 50, b"nobody should be able to read this"


def keys(generation: int = 0) -> dict[int, str]:
    """By SPI."""
    return {
        spi: bytes([spi >> 8 & 0xFF, spi & 0xFF, generation, 7] * 9).hex() for pair in SPIS.values() for spi in pair
    }


class Wire:
    """A bridge between the gateways, and what passes it. AF_XDP's own ends see neither what it sends nor takes."""

    def __init__(self, host: Host, first: str, second: str) -> None:
        host.netlink("link", "add", ifname="br0", kind="bridge")
        for name in (first, second):
            host.netlink("link", "set", index=host.index(name), master=host.index("br0"))
        host.up("br0")
        self.index = {name: host.index(name) for name in (first, second)}
        self.all = self._sniffer(host, ())
        self.others = self._sniffer(host, _NO_ESP)
        self.host, self.injector = host, host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)

    def _sniffer(self, host: Host, program: tuple[tuple[int, int, int, int], ...]) -> socket.socket:
        sniffer = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL, of all interfaces
        if program:
            code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
            sniffer.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
        sniffer.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        sniffer.setblocking(False)
        return sniffer

    def frames(self, sniffer: socket.socket) -> list[bytes]:
        """What has come in since the last call; each frame once."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (name, _, kind, *_) = sniffer.recvfrom(1 << 16)
                if name in self.index and kind != socket.PACKET_OUTGOING:
                    found.append(frame)
        return found

    def esp(self) -> list[bytes]:
        return [frame for frame in self.frames(self.all) if is_esp(frame)]

    def leaks(self) -> list[str]:
        """What should not have been there."""
        _, lost = struct.unpack("II", self.others.getsockopt(263, 6, 8))  # SOL_PACKET, PACKET_STATISTICS
        assert lost == 0, "the capture is complete"
        return [f"{frame[:60].hex()} ({len(frame)} bytes)" for frame in self.frames(self.others) if not harmless(frame)]

    def send(self, frame: bytes, to: str) -> None:
        """Out of the port `to` of the bridge."""
        self.injector.sendto(frame, (to, 0))


# Classic BPF: IPv4 and IPv6 with ESP as the protocol are not for this socket.
_NO_ESP = (
    (0x28, 0, 0, 12), (0x15, 0, 2, 0x0800), (0x30, 0, 0, 23), (0x15, 4, 3, ESP),
    (0x15, 0, 2, 0x86DD), (0x30, 0, 0, 20), (0x15, 1, 0, ESP), (0x06, 0, 0, 0x40000), (0x06, 0, 0, 0),
)  # fmt: skip


def is_esp(frame: bytes) -> bool:
    kind = frame[12:14]
    return (kind == b"\x08\0" and frame[23] == ESP) or (kind == b"\x86\xdd" and frame[20] == ESP)


def harmless(frame: bytes) -> bool:
    """ARP, and ICMPv6 between neighbours: nothing that a host behind a gateway has said."""
    if MARKER in frame:
        return False
    if frame[12:14] == b"\x08\x06":
        return True
    if frame[12:14] == b"\x86\xdd":
        at = 54 + (8 if frame[20] == 0 else 0)  # a hop-by-hop header: of MLD
        return 58 in (frame[20], frame[54]) and frame[at] in (130, 131, 132, 133, 134, 135, 136, 143)
    if frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[34:36] == b"\x03\x02":
        return frame[42 + 9] == ESP  # a kernel without IPsec says so to the other gateway, about its ESP
    return False


def five_hosts(lab: Lab, workers: tuple[int, int]) -> tuple[Host, Host, Wire, Host, Host]:
    """a, gw1, the wire, gw2, b: without addresses, their wires with a queue for each worker of the gateway there."""
    a, gw1, between, gw2, b = (lab.host(name) for name in ("a", "gw1", "wire", "gw2", "b"))
    for host, name, other, other_name, queues in (
        (a, "a0", gw1, "l1", workers[0]),
        (gw1, "w1", between, "x1", workers[0]),
        (gw2, "w2", between, "x2", workers[1]),
        (b, "b0", gw2, "l2", workers[1]),
    ):
        for scope in ("all", "default"):
            host.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 0)
            between.sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 1)
        host.sysctl("net.ipv6.conf.all.accept_dad", 0)
        host.sysctl("net.ipv4.icmp_ratemask", 0)
        host.sysctl("net.ipv6.icmp.ratelimit", 0)
        lab.link(host, name, other, other_name, queues=queues)
    return a, gw1, Wire(between, "x1", "x2"), gw2, b


class Site:
    """The hosts, the wire, the files and the running gateways; `workers` says how many each of these has."""

    def __init__(self, lab: Lab, folder: Path, workers: tuple[int, int]) -> None:
        self.lab, self.folder, self.workers = lab, folder, workers
        self.a, self.gw1, self.wire, self.gw2, self.b = five_hosts(lab, workers)
        for number, (host, end, gateway, inside, outside) in enumerate(
            ((self.a, "a0", self.gw1, "l1", "w1"), (self.b, "b0", self.gw2, "l2", "w2"))
        ):
            here, there = number + 1, 2 - number
            host.address(end, f"10.{here}.0.2/24")
            host.address(end, f"2001:db8:{here}::2/64")
            for more in (88, 99):
                host.address(end, f"10.{here}.{more}.2/24")
                gateway.address(inside, f"10.{here}.{more}.1/24")
            gateway.address(inside, f"10.{here}.0.1/24")
            gateway.address(inside, f"2001:db8:{here}::1/64")
            gateway.address(outside, f"{OUTER[4][number]}/24")
            gateway.address(outside, f"{OUTER[6][number]}/64")
            host.route("default", via=f"10.{here}.0.1")
            host.route("::/0", via=f"2001:db8:{here}::1")
            gateway.route(f"10.{there}.0.0/16", via=OUTER[4][1 - number])
            gateway.route(f"2001:db8:{there}::/48", via=OUTER[6][1 - number])
            gateway.sysctl("net.ipv4.ip_forward", 1)
            gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
        self.files = [folder / f"gw{number + 1}.toml" for number in range(2)]
        self.gateways: list[AppProcess] = []
        for number in range(2):
            self.write(number)

    def write(
        self,
        number: int,
        sas: dict[int, str] | None = None,
        *,
        default: str = "bypass",
        first: str = "",
        last: str = "",
        mode: int = 0o600,
    ) -> None:
        """The file of gateway `number`; `sas` are keys by SPI, an odd thousand to gw2; `first` and `last` go before and
        behind all policies."""
        text = f'default = "{default}"\nstate = "{self.folder}/gw{number + 1}.json"\n'
        for spi, key in (sas or keys()).items():
            version = spi & 0xF
            local, remote = OUTER[version][number], OUTER[version][1 - number]
            text += f'[[sa]]\ntunnel = "six{version}"\ndirection = "{"in" if (spi >> 12) % 2 == number else "out"}"\n'
            text += f'spi = {spi:#x}\nlocal = "{local}"\nremote = "{remote}"\ncipher = "aes-256-gcm"\nkey = "{key}"\n'
            text += "esn = false\n" * (version == 6)
        text += first
        here, there = (number, 1 - number)
        text += f'[[policy]]\naction = "bypass"\nsource = "{CLEAR[here]}"\ndestination = "{CLEAR[there]}"\n'
        for version, nets in ((6, CROSS), *NETS.items()):
            text += f'[[policy]]\naction = "protect"\nsource = "{nets[here]}"\ndestination = "{nets[there]}"\n'
            text += f'tunnel = "six{version}"\n'
        self.files[number].touch()
        self.files[number].chmod(mode)
        self.files[number].write_text(text + last)

    def start(self, number: int, **more: Any) -> AppProcess:
        ports = (f"l{number + 1}", f"w{number + 1}")
        name = f"gw{number + 1}-{os.getpid()}"
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: self.workers[number]]))
        options = ("--cores", cores, "--kick", "inline", "--log", "debug", "--name", name)
        gateway = (self.gw1, self.gw2)[number]
        return AppProcess(gateway, "ipsec", *ports, *options, "--config", str(self.files[number]), **more)

    def start_again(self, number: int) -> AppProcess:
        """In the place of the one that has ended."""
        self.gateways[number].close()
        self.gateways[number] = self.start(number)
        return self.gateways[number]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for gateway in self.gateways:
            gateway.close()

    def reload(self, number: int, words: str, **written: Any) -> str:
        """Write the file, send a SIGHUP, wait until the gateway says these words, and return all that it says then."""
        self.write(number, **written)
        gateway = self.gateways[number]
        before = len(gateway.said())
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: words in gateway.said()[before:], 10, f"{words!r}")
        return gateway.said()[before:]

    def reach(self, version: int = 4) -> None:
        """Until a packet comes through: both gateways know their neighbours then."""
        target = B if version == 4 else B6
        wait_until(lambda: self.a.ping(target, count=1, timeout=0.2).received, 20, f"{target} to answer")

    def drops(self, number: int) -> dict[str, int]:
        return dict(self.gateways[number].counters().drops)

    def punted(self) -> list[int]:
        return [gateway.counters().punted for gateway in self.gateways]

    def flush(self) -> None:
        """Have Linux forget all neighbours of the gateways."""
        for gateway, family in itertools.product((self.gw1, self.gw2), (socket.AF_INET, socket.AF_INET6)):
            for one in gateway.netlink("neigh", "dump", family=family):
                if not one["state"] & (NUD_NOARP | NUD_PERMANENT):
                    where = {"ifindex": one["ifindex"], "dst": one.get_attr("NDA_DST"), "family": family}
                    gateway.netlink("neigh", "del", **where)

    def sas(self, number: int) -> dict[int, dict[str, Any]]:
        command = ["ipsec", "sas", self.gateways[number].ready["name"], "--json"]
        return {sa["spi"]: sa for sa in json.loads(fp(*command))["sas"]}


def fp(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(arguments)) == 0
    return out.getvalue()
