"""A change anywhere below a stage is seen by the next run, and a run without a change compiles nothing.

Every run is a process of its own. Its stage writes what it computed into the packet's first byte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from libfp import NotCacheable, Pipeline, stage
from libfp.engine.digest import Digest
from libfp.jit import INTERPRETED, constant, kernel, native, word

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(INTERPRETED, reason="about compiled code"),
]  # compiling takes long on a busy machine

RUN = """
import json, sys
from numba.core import event

compiled = []

class Listener(event.Listener):
    def on_start(self, one):
        compiled.append(str(one.data.get("dispatcher") or one.data.get("name")))
    def on_end(self, one):
        pass

listener = Listener()
event.register("numba:compile", listener)
event.register("numba:run_pass", listener)

import stages
print(json.dumps({"value": stages.run(), "compiled": len(compiled), "what": compiled[:3]}))
"""

HELPERS = """
from libfp.jit import kernel

LIMIT = 10

@kernel
def inner(x):
    return x + 1

@kernel
def outer(x):
    return inner(x) + LIMIT
"""
BOX = """
from libfp.jit import native, word

@native
class Box:
    a: word
    b: word

    def get(self):
        return self.a * 16
"""
STAGES = """
import settings
from box import Box
from helpers import outer
from libfp import Pipeline, stage
from libfp.jit import store8

@stage
def work(packet, box, bound):
    store8(packet.data, outer(0) + bound + box.get() + settings.EXTRA)

def run():
    return Pipeline(work(Box(1, 2), 3)).run_once([bytes(60)])[0].frame[0]
"""
FILES = {"helpers.py": HELPERS, "box.py": BOX, "settings.py": "EXTRA = 0\n", "stages.py": STAGES}
VALUE = 1 + 10 + 3 + 16


class Project:
    """Source files in a folder, a cache beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        for name, text in FILES.items():
            (folder / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))

    def run(self) -> dict[str, Any]:
        env = {**os.environ, "LIBFP_CACHE_DIR": str(self.cache), "PYTHONPATH": str(self.folder)}
        env |= {"HOME": str(self.folder / "home"), "NUMBA_CACHE_DIR": str(self.folder / "elsewhere")}
        env |= {"NUMBA_CACHE_LOCATOR_CLASSES": "UserWideCacheLocator"}
        return execute(RUN, env)


def execute(code: str, env: dict[str, str]) -> dict[str, Any]:
    """The last line that `code` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Has run once."""
    made = Project(tmp_path_factory.mktemp("project"))
    first = made.run()
    assert first["value"] == VALUE
    assert first["compiled"] > 0, "or counting compilations shows nothing"
    return made


EDITS = {
    "a helper of a helper": ("helpers.py", "x + 1", "x + 2", 1),
    "a global of a helper": ("helpers.py", "LIMIT = 10", "LIMIT = 20", 10),
    "a bound constant": ("stages.py", "Box(1, 2), 3)", "Box(1, 2), 4)", 1),
    "a class layout": ("box.py", "    a: word\n    b: word\n", "    b: word\n    a: word\n", 16),
    "a method of a class": ("box.py", "self.a * 16", "self.b * 16", 16),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_change_is_seen_and_then_kept(project: Project, what: str) -> None:
    name, old, new, difference = EDITS[what]
    project.edit(name, old, new)
    try:
        assert project.run()["value"] == VALUE + difference
    finally:
        project.edit(name, new, old)


def test_the_second_start_compiles_nothing(project: Project) -> None:
    assert project.run() == {"value": VALUE, "compiled": 0, "what": []}


def test_a_comment_and_the_place_compile_nothing(project: Project) -> None:
    project.edit("stages.py", "@stage\n", "# A comment moves every line.\n\n@stage\n")
    project.edit("helpers.py", "def inner(x):\n", "def inner(x):\n    # another\n")
    assert project.run() == {"value": VALUE, "compiled": 0, "what": []}


def test_numbas_own_settings_divert_nothing(project: Project) -> None:
    assert list((project.cache / "__pycache__").glob("*.nbi"))
    for elsewhere in ("home", "elsewhere"):
        assert not list((project.folder / elsewhere).glob("**/*.nb?"))


APPLICATION = RUN.replace(
    "import stages\n",
    """
from libfp import Pipeline
from libfp.ports.memory import MemoryPort
from libfp.stages import Forward, Routes, forward, parse
from libfp.testing.packets import udp
from libfp.testing.wait import wait_until
from libfp.tables import Hash
from libfp import stage

@stage
def deny(packet, blocked):
    if packet.is_ipv4 and packet.ipv4.src in blocked:
        packet.drop("denied")

class stages:
    @staticmethod
    def run():
        routes, blocked = Routes(routes=1000, next_hops=16), Hash(key="ipv4", capacity=64)
        routes.fib["0.0.0.0/0"] = routes.next_hops.add(Forward(1, b"abcdef", b"ghijkl", 1500))
        pipeline = Pipeline(parse, deny(blocked), forward(routes))
        ports = [MemoryPort("a"), MemoryPort("b")]
        with pipeline.start(ports, name="test-cache") as app:
            wait_until(lambda: app.workers[0].heartbeat > 1)
            blocked["10.0.0.9"] = True
            app.workers[0].state.replicas.flush()
            beat = app.workers[0].heartbeat
            wait_until(lambda: app.workers[0].heartbeat > beat + 2)
            ports[0].inject([udp(), udp(src="10.0.0.9")])
            wait_until(lambda: app.counters.received == 2)
            return len(wait_until(ports[1].collect)) * 10 + app.counters["denied"]
""",
)


def test_the_second_start_of_an_application_compiles_nothing() -> None:
    """With tables, a worker, the keeper, statistics and all. The first start may find the cache of the tests warm."""
    first, second = (execute(APPLICATION, dict(os.environ)) for _ in range(2))
    assert (first["value"], second["value"]) == (11, 11)
    assert second["compiled"] == 0, second["what"]


ENTRY = RUN.replace(
    "import stages\n",
    """
from libfp.jit import clock_hz

class stages:
    @staticmethod
    def run():
        return clock_hz() > 0
""",
)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both come to an empty cache; the third run finds what they left."""
    env = {**os.environ, "LIBFP_CACHE_DIR": str(tmp_path / "cache")}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: execute(ENTRY, env), range(2)))
    assert all(one["value"] for one in results)
    assert sum(one["compiled"] for one in results) > 0
    assert execute(ENTRY, env)["compiled"] == 0
    assert not list((tmp_path / "cache").glob(".*")), "nothing half-written is left"


# What the name of a pipeline's module depends on, piece by piece. Below, `reads` makes a stage of a text in which X is
# a global, and returns what is hashed for it.


def reads(text: str, **scope: Any) -> str:
    names = {"kernel": kernel, "__name__": __name__, **scope}
    exec(text, names)
    digest = Digest()
    digest.add_function(names["work"], "stage 'work'")
    return digest.text()


WORK = "def work(packet):\n    return {}\n"


@native
class Two:
    a: word
    b: word


@native
class OneAndConstant:
    a: word
    b: constant


def helper(step: int) -> Any:
    """A kernel over a closure."""

    def add(x: int) -> int:
        return x + step

    return kernel(add)


def with_default(value: int) -> Any:
    scope: dict[str, Any] = {"__name__": __name__}
    exec(f"def f(x, y={value}): return x + y", scope)
    return scope["f"]


PAIRS = {
    "int": (1, 2),
    "bool": (True, 1),
    "string": ("a", "b"),
    "tuple": ((1, (2, 3)), (1, (2, 4))),
    "numpy scalar": ((lambda np: np.int64(1)), (lambda np: np.int64(2))),
    "numpy type": ((lambda np: np.int64(1)), (lambda np: np.int32(1))),
    "closure": ((lambda np: helper(1)), (lambda np: helper(2))),
    "default": ((lambda np: with_default(1)), (lambda np: with_default(2))),
    "class": (Two, OneAndConstant),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_globals_are_part_of_the_name(kind: str) -> None:
    import numpy as np

    one, other = (made(np) if getattr(made, "__name__", "") == "<lambda>" else made for made in PAIRS[kind])
    assert reads(WORK.format("X"), X=one) == reads(WORK.format("X"), X=one)
    assert reads(WORK.format("X"), X=one) != reads(WORK.format("X"), X=other)


def test_what_is_not_read_is_no_part_of_the_name() -> None:
    assert reads(WORK.format("X"), X=1, Y=2) == reads(WORK.format("X"), X=1, Y=3)


@pytest.mark.parametrize("python", ["lambda: X", "[X for _ in range(3)]"])
def test_nested_functions_are_followed(python: str) -> None:
    assert reads(WORK.format(python), X=1) != reads(WORK.format(python), X=2)


def test_many_names_before_a_modules_attribute() -> None:
    """With more than 256 names the bytecode has prefixes between the module and its attribute."""
    import types

    module = types.ModuleType("settings")
    many = "".join(f"    n{i} = G{i}\n" for i in range(300))
    scope = {f"G{i}": i for i in range(300)}
    texts = []
    for module.LIMIT in (1, 2):
        texts.append(reads(f"def work(packet):\n{many}    return settings.LIMIT\n", settings=module, **scope))
    assert texts[0] != texts[1]


class Plain:
    LIMIT = 3


UNUSABLE = {
    "list": [1], "dict": {1: 2}, "set": {1}, "object": object(), "plain class": Plain, "instance": Plain(),
    "bytearray": bytearray(b"a"), "tuple of lists": ([1], 2), "module": json, "method": [1].count,
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_other_globals_are_refused_by_name(kind: str) -> None:
    with pytest.raises(NotCacheable, match=r"stage 'work' reads the global 'THING'.*bind it"):
        reads(WORK.format("THING"), THING=UNUSABLE[kind])


def test_arrays_are_refused_by_name() -> None:
    """numba would compile their content in."""
    import numpy as np

    with pytest.raises(NotCacheable, match="'THING', a ndarray"):
        reads(WORK.format("THING[0]"), THING=np.arange(3))


def test_refused_also_in_a_helper_of_a_helper() -> None:
    text = "@kernel\ndef inner(): return THING[0]\n@kernel\ndef outer(): return inner()\n" + WORK.format("outer()")
    with pytest.raises(NotCacheable, match="stage 'work' reads the global 'THING'"):
        reads(text, THING=[1])


def test_a_helper_with_a_cache_of_its_own_is_refused() -> None:
    import numba

    from libfp.testing import internet_checksum

    cached = numba.njit(cache=True)(internet_checksum)
    with pytest.raises(NotCacheable, match="stage 'work' calls 'helper', which numba caches by itself"):
        reads(WORK.format("helper(1)"), helper=cached)
    reads(WORK.format("helper(1)"), helper=numba.njit(with_default(1)))


def test_a_stage_itself_is_checked() -> None:
    things = [1]

    @stage
    def work(packet) -> None:  # type: ignore[no-untyped-def]
        packet.mark = things[0]

    with pytest.raises(NotCacheable, match="stage 'work' reads the global 'things', a list"):
        Pipeline(work)


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), 1.5, (1, [2])])
def test_what_cannot_be_bound(value: Any) -> None:
    @stage
    def work(packet, thing) -> None:  # type: ignore[no-untyped-def]
        packet.drop("no")

    with pytest.raises(NotCacheable, match="stage 'work' cannot bind thing="):
        work(value)


def test_libfps_own_functions_are_in_every_name_already() -> None:
    from libfp.packet import checksum

    assert "def libfp" not in reads(WORK.format("checksum(1, 2)"), checksum=checksum)
