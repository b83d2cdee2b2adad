"""`fp firewall` from its start to its end: rules of the kernel and of a file, their hits, and what a reload does."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libfp.cli import main
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.router import AppProcess, Crossroads

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, OTHER = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.OTHER
RULES = """flush ruleset
table inet filter {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related counter accept
    iifname "r0" icmp type echo-request counter accept
    %s
  }
}
"""


def nft(host: Host, *arguments: str) -> str:
    done = host.run(["nft", *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


class Running:
    """A firewall with a file of rules, and what may be asked of it."""

    def __init__(self, net: Crossroads, file: Path) -> None:
        self.net, self.file = net, file
        self.load("tcp dport 7000 accept")
        self.process = AppProcess(net.router, "firewall", *net.PORTS, "--load", str(file), "--kick", "inline")

    def load(self, *rules: str) -> None:
        """Write the file, in which these are the last rules."""
        self.file.write_text(RULES % "\n    ".join(rules))

    def hup(self, expect: str) -> str:
        """Have it read everything again; the line that it says."""
        before = len(self.process.said())
        self.process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: expect in self.process.said()[before:], 20, expect)
        return next(line for line in self.process.said()[before:].splitlines() if expect in line)

    def told(self, *arguments: str) -> str:
        """What `fp firewall rules` prints."""
        command = [sys.executable, "-m", "libfp", "firewall", "rules", self.process.ready["name"], *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def rules(self) -> dict[str, list[int]]:
        """Packets and bytes, by rule."""
        found = json.loads(self.told("--json"))["rules"]
        return {one["rule"]: [one["packets"], one["bytes"]] for one in found}

    def fast(self) -> bool:
        """Whether the fast path forwards what the client and the server say to each other."""
        before = self.process.counters().forwarded
        assert self.net.client.ping(SERVER, count=5, interval=0.001).received == 5
        return self.process.counters().forwarded - before >= 10


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Lab() as lab:
        net = Crossroads(lab)
        net.router.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 1)
        made = Running(net, tmp_path_factory.mktemp("firewall") / "rules.nft")
        with made.process:
            wait_until(made.fast)
            yield made
            assert made.process.stop() == 0
            assert "chain forward" in nft(net.router, "list", "ruleset"), "the kernel keeps its rules"


def test_hits_of_each_rule(running: Running) -> None:
    before = running.rules()
    assert list(before) == [
        "ct state established,related counter accept",
        'iifname "r0" icmp type echo-request counter accept',
        "tcp dport 7000 accept",
        "policy drop",
    ]
    assert running.net.client.ping(SERVER, count=3, interval=0.001).received == 3
    assert running.net.server.ping(CLIENT, count=2, interval=0.001, timeout=0.1).received == 0

    def changed() -> list[list[int]]:
        after = running.rules()
        return [[now - then for now, then in zip(after[rule], before[rule], strict=True)] for rule in after]

    # one packet of the ping is new, all others are of its flow: 84 bytes of IP each
    wait_until(lambda: changed() == [[5, 420], [1, 84], [0, 0], [2, 168]])  # what is dropped, nobody has waited for
    shown = running.told().splitlines()
    assert shown[0].split() == ["packets", "bytes", "inet", "filter", "forward"]
    assert re.fullmatch(r' +[\d,]+ +[\d,]+  iifname "r0" icmp type echo-request counter accept  # handle \d+', shown[2])
    assert shown[4].endswith("  policy drop")


def test_a_change_of_the_kernels_rules_is_taken_over_at_once(running: Running) -> None:
    server = running.net.server
    nft(running.net.router, "insert", "rule", "inet", "filter", "forward", "iifname", "r1", "accept")
    wait_until(lambda: 'iifname "r1" accept' in running.rules())
    assert server.ping(CLIENT, count=3, interval=0.001).received == 3
    nft(running.net.router, "flush", "chain", "inet", "filter", "forward")
    wait_until(lambda: list(running.rules()) == ["policy drop"])
    assert running.net.client.ping(SERVER, count=2, interval=0.001, timeout=0.1).received == 0
    running.hup("rules read again: 3")
    assert running.fast(), "as in the file again"


def test_a_reload_loses_no_connection(running: Running) -> None:
    def stream(host: Host, timeout: float) -> socket.socket:
        made = host.socket(kind=socket.SOCK_STREAM)
        made.settimeout(timeout)
        return made

    net = running.net
    with stream(net.server, 5) as listening, stream(net.client, 5) as client:
        listening.bind(("", 7000))
        listening.listen()
        client.connect((SERVER, 7000))
        with listening.accept()[0] as server:
            server.settimeout(5)
            for number, rules in enumerate([(), ("tcp dport 7001 accept",), ("counter", "tcp dport 7001 drop")]):
                running.load(*rules)
                running.hup(f"rules read again: {2 + len(rules)}")
                client.sendall(bytes([number]))
                assert server.recv(1) == bytes([number])
                server.sendall(b"x")
                assert client.recv(1) == b"x"
                with stream(net.client, 0.2) as another, pytest.raises(TimeoutError):
                    another.connect((SERVER, 7000))
    running.load("tcp dport 7000 accept")
    running.hup("rules read again: 3")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("tcp dport nonsense accept", "rules.nft:7:15-22: Error: "),
        ("iif nope0 accept", "rules.nft:7:9-13: Error: Interface does not exist"),
        ("limit rate 5/second accept", "nftables rule `limit rate 5/second accept` (handle "),
        ("ip saddr != 10.0.0.1 ip daddr != 10.0.0.1 tcp flags != syn accept", "8,192 entries"),
    ],
)
def test_a_bad_file_leaves_the_rules_as_they_were(running: Running, rule: str, said: str) -> None:
    before, good = nft(running.net.router, "-s", "list", "ruleset"), running.file.read_text()
    running.load(rule)
    try:
        assert said in running.hup("fp: the rules stay as they were: ")
    finally:
        running.file.write_text(good)
    assert nft(running.net.router, "-s", "list", "ruleset") == before
    assert running.fast()


def test_linux_forwards_alone_by_rules_that_cannot_be_applied(running: Running) -> None:
    router, rule = running.net.router, "ip ttl 1-255 limit rate 1000/second accept"
    nft(router, "add", "rule", "inet", "filter", "forward", *rule.split())
    running.process.wait_said("Linux forwards alone: nftables rule `ip ttl 1-255 limit rate 1000/second")
    wait_until(lambda: not running.fast())
    assert running.net.server.ping(CLIENT, count=3, interval=0.001).received == 3, "by that rule"
    assert "tcp dport 7000 accept" in running.rules(), "what was applied last"
    running.process.process.send_signal(signal.SIGHUP)  # the file's rules flush that one
    running.process.wait_said("forwarding again")
    wait_until(running.fast)
    assert running.net.server.ping(CLIENT, count=2, interval=0.001, timeout=0.1).received == 0


# -- what does not start


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Lab() as lab:
        yield lab.host("alone")


def refused(host: Host, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with host.enter():
        assert main(["firewall", "up0", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("fp: ")
    return said[-1]


def test_without_rules_it_does_not_start(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(host, capsys).startswith("fp: the kernel has no nftables chain on the hook forward; make one (type")


def test_a_bad_file_is_not_loaded(host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rules.nft"

    def loading(text: str) -> str:
        path.write_text(text)
        said = refused(host, capsys, "--load", str(path))
        assert nft(host, "list", "ruleset") == ""
        return said

    assert "rules.nft:1:9-9: Error: syntax error" in loading("nonsense\n")
    assert "`log accept` (handle " in loading(RULES % "log accept")
    assert f"fp: {path} makes no nftables chain on the hook forward" in loading("table inet a { }\n")


def test_rules_that_are_there_are_tried_with_those_of_the_file(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """nft -f adds to what there is, unless the file begins with a flush."""
    path = tmp_path / "rules.nft"
    path.write_text("table ip a {\n chain b {\n type filter hook forward priority 0; policy drop;\n }\n}\n")
    nft(host, "-f", str(path))
    path.write_text("table inet c {\n chain d {\n type filter hook forward priority 0; policy drop;\n }\n}\n")
    assert "IPv4 meets 2 nftables chains on the hook forward: ip a b and inet c d" in refused(
        host, capsys, "--load", str(path)
    )
    assert "table inet" not in nft(host, "list", "ruleset")
    path.write_text("flush ruleset\n" + path.read_text())
    assert "no interface 'up0'" in refused(host, capsys, "--load", str(path)), "the rules are good"
    nft(host, "flush", "ruleset")


def test_sequence_numbers_are_not_held_against_windows(host: Host, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "rules.nft"
    path.write_text(RULES % "")
    host.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 0)
    said = refused(host, capsys, "--load", str(path))
    assert said.endswith("; sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1")
    assert nft(host, "list", "ruleset") == ""
