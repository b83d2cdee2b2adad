"""What `fp router` hands to Linux arrives as if it had come by the port itself, whatever rules Linux has about that.

In native mode, and in skb mode where re-injected frames pass the steering program a second time.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator

import pytest

from libfp.testing import udp
from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import IcmpError, Wire, udp_probe
from libfp.testing.router import Crossroads, RouterProcess
from libfp.testing.traffic import tcp_transfer

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs the program nft"),
]

CLIENT, SERVER, OTHER = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.OTHER
RECORD_ROUTE = bytes([7, 7, 4, 0, 0, 0, 0])  # an IP option: only Linux forwards such packets
TABLE = 100

# Every packet that comes in by r0, and every packet that comes in by no port at all.
NFT = """
table ip seen {
  counter by_r0 {}
  counter by_others {}
  chain prerouting {
    type filter hook prerouting priority 0;
    iifname "r0" counter name by_r0
    iifname != { "r0", "r1", "r2", "lo" } counter name by_others
  }
}
"""


class Net(Crossroads):
    """What comes in by r0 is routed by a table of its own, to the other host whatever its destination."""

    def __init__(self, lab: Lab, workers: int) -> None:
        super().__init__(lab, workers)
        self.router.route("default", via=OTHER, table=TABLE)
        self.router.netlink("rule", "add", iifname="r0", table=TABLE, priority=100)
        self.router.run(["nft", NFT], check=True)

    def seen(self) -> dict[str, int]:
        """How many packets netfilter has seen come in by r0, and by devices that are no port."""
        done = self.router.run(["nft", "-j", "list", "counters"], check=True)
        counters = [entry["counter"] for entry in json.loads(done.stdout)["nftables"] if "counter" in entry]
        return {counter["name"]: counter["packets"] for counter in counters}


@pytest.fixture(scope="module")
def net(workers: int) -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab, workers)


@pytest.fixture(scope="module")
def refusal(net: Net) -> str:
    """What it says without --bypass, before another one runs there."""
    with RouterProcess(net.router, *net.PORTS, *net.options, wait=False) as process:
        assert process.wait(60) == 2
        return process.said().strip().splitlines()[-1]


def test_without_bypass_such_a_host_is_refused(refusal: str) -> None:
    for word in ("policy rule 100", "iif r0", "nftables chain ip seen prerouting", "--bypass"):
        assert word in refusal


@pytest.fixture(scope="module", params=["native", "skb"])
def router(net: Net, refusal: str, request: pytest.FixtureRequest) -> Iterator[RouterProcess]:
    with RouterProcess(net.router, *net.PORTS, *net.options, "--bypass", "--mode", request.param) as process:
        attached = net.router.netlink("get_links", net.router.index("r0"))[0].get_nested(
            "IFLA_XDP", "IFLA_XDP_ATTACHED"
        )
        assert attached == {"native": "xdp", "skb": "xdpgeneric"}[request.param]
        for address in (SERVER, OTHER):
            wait_until(lambda: net.router.ping(address, count=1).received)  # noqa: B023
        yield process


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_linux_sees_the_true_port(net: Net, router: RouterProcess, rp_filter: int) -> None:
    """TTL 1 and IP options: answered, routed and counted by r0's rules, and each punted once."""
    net.router.sysctl("net.ipv4.conf.all.rp_filter", rp_filter)
    net.router.sysctl("net.ipv4.conf.r0.rp_filter", rp_filter)
    wait_until(lambda: net.server.ping(OTHER, count=1).received)
    before, seen = router.counters(), net.seen()
    for _ in range(10):
        assert udp_probe(net.client, SERVER, ttl=1) == IcmpError(11, 0, "10.0.1.1")
    with Wire(net.client, "c0") as client, Wire(net.other, "o0") as other, Wire(net.server, "s0") as server:
        to_router = {"eth_dst": net.router.mac("r0"), "eth_src": client.mac}
        for number in range(10):
            payload = b"with options %d" % number
            client.send(udp(payload, options=RECORD_ROUTE, **to_router))  # type: ignore[arg-type]
            frame = other.receive(lambda frame: payload in frame)  # noqa: B023
            assert frame is not None, "the rule for r0 leads to the other host"
            assert frame[34:41] == bytes([7, 7, 8]) + socket.inet_aton("10.0.3.1"), "unchanged but for the option"
        assert server.receive(lambda frame: b"with options" in frame, timeout=0) is None
    wait_until(lambda: router.counters()["ip-options"] >= before["ip-options"] + 10)
    after, now = router.counters(), net.seen()
    assert after["ttl-expired"] == before["ttl-expired"] + 10
    assert after["ip-options"] == before["ip-options"] + 10
    assert after.ports["r0"]["rx_packets"] == before.ports["r0"]["rx_packets"] + 20, "none came back to us"
    assert now["by_r0"] == seen["by_r0"] + 20
    assert now["by_others"] == seen["by_others"] == 0


def test_bypass_forwards_past_the_rules(net: Net, router: RouterProcess) -> None:
    """That is what --bypass is for, and it says so: the rule would send this to the other host."""
    assert "bypassed: policy rule 100" in router.said()
    before = router.counters()
    assert net.client.ping(SERVER, count=10, interval=0.001).received == 10
    assert router.counters().forwarded == before.forwarded + 20
    assert tcp_transfer(net.server, net.client, CLIENT, 1_000_000).intact
