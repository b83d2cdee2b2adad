"""Every primitive has two definitions, plain Python and instructions: they must agree on every value."""

from __future__ import annotations

import inspect
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libfp import jit
from libfp.jit.libc import address_of

word64 = st.one_of(
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.sampled_from([0, 1, -1, 0xFF, 0xFFFF, 0xFFFFFFFF, 1 << 32, 1 << 62, (1 << 63) - 1, -(1 << 63), -(1 << 32)]),
)


def compiled(function: Callable[..., Any]) -> Any:
    """A kernel that does nothing but call `function`."""
    names = ", ".join(inspect.signature(function).parameters)
    scope = {"function": function}
    exec(f"def wrapper({names}): return function({names})", scope)
    return jit.kernel(scope["wrapper"])


def pattern(value: int) -> int:
    """The low 64 bits."""
    return value & 0xFFFFFFFFFFFFFFFF


UNARY = {
    jit.bswap16: lambda v: struct.unpack("<H", struct.pack(">H", v & 0xFFFF))[0],
    jit.bswap32: lambda v: struct.unpack("<I", struct.pack(">I", v & 0xFFFFFFFF))[0],
    jit.bswap64: lambda v: struct.unpack("<q", struct.pack(">q", v))[0],
    jit.popcount64: lambda v: bin(pattern(v)).count("1"),
    jit.clz64: lambda v: 64 - pattern(v).bit_length(),
    jit.ctz64: lambda v: (f"1{pattern(v):064b}"[::-1]).index("1"),
    jit.without_lowest64: lambda v: v & (v - 1),
    jit.u32: lambda v: v % (1 << 32),
}
BINARY = {
    jit.shr64: lambda a, b: pattern(a) >> (b % 64),
    jit.shl64: lambda a, b: a << (b % 64),
    jit.mul64: lambda a, b: a * b,
    jit.mulhi64: lambda a, b: (pattern(a) * pattern(b)) >> 64,
    jit.ult64: lambda a, b: pattern(a) < pattern(b),
}


@pytest.mark.parametrize("function", UNARY, ids=lambda f: f.__name__)
def test_unary(function: Callable[[int], int]) -> None:
    kernel, oracle = compiled(function), UNARY[function]

    @given(word64)
    def agree(value: int) -> None:
        assert kernel(value) == function(value)
        assert pattern(function(value)) == pattern(oracle(value))

    agree()


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
def test_binary(function: Callable[[int, int], int]) -> None:
    kernel, oracle = compiled(function), BINARY[function]

    @given(word64, word64)
    def agree(a: int, b: int) -> None:
        assert kernel(a, b) == function(a, b)
        assert pattern(function(a, b)) == pattern(oracle(a, b))
        assert -(1 << 63) <= function(a, b) < 1 << 63, "a register's value, not a Python integer"

    agree()


LOADS = {
    jit.load8: "<B", jit.load16: "<H", jit.load32: "<I", jit.load64: "<q",
    jit.load16be: ">H", jit.load32be: ">I", jit.load64be: ">q",
}  # fmt: skip
STORES = {
    jit.store8: "<B", jit.store16: "<H", jit.store32: "<I", jit.store64: "<Q", jit.store16be: ">H", jit.store32be: ">I",
}  # fmt: skip


@pytest.mark.parametrize("function", LOADS, ids=lambda f: f.__name__)
def test_loads_at_any_address(function: Callable[[int], int]) -> None:
    kernel, form = compiled(function), LOADS[function]
    arena = jit.Arena(64)

    @given(st.binary(min_size=64, max_size=64), st.integers(0, 56))
    def agree(content: bytes, offset: int) -> None:
        arena.buffer[:] = content
        expected = struct.unpack_from(form, content, offset)[0]
        assert kernel(arena.address + offset) == function(arena.address + offset) == expected

    agree()


@pytest.mark.parametrize("function", STORES, ids=lambda f: f.__name__)
def test_stores_at_any_address(function: Callable[[int, int], None]) -> None:
    kernel, form = compiled(function), STORES[function]
    arena = jit.Arena(64)

    @given(st.binary(min_size=64, max_size=64), st.integers(0, 56), word64)
    def agree(content: bytes, offset: int, value: int) -> None:
        expected = bytearray(content)
        struct.pack_into(form, expected, offset, value & ((1 << 8 * struct.calcsize(form)) - 1))
        for store in (kernel, function):
            arena.buffer[:] = content
            assert store(arena.address + offset, value) is None
            assert bytes(arena.buffer) == expected, "nothing beside the word changes"

    agree()


def test_copy() -> None:
    kernel = compiled(jit.copy)
    source, target = jit.Arena(300), jit.Arena(300)

    @given(st.binary(min_size=300, max_size=300), st.integers(0, 100), st.integers(0, 100), st.integers(0, 200))
    def agree(content: bytes, into: int, out: int, size: int) -> None:
        source.buffer[:] = content
        for one in (kernel, jit.copy):
            target.buffer[:] = bytes(300)
            one(target.address + into, source.address + out, size)
            assert bytes(target.buffer) == bytes(into) + content[out : out + size] + bytes(300 - into - size)

    agree()


@pytest.mark.parametrize("address", [0, 1, -1, 1 << 47])
@pytest.mark.parametrize("function", [jit.prefetch, jit.prefetch_write], ids=lambda f: f.__name__)
def test_prefetch_never_faults(function: Callable[[int], None], address: int) -> None:
    assert compiled(function)(address) is None
    assert function(address) is None


def test_copy64_copies_a_line_and_nothing_else() -> None:
    source, target = jit.Arena(64, flush_end=True), jit.Arena(80)
    source.buffer[:] = bytes(range(1, 65))
    for function in (jit.copy64, compiled(jit.copy64)):
        target.buffer[:] = bytes(80)
        function(target.address + 8, source.address)
        assert bytes(target.buffer) == bytes(8) + bytes(range(1, 65)) + bytes(8)
    with pytest.raises(IndexError):
        jit.copy64(target.address, source.address + 8)


def test_call() -> None:
    kernel, labs = compiled(jit.call), address_of("labs")

    @given(st.integers(-(1 << 63) + 1, (1 << 63) - 1))
    def agree(value: int) -> None:
        assert kernel(labs, value, 0, 0, 0, 0, 0) == jit.call(labs, value, 0, 0, 0, 0, 0) == abs(value)

    agree()


def test_call_passes_six_arguments() -> None:
    import ctypes

    six = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 6)(
        lambda a, b, c, d, e, f: a + 2 * b + 4 * c + 8 * d + 16 * e + 32 * f
    )
    address = ctypes.cast(six, ctypes.c_void_p).value
    assert address
    assert jit.call(address, 1, -1, 3, 5, 7, 11) == 1 - 2 + 12 + 40 + 112 + 352
    assert address_of("poll") != address_of("write")
    with pytest.raises(AttributeError):
        address_of("no_such_function_in_libc")


def test_values_of_other_widths_are_widened() -> None:
    """Literals, booleans and 32-bit values enter as int64: no float64 in sight."""

    @jit.kernel
    def mixed(flag: bool) -> int:
        return jit.shr64(-1, 60) + jit.popcount64(flag) + jit.u32(-1)

    assert mixed(True) == 15 + 1 + 0xFFFFFFFF


ATOMIC_LOADS = {jit.load_acquire32: "<I", jit.load_acquire64: "<q"}
ATOMIC_STORES = {jit.store_release32: "<I", jit.store_release64: "<Q"}


@pytest.mark.parametrize("function", ATOMIC_LOADS, ids=lambda f: f.__name__)
def test_acquire(function: Callable[[int], int]) -> None:
    kernel, form = compiled(function), ATOMIC_LOADS[function]
    arena = jit.Arena(64)

    @given(st.binary(min_size=64, max_size=64), st.integers(0, 7))
    def agree(content: bytes, index: int) -> None:
        arena.buffer[:] = content
        at = 8 * index
        assert kernel(arena.address + at) == function(arena.address + at) == struct.unpack_from(form, content, at)[0]

    agree()


@pytest.mark.parametrize("function", ATOMIC_STORES, ids=lambda f: f.__name__)
def test_release(function: Callable[[int, int], None]) -> None:
    kernel, form = compiled(function), ATOMIC_STORES[function]
    arena = jit.Arena(64)

    @given(word64, st.integers(0, 7))
    def agree(value: int, index: int) -> None:
        expected = bytearray(64)
        struct.pack_into(form, expected, 8 * index, value & ((1 << 8 * struct.calcsize(form)) - 1))
        for store in (kernel, function):
            arena.buffer[:] = bytes(64)
            store(arena.address + 8 * index, value)
            assert bytes(arena.buffer) == expected

    agree()


def test_compare_and_swap() -> None:
    arena, kernel = jit.Arena(8), compiled(jit.compare_and_swap64)

    @given(word64, word64, word64)
    def agree(there: int, expected: int, new: int) -> None:
        for swap in (kernel, jit.compare_and_swap64):
            for want in (expected, there):
                jit.store64(arena.address, there)
                assert swap(arena.address, want, new) == there
                assert jit.load64(arena.address) == (new if want == there else there)

    agree()


def test_fetch_add_wraps() -> None:
    arena, kernel = jit.Arena(8), compiled(jit.fetch_add64)

    @given(word64, word64)
    def agree(there: int, by: int) -> None:
        for add in (kernel, jit.fetch_add64):
            jit.store64(arena.address, there)
            assert add(arena.address, by) == there
            assert pattern(jit.load64(arena.address)) == pattern(there + by)

    agree()


def test_two_threads_add() -> None:
    """Read-modify-writes lose nothing, however two threads interleave."""
    arena, turns = jit.Arena(8), 2000 if jit.INTERPRETED else 300_000

    @jit.kernel
    def add(address: int, turns: int) -> None:
        for _ in range(turns):
            jit.fetch_add64(address, 1)

    add(arena.address, 0)
    threads = [threading.Thread(target=add, args=(arena.address, turns)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert jit.load64(arena.address) == 2 * turns


def test_two_threads_hand_over() -> None:
    """What is stored before a release is seen after the acquire, in strict turns, from both sides."""
    arena, turns = jit.Arena(256), 200 if jit.INTERPRETED else 20_000

    @jit.kernel
    def play(address: int, me: int, turns: int) -> int:
        wrong = 0
        for turn in range(me, 2 * turns, 2):
            while jit.load_acquire64(address) != turn:
                jit.pause()
            if turn and jit.load64(address + 128) != turn * 3:
                wrong += 1
            jit.store64(address + 128, (turn + 1) * 3)
            jit.store_release64(address, turn + 1)
        return wrong

    play(arena.address, 0, 0)
    wrong: list[int] = []
    threads = [threading.Thread(target=lambda me=me: wrong.append(play(arena.address, me, turns))) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]


def test_clock_counts_at_its_rate() -> None:
    import time

    kernel = compiled(jit.clock)
    kernel()
    hz = 1_000_000_000 if jit.INTERPRETED else jit.clock_hz()
    spans = []
    for _ in range(5):  # the machine may take the processor away between two reads
        start, ticks = time.perf_counter_ns(), kernel()
        while time.perf_counter_ns() - start < 10_000_000:
            pass
        spans.append(abs((kernel() - ticks) / hz / ((time.perf_counter_ns() - start) / 1e9) - 1))
    assert min(spans) < 0.01
    readings = [kernel() for _ in range(1000)]
    assert readings == sorted(readings)
