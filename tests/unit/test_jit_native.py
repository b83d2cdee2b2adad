"""Native classes: the same class body from Python and compiled, several layouts, no way to get a wrong type."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from libfp.jit import INTERPRETED, Arena, constant, kernel, load64, native, store64, word

needs_numba = pytest.mark.skipif(INTERPRETED, reason="about compiled code")


@native
class Cells:
    """`size` words at `at`."""

    at: word
    size: constant

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return load64(self.at + 8 * (index & (self.size - 1)))

    def __contains__(self, value: int) -> bool:
        return self.find(value) >= 0

    def find(self, value: int) -> int:
        for i in range(self.size):
            if load64(self.at + 8 * i) == value:
                return i
        return -1

    def put(self, index: int, value: int = 7) -> None:
        store64(self.at + 8 * (index & (self.size - 1)), value)

    @property
    def first(self) -> int:
        return self[0]

    @first.setter
    def first(self, value: int) -> None:
        self.put(0, value)


@native
class Point:
    x: word
    y: word

    @property
    def mirrored(self) -> Point:
        return Point(self.y, self.x)

    def plus(self, other: Point) -> Point:
        return Point(self.x + other.x, self.y + other.y)


@native
class Line:
    begin: Point
    end: Point
    colour: constant

    def width(self) -> int:
        return self.end.x - self.begin.x


@native
class Empty:
    pass


@pytest.fixture
def cells() -> Any:
    arena = Arena(8 * 16)
    arena.words[:] = range(100, 116)
    made = Cells(arena.address, 4)
    made.arena = arena
    return made


def test_python_side(cells: Any) -> None:
    assert (len(cells), cells[0], cells[5], cells.first) == (4, 100, 101, 100)
    assert 103 in cells
    assert 104 not in cells
    cells.first = 9
    assert cells[0] == 9
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"


def test_compiled_side_agrees(cells: Any) -> None:
    @kernel
    def work(cells: Cells) -> tuple[int, int, int, int, int, int]:
        before = cells.first
        cells.first = 5
        cells.put(1)
        cells.put(2, 6)
        return before, len(cells), cells[4], cells[1], 103 in cells, 104 in cells

    assert work(cells) == (100, 4, 5, 7, 1, 0)
    assert [cells[i] for i in range(4)] == [5, 7, 6, 103]


def test_two_layouts_in_one_function() -> None:
    arena = Arena(8 * 16)
    arena.words[:] = range(16)

    @kernel
    def both(small: Cells, large: Cells) -> tuple[int, int, int, int]:
        return len(small), len(large), small.find(9), large.find(9)

    assert both(Cells(arena.address, 4), Cells(arena.address, 16)) == (4, 16, -1, 9)
    assert both(Cells(arena.address, 16), Cells(arena.address, 4)) == (16, 4, 9, -1)


def test_made_in_compiled_code() -> None:
    @kernel
    def work(x: int, y: int) -> int:
        point = Point(x, y).mirrored.plus(Point(1, True))
        return point.x * 1000 + point.y

    assert work(3, 4) == 5004


def test_nested() -> None:
    @kernel
    def work(line: Line) -> tuple[int, int, int]:
        return line.width(), line.end.mirrored.x, line.colour

    assert work(Line(Point(1, 2), Point(11, 12), 3)) == (10, 12, 3)
    assert Line(Point(1, 2), Point(11, 12), 3).width() == 10


def test_without_fields() -> None:
    @kernel
    def work(empty: Empty) -> int:
        return 3

    assert work(Empty()) == 3


def test_loops_over_values_made_on_the_way() -> None:
    @kernel
    def total(at: int, n: int) -> int:
        found = 0
        for i in range(n):
            point = Point(load64(at + 8 * i), i)
            if point.x > 3:
                found += point.mirrored.y
        return found

    arena = Arena(80)
    arena.words[:] = range(10)
    assert total(arena.address, 10) == sum(range(4, 10))


@needs_numba
def test_fields_are_not_stored_to_from_compiled_code() -> None:
    @kernel
    def work(point: Point) -> None:
        point.x = 3

    with pytest.raises(Exception, match=r"(?s)x"):
        work(Point(1, 2))


@needs_numba
def test_a_field_that_is_no_integer_is_refused(cells: Any) -> None:
    @kernel
    def work(point: Point) -> int:
        return point.x

    assert work(Point(5, 6)) == 5
    for _ in range(20):  # reading the second field must not make Python forget what the first one raised
        with pytest.raises((TypeError, ValueError)):
            work(Point("a", 6))
        with pytest.raises(OverflowError):
            work(Point(1 << 63, 6))
        with pytest.raises(OverflowError):
            work(Point(6, -(1 << 63) - 1))
    with pytest.raises(AttributeError):
        point = Point(1, 2)
        del point.x
        work(point)


@needs_numba
def test_no_such_attribute() -> None:
    @kernel
    def work(point: Point) -> int:
        return point.z  # type: ignore[attr-defined]

    with pytest.raises(Exception, match="z"):
        work(Point(1, 2))


@needs_numba
def test_types() -> None:
    from numba import typeof

    small, large = typeof(Cells(0, 4)), typeof(Cells(0, 16))
    assert small != large
    assert small == typeof(Cells(99, 4))
    assert pickle.loads(pickle.dumps(small)) is small
    assert pickle.loads(pickle.dumps(large)) is large
    assert Cells.__module__.encode() in pickle.dumps(small), "by name, never by value"


@needs_numba
def test_a_class_made_in_a_function_pickles_while_it_is_there() -> None:
    """Its name cannot be imported, but who loads compiled code for it has made it before."""
    from numba import typeof

    @native
    class Local:
        at: word

    made = typeof(Local(1))
    assert pickle.loads(pickle.dumps(made)) is made


@needs_numba
def test_two_classes_of_one_name_are_two_types() -> None:
    from numba import typeof

    def make(kind: Any) -> Any:
        return native(type("Twin", (), {"__annotations__": {"at": word, "step": kind}, "__module__": __name__}))

    a, b = make(word), make(constant)
    assert typeof(a(1, 2)) != typeof(b(1, 2))

    @kernel
    def step(twin: Any) -> int:
        return twin.step

    assert (step(a(1, 2)), step(b(1, 3))) == (2, 3)


def test_a_nested_class_must_have_one_layout() -> None:
    with pytest.raises(TypeError, match="Cells"):

        @native
        class Holder:
            cells: Cells


def test_a_field_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="name"):

        @native
        class Holder:
            name: str


@needs_numba
def test_made_while_another_thread_compiles() -> None:
    """What numba looks through when it compiles holds still meanwhile (`fp router` once died of it when starting)."""
    from numba.core.compiler_lock import global_compiler_lock

    made = threading.Thread(target=native, args=(type("Late", (), {"__annotations__": {"at": word}}),))
    with global_compiler_lock:
        made.start()
        made.join(0.05)
        assert made.is_alive()
    made.join()
