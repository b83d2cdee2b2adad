"""The kernel as oracle: after any sequence of changes, the tables say of any address what the kernel says.

The kernel is asked with RTM_GETROUTE and RTM_F_FIB_MATCH for a packet that arrives on a port, which is the lookup it
makes when it forwards one.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from libfp.linux import rtnetlink as rt
from libfp.linux.mirror import Mirror
from libfp.linux.netlink import NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, Netlink, attribute
from libfp.linux.state import USABLE
from libfp.stages.next_hops import Drop, Forward, Multipath, Punt
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.plain_routes import PlainRoutes

PORTS = ("r0", "r1")  # r2 is a link that is not a port
LINKS = ("r0", "r1", "r2")
NETS = [f"10.{i}.{j}" for i in (0, 1) for j in (1, 2)]
GATEWAYS = {"r0": "10.0.1.9", "r1": "10.0.2.9", "r2": "10.1.1.9"}
ERRORS: dict[int | None, Punt | Drop] = {
    errno.EINVAL: Drop("blackhole"),
    errno.EHOSTUNREACH: Punt("unreachable"),
    errno.EACCES: Punt("prohibit"),
    errno.ENETUNREACH: Punt("no-route"),
}


def packed(address: str) -> bytes:
    return socket.inet_aton(address)


class Kernel:
    """Requests to one namespace's kernel, sent as they are: what it refuses is not an error here."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.netlink: Netlink = host.call(Netlink)
        self.log: list[str] = []

    def index(self, name: str) -> int:
        return self.host.index(name)

    def send(self, what: str, kind: int, body: bytes, flags: int = NLM_F_CREATE) -> None:
        try:
            self.netlink.ask(kind, body, flags | 4)
        except OSError as error:
            what += f" -> {errno.errorcode[error.errno or 0]}"
        self.log.append(what)

    def route(
        self, command: str, prefix: str, length: int, kind: int, hops: list[tuple[str, str]], **more: int
    ) -> None:
        flags = {"add": NLM_F_CREATE | 0x200, "replace": NLM_F_CREATE | NLM_F_REPLACE, "prepend": NLM_F_CREATE}
        flags |= {"append": NLM_F_CREATE | NLM_F_APPEND, "del": 0}
        scope = 255 if command == "del" else rt.SCOPE_LINK if hops and not any(via for _, via in hops) else 0
        body = struct.pack("=BBBBBBBBI", 2, length, 0, more.get("tos", 0), 254, 4, scope, kind, 0)
        if length:
            mask = 0xFFFFFFFF << (32 - length) & 0xFFFFFFFF
            number = int.from_bytes(packed(prefix), "big") & mask
            body += attribute(1, number.to_bytes(4, "big"))
        if len(hops) == 1:
            body += self._hop(*hops[0])
        elif hops:
            entries = b""
            for link, via in hops:
                nested = attribute(5, packed(via)) if via else b""
                entries += struct.pack("=HBBi", 8 + len(nested), 0, 0, self.index(link)) + nested
            body += attribute(9, entries)
        if more.get("metric"):
            body += attribute(6, struct.pack("=I", more["metric"]))
        if more.get("source"):
            body += attribute(7, more["source"].to_bytes(4, "big"))
        if more.get("mtu"):
            body += attribute(8, attribute(2, struct.pack("=I", more["mtu"])))
        text = f"route {command} {prefix}/{length} type {kind} {hops} {more}"
        self.send(text, rt.RTM_DELROUTE if command == "del" else rt.RTM_NEWROUTE, body, flags[command])

    def _hop(self, link: str, via: str) -> bytes:
        hop = attribute(4, struct.pack("=I", self.index(link)))
        return hop + attribute(5, packed(via)) if via else hop

    def address(self, command: str, link: str, address: str, length: int) -> None:
        body = struct.pack("=BBBBI", 2, length, 0, 0, self.index(link))
        broadcast = int.from_bytes(packed(address), "big") | (0xFFFFFFFF >> length)
        body += attribute(2, packed(address)) + attribute(1, packed(address))
        if length < 31:
            body += attribute(4, broadcast.to_bytes(4, "big"))
        kind = rt.RTM_NEWADDR if command == "add" else rt.RTM_DELADDR
        self.send(f"address {command} {link} {address}/{length}", kind, body)

    def neighbour(self, command: str, link: str, address: str, state: int, mac: int) -> None:
        body = struct.pack("=B3xiHBB", 2, self.index(link), state, 0, 0) + attribute(1, packed(address))
        body += attribute(2, bytes([2, 0, 0, 0, 1, mac]))
        kind = rt.RTM_NEWNEIGH if command == "add" else rt.RTM_DELNEIGH
        self.send(f"neighbour {command} {link} {address} {state:#x} {mac}", kind, body, NLM_F_CREATE | NLM_F_REPLACE)

    def link(self, name: str, up: bool) -> None:
        body = struct.pack("=BxHiII", 0, 0, self.index(name), int(up), 1)
        self.send(f"link {name} {'up' if up else 'down'}", rt.RTM_NEWLINK, body, 0)

    def lookup(self, address: int, iif: int) -> rt.Route | int:
        """The route that a packet arriving on `iif` takes, or an error number."""
        body = struct.pack("=BBBBBBBBI", 2, 32, 32, 0, 0, 0, 0, 0, rt.RTM_F_FIB_MATCH)
        body += attribute(1, address.to_bytes(4, "big")) + attribute(2, packed("203.0.113.9"))
        body += attribute(3, struct.pack("=I", iif))
        try:
            replies = self.netlink.ask(rt.RTM_GETROUTE, body, 0)
        except OSError as error:
            return error.errno or 0
        found = rt.route(replies[0].body)
        assert found is not None
        return found[1]

    def neighbours(self) -> dict[tuple[int, bytes], rt.Neighbour]:
        messages = self.netlink.dump_all(rt.RTM_GETNEIGH, bytes(12))
        found = [rt.neighbour(message.body) for message in messages]
        return {(n.link, n.address): n for n in found if n is not None}

    def links(self) -> dict[int, rt.Link]:
        found = [rt.link(message.body) for message in self.netlink.dump_all(rt.RTM_GETLINK, bytes(16))]
        return {link.index: link for link in found if link is not None}


class Router:
    """A namespace with three links and its mirror."""

    def __init__(self, lab: Lab) -> None:
        self.far, self.near = lab.host("far"), lab.host("near")
        for name in LINKS:
            lab.link(self.far, "far" + name, self.near, name)
        self.near.sysctl("net.ipv4.ip_forward", 1)
        self.near.sysctl("net.ipv4.conf.all.send_redirects", 0)
        for name in LINKS:
            self.near.sysctl(f"net.ipv4.conf.{name}.send_redirects", 0)
            self.near.sysctl(f"net.ipv4.neigh.{name}.gc_stale_time", 3600)
        self.kernel = Kernel(self.near)
        self.ports = {self.near.index(name): number for number, name in enumerate(PORTS)}
        self.routes = PlainRoutes()
        self.mirror: Mirror = self.near.call(Mirror, self.routes, self.ports)  # type: ignore[arg-type]
        self.near.call(self.mirror.start)
        self.mirror.wait_synced(10)

    def close(self) -> None:
        self.mirror.close()
        self.kernel.netlink.close()

    def contents(self) -> dict[tuple[int, int], Any]:
        return {key: self.routes.next_hops[index] for key, index in self.routes.fib.entries.items()}

    def expected(self, address: int) -> list[Any]:
        """The actions that would do what the kernel does."""
        found = self.kernel.lookup(address, next(iter(self.ports)))
        if isinstance(found, int):
            return [ERRORS[found]]
        if found.type == rt.LOCAL:
            return [Punt("local")]
        if found.type == rt.BROADCAST:
            return [Punt("broadcast")]
        assert found.type == rt.UNICAST
        hops = [hop for hop in found.hops if not hop.dead]
        actions: list[Any] = [self._hop(found, hop, address) for hop in hops]
        if len(hops) > 1 and not all(hop.gateway for hop in hops):
            # the path of flows whose destinations are on a link itself: a group has no neighbour of each of them
            actions.append(Punt("via-linux"))
        return actions

    def _hop(self, route: rt.Route, hop: rt.Hop, address: int) -> Forward | Punt:
        if hop.link not in self.ports:
            return Punt("via-linux")
        link = self.kernel.links()[hop.link]
        neighbour = self.kernel.neighbours().get((hop.link, hop.gateway or address.to_bytes(4, "big")))
        if neighbour is None or not neighbour.state & USABLE or not neighbour.mac or not link.carrier:
            return Punt("no-neighbour")
        mtu = min(route.mtu or link.mtu, link.mtu)
        return Forward(self.ports[hop.link], neighbour.mac, link.mac, mtu)

    def check(self, addresses: list[int]) -> None:
        wrong: list[str] = []

        def agrees() -> bool:
            self.mirror.barrier()
            wrong.clear()
            for address in addresses:
                action, expected = self.routes.action(address), self.expected(address)
                paths = action.paths if isinstance(action, Multipath) else ()
                actions = [self.routes.next_hops[path] for path, _ in paths] or [action]
                if not all(one in expected for one in actions):
                    wrong.append(f"{socket.inet_ntoa(address.to_bytes(4, 'big'))}: {action} instead of {expected}")
            return not wrong

        try:  # the kernel takes note of a lost carrier up to a second later
            wait_until(agrees, timeout=2.5)
        except TimeoutError:
            pytest.fail("\n".join([*wrong, "after", *self.kernel.log]))


@pytest.fixture
def router() -> Iterator[Router]:
    with Lab() as lab:
        router = Router(lab)
        try:
            yield router
        finally:
            router.close()


def steps(router: Router, choose: random.Random) -> dict[str, tuple[float, Callable[[], None]]]:
    """What can happen, and how often."""
    kernel = router.kernel

    def prefix() -> tuple[str, int]:
        length = choose.choice((0, 8, 15, 16, 22, 24, 24, 25, 30, 32, 32))
        return f"{choose.choice(NETS)}.{choose.randrange(8)}", length

    def hop() -> tuple[str, str]:
        link = choose.choice(LINKS)
        return link, choose.choice((GATEWAYS[link], GATEWAYS[link], ""))

    def route() -> None:
        command = choose.choice(("add", "add", "replace", "append", "prepend", "del", "del"))
        kind = choose.choice((rt.UNICAST,) * 6 + (rt.BLACKHOLE, rt.UNREACHABLE, rt.PROHIBIT, rt.THROW))
        hops = [hop() for _ in range(choose.choice((1, 1, 1, 2, 3)))] if kind == rt.UNICAST else []
        more = {"metric": choose.choice((0, 0, 10, 20)), "mtu": choose.choice((0, 0, 0, 1400, 1600))}
        if choose.random() < 0.3:
            more["source"] = int.from_bytes(packed(choose.choice(NETS) + ".1"), "big")
        if command == "del" and choose.random() < 0.7:
            hops, kind, more = [], 0, {"metric": more["metric"]}
        kernel.route(command, *prefix(), kind, hops, **more)

    def address() -> None:
        router.mirror.barrier()
        there = [a for found in router.mirror.state.addresses.values() for a in found if a.local[0] == 10]
        if there and choose.random() < 0.5:
            gone = choose.choice(sorted(there))
            name = router.mirror.state.links[gone.link].name
            kernel.address("del", name, socket.inet_ntoa(gone.local), gone.length)
        else:
            kernel.address("add", choose.choice(LINKS), f"{choose.choice(NETS)}.1", choose.choice((24, 24, 25, 32, 16)))

    def neighbour() -> None:
        link = choose.choice(LINKS)
        where = choose.choice((GATEWAYS[link], f"{choose.choice(NETS)}.{choose.randrange(8)}"))
        state = choose.choice((rt.NUD_PERMANENT, rt.NUD_PERMANENT, rt.NUD_STALE, rt.NUD_NOARP))
        kernel.neighbour(choose.choice(("add", "add", "del")), link, where, state, choose.randrange(3))

    def link() -> None:
        kernel.link(choose.choice(LINKS), choose.random() < 0.6)

    def carrier() -> None:
        name = choose.choice(LINKS)
        up = choose.random() < 0.6
        kernel.log.append(f"carrier {name} {'up' if up else 'down'}")
        (router.far.up if up else router.far.down)("far" + name)

    def ignore_linkdown() -> None:
        name, value = choose.choice((*LINKS, "all")), choose.randrange(2)
        kernel.log.append(f"ignore_routes_with_linkdown {name} {value}")
        router.near.sysctl(f"net.ipv4.conf.{name}.ignore_routes_with_linkdown", value)

    def resync() -> None:
        kernel.log.append("resync")
        router.mirror.resync()

    return {
        "route": (20, route),
        "address": (6, address),
        "neighbour": (8, neighbour),
        "link": (2, link),
        "carrier": (1, carrier),
        "ignore": (1, ignore_linkdown),
        "resync": (0.5, resync),
    }


def addresses(choose: random.Random, count: int) -> list[int]:
    found = []
    for _ in range(count):
        last = choose.choice((choose.randrange(10), choose.randrange(10), 127, 128, 254, 255))
        net = choose.choice((*NETS, *NETS, "10.0.3", "10.1.0", "11.0.0"))
        found.append(int.from_bytes(packed(f"{net}.{last}"), "big"))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_tables_agree_with_kernel(router: Router, seed: int) -> None:
    choose = random.Random(seed)
    for link in LINKS:
        router.kernel.address("add", link, GATEWAYS[link].rsplit(".", 1)[0] + ".1", 24)
    weights = steps(router, choose)
    for _ in range(25):
        for _ in range(8):
            name = choose.choices(list(weights), [weight for weight, _ in weights.values()])[0]
            weights[name][1]()
        router.check(addresses(choose, 40))
    known = router.contents()
    router.mirror.resync()
    router.mirror.barrier()
    assert known == router.contents(), "a new dump found something else than the notifications had told"
