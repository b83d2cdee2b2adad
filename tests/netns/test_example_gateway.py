"""examples/gateway.py at both ends of a tunnel: the rules meet what the tunnel protects, in clear and once.

    a 10.1.0.2 -- l1 gw1 w1 198.51.100.1 -- wire (a bridge) -- 198.51.100.2 w2 gw2 l2 -- b 10.2.0.2, 10.3.0.2

From 10.1.0.0/16 to 10.2.0.0/16 there is a tunnel, to 10.3.0.0/16 none. Linux has all routes, and the same rules.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from libfp.cli import main
from libfp.testing import udp
from libfp.testing.instance import Instance
from libfp.testing.netns import Host, Lab, wait_until
from libfp.testing.probe import IcmpError, udp_probe
from libfp.testing.traffic import tcp_transfer
from tests.netns.ipsec_sites import five_hosts, harmless, is_esp

pytestmark = pytest.mark.timeout(180)

PROGRAM = Path(__file__).parents[2] / "examples/gateway.py"
A, B, CLEAR, GW1 = "10.1.0.2", "10.2.0.2", "10.3.0.2", "10.1.0.1"
OUTER = "198.51.100.1", "198.51.100.2"
#: UDP ports: what gw1 lets out, and gw2 in; what gw1 rejects; what only gw2 refuses. All others gw1 drops.
OPEN, REJECTED, FAR = 7000, 7002, 7004
COUNT = 12  # datagrams, each a flow of its own: with two workers some are of either
RULES = (
    f"""ct state established,related counter accept
    icmp type echo-request counter accept
    iifname "l1" oifname "w1" udp dport {{ {OPEN}, {FAR}, 33434 }} counter accept
    iifname "l1" udp dport {REJECTED} counter reject
    iifname "l1" tcp dport 1024-65535 accept""",
    f"""ct state established,related counter accept
    icmp type echo-request counter accept
    iifname "w2" oifname "l2" ip saddr 10.1.0.0/16 udp dport {{ {OPEN}, 33434 }} counter accept
    iifname "w2" tcp dport 1024-65535 accept""",
)
#: The loop is the same for one worker: with two, flows and SAs are each other's, and packets are handed off.
WORKERS = ([1] if os.environ.get("LIBFP_FULL") else []) + [min(2, len(os.sched_getaffinity(0)))]


class Site:
    def __init__(self, lab: Lab, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.a, self.gw1, self.wire, self.gw2, self.b = five_hosts(lab, (workers, workers))
        for number, (host, end, gateway) in enumerate(((self.a, "a0", self.gw1), (self.b, "b0", self.gw2))):
            for net in ((1,), (2, 3))[number]:
                host.address(end, f"10.{net}.0.2/24")
                gateway.address(f"l{number + 1}", f"10.{net}.0.1/24")
            gateway.address(f"w{number + 1}", f"{OUTER[number]}/24")
            host.route("default", via=f"10.{number + 1}.0.1")
            for net in ((2, 3), (1,))[number]:
                gateway.route(f"10.{net}.0.0/16", via=OUTER[1 - number])
            gateway.sysctl("net.ipv4.ip_forward", 1)
            gateway.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 1)
            chain = f"type filter hook forward priority 0; policy drop;\n    {RULES[number]}\n"
            rules = f"table inet filter {{\n  chain forward {{\n    {chain}  }}\n}}\n"
            (folder / f"gw{number + 1}.nft").write_text(rules)
            assert gateway.run(["nft", "-f", str(folder / f"gw{number + 1}.nft")]).returncode == 0
            self._write(number)
        self.programs: list[Instance] = []

    def _write(self, number: int) -> None:
        text = f'default = "bypass"\nstate = "{self.folder}/gw{number + 1}.json"\n'
        for spi, direction in ((0x1001, ("out", "in")[number]), (0x2001, ("in", "out")[number])):
            text += f'[[sa]]\ntunnel = "t"\ndirection = "{direction}"\nspi = {spi}\ncipher = "aes-128-gcm"\n'
            text += f'local = "{OUTER[number]}"\nremote = "{OUTER[1 - number]}"\nkey = "{spi:040x}"\n'
        text += '[[policy]]\naction = "protect"\ntunnel = "t"\n'
        text += f'source = "10.{number + 1}.0.0/16"\ndestination = "10.{2 - number}.0.0/16"\n'
        (self.folder / f"gw{number + 1}.toml").touch(mode=0o600)
        (self.folder / f"gw{number + 1}.toml").write_text(text)

    def start(self, number: int, undo: contextlib.ExitStack) -> Instance:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: self.workers]))
        options = ("--cores", cores, "--kick", "inline", "--config", str(self.folder / f"gw{number + 1}.toml"))
        ports, host = (f"l{number + 1}", f"w{number + 1}"), (self.gw1, self.gw2)[number]
        return Instance(host, undo, str(PROGRAM), *ports, *options, "--json")

    def sas(self, number: int) -> dict[int, int]:
        """Packets by SPI."""
        found = fp("ipsec", "sas", self.programs[number].name, "--json")["sas"]
        return {sa["spi"]: sa["counters"]["packets"] for sa in found}

    def hits(self, number: int) -> dict[str, int]:
        """Packets by rule."""
        return {
            one["rule"]: one["packets"]
            for one in fp("firewall", "rules", self.programs[number].name, "--json")["rules"]
        }

    def send(self, port: int, to: str = B, source: str = "a") -> None:
        """A datagram each of `COUNT` flows."""
        host = {"a": self.a, "b": self.b}[source]
        for _ in range(COUNT):
            with host.socket() as sock:
                sock.sendto(b"x" * 100, (to, port))

    def counted(self, number: int, reason: str) -> Callable[[], bool]:
        """Whether there are `COUNT` more of them than now."""
        program = self.programs[number]
        before = program.counters[reason]
        return lambda: program.counters[reason] == before + COUNT

    def clear(self) -> list[bytes]:
        """What was on the wire in clear."""
        return [frame for frame in self.wire.frames(self.wire.others) if not harmless(frame)]


def fp(*arguments: str) -> dict[str, Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(arguments)) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


@pytest.fixture(scope="module", params=WORKERS, ids=lambda count: f"workers{count}")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Lab() as lab, contextlib.ExitStack() as undo:
        site = Site(lab, tmp_path_factory.mktemp("gateway"), request.param)
        assert site.a.ping(B).received == 3
        assert any(not is_esp(frame) for frame in site.clear()), "Linux forwards in clear"
        for number in (0, 1):
            site.programs.append(site.start(number, undo))
        wait_until(lambda: site.a.ping(B, count=1, timeout=0.5).received, 20, "an answer through the tunnel")
        wait_until(lambda: site.a.ping(CLEAR, count=1, timeout=0.5).received, 20, "an answer in clear")
        site.clear()
        yield site


@contextlib.contextmanager
def listening(host: Host, address: str, port: int) -> Iterator[Callable[[], int]]:
    """How many datagrams have come."""
    with host.socket() as sock:
        sock.bind((address, port))
        sock.setblocking(False)
        found = 0

        def count() -> int:
            nonlocal found
            with contextlib.suppress(BlockingIOError):
                while sock.recv(2000):
                    found += 1
            return found

        yield count


def test_what_the_rules_allow_goes_through_the_tunnel(site: Site) -> None:
    before = [site.hits(number) for number in (0, 1)]
    with listening(site.b, B, OPEN) as come:
        site.send(OPEN)
        wait_until(lambda: come() == COUNT, 10)
    for number, hits in enumerate(before):
        changed = {rule: now - hits[rule] for rule, now in site.hits(number).items() if now != hits[rule]}
        assert list(changed.values()) == [COUNT], changed  # each packet once
        assert str(OPEN) in next(iter(changed))
    assert site.a.ping(B, count=5, interval=0.01).received == 5
    assert tcp_transfer(site.a, site.b, B, 4 << 20).intact, "answers are of an established flow, at both gateways"
    assert site.clear() == []
    if site.workers > 1:
        assert all(worker["handed_off"] for program in site.programs for worker in program.counters.workers)


def test_what_the_rules_refuse_is_not_encrypted(site: Site) -> None:
    before, filtered, rejected = site.sas(0), site.counted(0, "filtered"), site.counted(0, "reject")
    site.send(7001)
    wait_until(filtered, 10)
    site.send(REJECTED)  # which Linux would have to do
    wait_until(rejected, 10)
    assert site.sas(0) == before
    assert site.clear() == []
    before, filtered = site.sas(1), site.counted(1, "filtered")
    site.send(OPEN, to=A, source="b")  # only answers come out of there
    wait_until(filtered, 10)
    assert site.sas(1) == before


def test_what_the_rules_refuse_after_decryption(site: Site) -> None:
    before, filtered = site.sas(1)[0x1001], site.counted(1, "filtered")
    with listening(site.b, B, FAR) as come:
        site.send(FAR)
        wait_until(filtered, 10)
        assert site.sas(1)[0x1001] == before + COUNT
        assert come() == 0


def test_cleartext_is_routed_and_filtered(site: Site) -> None:
    before, punted = [site.sas(number) for number in (0, 1)], site.counted(0, "flow-unknown")
    with listening(site.b, CLEAR, OPEN) as come:
        site.send(OPEN, to=CLEAR)
        wait_until(lambda: come() == COUNT, 10)
    assert len(site.clear()) >= COUNT
    site.send(7001, to=CLEAR)
    wait_until(punted, 10)  # Linux might know it as an answer, and drops it
    assert not site.clear()
    with listening(site.b, CLEAR, FAR) as come:
        punted = site.counted(1, "flow-unknown")
        site.send(FAR, to=CLEAR)
        wait_until(punted, 10)
        assert site.a.ping(CLEAR).received == 3
        assert come() == 0
    site.clear()
    with site.a.socket() as sock:
        sock.settimeout(10)
        sock.connect((CLEAR, REJECTED))
        sock.send(b"x")
        with pytest.raises(ConnectionRefusedError):  # Linux rejects it
            sock.recv(1)
    assert site.clear() == []
    assert [site.sas(number) for number in (0, 1)] == before


def test_what_should_have_come_through_the_tunnel(site: Site) -> None:
    """The rules would let it in."""
    refused = site.counted(1, "policy-clear")
    for port in range(COUNT):
        ends = {"src": A, "dst": B, "eth_dst": site.gw2.mac("w2"), "eth_src": site.gw1.mac("w1")}
        site.wire.send(udp(b"x", sport=40000 + port, dport=OPEN, **ends), "x2")
    wait_until(refused, 10)


def test_icmp_errors_come_back(site: Site) -> None:
    """Those of the gateways themselves, which no rule need allow, and that of the host behind them."""
    assert udp_probe(site.a, B, ttl=1) == IcmpError(11, 0, GW1)
    second = udp_probe(site.a, B, ttl=2)
    assert second is not None
    assert (second.kind, second.sender) == (11, "10.2.0.1")
    assert udp_probe(site.a, B, ttl=3) == IcmpError(3, 3, B)
    big = udp_probe(site.a, B, size=1472, dont_fragment=True)
    assert big is not None
    assert (big.kind, big.code, big.sender, big.mtu) == (3, 4, GW1, 1446)


def test_rules_change_while_it_runs(site: Site) -> None:
    rule = "udp", "dport", str(FAR), "accept"
    assert site.gw2.run(["nft", "add", "rule", "inet", "filter", "forward", *rule]).returncode == 0
    wait_until(lambda: " ".join(rule) in site.hits(1), 10)
    with listening(site.b, B, FAR) as come:
        site.send(FAR)
        wait_until(lambda: come() == COUNT, 10)
    site.programs[1].process.send_signal(signal.SIGHUP)
    wait_until(lambda: "rules read again" in site.programs[1].said, 10)


def test_after_its_end_linux_has_the_policies_and_the_rules(site: Site) -> None:
    """The last test."""
    site.programs[0].kill()
    site.clear()
    for port in (OPEN, 7001):
        site.send(port)
        site.send(port, to=CLEAR)
    assert site.a.ping(CLEAR).received == 3
    assert site.a.ping(B, count=2, timeout=0.2).received == 0
    clear = site.clear()
    assert not any(socket.inet_aton(B) == frame[30:34] for frame in clear)
    ports = [int.from_bytes(frame[36:38], "big") for frame in clear if frame[23] == socket.IPPROTO_UDP]
    assert ports == [OPEN] * COUNT
