"""Replicas against their masters: after any changes, at any budget, whatever is full, no reader sees a half of one."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from libfp.engine.replicas import Replicas, drain
from libfp.jit import INTERPRETED
from libfp.tables import Hash, Lpm4
from libfp.testing.tables import catch_up, same_words

EXAMPLES = settings(max_examples=20 if INTERPRETED else 200, deadline=None)

KEYS = [k * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF for k in range(14)]  # with 12 places, so that they move
ROUTES = [(0x0A000000, 15), (0x0A000000, 18), (0x0A000000, 20), (0x0A000100, 24), (0x0A000180, 25), (0x0A000181, 32)]
ROUTES += [(0x0A004000, 18), (0x0A004100, 24), (0x0A010000, 16), (0x0A010101, 32), (0, 0)]
PROBES = [0x0A000000, 0x0A000100, 0x0A000180, 0x0A000181, 0x0A001000, 0x0A004000, 0x0A004100, 0x0A010101, 0x0B000000]

_steps = st.lists(
    st.one_of(
        st.tuples(st.just("hash"), st.sampled_from(KEYS), st.integers(0, 3)),
        st.tuples(st.just("lpm4"), st.sampled_from(ROUTES), st.integers(0, 3)),
        st.tuples(st.just("drain"), st.sampled_from([1, 3, 16, 512])),
        st.tuples(st.just("drain"), st.sampled_from([1, 3, 16, 512])),
        st.tuples(st.just("flush")),
        st.tuples(st.just("restart")),
        st.tuples(st.just("load")),
    ),
    max_size=40,
)


class World:
    """Two tables, a worker's replicas, and everything the worker may rightly see."""

    def __init__(self, mailbox: int) -> None:
        self.lpm4, self.hash = Lpm4(capacity=50), Hash("u64", capacity=12)
        self.replicas = Replicas([self.lpm4, self.hash], mailbox=mailbox)
        self.replicas.reset()
        self.keys: dict[int, int] = {}
        self.routes: dict[tuple[int, int], int] = {}
        self.pending = [self.truth()]  # the states since the one the worker has certainly reached

    def truth(self) -> tuple[list[int], list[int]]:
        def scan(address: int) -> int:
            holding = [one for one in self.routes if address >> (32 - one[1]) << (32 - one[1]) == one[0]]
            return self.routes[max(holding, key=lambda one: one[1])] if holding else 0

        return [self.keys.get(key, -1) for key in KEYS], [scan(probe) for probe in PROBES]

    def change(self, step: tuple[Any, ...]) -> None:
        kind, key, value = step
        model: dict[Any, int] = self.keys if kind == "hash" else self.routes
        if kind == "hash" and value and (key in model or len(model) < 12):
            self.hash[key] = model[key] = value
        elif kind == "hash" and not value and key in model:
            del self.hash[key], model[key]
        elif kind == "lpm4" and value:
            self.lpm4.set(*key, value)
            model[key] = value
        elif kind == "lpm4" and key in model:
            self.lpm4.remove(*key)
            del model[key]
        self.pending.append(self.truth())

    def load(self) -> None:
        addresses, lengths, values = self.lpm4.routes()
        self.lpm4.load(addresses, lengths, values)

    def seen(self) -> tuple[list[int], list[int]]:
        hashed, routed = self.replicas.view(self.hash), self.replicas.view(self.lpm4)
        words = [self.hash._key.encode(key)[0] for key in KEYS]
        return [hashed.lookup(word) for word in words], [routed.lookup(probe) for probe in PROBES]

    def check(self) -> None:
        """Each lookup must give what was right at some moment since the worker last caught up.

        A key of the hash is one transaction, so all of them are from one moment.
        """
        hashed, routed = self.seen()
        assert hashed in [state[0] for state in self.pending]
        for i, value in enumerate(routed):
            assert value in {state[1][i] for state in self.pending}
        if self.replicas.acknowledged() and self.replicas.flush():
            assert (hashed, routed) == self.truth()
            self.pending = [self.truth()]


@EXAMPLES
@given(_steps, st.sampled_from([16, 64, 1024]))
def test_no_reader_sees_half_a_change(steps, mailbox):
    world = World(mailbox)
    replicas = world.replicas
    try:
        for step in steps:
            if step[0] in ("hash", "lpm4"):
                world.change(step)
            elif step[0] == "drain":
                waiting = len(replicas._ring)
                assert drain(replicas.mailbox, step[1]) <= max(step[1], 64)
                assert len(replicas._ring) < waiting or waiting == 0
            elif step[0] == "flush":
                replicas.flush()
            elif step[0] == "load":
                world.load()
            else:
                replicas.stop()
                replicas.reset()
                world.pending = [world.truth()]
            world.check()
        catch_up(replicas)
        assert world.seen() == world.truth()
        assert same_words(replicas, world.lpm4)
        assert same_words(replicas, world.hash)
    finally:
        replicas.stop()
        replicas.close()
