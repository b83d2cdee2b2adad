"""The programs of examples/: each one's stages over memory ports, and what their arguments may be."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from libfp import Pipeline
from libfp.cli import run
from libfp.errors import BadInput
from libfp.stages import parse
from libfp.testing import ethernet, icmp_error, ipv4, tcp, udp

pytestmark = pytest.mark.timeout(180)  # most compile
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """A fresh copy of the program as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_deny() -> None:
    program = example("deny")
    pipeline = Pipeline(parse, program.deny(program.blocked))
    packets = [udp(src="192.0.2.7"), udp(src="192.0.2.8"), udp(src="2001:db8::7"), ethernet(b"no IP", 0x1234)]
    assert pipeline.run_once(packets) == ["pass"] * 4
    program.change("192.0.2.7")
    assert pipeline.run_once(packets) == ["drop denied", *["pass"] * 3]
    program.change("-192.0.2.7")
    program.change("-192.0.2.7")
    assert pipeline.run_once(packets) == ["pass"] * 4
    with pytest.raises(BadInput, match=r"'192\.0\.2' is not of type ipv4"):
        program.change("192.0.2")


def test_rate_limit() -> None:
    program = example("rate_limit")
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


class Lines(list[str]):
    """What is left of a file here: its lines, and its name."""

    name = "prefixes"


def test_prefix_count() -> None:
    program = example("prefix_count")
    routes = "default via 10.0.1.1 dev eth0", "10.0.0.0/8 dev eth1", "", "10.1.0.0/16 via 10.0.0.1", "2001:db8::/32"
    program.read(Lines(routes))
    pipeline = Pipeline(parse, program.count(program.prefixes, program.prefixes6, program.counters))
    packets = [udp(dst="10.1.2.3")] * 3 + [udp(b"x" * 500, dst="10.2.0.1"), udp(dst="192.0.2.1")]
    packets += [udp(dst="2001:db8::1")] * 2 + [udp(dst="2001:db9::1"), ethernet(b"\0" * 46, 0x1234)]
    assert pipeline.run_once(packets) == ["pass"] * 9
    assert program.counters.totals() == [[3, 42 + 62 + 60], [1, 542], [3, 3 * 42], [2, 2 * 62]]
    columns = [list(column.cells) for column in program.busiest(3).columns]
    assert columns[0] == ["10.0.0.0/8", "everything else", "10.1.0.0/16"]
    assert columns[1:] == [["1", "3", "3"], ["542", "164", "126"]]
    with pytest.raises(BadInput, match=r"prefixes:2: '10\.0\.0\.1/8'"):
        program.read(Lines(["10.3.0.0/16", "10.0.0.1/8"]))


class TestMaglev:
    NAMES = ("10.0.1.11", "10.0.1.12", "10.0.1.13", "10.0.1.14", "10.0.1.15")

    def test_shares_are_equal_or_as_the_weights(self) -> None:
        program = example("maglev")
        shares = Counter(program.populate(self.NAMES))
        assert set(shares) == set(self.NAMES)
        assert max(shares.values()) - min(shares.values()) <= 1
        shares = Counter(program.populate("abbcccc"))
        assert [round(7 * shares[name] / program.SLOTS, 3) for name in "abc"] == [1, 2, 4]
        assert program.populate([]) == [None] * program.SLOTS

    def test_who_goes_takes_little_with_him(self) -> None:
        program = example("maglev")
        before = program.populate(self.NAMES)
        assert program.populate(reversed(self.NAMES)) == before, "all balancers agree"
        after = program.populate(self.NAMES[1:])
        moved = Counter(old for old, new in zip(before, after, strict=True) if old != new)
        assert moved.pop(self.NAMES[0]) == before.count(self.NAMES[0])
        assert sum(moved.values()) < 0.05 * program.SLOTS, "of the others, few"

    def test_packets_keep_all_but_their_mac_addresses(self) -> None:
        program = example("maglev")
        program.macs[0], program.macs[1] = "02:00:00:00:00:a0", "02:00:00:00:00:a1"
        ways = {0x02_00_00_00_00_0B: 0, 0x02_00_00_00_00_0C: 1, 0x02_00_00_00_00_0D: 1}
        pipeline = Pipeline(parse, program.balance(program.table, program.macs))
        packets = [tcp(src="198.51.100.1", sport=port, dst="192.0.2.80", ttl=1) for port in range(1000, 1300)]
        assert set(pipeline.run_once(packets)) == {"drop no-backend"}
        words = {str(mac): port << 48 | mac for mac, port in ways.items()}
        program.table.load(words[name] for name in program.populate(list(words)))
        shares = Counter[int]()
        for before, outcome in zip(packets, pipeline.run_once(packets), strict=True):
            assert outcome == "forward"
            mac = int.from_bytes(outcome.frame[:6])
            assert outcome.port == ways[mac]
            assert outcome.frame[6:12].hex(":") == program.macs[outcome.port]
            assert outcome.frame[12:] == before[12:]
            shares[mac] += 1
        assert all(70 <= shares[mac] <= 130 for mac in ways), shares  # 5 standard deviations: 41

    def test_fragments_and_errors(self) -> None:
        program = example("maglev")
        backends = {str(number): number for number in range(1, 200)}
        program.table.load(backends[name] for name in program.populate(list(backends)))
        pipeline = Pipeline(parse, program.balance(program.table, program.macs))
        fragments = [
            ipv4(bytes([port]) * 64, dst="192.0.2.80", protocol=17, fragment_offset=offset, more_fragments=offset == 0)
            for port in range(3)
            for offset in (0, 64)
        ]
        assert len({outcome.frame[:6] for outcome in pipeline.run_once(fragments)}) == 1, "all of a datagram meet"
        for port in range(1000, 1020):
            there = tcp(src="198.51.100.1", sport=port, dst="192.0.2.80", dport=80)
            back = tcp(src="192.0.2.80", sport=80, dst="198.51.100.1", dport=port)
            error = icmp_error(back, src="203.0.113.1", dst="192.0.2.80")
            one, two = pipeline.run_once([there, error])
            assert one.frame[:6] == two.frame[:6], "the error about an answer comes to who gave it"
        packets = [udp(src="2001:db8:1::2", sport=port, dst="2001:db8::80") for port in range(20)]
        assert set(pipeline.run_once(packets)) == {"forward"}


@pytest.mark.parametrize("name", ["deny", "rate_limit", "prefix_count", "maglev", "gateway"])
def test_what_goes_wrong_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prefixes").write_text("10.0.0.0/8\n10.0.0.0/33\n")
    wrong = {
        "deny": [["none0"]],
        "rate_limit": [["10", "none0"]],
        "prefix_count": [[str(tmp_path / "prefixes"), "none0"], ["/dev/null", "none0"]],
        "gateway": [["none0", "none1", "--config", str(tmp_path / "no.toml")], ["none0", "none1"]],
        "maglev": [["-i", "none0", "192.0.2.80", "10.0.0.1"], ["-i", "lo", "192.0.2", "10.0.0.1"]],
    }
    program = example(name)
    for arguments in wrong[name]:
        assert run(program.main, f"{name}.py", arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"{name}.py: ")
        assert err.count("\n") == 1
    assert run(program.main, f"{name}.py", []) == 2
    assert ("no --config" if name == "gateway" else "missing") in capsys.readouterr().err


def test_help_is_the_program_s_own_text() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "deny.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Type an address to block it" in done.stdout
