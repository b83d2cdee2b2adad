"""A compiled worker looks up and drains while the control plane changes what it looks at."""

from __future__ import annotations

import random

import pytest

from libfp.engine.replicas import Replicas, drain
from libfp.jit import INTERPRETED, Arena, call, kernel, load64, load_acquire64, pause, store64, store_release64
from libfp.tables import Hash, Lpm4
from tests.stress.turning import STOP, TURNS, turning

pytestmark = [pytest.mark.stress, pytest.mark.timeout(180)]
CHANGES = 300 if INTERPRETED else 8_000
LENGTHS = [20, 24, 24, 28, 32, 18] if INTERPRETED else [13, 16, 18, 20, 24, 24, 28, 32]
PREFIX = 10 << 24
WRONG, FOUND = 16, 24


@kernel
def _worker(mailbox, fib, hops, shared, sched_yield):  # type: ignore[no-untyped-def]
    """Turns until told to stop. Every route leads to a next hop that is known, and 10/12 always leads somewhere."""
    turns = wrong = found = 0
    while load_acquire64(shared + STOP) == 0:
        drain(mailbox, 64)
        for i in range(16):
            hop = fib.lookup(PREFIX + (((turns * 16 + i) * 37) & 0x3FFFF))
            wrong += hop == 0 or hops.lookup(hop) != hop * 7
            found += hop > 1
        turns += 1
        store_release64(shared + TURNS, turns)
        if turns & 63 == 0:
            call(sched_yield, 0, 0, 0, 0, 0, 0)
        pause()
    store64(shared + WRONG, wrong)
    store64(shared + FOUND, found)


@pytest.mark.parametrize("mailbox", [64, 256, 1 << 14])
def test_a_route_never_leads_to_an_unknown_next_hop(mailbox):
    """The next hop goes in before its routes and out after them: on the worker too, also through fresh copies."""
    rng = random.Random(mailbox)
    fib, hops = Lpm4(capacity=2000), Hash("u32", capacity=300)
    replicas = Replicas([fib, hops], mailbox=mailbox)
    hops[1] = 7
    fib.set(PREFIX, 12, 1)
    shared = Arena(64)
    with turning(_worker, replicas, [fib, hops], shared.address):
        _churn(rng, fib, hops, replicas)
    assert load64(shared.address + WRONG) == 0
    assert load64(shared.address + FOUND) > 0
    assert mailbox > 64 or replicas.copies > 0, "a small mailbox overflows"
    addresses, lengths, values = fib.routes()
    view = replicas.view(fib)
    for address, length, value in list(zip(addresses, lengths, values, strict=True))[:: 1 + len(fib) // 50]:
        if length == 32:
            assert view.lookup(int(address)) == value
    replicas.stop()
    replicas.close()


def _churn(rng: random.Random, fib: Lpm4, hops: Hash, replicas: Replicas) -> None:
    users: dict[int, list[tuple[int, int]]] = {}
    for turn in range(CHANGES):
        hop = rng.randrange(2, 250)
        if hop in users and rng.random() < 0.4:
            for route in users.pop(hop):
                fib.remove(*route)
            del hops[hop]
        else:
            length = rng.choice(LENGTHS)
            address = PREFIX + (rng.getrandbits(18) >> (32 - length) << (32 - length))
            owner = next((one for one, routes in users.items() if (address, length) in routes), None)
            if owner is None:
                if hop not in users:
                    hops[hop] = hop * 7
                    users[hop] = []
                fib.set(address, length, hop)
                users[hop].append((address, length))
        if turn % 500 == 499:
            addresses, lengths, values = fib.routes()
            fib.load(addresses, lengths, values)
        if turn % 16 == 15:
            replicas.flush()
