"""The public surface: what the pages of docs/api describe, no more and no less, each name with its docstring."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sphinx.util.inventory import InventoryFile

import libfp

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
DOCUMENTED = [name for page in PAGES for name in re.findall(r"^```\{public\} ([\w.]+)\n", page.read_text(), re.M)]
INTERNAL = [
    name
    for line in re.findall(r"^- (`.*?):", (ROOT / "docs" / "api" / "internal.md").read_text(), re.M)
    for name in re.findall(r"`([\w.*]+)`", line)
]


def own_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class itself, or a base that is not public, defines."""
    for one in cls.__mro__:
        if one.__module__.startswith("libfp"):
            yield from ((name, value) for name, value in vars(one).items() if not name.startswith("_"))


def is_public(name: str, value: Any) -> bool:
    """A method or property."""
    methods = property | classmethod | staticmethod
    return not name.startswith("_") and (isinstance(value, methods) or inspect.isfunction(value))


def public(module: str) -> Iterator[tuple[str, Any]]:
    found = importlib.import_module(module)
    yield from ((name, getattr(found, name)) for name in found.__all__ if name != "__version__")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_is_there_and_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert len(module.__all__) == len(set(module.__all__))
    undocumented = []
    for member, value in public(name):
        if not callable(value):
            continue  # the build wants a comment
        if not value.__doc__:
            undocumented.append(member)
        if inspect.isclass(value):
            methods = [(one, made) for one, made in own_members(value) if is_public(one, made)]
            undocumented += [f"{member}.{one}" for one, made in methods if not inspect.getdoc(made)]
    assert not undocumented


def test_the_pages_are_built_and_have_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees"), "docs"]
    built = subprocess.run([*command, str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    with open(tmp_path / "html" / "objects.inv", "rb") as file:
        inventory = {name for kind in InventoryFile.load(file, "", lambda *parts: "").values() for name in kind}
    described: dict[int, str] = {}
    for name in sorted(DOCUMENTED):
        for member, value in public(name):
            if home := described.get(id(value)) if callable(value) else None:  # there is a link to it
                assert home in inventory
                continue
            described[id(value)] = f"{name}.{member}"
            members = vars(value) if inspect.isclass(value) else {}
            wanted = [name, member], *([name, member, one] for one, made in members.items() if is_public(one, made))
            missing = {".".join(one) for one in wanted} - inventory
            assert not missing


def test_every_module_is_documented_or_internal() -> None:
    found = [one.name for one in pkgutil.walk_packages(libfp.__path__, "libfp.")]
    named = re.compile("|".join(re.escape(one).replace(r"\*", r"[\w.]+") for one in INTERNAL))
    assert [name for name in found if name not in DOCUMENTED and not named.fullmatch(name)] == []


def test_the_figures_are_those_of_the_benches() -> None:
    """A ratio on a page is that of docs/bench.md, or was, before a run on the same machine that came out much alike."""
    sections = re.split(r"^## (\w+)$", (ROOT / "docs" / "bench.md").read_text(), flags=re.M)
    benches = dict(zip(sections[1::2], sections[2::2], strict=True))
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ([\d.]+) \|$", (ROOT / "docs" / "dpdk.md").read_text(), re.M)
    assert len(rows) >= 10
    for bench, case, ratio in rows:
        measured = re.search(rf"^\| {re.escape(case)} \|(?:[^|]*\|){{4}} ([\d.]+) \|", benches[bench], re.M)
        assert measured, case
        assert float(measured[1]) == pytest.approx(float(ratio), rel=0.1), case


def test_examples_and_pages_import_what_is_public() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("apps/*/README.md")]
    programs = [code for page in pages for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    programs += [example.read_text() for example in ROOT.glob("examples/*.py")]
    nodes = [node for code in programs for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    named = {(node.module, one.name) for node in nodes for one in node.names if (node.module or "").startswith("libfp")}
    assert len(named) > 20
    for module, name in named:
        assert module in DOCUMENTED, f"{module} is internal"
        assert name in importlib.import_module(module).__all__
