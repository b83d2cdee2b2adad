"""The program about tables in examples: rate_limit.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from libfp import Pipeline
from libfp.stages import parse
from libfp.testing import udp

ROOT = Path(__file__).parents[2]


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
