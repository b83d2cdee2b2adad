"""IPv6 routes in the mirror: after any sequence of changes it knows what a new dump finds. The kernel is the oracle."""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from libfp.linux import rtnetlink as rt
from libfp.linux.mirror import Mirror
from libfp.linux.netlink import NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, Netlink, attribute
from libfp.linux.state import State
from libfp.linux.verify import Verification, compare, verify
from libfp.stages.next_hops import Drop, Forward, Multipath, Punt
from libfp.stages.routes import Routes
from libfp.testing.netns import Host, Lab, wait_until

LINKS = ("r0", "r1", "r2")
Hops = list[tuple[str, str]]
ERRORS: dict[int | None, Punt | Drop] = {
    errno.EINVAL: Drop("blackhole"),
    errno.EHOSTUNREACH: Punt("unreachable"),
    errno.EACCES: Punt("prohibit"),
    errno.ENETUNREACH: Punt("no-route"),
    errno.EAGAIN: Punt("no-route"),
}
KINDS: dict[int, Punt | Drop] = {
    rt.BLACKHOLE: Drop("blackhole"),
    rt.UNREACHABLE: Punt("unreachable"),
    rt.PROHIBIT: Punt("prohibit"),
    rt.THROW: Punt("no-route"),
    rt.MULTICAST: Punt("multicast"),
}


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)


class Router:
    """A namespace with three links and its mirror, and requests to its kernel: what it refuses is no error here."""

    def __init__(self, lab: Lab) -> None:
        self.far, self.near = lab.host("far"), lab.host("near")
        for number, name in enumerate(LINKS):
            lab.link(self.far, "far" + name, self.near, name)
            self.near.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 0)
            self.near.sysctl(f"net.ipv6.conf.{name}.keep_addr_on_down", number % 2)
        self.indexes = {name: self.near.index(name) for name in LINKS}
        self.netlink: Netlink = self.near.call(Netlink)
        self.log: list[str] = []
        for number, name in enumerate(LINKS):
            self.address("add", name, f"2001:db8:{number}::1")
        self.near.sysctl("net.ipv6.conf.all.forwarding", 1)
        self.routes = Routes()
        self.ports = {self.indexes["r0"]: 0, self.indexes["r1"]: 1}
        self.mirror: Mirror = self.near.call(Mirror, self.routes, self.ports)
        self.near.call(self.mirror.start)
        self.mirror.wait_synced(10)

    def close(self) -> None:
        self.mirror.close()
        self.netlink.close()

    def send(self, what: str, kind: int, body: bytes, flags: int = 0) -> None:
        try:
            self.netlink.ask(kind, body, flags | 4)
        except OSError as error:
            what += f" -> {error}"
        self.log.append(what)

    def address(self, command: str, link: str, address: str) -> None:
        body = struct.pack("=BBBBI", rt.AF_INET6, 64, 2, 0, self.indexes[link]) + attribute(2, packed(address))
        kind = rt.RTM_NEWADDR if command == "add" else rt.RTM_DELADDR
        self.send(f"address {command} {link} {address}", kind, body, NLM_F_CREATE)

    def route(
        self, command: str, prefix: str, length: int, kind: int, hops: list[tuple[str, str]], metric: int
    ) -> None:
        flags = {
            "add": NLM_F_CREATE | 0x200,
            "replace": NLM_F_CREATE | NLM_F_REPLACE,
            "del": 0,
            "prepend": NLM_F_CREATE,
        }
        flags["append"] = NLM_F_CREATE | NLM_F_APPEND
        body = struct.pack("=BBBBBBBBI", rt.AF_INET6, length, 0, 0, 254, 4, 0, kind, 0) + attribute(1, packed(prefix))
        if len(hops) == 1:
            body += self._hop(*hops[0])
        elif hops:
            nested = [attribute(5, packed(via)) if via else b"" for _, via in hops]
            entries = zip(hops, nested, strict=True)
            body += attribute(
                9,
                b"".join(
                    struct.pack("=HBBi", 8 + len(rest), 0, len(rest) % 3, self.indexes[link]) + rest
                    for (link, _), rest in entries
                ),
            )
        if metric:
            body += attribute(6, struct.pack("=I", metric))
        what = f"route {command} {prefix}/{length} type {kind} {hops} metric {metric}"
        self.send(what, rt.RTM_DELROUTE if command == "del" else rt.RTM_NEWROUTE, body, flags[command])

    def neighbour(self, link: str, address: str, state: int) -> None:
        body = struct.pack("=B3xiHBB", rt.AF_INET6, self.indexes[link], state, 0, 0) + attribute(1, packed(address))
        body += attribute(2, bytes([2, 0, 0, 0, 1, 9]))
        self.send(f"neighbour {link} {address} {state:#x}", rt.RTM_NEWNEIGH, body, NLM_F_CREATE | NLM_F_REPLACE)

    def action(self, address: int) -> object:
        index = self.routes.fib6.lookup(address)
        return self.routes.next_hops[index] if index else Punt("no-route")

    def expected(self, address: int) -> list[object]:
        """What would do as the kernel does with a packet that arrives on r0; empty where only the kernel can tell."""
        body = struct.pack("=BBBBBBBBI", rt.AF_INET6, 128, 128, 0, 0, 0, 0, 0, rt.RTM_F_FIB_MATCH)
        body += attribute(1, address.to_bytes(16, "big")) + attribute(2, packed("2001:db8:ffff::9"))
        body += attribute(3, struct.pack("=I", self.indexes["r0"]))
        try:
            (reply, *_) = self.netlink.ask(rt.RTM_GETROUTE, body, 0)
        except OSError as error:
            return [ERRORS[error.errno]]
        decoded = rt.route(reply.body)
        assert decoded is not None
        route = decoded[1]
        if route.type in (rt.LOCAL, rt.ANYCAST):
            return [Punt("local")]
        if route.type in KINDS:
            return [KINDS[route.type]]
        assert route.type == rt.UNICAST, route
        return [self._does(route, hop, address) for hop in route.hops if not hop.dead]

    def _does(self, route: rt.Route, hop: rt.Hop, address: int) -> Forward | Punt:
        if hop.link not in self.ports:
            return Punt("via-linux")
        state = self.mirror.state
        link = state.links[hop.link]
        neighbour = state.usable(hop.link, hop.gateway or address.to_bytes(16, "big"))
        if neighbour is None or not link.carrier:
            return Punt("no-neighbour")
        return Forward(self.ports[hop.link], neighbour.mac, link.mac, min(route.mtu or link.mtu, link.mtu))

    def check(self, addresses: list[int]) -> list[str]:
        """Where the tables and the kernel disagree."""
        wrong = []
        for address in addresses:
            action, expected = self.action(address), self.expected(address)
            actions = (
                [self.routes.next_hops[path] for path, _ in action.paths] if isinstance(action, Multipath) else [action]
            )
            if not all(one in expected for one in actions) and action != Punt("via-linux"):
                name = socket.inet_ntop(socket.AF_INET6, address.to_bytes(16, "big"))
                wrong.append(f"{name}: {action} instead of {expected}")
        return wrong

    def _hop(self, link: str, via: str) -> bytes:
        hop = attribute(4, struct.pack("=I", self.indexes[link]))
        return hop + attribute(5, packed(via)) if via else hop

    def step(self, choose: random.Random) -> None:
        what = choose.choices(("route", "neighbour", "address", "link", "carrier"), (20, 6, 4, 2, 1))[0]
        if what == "route":
            length = choose.choice((0, 32, 48, 48, 64, 65, 128))
            whole = int.from_bytes(packed(f"2001:db8:{choose.randrange(8)}::{choose.randrange(2)}"), "big")
            prefix = socket.inet_ntop(socket.AF_INET6, (whole >> (128 - length) << (128 - length)).to_bytes(16, "big"))
            kind = choose.choice((rt.UNICAST,) * 6 + (rt.BLACKHOLE, rt.UNREACHABLE, rt.PROHIBIT, rt.THROW))
            count = choose.choice((1, 1, 1, 2, 3)) if kind == rt.UNICAST else 0
            hops = [self._way(choose) for _ in range(count)]
            command = choose.choice(("add", "add", "replace", "append", "prepend", "del", "del"))
            if command == "del" and choose.random() < 0.5:
                hops = []
            # a dump skips what stands between two hops of a multipath route: other routes have other metrics here
            joins = bool(hops) and all(via for _, via in hops)
            self.route(command, prefix, length, kind, hops, choose.choice((0, 10, 20) if joins else (5, 15, 25)))
        elif what == "neighbour":
            link, address = self._way(choose)
            state = choose.choice((rt.NUD_PERMANENT, rt.NUD_PERMANENT, rt.NUD_STALE))
            self.neighbour(link, address or f"2001:db8:{choose.randrange(8)}::{choose.randrange(2)}", state)
        elif what == "address":
            number = choose.randrange(3)
            self.address(choose.choice(("add", "del")), LINKS[number], f"2001:db8:{number}::{choose.randrange(1, 4)}")
        elif what == "link":
            name, up = choose.choice(LINKS), choose.random() < 0.6
            self.log.append(f"link {name} {'up' if up else 'down'}")
            (self.near.up if up else self.near.down)(name)
        else:
            name, up = choose.choice(LINKS), choose.random() < 0.6
            self.log.append(f"carrier {name} {'up' if up else 'down'}")
            (self.far.up if up else self.far.down)("far" + name)

    @staticmethod
    def _way(choose: random.Random) -> tuple[str, str]:
        number = choose.randrange(3)
        gateway = choose.choice((f"2001:db8:{number}::{choose.randrange(8, 11)}", "fe80::9", ""))
        return LINKS[number], gateway


@pytest.fixture
def router() -> Iterator[Router]:
    with Lab() as lab:
        router = Router(lab)
        try:
            yield router
        finally:
            router.close()


@pytest.mark.parametrize("seed", range(6))
def test_notifications_tell_what_a_dump_does(router: Router, seed: int) -> None:
    choose = random.Random(seed)
    found, wrong = list[Verification](), list[str]()
    ends = [f"2001:db8:{i}::{j}" for i in range(9) for j in (0, 1, 8, 9)] + ["2001:db9::1", "2001:db8:3:1::1"]
    addresses = [int.from_bytes(packed(end), "big") for end in ends]

    def same() -> bool:
        found.append(verify(router.mirror))
        wrong[:] = router.check(addresses)
        return not found[-1].differences and not wrong

    for _ in range(20):
        for _ in range(6):
            router.step(choose)
        try:  # the kernel takes note of a lost carrier up to a second later, and adds addresses when it likes
            wait_until(same, timeout=3)
        except TimeoutError:
            pytest.fail("\n".join([*found[-1].examples, *wrong, "after", *router.log]))
    assert found[-1].ipv6_routes > 5


def test_settings_are_those_of_all_interfaces(router: Router) -> None:
    index = router.indexes["r0"]
    assert router.mirror.state.forwarding(index, 128)
    router.near.sysctl("net.ipv6.conf.all.forwarding", 0)
    router.mirror.barrier()
    assert not router.mirror.state.forwarding(index, 128)


def test_a_host_without_ipv6(router: Router) -> None:
    host: Host = router.near
    for name in ("all", *LINKS):
        host.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 1)
    wait_until(lambda: (router.mirror.barrier(), verify(router.mirror).differences == 0)[1], what="the same")
    assert not any(router.mirror.state.addresses6.values())


def test_an_address_whose_peer_changes_is_one_address(router: Router) -> None:
    for peer in ("2001:db8:77::2", "2001:db8:77::3"):
        body = struct.pack("=BBBBI", rt.AF_INET6, 128, 2, 0, router.indexes["r1"])
        body += attribute(2, packed("2001:db8:77::1")) + attribute(1, packed(peer))
        router.netlink.ask(rt.RTM_NEWADDR, body, NLM_F_CREATE | NLM_F_REPLACE | 4)
        router.mirror.barrier()
        found = [one for one in router.mirror.state.addresses6[router.indexes["r1"]] if one.local[5] == 0x77]
        assert [one.peer for one in found] == [packed(peer)]
    wait_until(lambda: verify(router.mirror).differences == 0, what="the same")


def test_addresses_that_linux_has_not_told_of_yet_are_no_difference() -> None:
    """Those that it makes itself are told when nobody else turns out to have them: RFC 4862."""
    ours = State()
    fresh = State(ours)
    address = rt.Address(2, rt.AF_INET6, packed("fe80::1"), packed("fe80::1"), 64)
    for mine, linux, differences in (
        (set(), {address._replace(tentative=True)}, 0),
        (set(), {address}, 1),
        ({address}, {address._replace(tentative=True)}, 0),
        ({address}, set(), 1),
        ({address._replace(tentative=True)}, {address}, 0),
    ):
        ours.addresses6[2], fresh.addresses6[2] = mine, linux
        assert compare(ours, fresh).differences == differences, (mine, linux)
