"""Routes in a text file, in the words of `ip route`, for applications without Linux: see apps/router/README.md.

Nothing of numba is loaded before the whole file has been read.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from libfp.errors import BadInput

if TYPE_CHECKING:
    from libfp.stages import Routes

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

KINDS = ("blackhole", "unreachable", "prohibit", "local")
MTU, LEAST_MTU, MOST_MTU = 1500, 68, 65535
MOST_PORTS = 256
_DEVICE = re.compile(r"[^\s/]{1,15}")
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")


@dataclass(frozen=True)
class Route:
    """`kind` is "" for one that leads out of `device`: to the gateway `via`; None: to the destinations themselves."""

    line: int
    network: Network
    kind: str = ""
    via: Address | None = None
    device: str = ""
    mtu: int = MTU


@dataclass(frozen=True)
class Neighbour:
    line: int
    address: Address
    mac: bytes
    device: str


class RoutesFile:
    """What the file at `path` says. Raises BadInput that names the file and the line."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.routes: dict[Network, Route] = {}
        self.neighbours: dict[tuple[str, Address], Neighbour] = {}
        self.devices: list[str] = []
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if words := line.partition("#")[0].split():
                        self._line(number, words)
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}", "name a file of routes") from None
        except UnicodeDecodeError:
            raise BadInput(f"{path} is no text", "name a file of routes, one a line") from None

    def _wrong(self, line: int, what: str) -> NoReturn:
        raise BadInput(f"{self.path}, line {line}: {what}", 'a line reads "198.51.100.0/24 via 192.0.2.1 dev out0"')

    def _line(self, line: int, words: list[str]) -> None:
        rest = iter(words)
        first = next(rest)
        if first == "neigh":
            self._neighbour(line, rest)
        elif first in KINDS:
            network = self._network(line, next(rest, ""), "")
            self._nothing_left(line, rest)
            self._add(Route(line, network, first))
        else:
            self._route(line, first, rest)

    def _route(self, line: int, prefix: str, rest: Iterator[str]) -> None:
        via: Address | None = None
        device, mtu = "", MTU
        for word in rest:
            value = next(rest, "")
            if word == "via" and via is None:
                via = self._address(line, next(rest, "") if value in ("inet", "inet6") else value)
            elif word == "dev" and not device:
                device = self._device(line, value)
            elif word == "mtu" and mtu == MTU:
                if not value.isdecimal() or not LEAST_MTU <= int(value) <= MOST_MTU:
                    self._wrong(line, f"{value!r} is no MTU: {LEAST_MTU} to {MOST_MTU}")
                mtu = int(value)
            else:
                hint = "; a neighbour's line begins with neigh" if word == "lladdr" else ""
                self._wrong(line, f"{word!r} is not via, dev or mtu, each once{hint}")
        network = self._network(line, prefix, f"{via}" if via is not None else "")
        if not device:
            self._wrong(line, f"the route to {network} names no device")
        if via is not None and network.version == 6 and via.version == 4:
            self._wrong(line, f"an IPv6 route via {via}")
        self._add(Route(line, network, "", via, device, mtu))

    def _neighbour(self, line: int, rest: Iterator[str]) -> None:
        address = self._address(line, next(rest, ""))
        found: dict[str, str] = {}
        for word in rest:
            if word not in ("lladdr", "dev") or word in found:
                self._wrong(line, f"{word!r} is not lladdr or dev, each once")
            found[word] = next(rest, "")
        if not _MAC.fullmatch(found.get("lladdr", "")):
            self._wrong(line, f"{found.get('lladdr', '')!r} is no MAC address")
        device = self._device(line, found.get("dev", ""))
        mac = bytes.fromhex(found["lladdr"].replace(":", ""))
        before = self.neighbours.setdefault((device, address), Neighbour(line, address, mac, device))
        if before.line != line:
            self._wrong(line, f"neighbour {address} of {device} is there already, in line {before.line}")

    def _add(self, route: Route) -> None:
        before = self.routes.setdefault(route.network, route)
        if before.line != route.line:
            self._wrong(route.line, f"a route to {route.network} is there already, in line {before.line}")

    def _network(self, line: int, text: str, via: str) -> Network:
        if text == "default":
            text = "::/0" if ":" in via else "0.0.0.0/0"
        try:
            return ipaddress.ip_network(text)
        except ValueError as error:
            self._wrong(line, f"{text!r} is no prefix ({error})" if text else "it ends where a prefix should be")

    def _address(self, line: int, text: str) -> Address:
        try:
            found = ipaddress.ip_address(text)
        except ValueError:
            self._wrong(line, f"{text!r} is no address" if text else "it ends where an address should be")
        return found

    def _device(self, line: int, name: str) -> str:
        if not _DEVICE.fullmatch(name):
            self._wrong(line, f"{name!r} is no name of a device" if name else "it ends where a device should be")
        if name not in self.devices:
            if len(self.devices) == MOST_PORTS - 1:
                self._wrong(line, f"more than {MOST_PORTS - 1} devices")
            self.devices.append(name)
        return name

    def _nothing_left(self, line: int, rest: Iterator[str]) -> None:
        if (word := next(rest, "")) != "":
            self._wrong(line, f"{word!r} is one word too many")

    def tables(self, ports: list[str]) -> Routes:
        """Tables that say the same, for ports of these names, of which every device is one."""
        import numpy as np

        from libfp.stages import Drop, Forward, Punt, Routes

        numbers = {name: number for number, name in enumerate(ports)}
        hosts = [self._host(neighbour) for neighbour in self.neighbours.values()]
        wanted = [*self.routes.values(), *(route for route in hosts if route is not None)]
        four, six = (sum(route.network.version == version for route in wanted) for version in (4, 6))
        hops = {_hop(route) for route in wanted}
        made = Routes(routes=four + 16, routes6=six + 16, next_hops=len(hops) + 16)
        actions = {"blackhole": Drop("blackhole")} | {kind: Punt(kind) for kind in KINDS[1:]}
        index: dict[object, int] = {}
        for route in wanted:
            key = _hop(route)
            if key not in index:
                index[key] = made.next_hops.add(
                    actions[route.kind]
                    if route.kind
                    else Forward(numbers[route.device], self._mac(route), own_mac(numbers[route.device]), route.mtu)
                )
        for version in (4, 6):
            some = [route for route in wanted if route.network.version == version]
            addresses = [int(route.network.network_address) for route in some]
            lengths, values = [route.network.prefixlen for route in some], [index[_hop(route)] for route in some]
            if some and version == 4:
                made.fib.load(addresses, lengths, values)
            elif some:  # an address is two words
                rows = [(address >> 64, address & (1 << 64) - 1) for address in addresses]
                made.fib6.load(np.array(rows, np.uint64), lengths, values)
        return made

    def _mac(self, route: Route) -> bytes:
        if route.via is None:
            return bytes((0x06, 0, 0, 0)) + self.devices.index(route.device).to_bytes(2)
        neighbour = self.neighbours.get((route.device, route.via))
        return neighbour.mac if neighbour is not None else b"\x06\0" + route.via.packed[-4:]

    def _host(self, neighbour: Neighbour) -> Route | None:
        """The entry of a neighbour of its own, if a route says that it is on the device itself."""
        host: Network = ipaddress.ip_network(neighbour.address)
        for length in range(host.prefixlen, -1, -1):
            route = self.routes.get(host.supernet(new_prefix=length))
            if route is not None:
                direct = not route.kind and route.via is None and route.device == neighbour.device
                if not direct or route.network == host:
                    return None
                return Route(neighbour.line, host, "", neighbour.address, neighbour.device, route.mtu)
        return None


def _hop(route: Route) -> tuple[str, Address | None, str, int]:
    return route.kind, route.via, route.device, route.mtu


def own_mac(port: int) -> bytes:
    """The address of port number `port`: 02:00:00:00:00:NN, locally administered."""
    return b"\x02\0\0\0" + port.to_bytes(2)
