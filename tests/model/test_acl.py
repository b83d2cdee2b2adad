"""`Acl` against a linear scan: after any sequence of changes, in the master and in a replica at every moment; and with
the rule sets of ClassBench."""

from __future__ import annotations

import ipaddress
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import acl_rules
from libfp.engine.replicas import Replicas, drain
from libfp.jit import INTERPRETED, Arena, kernel
from libfp.tables import Acl, Rule
from libfp.testing.plain_rules import Header, first, matches
from libfp.testing.tables import catch_up, same_words


@kernel
def _burst(view, headers, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(headers, results, count)


def found(acl: Acl, headers: bytes, view: Any = None) -> np.ndarray:
    """What a burst finds: so often in a row that vectors look most of them up, and the last by themselves."""
    size = 16 if acl.family == "ipv4" else 40
    count = len(headers) // size
    repeated = 64 // count + 2
    keys, results = Arena(len(headers) * repeated, flush_end=True), Arena(4 * count * repeated + 8)
    keys.buffer[:] = headers * repeated
    _burst(view or acl.view(), keys.address, results.address, count * repeated)
    out = np.frombuffer(results.buffer, np.uint32)[: count * repeated].reshape(repeated, count).copy()
    keys.close()
    results.close()
    assert (out == out[0]).all()
    return out[0]


def prefixes(bits: int) -> Any:
    """Few addresses that share much, at all lengths."""
    network = ipaddress.IPv4Network if bits == 32 else ipaddress.IPv6Network

    def made(base: int, length: int) -> str:
        return str(network((base >> (bits - length) << (bits - length), length)))

    bases = [0, (1 << bits) - 1, 10 << (bits - 8), (10 << (bits - 8)) + 1, 0xC0000200 << (bits - 32)]
    return st.builds(made, st.sampled_from(bases), st.sampled_from([0, 1, 7, 8, 9, 16, bits - 8, bits - 1, bits]))


ports = st.sampled_from([0, 1, 80, (0, 1023), (1, 65535), (79, 81), (1024, 65535), 65535, (0, 65535)])


def rules(bits: int) -> Any:
    plain = st.builds(
        Rule,
        value=st.integers(1, 1000),
        source=st.none() | prefixes(bits),
        destination=st.none() | prefixes(bits),
        sport=st.none() | ports,
        dport=st.none() | ports,
        protocol=st.sampled_from([None, None, 6, "udp", 1, (0, 1), (16, 0xF0)]),
        interface=st.sampled_from([None, None, 0, 1, 0x7FFF, (1, 1), (0x40, 0x7F40), (0, 0)]),
    )
    flags = st.builds(Rule, value=st.integers(1, 1000), tcp_flags=st.sampled_from([(2, 2), (2, 0x12), (0, 1), (0, 0)]))
    return plain | flags


def headers_of(some: list[Rule], bits: int, rng: random.Random) -> list[Header]:
    """Headers on both edges of what rules ask, and one beyond."""
    out = []
    for rule in some:
        for _ in range(3):
            ends = []
            for prefix in (rule.source, rule.destination):
                network = ipaddress.ip_network(prefix) if prefix else None
                low, high = (int(network[0]), int(network[-1])) if network else (0, (1 << bits) - 1)
                ends.append(rng.choice([low, high, (low - 1) % (1 << bits), (high + 1) % (1 << bits)]))
            both = []
            for asked in (rule.sport, rule.dport):
                low, high = asked if isinstance(asked, tuple) else (asked or 0, asked or 65535)
                both.append(rng.choice([low, high, max(low - 1, 0), min(high + 1, 65535)]))
            out.append(
                Header(
                    *ends,
                    protocol=rng.choice([1, 6, 17]),
                    ports=rng.choice([None, (both[0], both[1]), (both[0], both[1])]),
                    flags=rng.choice([0, 2, 0x12, 3]),
                    interface=rng.choice([0, 1, 0x7FFF, 0x40, 0x41, 0x2040]),
                )
            )
    return out


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@settings(max_examples=4 if INTERPRETED else 30, deadline=None)
@given(data=st.data())
def test_any_changes_against_a_linear_scan(family: str, data: st.DataObject) -> None:
    bits, version = (32, 4) if family == "ipv4" else (128, 6)
    acl, model, seen = Acl(capacity=200, family=family), dict[int, Rule](), list[Rule]()
    rng = data.draw(st.randoms(use_true_random=False))
    replicas = Replicas([acl], mailbox=data.draw(st.sampled_from([64, 1024, 16384])))
    replicas.reset()
    try:
        least = 0 if INTERPRETED else data.draw(st.sampled_from([0, 40]), "least")  # 40 make a tree of more than a leaf
        loaded = data.draw(st.lists(rules(bits), min_size=least, max_size=least + 10), "loaded")
        loaded += [Rule(999)] * data.draw(st.integers(0, 1), "a rule for all else")
        acl.load(loaded)
        model |= dict(enumerate(loaded))
        seen += loaded
        changes = st.tuples(st.integers(0, 100), st.none() | rules(bits), st.sampled_from([1, 60, 512, 0]))
        for priority, rule, budget in data.draw(st.lists(changes, max_size=30), "changes"):
            old = model.get(priority)
            before = dict(model)
            catch_up(replicas)
            if rule is not None:
                acl[priority] = model[priority] = rule
                seen.append(rule)
            elif old:
                del acl[priority], model[priority]
            asked = headers_of([one for one in (rule, old) if one] + rng.sample(seen, min(3, len(seen))), bits, rng)
            if not asked:
                continue
            wire = b"".join(one.bytes(version) for one in asked)
            expected = [first(model, one) for one in asked]
            assert found(acl, wire).tolist() == expected
            while budget and not replicas.acknowledged():  # each header finds what was right before or after
                drain(replicas.mailbox, budget)
                replicas.flush()
                now = found(acl, wire, replicas.view(acl)).tolist()
                once = [first(before, one) for one in asked]
                assert all(one in both for one, *both in zip(now, expected, once, strict=True))
        catch_up(replicas)
        assert same_words(replicas, acl)
        assert dict(acl) == model
        asked = [Header(), *headers_of(seen[:60], bits, rng)]
        wire = b"".join(one.bytes(version) for one in asked)
        assert found(acl, wire).tolist() == [first(model, one) for one in asked]
        assert found(acl, wire, replicas.view(acl)).tolist() == found(acl, wire).tolist()
    finally:
        replicas.stop()
        replicas.close()


def scan(rows: np.ndarray, headers: np.ndarray) -> np.ndarray:
    """The number of the first rule of `bench.acl_rules` that each header matches, from 1 on, or 0."""
    words = headers.view(">u4").astype(np.int64)
    fields = words[:, 0], words[:, 1], words[:, 2] >> 16, words[:, 2] & 0xFFFF, words[:, 3] >> 24
    out = np.zeros(len(headers), np.int64)
    for number, row in reversed(list(enumerate(rows.tolist(), 1))):
        there = (fields[0] ^ row[0]) >> (32 - row[1]) == 0
        there &= (fields[1] ^ row[2]) >> (32 - row[3]) == 0
        there &= (fields[2] >= row[4]) & (fields[2] <= row[5]) & (fields[3] >= row[6]) & (fields[3] <= row[7])
        there &= (fields[4] ^ row[8]) & row[9] == 0
        out[there] = number
    return out


@pytest.mark.skipif(INTERPRETED, reason="too long")
@pytest.mark.parametrize("name", acl_rules.SETS if os.environ.get("LIBFP_FULL") else acl_rules.SETS[:3])
def test_classbench_against_a_linear_scan(name: str, data: Path) -> None:
    rows = acl_rules.rules(name)
    acl = Acl(capacity=len(rows))
    acl.load(acl_rules.as_rules(rows))
    headers = np.vstack([acl_rules.trace(name, rows, 3000), acl_rules.uniform(3000)])
    headers = np.vstack([headers, acl_rules.headers(acl_rules.corners(rows, 3000, np.random.default_rng(1)))])
    assert np.array_equal(found(acl, headers.tobytes()), scan(rows, headers))
    kept = np.ones(len(rows), bool)
    rng = random.Random(2)
    for i in rng.sample(range(len(rows)), 100):  # the first rules of all go, and others
        del acl[i]
        kept[i] = False
    numbers = np.flatnonzero(kept) + 1
    expected = scan(rows[kept], headers)
    expected[expected > 0] = numbers[expected[expected > 0] - 1]
    assert np.array_equal(found(acl, headers.tobytes()), expected)
    for i in np.flatnonzero(~kept).tolist():
        acl[i] = next(iter(acl_rules.as_rules(rows[i : i + 1], i)))
    assert np.array_equal(found(acl, headers.tobytes()), scan(rows, headers))


def test_the_scan_of_the_tests() -> None:
    assert matches(Rule(1, source="10.0.0.0/8", dport=(1, 2)), Header(10 << 24, ports=(0, 2)))
    assert not matches(Rule(1, source="10.0.0.0/8"), Header(11 << 24))
