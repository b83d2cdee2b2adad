"""The programs about tables that a reader meets in docs/tables.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_the_programs_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "docs" / "tables.md"
    tracks, classifies = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    exec(compile(tracks, str(path), "exec"), {"__name__": "program"})
    assert capsys.readouterr().out.startswith("10.0.0.1 5000 10.0.0.2 53 17 0 30.0 (1, ")
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(classifies, str(path), "exec"), names)
    assert [rule.value for rule in names["acl"].values()] == [1, 2, 3]
