"""Route messages in compiled code: the same as one decoded by Python at a time, whatever the messages are.

Hostile ones included: a million of them, mutated, from a buffer that ends at a guard page. They are taken in or found
malformed; nothing is read outside of the datagram, which ends the process (and with ``LIBFP_BOUNDSCHECK=1`` or
interpreted, raises).
"""

from __future__ import annotations

import os
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.jit import INTERPRETED
from libfp.linux import bulk
from libfp.linux import rtnetlink as rt
from libfp.linux.netlink import Malformed, Message, attribute, messages, request
from libfp.linux.state import Changes, State

#: `make stress` has a million.
MUTANTS = 20_000 if INTERPRETED else 1_000_000 if "LIBFP_STRESS" in os.environ else 100_000


def route(
    kind: int, flags: int, bits: int, address: int, length: int, *more: bytes, table: int = 254, rtype: int = 1
) -> bytes:
    family = rt.AF_INET if bits == 32 else rt.AF_INET6
    body = struct.pack("=BBBBBBBBI", family, length, 0, 0, table, 4, 0, rtype, 0)
    if length:
        prefix = address >> (bits - length) << (bits - length)
        body += attribute(1, prefix.to_bytes(bits // 8, "big"))
    return request(kind, flags, 7, body + b"".join(more))


def hop(link: int, gateway: bytes = b"") -> bytes:
    return (attribute(5, gateway) if gateway else b"") + attribute(4, struct.pack("=I", link))


def multipath(*hops: tuple[int, bytes]) -> bytes:
    entries = [(link, attribute(5, gateway) if gateway else b"") for link, gateway in hops]
    return attribute(9, b"".join(struct.pack("=HBBi", 8 + len(x), 0, 1, link) + x for link, x in entries))


def one_by_one(state: State, datagram: bytes, changes: Changes, dump: bool) -> None:
    """The reference: every message through the decoder in Python."""
    for message in messages(datagram):
        if message.type >= 16:
            state.apply(message, changes, dump)


def contents(state: State) -> list[object]:
    ribs = state.ribs.values()
    return [(dict(rib.routes), rib.local, rib.local_prefixes, rib.nexthop_objects) for rib in ribs]


gateways = {32: [bytes([10, 0, 0, i]) for i in (1, 2)], 128: [bytes([0xFE, 0x80, *bytes(13), i]) for i in (1, 2)]}


@st.composite
def route_messages(draw: st.DrawFn) -> bytes:
    bits = draw(st.sampled_from((32, 32, 128)))
    length = draw(st.sampled_from((0, 8, bits // 2 - 1, bits // 2, bits // 2 + 1, bits)))
    address = draw(st.integers(0, 7)) << (bits - 3) | draw(st.integers(0, 3))
    via = st.tuples(st.integers(2, 4), st.sampled_from([*gateways[bits], b""]))
    ways = draw(st.lists(via, max_size=3))
    more = [hop(*ways[0])] if len(ways) == 1 else [multipath(*ways)] if ways else []
    more += draw(
        st.lists(
            st.sampled_from(
                [
                    attribute(6, struct.pack("=I", 10)),  # metric
                    attribute(8, attribute(2, struct.pack("=I", 1400))),  # MTU
                    attribute(30, struct.pack("=I", 3)),  # nexthop object
                    attribute(12, bytes(32)),  # age
                    attribute(77, b"what is this"),
                ]
            ),
            max_size=2,
            unique=True,
        )
    )
    kind = draw(st.sampled_from((rt.RTM_NEWROUTE, rt.RTM_NEWROUTE, rt.RTM_DELROUTE)))
    flags = draw(st.sampled_from((0, 0x100, 0x400, 0x800)))
    table = draw(st.sampled_from((254, 254, 254, 255, 253, 99)))
    return route(kind, flags, bits, address, length, *more, table=table, rtype=draw(st.sampled_from((1, 1, 2, 6, 7))))


links = st.builds(
    lambda index, up: request(
        rt.RTM_NEWLINK, 0, 7, struct.pack("=BxHiII", 0, 1, index, 0x10001 if up else 0, 0) + attribute(3, b"x\0")
    ),
    st.integers(2, 4),
    st.booleans(),
)


@settings(max_examples=150 if not INTERPRETED else 20)
@given(
    st.lists(st.tuples(st.lists(st.one_of(route_messages(), route_messages(), links), max_size=8), st.booleans())),
)
def test_the_same_as_one_by_one(datagrams: list[tuple[list[bytes], bool]]) -> None:
    ours, plain = State(), State()
    for parts, dump in datagrams:
        changed, expected = Changes(), Changes()
        before = {bits: dict(rib.routes) for bits, rib in ours.ribs.items()}
        ours.take(b"".join(parts), changed, dump)
        ours.harvest(changed)
        one_by_one(plain, b"".join(parts), expected, dump)
        assert contents(ours) == contents(plain)
        assert changed.links == expected.links
        for bits, rib in ours.ribs.items():
            known = {tuple(row) for row in changed.of(bits).tolist()}
            differ = {p for p in before[bits].keys() | rib.routes.keys() if before[bits].get(p) != rib.routes.get(p)}
            assert dump or {prefix.row() for prefix in differ} <= known, "a change that is not told"


def test_many_prefixes_and_what_is_forgotten() -> None:
    """Growth of every structure: more prefixes than the first index, more forms than are kept, more than the log."""
    state, count = State(), 3000 if INTERPRETED else bulk.LOG_ROOM + 1000
    random.seed(1)
    addresses = random.sample(range(1 << 24), count)
    made = [
        route(24, 0, 32, address << 8, 24, hop(2 + i % 3), attribute(7, struct.pack("!I", i % 5000)))
        for i, address in enumerate(addresses)
    ]
    changes = Changes()
    for at in range(0, count, 500):
        state.take(b"".join(made[at : at + 500]), changes)
    state.harvest(changes)
    assert len(state.rib) == count
    assert len(changes.of(32)) == count
    for i in (0, 1, count // 2, count - 1):
        found = state.rib.routes[rt.Prefix(addresses[i] << 8, 24)]
        assert (found[0].hops[0].link, found[0].source) == (2 + i % 3, struct.pack("!I", i % 5000))
    rows = state.rib.link_gone(2)
    assert len(rows) == len([i for i in range(count) if i % 3 == 0])
    assert len(state.rib) == count - len(rows)


def test_what_is_out_of_use_is_forgotten() -> None:
    """A gateway that changes all the time: numbers do not pile up, and those that stay keep their meaning."""
    state = State()
    for i in range(40_000 if not INTERPRETED else 17_000):
        flags = 0x100  # replace
        state.take(route(24, flags, 32, 10 << 24, 8, hop(2), attribute(7, struct.pack("!I", i))), Changes())
        if i % 1000 == 0:
            state.numbering.tidy()
    assert len(state.numbering) < 20_000
    (found,) = state.rib.routes[rt.Prefix(10 << 24, 8)]
    assert found.source == struct.pack("!I", i)


def seeds() -> list[bytes]:
    """What a kernel would send."""
    found = []
    for bits in (32, 128):
        a, b = gateways[bits]
        for number, more in enumerate(
            (
                [hop(2, a)],
                [hop(3)],
                [multipath((2, a), (3, b))],
                [hop(2, a), attribute(6, struct.pack("=I", 10)), attribute(12, bytes(32))],
                [attribute(30, struct.pack("=I", 3)), hop(2, b)],
                [hop(2), attribute(8, attribute(2, struct.pack("=I", 1400))), attribute(15, struct.pack("=I", 254))],
                [attribute(18, struct.pack("=H", 10) + gateways[128][0]), attribute(4, struct.pack("=I", 2))],
            )
        ):
            for kind, flags in ((24, 0x400), (24, 0x100), (25, 0)):
                found.append(route(kind, flags, bits, number << (bits - 8), 16, *more))
    return found


def mutated(choose: random.Random, count: int) -> list[bytes]:
    """Datagrams of a few messages each, `count` messages in all, most of them damaged somewhere."""
    made, whole = [], seeds()
    lengths = (0, 1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 27, 28, 29, 255, 0xFFFF, 0xFFFC)
    while count > 0:
        some = [bytearray(message) for message in choose.choices(whole, k=1 + int(4 * choose.random()))]
        count -= len(some)
        for message in some:
            what, at = int(8 * choose.random()), int(len(message) * choose.random())
            if what == 0:
                message[at] = choose.getrandbits(8)
            elif what == 1:  # any length or type word
                struct.pack_into("=H", message, at & ~1, choose.choice(lengths))
            elif what == 2:  # an attribute's
                struct.pack_into("=H", message, 28 + (at & ~3) % (len(message) - 28), choose.choice(lengths))
            elif what == 3:  # the message's
                struct.pack_into("=I", message, 0, len(message) + int(40 * choose.random()) - 20)
            elif what == 4:
                del message[at:]
            elif what == 5:
                message[at:at] = choose.randbytes(4 + 4 * int(8 * choose.random()))
            elif what == 6:  # nested into itself
                message[28:28] = attribute(int(32 * choose.random()) | 0x8000, bytes(message[28:]))
        made.append(b"".join(some))
    return made


@pytest.mark.stress
@pytest.mark.timeout(280)
def test_hostile_messages() -> None:
    """Taken in or malformed, and consistent: the same as the decoder in Python makes of them, checked on a sample."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    choose = random.Random(seed)
    ours, done, malformed = State(), 0, 0
    plain: State | None = State()
    while done < MUTANTS:
        for number, datagram in enumerate(mutated(choose, 5000)):
            outcomes = []
            for state in (ours, plain) if plain else (ours,):
                changes = Changes()
                try:
                    if state is ours:
                        state.take(datagram, changes)
                    else:
                        one_by_one(state, datagram, changes, False)
                    outcomes.append("taken in")
                except Malformed:
                    outcomes.append("malformed")
                finally:
                    state.harvest(changes)
            malformed += outcomes[0] == "malformed"
            assert len(set(outcomes)) == 1, (outcomes, datagram.hex())
            if plain and number % 100 == 0:
                assert contents(ours) == contents(plain), datagram.hex()
        done += 5000
        if plain and done >= MUTANTS // 20:
            assert contents(ours) == contents(plain)
            plain = None  # the rest without the reference, which is slow
        ours.numbering.tidy()
    assert malformed > MUTANTS // 50, "the mutations are too tame"


def test_a_datagram_that_is_too_large() -> None:
    with pytest.raises(Malformed):
        State().take(bytes(bulk.DATAGRAM + 1), Changes())


def test_control_messages_are_handed_back() -> None:
    state = State()
    done = request(3, 2, 7, bytes(4))
    other = route(24, 0, 32, 9 << 24, 8, hop(2)).replace(struct.pack("=I", 7), struct.pack("=I", 8), 1)
    datagram = route(24, 0x10, 32, 10 << 24, 8, hop(2)) + other + done
    flags, found = state.take(datagram, Changes(), dump=True, sequence=7)
    assert flags & 0x10, "NLM_F_DUMP_INTR"
    assert [message.type for message in found] == [3]
    assert isinstance(found[0], Message)
    assert [str(prefix) for prefix in state.rib.routes] == ["10.0.0.0/8"], "the other has another sequence number"
