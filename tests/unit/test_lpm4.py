"""`libfp.tables.Lpm4`: its mapping, its errors, its memory, and the lookup in compiled code."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import numpy as np
import pytest

from libfp.errors import BadInput, TableFull
from libfp.jit import INTERPRETED, Arena, kernel, load32
from libfp.jit.memory import PAGE
from libfp.tables import Lpm4
from libfp.tables.lpm4_slot import BLOCKS
from libfp.testing.tables import check_table


def ip(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


@pytest.fixture
def table():
    return Lpm4(capacity=1000)


def test_the_longest_prefix_wins(table):
    for prefix, value in {
        "0.0.0.0/0": 1,
        "10.0.0.0/8": 2,
        "10.1.0.0/16": 3,
        "10.1.1.0/24": 4,
        "10.1.1.1/32": 5,
    }.items():
        table[prefix] = value
    found = [table.lookup(ip(one)) for one in ("9.9.9.9", "10.9.9.9", "10.1.9.9", "10.1.1.9", "10.1.1.1")]
    assert found == [1, 2, 3, 4, 5]


def test_nothing_is_found_in_an_empty_table(table):
    assert table.lookup(0) == table.lookup((1 << 32) - 1) == 0
    assert table.match("10.0.0.1") is None


def test_it_is_a_mapping(table):
    table["10.0.0.0/8"] = 7
    table[ipaddress.IPv4Network("192.0.2.0/25")] = 1 << 31
    assert dict(table) == {"10.0.0.0/8": 7, "192.0.2.0/25": 1 << 31}
    assert "10.0.0.0/8" in table
    assert "10.0.0.0/9" not in table
    assert table.get("11.0.0.0/8") is None
    assert table.pop("10.0.0.0/8") == 7
    assert len(table) == 1
    table.clear()
    assert len(table) == 0
    assert table.lookup(ip("192.0.2.1")) == 0


def test_match_tells_the_prefix(table):
    table["10.0.0.0/8"] = 7
    table["10.1.2.128/25"] = 8
    assert table.match("10.1.2.129") == ("10.1.2.128/25", 8)
    assert table.match(ipaddress.IPv4Address("10.1.2.1")) == ("10.0.0.0/8", 7)
    assert table.match(0) is None


@pytest.mark.parametrize("prefix", ["10.0.0.1/8", "10.0.0.0/33", "ten", "2001:db8::/32", None, 1.5])
def test_refuses_what_is_no_prefix(table, prefix):
    with pytest.raises(BadInput, match="not an IPv4 prefix"):
        table[prefix] = 1
    assert len(table) == 0


@pytest.mark.parametrize("value", [0, -1, 1 << 32])
def test_refuses_values(table, value):
    with pytest.raises(BadInput, match="value"):
        table["10.0.0.0/8"] = value


@pytest.mark.parametrize(("address", "length"), [(1, 8), (-1, 32), (1 << 32, 32), (0, 33), (0, -1)])
def test_refuses_numbers_that_are_no_prefix(table, address, length):
    with pytest.raises(BadInput):
        table.set(address, length, 1)
    with pytest.raises(BadInput):
        table.remove(address, length)
    with pytest.raises(BadInput, match="route 1"):
        table.load([0, address], [0, length], [1, 1])
    assert len(table) == 0


def test_removing_what_is_not_there_is_a_key_error(table):
    with pytest.raises(KeyError, match=r"10\.0\.0\.0/8"):
        del table["10.0.0.0/8"]
    table["10.0.0.0/9"] = 1
    with pytest.raises(KeyError):
        del table["10.0.0.0/8"]


def test_full():
    table = Lpm4(capacity=3)
    for k in range(3):
        table[f"10.0.{k}.0/24"] = k + 1
    with pytest.raises(TableFull, match="3 routes"):
        table["10.0.3.0/24"] = 4
    assert table.lookup(ip("10.0.3.1")) == 0
    table["10.0.2.0/24"] = 9  # another value for a route takes no room
    del table["10.0.0.0/24"]
    table["10.0.3.0/24"] = 4
    assert len(table) == 3
    with pytest.raises(TableFull):
        table.load([0, 1, 2, 3], [32] * 4, [1] * 4)
    assert dict(table) == {"10.0.1.0/24": 2, "10.0.2.0/24": 9, "10.0.3.0/24": 4}


def test_load_replaces_everything_and_the_last_of_equals_counts(table):
    table["10.0.0.0/8"] = 7
    table.load([ip("11.0.0.0"), 0, ip("11.0.0.0")], [8, 0, 8], [1, 2, 3])
    assert dict(table) == {"0.0.0.0/0": 2, "11.0.0.0/8": 3}
    assert table.lookup(ip("10.0.0.1")) == 2


def test_routes_are_sorted_arrays(table):
    given = {"10.0.0.0/9": 3, "10.0.0.0/8": 1, "9.0.0.0/32": 5, "255.255.255.255/32": (1 << 32) - 1}
    table.update(given)
    addresses, lengths, values = table.routes()
    assert addresses.tolist() == [ip("9.0.0.0"), ip("10.0.0.0"), ip("10.0.0.0"), (1 << 32) - 1]
    assert lengths.tolist() == [32, 8, 9, 32]
    assert values.tolist() == [5, 1, 3, (1 << 32) - 1]


def test_apply_sets_and_removes_in_order(table):
    address = ip("10.0.0.0")
    table.apply([address, address, address + 256, 0], [8, 8, 24, 0], [1, 0, 5, 0])
    assert dict(table) == {"10.0.1.0/24": 5}


def test_apply_keeps_what_fitted():
    table = Lpm4(capacity=2)
    with pytest.raises(TableFull):
        table.apply([0, 1 << 24, 2 << 24], [8, 8, 8], [1, 2, 3])
    assert len(table) == 2
    with pytest.raises(BadInput, match="length"):
        table.apply([1], [32, 31], [1])


def test_a_deep_block_more_where_the_runs_stay_the_same(table):
    """10.0.5.0/24 and 10.0.9.0/24 are runs of their own; which of them are deep changes by itself."""
    table.update({"10.0.5.0/24": 1, "10.0.9.0/24": 2, "10.0.5.128/25": 3})
    table["10.0.9.128/25"] = 4
    assert [table.lookup(ip(one)) for one in ("10.0.5.1", "10.0.5.129", "10.0.9.1", "10.0.9.129")] == [1, 3, 2, 4]
    del table["10.0.5.128/25"]
    assert [table.lookup(ip(one)) for one in ("10.0.5.1", "10.0.5.129", "10.0.9.1", "10.0.9.129")] == [1, 1, 2, 4]


def test_worst_case_of_memory_fits():
    """Routes that share nothing, each with a slot, a deep block and a chain of nodes of its own."""
    count = 40 if INTERPRETED else 4000
    table = Lpm4(capacity=count)
    spread = [(k * 0x9E3779B1) & 0xFFFFFFFF for k in range(count)]
    table.load(spread, [32] * count, range(1, count + 1))
    assert all(table.lookup(one) == k + 1 for k, one in enumerate(spread))
    for turn in range(2):
        for k, one in enumerate(spread):
            table.remove(one, 32)
            spread[k] = (one + 0x01010101 * (turn + 1)) & 0xFFFFFFFF
            table.set(spread[k], 32, k + 1)
    assert all(table.lookup(one) == k + 1 for k, one in enumerate(spread))


def test_what_goes_gives_its_memory_back(table):
    routes = [f"10.{k % 3}.{k % 5}.0/{length}" for k in range(15) for length in (24, 27, 30)]
    routes += ["10.0.0.0/13", "10.1.0.0/16", "10.0.0.0/18", "10.2.0.0/17"]
    routes = sorted(set(routes))
    used = []
    for _ in range(8):
        rng = np.random.default_rng(1)  # the same each time, so that the blocks of one turn serve the next
        for k in rng.permutation(len(routes)):
            table[routes[k]] = int(k) + 1
        used.append(table.replica_bytes)
        for k in rng.permutation(len(routes)):
            table[routes[k]] = int(k) + 2
        for k in rng.permutation(len(routes)):
            del table[routes[k]]
    assert len(table) == 0
    assert not table._words.arena.words[:BLOCKS].any()  # as if nothing had been
    assert used[-1] == used[3]


def test_fragmented_memory_is_made_anew():
    """When blocks of the right size run out, the table is rebuilt: nobody notices but its memory."""
    table = Lpm4(capacity=500)
    fields = table._words.fields
    fields[1] = table._words.used + 60  # the arena's size: almost nothing is left
    routes = [((10 << 24) + (k << 14), 32) for k in range(20)]
    for k, (address, length) in enumerate(routes):
        table.set(address, length, k + 1)
    assert [table.lookup(address) for address, _ in routes] == list(range(1, 21))
    assert len(table) == 20


def test_another_next_hop_for_a_short_prefix_is_one_word(table):
    """However many slots it covers."""
    for prefix in ("10.0.0.0/10", "0.0.0.0/0"):
        table[prefix] = 1
        table._words.log_changes(True)
        block = table._words
        table._held += 1  # look at the log before it is handed over
        table[prefix] = 2
        assert block.logged == 2  # a header and a word
        table._held -= 1
        table.commit()


def test_an_empty_table_takes_no_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    Lpm4()
    before = resident()
    tables = [Lpm4() for _ in range(4)]
    assert (resident() - before) * PAGE < 4 << 20
    assert not any(map(len, tables))


@kernel
def _one_by_one(view, keys, results, count):  # type: ignore[no-untyped-def]
    from_bulk = 0
    view.lookup_burst(keys, results, count)
    for i in range(count):
        from_bulk += view.lookup(load32(keys + 4 * i)) != load32(results + 4 * i)
    return from_bulk


@pytest.mark.parametrize("count", [0, 1, 7, 8, 17, 63, 64])
def test_bulk_lookup_is_lookup(table, count):
    table.update({"0.0.0.0/0": 1, "10.0.0.0/13": 2, "10.0.0.0/24": 3, "10.0.0.128/25": 4, "10.0.0.200/32": 5})
    rng = np.random.default_rng(count)
    memory = Arena(1024)
    keys = np.frombuffer(memory.buffer, np.uint32, 64)
    keys[:] = np.concatenate([rng.integers(0, 1 << 32, 32), ip("10.0.0.0") + rng.integers(0, 512, 32)])
    rng.shuffle(keys)
    assert _one_by_one(table.view(), memory.address, memory.address + 256, count) == 0


def test_keys_beyond_32_bits_stay_inside_the_table(table):
    table["0.0.0.0/0"] = 3
    assert table.view().lookup(-1) == table.view().lookup(1 << 40) == 3


def test_against_a_dict_with_a_replica():
    table = Lpm4(capacity=30)
    keys = [f"10.{k % 2}.{k % 4}.0/{length}" for k in range(4) for length in (24, 25, 28, 32)]
    keys += ["10.0.0.0/8", "10.0.0.0/14", "10.1.0.0/16", "10.0.0.0/18", "10.0.0.0/20", "0.0.0.0/0"]
    check_table(table, sorted(set(keys)), [1, 2, 3, (1 << 32) - 1], steps=100 if INTERPRETED else 1000)


def test_tables_are_things_not_values(table):
    assert table != Lpm4(capacity=1000)
    assert len({table, table}) == 1
    assert repr(table) == "<Lpm4 of 0 routes, at most 1000>"
