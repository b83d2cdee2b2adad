"""The netlink codec: what it encodes it decodes, and nothing that a socket can bring makes it fail otherwise."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libfp.linux import netlink as nl
from libfp.linux import rtnetlink as rt
from libfp.linux.netlink import Malformed, attribute, attribute_list, attributes, messages, request
from libfp.linux.rib import Rib
from libfp.linux.state import Changes, State

NEW = (
    rt.RTM_NEWLINK,
    rt.RTM_NEWADDR,
    rt.RTM_NEWROUTE,
    rt.RTM_NEWNEIGH,
    rt.RTM_NEWRULE,
    rt.RTM_NEWNETCONF,
    rt.RTM_NEWNEXTHOP,
)


def route_body(prefix: bytes = b"\x0a\x09\x00\x00", length: int = 16, table: int = 254, **more: bytes) -> bytes:
    body = struct.pack("=BBBBBBBBI", rt.AF_INET, length, 0, 0, table, 4, 0, rt.UNICAST, 0)
    body += attribute(1, prefix) + attribute(5, b"\x0a\x00\x02\x09") + attribute(4, struct.pack("=I", 3))
    return body + b"".join(more.values())


def neighbour_body() -> bytes:
    body = struct.pack("=B3xiHBB", rt.AF_INET, 3, rt.NUD_REACHABLE, 0, 0)
    return body + attribute(1, b"\x0a\x00\x02\x09") + attribute(2, b"\x02\0\0\0\0\x01")


def link_body() -> bytes:
    body = struct.pack("=BxHiII", 0, 1, 3, rt.IFF_UP | rt.IFF_LOWER_UP, 0)
    info = attribute(1, b"veth\0") + attribute(4, b"bridge\0")
    parts = [attribute(3, b"r1\0"), attribute(4, struct.pack("=I", 1500)), attribute(1, b"\x02\0\0\0\0\x09")]
    return body + b"".join(parts) + attribute(18, info) + attribute(10, struct.pack("=I", 9))


@given(st.lists(st.tuples(st.integers(16, 0xFFFF), st.integers(0, 0xFFFE), st.binary(max_size=40)), max_size=5))
def test_messages_survive_the_round_trip(wanted: list[tuple[int, int, bytes]]) -> None:
    buffer = b""
    for number, (kind, flags, body) in enumerate(wanted):
        encoded = request(kind, flags, number, body)
        buffer += encoded + bytes(-len(encoded) % 4)
    found = list(messages(buffer))
    assert [(m.type, m.flags, bytes(m.body)) for m in found] == [(k, f | 1, b) for k, f, b in wanted]
    assert [m.sequence for m in found] == list(range(len(wanted)))


@given(st.lists(st.tuples(st.integers(0, nl.NLA_TYPE_MASK), st.binary(max_size=20)), max_size=6))
def test_attributes_survive_the_round_trip(wanted: list[tuple[int, bytes]]) -> None:
    body = memoryview(b"".join(attribute(kind, value) for kind, value in wanted))
    assert [(kind, bytes(value)) for kind, value in attribute_list(body)] == wanted
    assert {kind: bytes(value) for kind, value in attributes(body).items()} == dict(wanted)


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_malformed(data: bytes) -> None:
    try:
        for message in messages(data):
            attributes(message.body)
    except Malformed:
        pass


@given(st.sampled_from(NEW), st.integers(0, 0xFFFF), st.binary(max_size=120), st.booleans())
def test_any_payload_is_taken_in_or_malformed(kind: int, flags: int, body: bytes, dump: bool) -> None:
    state, changes = State(), Changes()
    for number in (kind, kind + 1):  # new, deleted
        try:
            state.apply(nl.Message(number, flags, 0, memoryview(body)), changes, dump)
        except Malformed:
            pass


@pytest.mark.parametrize("make", [route_body, neighbour_body, link_body])
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_damaged_messages_are_taken_in_or_malformed(
    make: Callable[[], bytes], position: int, value: int, cut: int
) -> None:
    """One byte changed, the end cut off: nearer to what a decoder expects than random bytes."""
    body = bytearray(make())
    body[position % len(body)] = value
    damaged = memoryview(bytes(body[: max(0, len(body) - cut)]))
    kind = {route_body: rt.RTM_NEWROUTE, neighbour_body: rt.RTM_NEWNEIGH, link_body: rt.RTM_NEWLINK}[make]
    try:
        State().apply(nl.Message(kind, 0, 0, damaged), Changes())
    except Malformed:
        pass


def test_route() -> None:
    metrics = attribute(8, attribute(2, struct.pack("=I", 1400)))
    body = route_body(table=0, metrics=metrics, table_32=attribute(15, struct.pack("=I", 254)))
    found = rt.route(memoryview(body))
    assert found is not None
    prefix, route = found
    assert str(prefix) == "10.9.0.0/16"
    assert route.hops == (rt.Hop(3, b"\x0a\x00\x02\x09"),)
    assert (route.table, route.mtu, route.type) == (254, 1400, rt.UNICAST)


def test_multipath_route() -> None:
    hops = b""
    for link, flags in ((3, 0), (4, rt.RTNH_F_DEAD)):
        hops += struct.pack("=HBBi", 16, flags, 0, link) + attribute(5, bytes([10, 0, link, 9]))
    body = struct.pack("=BBBBBBBBI", rt.AF_INET, 0, 0, 0, 254, 4, 0, rt.UNICAST, 0) + attribute(9, hops)
    found = rt.route(memoryview(body))
    assert found is not None
    assert found[1].hops == (rt.Hop(3, b"\x0a\0\x03\x09"), rt.Hop(4, b"\x0a\0\x04\x09", dead=True))
    with pytest.raises(Malformed):
        rt.route(memoryview(body[:-1] + b""))
    wrong = bytearray(body)
    struct.pack_into("=H", wrong, 16, 40)  # the first hop claims more than there is
    with pytest.raises(Malformed):
        rt.route(memoryview(bytes(wrong)))


def test_other_families_are_not_for_us() -> None:
    assert rt.route(memoryview(bytes([7]) + bytes(11))) is None
    assert rt.neighbour(memoryview(bytes([7]) + bytes(11))) is None
    assert rt.link(memoryview(bytes([7]) + bytes(15))) is None


def test_link() -> None:
    link = rt.link(memoryview(link_body()))
    assert link is not None
    assert (link.name, link.index, link.mtu, link.kind) == ("r1", 3, 1500, "veth")
    assert (link.master, link.master_kind) == (9, "bridge")
    assert link.up
    assert link.carrier


@pytest.mark.parametrize(
    ("extra", "text", "plain"),
    [
        (b"", "policy rule 9: from all lookup main", True),
        (attribute(3, b"eth0\0"), "policy rule 9: from all iif eth0 lookup main", False),
        (attribute(10, struct.pack("=I", 3)), "policy rule 9: from all fwmark 0x3 lookup main", False),
        (attribute(14, struct.pack("=I", 0)), "policy rule 9: from all lookup main suppress_prefixlength 0", False),
        (attribute(14, b"\xff" * 4), "policy rule 9: from all lookup main", True),
    ],
)
def test_rule(extra: bytes, text: str, plain: bool) -> None:
    body = struct.pack("=BBBBBxxBI", rt.AF_INET, 0, 0, 0, 254, 1, 0) + attribute(6, struct.pack("=I", 9)) + extra
    rule = rt.rule(memoryview(body))
    assert (rule.what, rule.plain) == (text, plain)


def test_kernel_routes_of_one_metric_keep_the_kernel_s_order() -> None:
    rib, prefix = Rib(), rt.Prefix(0, 0)
    a, b, c = (rt.Route(254, 0, 0, rt.UNICAST, 0, (rt.Hop(link),)) for link in (1, 2, 3))
    rib.add(prefix, a, nl.NLM_F_CREATE)
    rib.add(prefix, b, nl.NLM_F_CREATE)
    assert rib.routes[prefix] == (b, a), "without append it goes in front"
    rib.add(prefix, c, nl.NLM_F_APPEND)
    assert rib.routes[prefix] == (b, a, c)
    rib.add(prefix, c, nl.NLM_F_REPLACE)
    assert rib.routes[prefix] == (c, a), "replace is of the first"
    assert not rib.remove(prefix, b)
    assert rib.remove(prefix, c)
    local = a._replace(table=255)
    rib.add(prefix, local)
    assert rib.routes[prefix] == (local, a)


def test_hops_of_an_ipv6_route_go_one_by_one() -> None:
    rib, prefix = Rib(bits=128), rt.Prefix(0, 0, 128)
    hops = tuple(rt.Hop(2, bytes([0xFE, 0x80, *bytes(13), i]), weight=3) for i in (1, 2, 3))
    route = rt.Route(254, 0, 0, rt.UNICAST, 0, hops)
    rib.add(prefix, route)
    assert rib.remove(prefix, route._replace(hops=(hops[1]._replace(weight=1),))), "told without its weight"
    assert rib.routes[prefix] == (route._replace(hops=(hops[0], hops[2])),)
    assert rib.remove(prefix, route._replace(hops=hops[:2]))
    assert rib.routes[prefix] == (route._replace(hops=(hops[2]._replace(weight=1),)),)
    assert rib.add(prefix, route, nl.NLM_F_APPEND), "told whole"
    assert rib.routes[prefix] == (route,)


class Pair:
    """A `Netlink` whose other end is a socket of ours: the kernel's words, as we want them."""

    def __init__(self) -> None:
        self.netlink = nl.Netlink.__new__(nl.Netlink)
        self.netlink.socket, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.netlink._sequence = 0
        self.netlink._buffer = bytearray(4096)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    pair = Pair()
    monkeypatch.setattr(nl, "_from_kernel", lambda sender: True)
    yield pair
    pair.netlink.close()
    pair.kernel.close()


def reply(kind: int, body: bytes, flags: int = 2, sequence: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def answer(pair: Pair, *datagrams: bytes) -> threading.Thread:
    def serve() -> None:
        pair.kernel.recv(4096)
        for datagram in datagrams:
            pair.kernel.send(datagram)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_dump(pair: Pair) -> None:
    done = reply(nl.NLMSG_DONE, bytes(4))
    thread = answer(pair, reply(24, b"a123") + reply(24, b"b123"), reply(24, b"c123"), reply(24, b"other", 0, 99), done)
    found = [bytes(m.body) for m in pair.netlink.dump_all(26, b"")]
    thread.join()
    assert found == [b"a123", b"b123", b"c123"]


def test_dump_that_changed_while_it_ran(pair: Pair) -> None:
    thread = answer(pair, reply(24, b"a123", 2 | nl.NLM_F_DUMP_INTR), reply(nl.NLMSG_DONE, bytes(4)))
    with pytest.raises(nl.Interrupted):
        list(pair.netlink.dump(26, b""))
    thread.join()


def test_dump_that_the_kernel_refuses(pair: Pair) -> None:
    thread = answer(pair, reply(nl.NLMSG_ERROR, struct.pack("=i", -95)))
    with pytest.raises(OSError, match="not supported"):
        list(pair.netlink.dump(26, b""))
    thread.join()
    pair.netlink._sequence = 0
    thread = answer(pair, reply(nl.NLMSG_DONE, struct.pack("=i", -12)))
    with pytest.raises(OSError, match="memory"):
        list(pair.netlink.dump(26, b""))
    thread.join()


def test_datagram_larger_than_the_buffer(pair: Pair) -> None:
    pair.kernel.send(bytes(5000))
    with pytest.raises(Malformed, match="larger"):
        pair.netlink.receive()
