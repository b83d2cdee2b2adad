"""The house rules that a reader of the code relies on: which way imports point, and what knows of what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import libfp

PACKAGE = Path(libfp.__file__).parent
APPLICATIONS = sorted(path.name for path in (PACKAGE / "apps").iterdir() if (path / "__init__.py").exists())
LONGEST_STAGE = 300  # lines of a file in which there is one

#: What each part may import of the others. Within a function, for what is made only then, a part may reach further.
PARTS = {
    "jit": (),
    "packet": ("jit",),
    "rings": ("jit",),
    "tables": ("jit", "packet", "rings"),
    "pyxdp": ("jit",),
    "ports": ("jit", "packet", "rings", "pyxdp"),
    "engine": ("jit", "packet", "rings", "tables", "ports"),
    "gen": ("jit", "packet", "ports"),
    "stages": ("jit", "packet", "rings", "tables", "ports", "engine"),
    "linux": ("jit", "packet", "rings", "tables", "ports", "engine", "stages", "pyxdp"),
}


def sources(part: str) -> Iterator[Path]:
    found = sorted((PACKAGE / part).glob("**/*.py"))
    assert found
    yield from found


def imported(path: Path) -> Iterator[str]:
    """The modules of libfp that a module imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part: str) -> None:
    for path in sources(part):
        for module in imported(path):
            parts = module.split(".")
            if parts[0] == "libfp" and len(parts) > 1 and parts[1] not in ("errors", "lazy", part):
                assert parts[1] in PARTS[part], f"{path.relative_to(PACKAGE)} imports {module}"


@pytest.mark.parametrize("part", ["jit", "packet", "ports", "gen", "engine", "stages", "rings", "tables"])
def test_nothing_that_applications_share_names_one(part: str) -> None:
    assert "router" in APPLICATIONS
    word = re.compile(rf"\b(libfp\.apps|{'|'.join(APPLICATIONS)})\b", re.IGNORECASE)
    for path in sources(part):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.DOTALL)  # a docstring may give an example
        assert not word.search(code), path


def test_a_stage_can_be_read_in_one_sitting() -> None:
    stages = [path for path in PACKAGE.glob("**/*.py") if re.search(r"^@stage\b", path.read_text(), re.MULTILINE)]
    assert len(stages) > 3
    for path in stages:
        assert len(path.read_text().splitlines()) <= LONGEST_STAGE, path
