"""`fp router --pcap`: a capture through the router's pipeline, by routes from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scapy.all import IP, UDP, Ether, IPv6, PcapNgWriter, RawPcapNgReader, rdpcap, wrpcap

from libfp.cli import main, offline
from libfp.cli.routes_file import RoutesFile
from libfp.errors import BadInput
from libfp.stages import forward, parse

pytestmark = pytest.mark.timeout(300)  # it may compile

ROUTES = """
# what leads where
default via 192.0.2.9 dev out1
198.51.100.0/24 via 192.0.2.1 dev out0   # with a neighbour
192.0.2.0/24 dev out0 mtu 100
198.51.100.128/25 via inet 192.0.2.2 dev out1 mtu 9000
2001:db8::/32 via fe80::1 dev out1
10.0.0.0/8 via inet6 fe80::1 dev out1
blackhole 203.0.113.0/24
unreachable 203.0.114.0/24
prohibit 2001:db8:f::/48
local 192.0.2.254
neigh 192.0.2.1 lladdr 02:aa:00:00:00:01 dev out0
neigh 192.0.2.7 lladdr 02:AA:00:00:00:07 dev out0
neigh fe80::1 lladdr 02:aa:00:00:00:66 dev out1
"""
SENT: list[tuple[str, int, int, str]] = [  # to, ttl, bytes; then by which port to which MAC address, or the reason
    ("198.51.100.7", 64, 10, "out0 02:aa:00:00:00:01"),
    ("198.51.100.200", 64, 4000, "out1 06:00:c0:00:02:02"),
    ("192.0.2.7", 2, 10, "out0 02:aa:00:00:00:07"),
    ("192.0.2.8", 64, 10, "out0 06:00:00:00:00:01"),
    ("8.8.8.8", 64, 10, "out1 06:00:c0:00:02:09"),
    ("10.1.1.1", 64, 10, "out1 02:aa:00:00:00:66"),
    ("2001:db8::7", 64, 10, "out1 02:aa:00:00:00:66"),
    ("192.0.2.8", 64, 200, "fragment-needed"),
    ("198.51.100.7", 1, 10, "ttl-expired"),
    ("203.0.113.9", 64, 10, "blackhole"),
    ("203.0.114.9", 64, 10, "unreachable"),
    ("2001:db8:f::1", 64, 10, "prohibit"),
    ("192.0.2.254", 64, 10, "local"),
    ("2001:db9::1", 64, 10, "no-route"),
]  # fmt: skip
TIMES = 50  # bursts are 64


def packet(to: str, ttl: int, size: int) -> Any:
    six = ":" in to
    ip = IPv6(dst=to, src="2001:db8:1::1", hlim=ttl) if six else IP(dst=to, src="172.16.0.1", ttl=ttl)
    return Ether(src="02:00:00:00:00:05", dst="02:00:00:00:00:06") / ip / UDP(sport=7, dport=9) / (b"x" * size)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    (tmp_path / "routes.txt").write_text(ROUTES)
    packets = [packet(*row[:3]) for _ in range(TIMES) for row in SENT]
    for number, one in enumerate(packets):
        one.time = 1000 + number
    wrpcap(str(tmp_path / "in.pcap"), packets)
    return str(tmp_path / "in.pcap"), str(tmp_path / "routes.txt"), str(tmp_path / "out.pcapng")


def test_packets_leave_as_the_routes_say(files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    pcap, routes, out = files
    assert main(["router", "--pcap", pcap, "--routes", routes, "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    forwarded = [row for row in SENT if " " in row[3]]
    assert (told["packets"], told["forwarded"]) == (len(SENT) * TIMES, len(forwarded) * TIMES)
    assert told["drops"] == {"blackhole": TIMES}
    expected = {row[3]: TIMES for row in SENT if " " not in row[3] and row[3] != "blackhole"}
    assert told["punts"] == expected, "no rate limit: time does not pass here"
    with RawPcapNgReader(out) as reader:
        names = [meta.ifname.decode() for _, meta in reader]
    packets = rdpcap(out)
    assert [(f"{name} {p[Ether].dst}") for name, p in zip(names, packets, strict=True)] == [
        row[3] for row in forwarded
    ] * TIMES
    for row, sent in zip(forwarded * TIMES, packets, strict=True):
        assert sent[Ether].src == {"out1": "02:00:00:00:00:01", "out0": "02:00:00:00:00:02"}[row[3].split()[0]]
        expect = packet(row[0], row[1] - 1, row[2])
        assert bytes(sent)[14:] == bytes(expect)[14:], "TTL and checksum"
    assert [int(p.time) - 1000 for p in packets[:8]] == [0, 1, 2, 3, 4, 5, 6, 14], "when they came"


def test_a_summary_and_a_classic_file(
    files: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.pcap"
    out.write_bytes(b"what was there")
    assert main(["router", "--pcap", files[0], "--routes", files[1], "--out", str(out)]) == 0
    said = {line.split()[1]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert said["packets"] == "700"
    assert said["blackhole"] == "50"
    assert len(rdpcap(str(out))) == int(said["forwarded"]) == 350
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pcap", "out.pcap", "routes.txt"]


def test_interfaces_of_a_pcapng_are_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with PcapNgWriter(str(tmp_path / "in.pcapng")) as writer:
        for number in range(10):
            one = packet("10.0.0.1" if number & 1 else "10.0.0.2", 64, 1)
            one.sniffed_on = ("left", "right")[number // 5]
            writer.write(one)
    (tmp_path / "routes").write_text("10.0.0.1 via 192.0.2.1 dev right\n10.0.0.2 via 192.0.2.1 dev far\n")
    arguments = ["--pcap", str(tmp_path / "in.pcapng"), "--routes", str(tmp_path / "routes"), "--json"]
    assert main(["router", *arguments]) == 0
    ports = json.loads(capsys.readouterr().out)["ports"]
    assert {name: (port["rx_packets"], port["tx_packets"]) for name, port in ports.items()} == {
        "in0": (0, 0),  # scapy's first interface, which has neither name nor packets
        "left": (5, 0), "right": (5, 5), "far": (0, 5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("10.0.0.0/8", "names no device"),
        ("10.0.0.0/8 via", "ends where an address should be"),
        ("10.0.0.0/8 via x dev a", "'x' is no address"),
        ("10.0.0.0/8 dev", "ends where a device should be"),
        ("10.0.0.0/8 dev a/b", "no name of a device"),
        ("10.0.0.0/8 dev a mtu 67", "'67' is no MTU"),
        ("10.0.0.0/8 dev a dev b", "'dev' is not via, dev or mtu, each once"),
        ("10.0.0.0/8 dev a metric 5", "'metric' is not via"),
        ("10.0.0.1/8 dev a", "'10.0.0.1/8' is no prefix"),
        ("nonsense", "'nonsense' is no prefix"),
        ("blackhole", "ends where a prefix should be"),
        ("blackhole 10.0.0.0/8 dev a", "'dev' is one word too many"),
        ("2001:db8::/32 via 10.0.0.1 dev a", "an IPv6 route via 10.0.0.1"),
        ("neigh 10.0.0.1 dev a", "'' is no MAC address"),
        ("neigh 10.0.0.1 lladdr 02:00 dev a", "'02:00' is no MAC address"),
        ("neigh 10.0.0.1 lladdr 02:00:00:00:00:01", "ends where a device"),
        ("neigh x lladdr 02:00:00:00:00:01 dev a", "'x' is no address"),
        ("172.16.0.0/12 dev b", "a route to 172.16.0.0/12 is there already, in line 2"),
    ],
)
def test_malformed_routes_are_named_with_the_line(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "routes.txt"
    path.write_text(f"# a comment\n172.16.0.0/12 dev a\n{line}\n")
    with pytest.raises(BadInput, match=r"routes.txt, line 3: ") as caught:
        RoutesFile(str(path))
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["pcap", "routes", "none", "out", "same"])
def test_on_errors_nothing_is_left_behind(
    files: tuple[str, str, str], tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pcap, routes, out = files
    if broken == "pcap":
        Path(pcap).write_bytes(Path(pcap).read_bytes()[:-1])
    elif broken == "routes":
        Path(routes).write_text(ROUTES + "nonsense\n")
    elif broken == "none":
        pcap = str(tmp_path / "none")
    elif broken == "out":
        out = str(tmp_path / "no" / "folder")
    else:
        out = pcap
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["router", "--pcap", pcap, "--routes", routes, "--out", out]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    where = {"pcap": "in.pcap, byte ", "routes": "routes.txt, line 16: ", "none": "cannot read", "out": "cannot write"}
    assert where.get(broken, "is what is read, too") in said.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "arguments", [["--pcap", "x"], ["--routes", "x"], ["--out", "x"], ["--pcap", "x", "--routes", "y", "eth0"], []]
)
def test_options_that_do_not_go_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_capture_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrpcap(str(tmp_path / "in.pcap"), [packet("10.0.0.1", 9, 9)])
    data = (tmp_path / "in.pcap").read_bytes()[:24]
    (tmp_path / "in.pcap").write_bytes(data)
    (tmp_path / "routes").write_text("")
    paths = (str(tmp_path / name) for name in ("in.pcap", "routes", "out.pcap"))
    offline.run(*paths, True, lambda routes, names: (parse, forward(routes)))
    assert json.loads(capsys.readouterr().out)["packets"] == 0
