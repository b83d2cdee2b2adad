"""The programs about tables that a reader meets: in docs/tables.md, and examples/rate_limit.py."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from libfp import Pipeline
from libfp.stages import parse
from libfp.testing import udp

ROOT = Path(__file__).parents[2]


def test_the_programs_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "docs" / "tables.md"
    tracks, classifies = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    exec(compile(tracks, str(path), "exec"), {"__name__": "program"})
    assert capsys.readouterr().out.startswith("10.0.0.1 5000 10.0.0.2 53 17 0 30.0 (1, ")
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(classifies, str(path), "exec"), names)
    assert [rule.value for rule in names["acl"].values()] == [1, 2, 3]


def test_rate_limit() -> None:
    spec = importlib.util.spec_from_file_location("rate_limit", ROOT / "examples" / "rate_limit.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    pipeline = Pipeline(parse, program.limit(program.sources, 10, 5))
    packets = [udp(src="192.0.2.1", sport=port) for port in range(8)] + [udp(src="192.0.2.2")]
    assert pipeline.run_once(packets) == ["pass"] * 5 + ["drop over-rate"] * 3 + ["pass"]
    assert pipeline.run_once([udp(src="2001:db8::1")] * 6) == ["pass"] * 5 + ["drop over-rate"]
    assert program.worst(2) == [(3, "192.0.2.1"), (1, "2001:db8::1")]
    [part] = program.sources.parts
    part.pass_time(0.2)
    outcomes = pipeline.run_once(packets)
    assert outcomes[:2] == ["pass", "pass"]
    assert outcomes[-2:] == ["drop over-rate", "pass"]
    part.pass_time(61)
    assert pipeline.run_once(packets) == ["pass"] * 5 + ["drop over-rate"] * 3 + ["pass"]
