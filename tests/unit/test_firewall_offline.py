"""`fp firewall --pcap`: a capture through the firewall's pipeline, by rules and routes from files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from scapy.all import ICMP, IP, TCP, UDP, Ether, IPv6, PcapNgWriter, rdpcap

from libfp.cli import main
from libfp.testing.netns import Lab

pytestmark = pytest.mark.timeout(300)  # it may compile

RULES = """
table inet filter {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan" oifname "wan" tcp dport 80 accept
    iifname "lan" ip6 daddr 2001:db8::/32 udp dport 53 accept
    iifname "lan" icmp type echo-request counter accept
    iifname "wan" tcp dport 22 reject
  }
}
"""
ROUTES = """
10.0.0.0/8 via 10.0.0.2 dev lan
default via 192.0.2.1 dev wan
::/0 via fe80::1 dev wan
fd00::/8 via fe80::2 dev lan
"""
INSIDE, OUTSIDE, INSIDE6, OUTSIDE6 = "10.1.1.1", "198.51.100.1", "fd00::1", "2001:db8::1"


def tcp(flags: str, sport: int = 5000, dport: int = 80) -> Any:
    return TCP(sport=sport, dport=dport, flags=flags, seq=1, ack=1)


SENT: list[tuple[str, Any, str]] = [  # by which port, what, what becomes of it
    ("lan", IP(src=INSIDE, dst=OUTSIDE) / tcp("S"), "forwarded"),
    ("wan", IP(src=OUTSIDE, dst=INSIDE) / tcp("SA", 80, 5000), "forwarded"),
    ("lan", IP(src=INSIDE, dst=OUTSIDE) / tcp("A"), "forwarded"),
    ("wan", IP(src=OUTSIDE, dst=INSIDE) / tcp("S", 80, 5001), "filtered"),
    ("lan", IP(src=INSIDE, dst=OUTSIDE) / tcp("S", 5000, 81), "filtered"),
    ("wan", IP(src=OUTSIDE, dst=INSIDE) / tcp("S", 5000, 22), "reject"),
    ("lan", IP(src=INSIDE, dst=OUTSIDE) / ICMP(id=7), "forwarded"),
    ("wan", IP(src=OUTSIDE, dst=INSIDE) / ICMP(type=0, id=7), "forwarded"),
    ("wan", IP(src=OUTSIDE, dst=INSIDE) / ICMP(id=8), "filtered"),
    ("lan", IPv6(src=INSIDE6, dst=OUTSIDE6) / UDP(sport=9, dport=53), "forwarded"),
    ("wan", IPv6(src=OUTSIDE6, dst=INSIDE6) / UDP(sport=53, dport=9), "forwarded"),
    ("wan", IPv6(src=OUTSIDE6, dst=INSIDE6) / UDP(sport=9, dport=53), "flow-unknown"),  # Linux may know it
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    with PcapNgWriter(str(tmp_path / "in.pcapng")) as writer:
        for port, packet, _ in SENT:
            one = Ether(src="02:00:00:00:00:05", dst="02:00:00:00:00:06") / packet
            one.sniffed_on = port
            writer.write(one)
    (tmp_path / "routes.txt").write_text(ROUTES)
    (tmp_path / "rules.nft").write_text(RULES)
    return tmp_path


def run(files: Path, rules: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    paths = {"pcap": "in.pcapng", "routes": "routes.txt", "rules": rules, "out": "out.pcap"}
    arguments = [word for name, path in paths.items() for word in (f"--{name}", str(files / path))]
    status = main(["firewall", *arguments, "--json"])
    said = capsys.readouterr()
    return status, said.out or said.err


def listed(rules: str) -> str:
    """The rules as nft prints them."""
    with Lab() as lab:
        host = lab.host("nft")
        assert host.run(["nft", "-f", rules]).returncode == 0
        return host.run(["nft", "-j", "list", "ruleset"]).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the rules are nft's")
def test_packets_meet_the_rules(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "rules.json").write_text(listed(str(files / "rules.nft")))
    for rules in ("rules.json", "rules.nft"):
        status, said = run(files, rules, capsys)
        assert status == 0, said
        told, becomes = json.loads(said), [row[2] for row in SENT]
        assert told["drops"] == {"filtered": becomes.count("filtered")}
        assert told["punts"] == {"reject": 1, "flow-unknown": 1}
        assert [p[Ether].payload.dst for p in rdpcap(str(files / "out.pcap"))] == [
            packet.dst for _, packet, what in SENT if what == "forwarded"
        ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"nftables": []}', "rules has no nftables chain on the hook forward"),
        ("{", "no output of nft -j list ruleset"),
    ],
)
def test_a_bad_file_of_rules(files: Path, capsys: pytest.CaptureFixture[str], text: str, what: str) -> None:
    (files / "rules").write_text(text)
    status, said = run(files, "rules", capsys)
    assert (status, what in said, said.count("\n")) == (2, True, 1), said
    assert not (files / "out.pcap").exists()
