"""`libfp.tables.Lpm6`: its mapping, its errors, its memory, and the lookup in compiled code."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import numpy as np
import pytest

from libfp.errors import BadInput, TableFull
from libfp.jit import INTERPRETED, Arena, kernel, load32, load64be
from libfp.jit.memory import PAGE
from libfp.tables import Lpm6
from libfp.tables.lpm6_block import BLOCKS
from libfp.testing.tables import check_table

LAST = (1 << 128) - 1


def ip(text: str) -> int:
    return int(ipaddress.IPv6Address(text))


def rows(*addresses: int) -> np.ndarray:
    return np.array([(one >> 64, one & ((1 << 64) - 1)) for one in addresses], np.uint64)


@pytest.fixture
def table():
    return Lpm6(capacity=1000)


CHAIN = {"::/0": 1, "2001::/16": 2, "2001:db8::/32": 3, "2001:db8:1::/48": 4, "2001:db8:1::/64": 5}
CHAIN |= {"2001:db8:1:0:8000::/66": 6, "2001:db8:1::7/128": 7}
INSIDE = ["fe80::1", "2001::", "2001:db8:2::1", "2001:db8:1:1::", "2001:db8:1::", "2001:db8:1:0:8000::1"]
INSIDE += ["2001:db8:1::7"]


def test_the_longest_prefix_wins(table):
    for prefix, value in CHAIN.items():
        table[prefix] = value
    assert [table.lookup(ip(one)) for one in INSIDE] == [1, 2, 3, 4, 5, 6, 7]


def test_a_chain_taken_down(table):
    table.update(CHAIN)
    for k, prefix in enumerate(CHAIN):
        del table[prefix]
        assert [table.lookup(ip(one)) for one in INSIDE] == [0] * (k + 1) + list(range(k + 2, 8))


def test_nothing_is_found_in_an_empty_table(table):
    assert table.lookup(0) == table.lookup(LAST) == 0
    assert table.match("2001:db8::1") is None


def test_it_is_a_mapping(table):
    table["2001:db8::/32"] = 7
    table[ipaddress.IPv6Network("fc00::/7")] = 1 << 31
    assert dict(table) == {"2001:db8::/32": 7, "fc00::/7": 1 << 31}
    assert "2001:db8::/32" in table
    assert "2001:db8::/33" not in table
    assert table.get("2001:db9::/32") is None
    assert table.pop("2001:db8::/32") == 7
    assert len(table) == 1
    table.clear()
    assert len(table) == 0
    assert table.lookup(ip("fc00::1")) == 0


def test_match_tells_the_prefix(table):
    table["2001:db8::/32"] = 7
    table["2001:db8::8000:0:0/81"] = 8
    assert table.match("2001:db8::8000:0:1") == ("2001:db8::8000:0:0/81", 8)
    assert table.match(ipaddress.IPv6Address("2001:db8::1")) == ("2001:db8::/32", 7)
    assert table.match(0) is None


@pytest.mark.parametrize("value", [(1 << 31) - 1, 1 << 31, 3 << 30, (1 << 32) - 1])
def test_values_of_all_32_bits(table, value):
    prefixes = ["::/0", "8000::/18", "2001:d00::/24", "2001:db8::/32", "2001:db8::/60", "2001:db8::1/128"]
    keys = ["::", "8000:3fff::", "2001:dff::", "2001:db8:1::", "2001:db8:0:f::", "2001:db8::1"]
    for one in (7, value, value - 1, 9):  # a value that needs a word of its own, another, and neither
        for prefix in prefixes:
            table[prefix] = one
            assert table[prefix] == one
        assert [table.lookup(ip(key)) for key in keys] == [one] * 6
        assert _one_by_one(table, [ip(key) for key in keys]) == [one] * 6


@pytest.mark.parametrize("prefix", ["2001:db8::1/32", "::/129", "ten", "10.0.0.0/8", None, 1.5])
def test_refuses_what_is_no_prefix(table, prefix):
    with pytest.raises(BadInput, match="not an IPv6 prefix"):
        table[prefix] = 1
    assert len(table) == 0


@pytest.mark.parametrize("value", [0, -1, 1 << 32])
def test_refuses_values(table, value):
    with pytest.raises(BadInput, match="value"):
        table["2001:db8::/32"] = value
    with pytest.raises(BadInput, match="route 0"):
        table.load(rows(0), [0], [value])
    assert len(table) == 0


@pytest.mark.parametrize(
    ("address", "length"), [(1, 127), (1 << 63, 64), (1 << 64, 63), (1 << 127, 0), (0, 129), (0, -1)]
)
def test_refuses_numbers_that_are_no_prefix(table, address, length):
    with pytest.raises(BadInput):
        table.set(address, length, 1)
    with pytest.raises(BadInput):
        table.remove(address, length)
    with pytest.raises(BadInput, match="route 1"):
        table.load(rows(0, address), [0, length], [1, 1])
    assert len(table) == 0


@pytest.mark.parametrize("address", [-1, 1 << 128])
def test_refuses_addresses_of_another_size(table, address):
    with pytest.raises(BadInput):
        table.set(address, 128, 1)
    with pytest.raises(ValueError, match="IPv6"):
        table.match(address)


def test_refuses_arrays_of_another_shape(table):
    for addresses in ([1, 2], np.zeros((2, 3), np.int64), np.zeros((2, 16), np.uint8), np.zeros((2, 2))):
        with pytest.raises(BadInput, match="shape"):
            table.load(addresses, [128, 128], [1, 1])
    with pytest.raises(BadInput, match="length"):
        table.apply(rows(1), [128, 127], [1])


def test_all_lengths_are_prefixes(table):
    least = 18 if INTERPRETED else 0  # shorter ones are tens of thousands of steps
    lengths = np.arange(least, 129)
    ones = [LAST >> (128 - n) << (128 - n) for n in range(least, 129)]
    table.load(rows(*ones), lengths, lengths + 1)
    assert [table.lookup(LAST ^ ((1 << 127) >> n)) for n in range(least, 128)] == list(range(least + 1, 129))
    assert table.lookup(LAST) == 129
    addresses, back, values = table.routes()
    assert np.array_equal(addresses, rows(*ones))
    assert np.array_equal(back, lengths)
    assert np.array_equal(values, lengths + 1)


@pytest.mark.skipif(INTERPRETED, reason="millions of steps")
def test_short_prefixes_go_around_longer_ones(table):
    table["2000::/3"] = 2
    table["8000::/10"] = 3
    table.update({"2001:db8::/32": 4, "8001::/16": 5, "8002::/18": 6, "8000::/9": 7})
    keys = ["3fff::", "8030::", "2001:db8::", "8001::", "8002::", "8070::", "7fff::"]
    assert [table.lookup(ip(key)) for key in keys] == [2, 3, 4, 5, 6, 7, 0]
    del table["8000::/10"]
    del table["2000::/3"]
    assert [table.lookup(ip(key)) for key in keys] == [0, 7, 4, 5, 6, 7, 0]


def test_removing_what_is_not_there_is_a_key_error(table):
    with pytest.raises(KeyError, match="2001:db8::/32"):
        del table["2001:db8::/32"]
    table["2001:db8::/33"] = 1
    with pytest.raises(KeyError):
        del table["2001:db8::/32"]


def test_full():
    table = Lpm6(capacity=3)
    for k in range(3):
        table[f"2001:db8:{k}::/48"] = k + 1
    with pytest.raises(TableFull, match="3 routes"):
        table["2001:db8:3::/48"] = 4
    assert table.lookup(ip("2001:db8:3::1")) == 0
    table["2001:db8:2::/48"] = 9  # another value for a route takes no room
    del table["2001:db8::/48"]
    table["2001:db8:3::/48"] = 4
    with pytest.raises(TableFull):
        table.load(rows(0, 1, 2, 3), [128] * 4, [1] * 4)
    assert dict(table) == {"2001:db8:1::/48": 2, "2001:db8:2::/48": 9, "2001:db8:3::/48": 4}


def test_load_replaces_everything_and_the_last_of_equals_counts(table):
    table["2001:db8::/32"] = 7
    table.load(rows(ip("fc00::"), 0, ip("fc00::")), [8, 0, 8], [1, 2, 3])
    assert dict(table) == {"::/0": 2, "fc00::/8": 3}
    assert table.lookup(ip("2001:db8::1")) == 2


def test_apply_sets_and_removes_in_order(table):
    address = ip("2001:db8::")
    table.apply(rows(address, address, address + (1 << 80), 0), [32, 32, 48, 0], [1, 0, 5, 0])
    assert dict(table) == {"2001:db8:1::/48": 5}


def test_apply_keeps_what_fitted():
    table = Lpm6(capacity=2)
    with pytest.raises(TableFull):
        table.apply(rows(0, 1 << 120, 2 << 120), [8, 8, 8], [1, 2, 3])
    assert len(table) == 2


def test_worst_case_of_memory_fits():
    """Routes that share nothing, each with blocks and a chain of nodes of its own."""
    count = 20 if INTERPRETED else 4000
    table = Lpm6(capacity=count)
    spread = [(k * 0x9E3779B97F4A7C15F39CC0605CEDC835) & LAST for k in range(count)]
    big = (1 << 32) - 1 - count
    table.load(rows(*spread), [128] * count, range(big, big + count))
    assert all(table.lookup(one) == big + k for k, one in enumerate(spread))
    for turn in range(2):
        for k, one in enumerate(spread):
            table.remove(one, 128)
            spread[k] = (one + (0x01010101 << 96) * (turn + 1)) & LAST
            table.set(spread[k], 128, k + 1)
    assert all(table.lookup(one) == k + 1 for k, one in enumerate(spread))


def test_what_goes_gives_its_memory_back(table):
    routes = [f"2001:{k % 3}:{k % 5}::/{length}" for k in range(15) for length in (48, 52, 64, 128)]
    routes += ["2001::/17", "2001::/20", "2001:2::/32", "2001::/18"]
    routes = sorted(set(routes))
    used = []
    for _ in range(8):
        rng = np.random.default_rng(1)  # the same each time, so that the blocks of one turn serve the next
        for value in (1, 1 << 31):
            for k in rng.permutation(len(routes)):
                table[routes[k]] = int(k) + value
        used.append(table.replica_bytes)
        for k in rng.permutation(len(routes)):
            del table[routes[k]]
    assert len(table) == 0
    assert not table._words.arena.words[:BLOCKS].any()  # as if nothing had been
    assert used[-1] == used[3]


def test_fragmented_memory_is_made_anew():
    """When blocks of the right size run out, the table is rebuilt: nobody notices but its memory."""
    table = Lpm6(capacity=500)
    table._words.fields[1] = table._words.used + 150  # the arena's size: almost nothing is left
    for k in range(20):
        table.set((0x2001 << 112) + (k << 100), 128, k + (1 << 31))
    assert [table.lookup((0x2001 << 112) + (k << 100)) for k in range(20)] == [k + (1 << 31) for k in range(20)]
    assert len(table) == 20


def test_another_next_hop_stays_in_place(table):
    """A word in the log, however much is around it; for the default route, too."""
    table.update({f"2001:db8:{k:x}::/48": k + 1 for k in range(200)})
    for prefix in ("2001:db8:77::/48", "::/0"):
        table[prefix] = 1000
        table._words.log_changes(True)
        table._held += 1  # look at the log before it is handed over
        table[prefix] = 2000
        assert table._words.logged == 2  # a header and a word
        table._held -= 1
        table.commit()


def test_an_empty_table_takes_little_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    Lpm6()
    before = resident()
    tables = [Lpm6() for _ in range(4)]
    assert (resident() - before) * PAGE < 4 << 20
    assert not any(map(len, tables))


@kernel
def _lookups(view, keys, results, count):  # type: ignore[no-untyped-def]
    wrong = 0
    view.lookup_burst(keys, results, count)
    for i in range(count):
        single = view.lookup(load64be(keys + 16 * i), load64be(keys + 16 * i + 8))
        wrong += single != load32(results + 4 * i)
    return wrong


def _one_by_one(table: Lpm6, keys: list[int]) -> list[int]:
    """What bulk lookup finds, which is what lookup finds."""
    count = len(keys)
    memory = Arena(20 * count + 8)
    memory.buffer[: 16 * count] = b"".join(key.to_bytes(16, "big") for key in keys)
    assert _lookups(table.view(), memory.address, memory.address + 16 * count, count) == 0
    assert bytes(memory.buffer[20 * count :]) == bytes(8)
    return np.frombuffer(memory.buffer, np.uint32, count, 16 * count).tolist()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 64, 65, 200])
def test_bulk_lookup_is_lookup(table, count):
    table.update(CHAIN)
    table["2001:db8:2::/48"] = 1 << 31
    rng = np.random.default_rng(count)
    keys = [ip(INSIDE[int(rng.integers(7))]) ^ int(rng.integers(0, 4)) << int(rng.integers(126)) for _ in range(count)]
    found = _one_by_one(table, keys)
    assert found == [table.match(key)[1] for key in keys]


def test_against_a_dict_with_a_replica():
    table = Lpm6(capacity=30)
    keys = [f"2001:{k % 2}:{k % 4}::/{length}" for k in range(4) for length in (48, 52, 64, 128)]
    keys += ["2001::/16", "2001::/22", "2001:1::/32", "2001::/18", "2001:0:0:8000::/50", "::/0", "4000::/15"]
    keys = sorted({str(ipaddress.IPv6Network(key, strict=False)) for key in keys})
    check_table(table, keys, [1, 2, 3, 1 << 31, (1 << 32) - 1], steps=100 if INTERPRETED else 1000)


def test_tables_are_things_not_values(table):
    assert table != Lpm6(capacity=1000)
    assert len({table, table}) == 1
    assert repr(table) == "<Lpm6 of 0 routes, at most 1000>"
    with pytest.raises(BadInput, match="capacity"):
        Lpm6(capacity=0)
