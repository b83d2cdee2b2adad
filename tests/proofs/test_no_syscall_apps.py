"""The loops of `fp firewall` and `fp ipsec` make no system call: sealed, each stands a flood of all that it may meet.

libcrypto is called from the second one, and must make none either. The contrast is a call that is put into the sealed
thread by a tracer: the thread dies of it, and the test sees that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from libfp.demo.network import CLIENT, SERVER, Network, check_af_xdp
from libfp.errors import Unsupported
from libfp.linux import xfrm
from libfp.testing import icmp_echo, ipv4, tcp, udp
from libfp.testing.instance import Instance
from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import Wire
from libfp.testing.syscalls import force_syscall

pytestmark = pytest.mark.timeout(300)

SECONDS = 10.0 if os.environ.get("LIBFP_FULL") else 3.0  # of flood; the router stands 10 always
GETPID = 39
LOCAL, INSIDE = "10.0.2.1", "10.9.0.1"  # our end of the tunnel to SERVER, and a host behind that
KEYS = {0x1001: bytes(range(20)), 0x2001: bytes(range(100, 120))}  # out, in
RULES = """table inet filter { chain forward { type filter hook forward priority 0; policy drop;
  ct state established,related accept
  iifname "r0" udp dport 9 reject
  iifname "r0" meta l4proto { tcp, udp, icmp } accept
}; }
"""
SAS = f"""default = "bypass"
state = "%s/state.json"
[[sa]]
tunnel = "t"\ndirection = "out"\nspi = {0x1001}\ncipher = "aes-128-gcm"
local = "{LOCAL}"\nremote = "{SERVER}"\nkey = "{KEYS[0x1001].hex()}"
[[sa]]
tunnel = "t"\ndirection = "in"\nspi = {0x2001}\ncipher = "aes-128-gcm"
local = "{LOCAL}"\nremote = "{SERVER}"\nkey = "{KEYS[0x2001].hex()}"
[[policy]]
action = "protect"\ntunnel = "t"\nsource = "10.0.1.0/24"\ndestination = "10.9.0.0/16"
"""


class Site:
    """A network with an application in its middle, stopped but while it is looked at: there are two cores."""

    def __init__(self, lab: Lab) -> None:
        self.net = Network(lab)
        self.net.place()
        self.wires = Wire(self.net.client, "c0"), Wire(self.net.server, "s0")
        macs = [self.net.router.mac(name) for name in ("r0", "r1")]
        self.ends = [{"eth_src": wire.mac, "eth_dst": mac} for wire, mac in zip(self.wires, macs, strict=True)]

    def start(self, undo: contextlib.ExitStack, application: str, core: int, *more: str) -> None:
        options = ("--json", "--cores", str(core), "--kick", "helper", "--idle", "spin", "--sealed", *more)
        arguments = ("-m", "libfp", application, "r0", "r1", *options)
        self.app = Instance(self.net.router, undo, *arguments, prefer="worker")
        self.app.process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[Instance]:
        self.app.process.send_signal(signal.SIGCONT)
        try:
            yield self.app
        finally:
            self.app.process.send_signal(signal.SIGSTOP)

    def send(self, *frames: Sequence[bytes]) -> None:
        """Both ends send what is theirs over and over, as fast as they can."""
        over = time.monotonic() + SECONDS

        def send(wire: Wire, some: Sequence[bytes]) -> None:
            while True:
                for frame in some:
                    with contextlib.suppress(OSError):  # ENOBUFS
                        wire.send(frame)
                    if time.monotonic() > over:
                        return

        with ThreadPoolExecutor() as pool:
            list(pool.map(send, self.wires, frames))

    def prove(self, *frames: Sequence[bytes]) -> dict[str, int]:
        """What the application has counted under the flood, by reason."""
        with self.running() as app:
            assert app.is_sealed()
            before = app.counters
            self.send(*frames)
            beat = app.worker["heartbeat"]
            wait_until(lambda: app.worker["heartbeat"] > beat, 20, "the worker's loop to turn")
            assert app.is_sealed()
            assert app.worker["syscalls"] == 0
            after = app.counters
        assert after.forwarded - before.forwarded > 10_000
        return {reason: after[reason] - before[reason] for reason in after}


@pytest.fixture(scope="module")
def sites(core: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    try:
        check_af_xdp()
    except Unsupported as error:
        pytest.skip(str(error))
    folder: Path = tmp_path_factory.mktemp("apps")
    (folder / "rules.nft").write_text(RULES)
    (folder / "ipsec.toml").touch(mode=0o600)
    (folder / "ipsec.toml").write_text(SAS % folder)
    with contextlib.ExitStack() as undo:
        firewall, ipsec = (Site(undo.enter_context(Lab())) for _ in range(2))
        try:
            ipsec.net.router.call(xfrm.policies)
        except OSError as error:
            pytest.skip(f"this kernel has no XFRM: {error}")
        firewall.net.router.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 1)
        firewall.net.router.run(["nft", "-f", str(folder / "rules.nft")], check=True)
        ipsec.net.router.route("10.9.0.0/16", via=SERVER)
        for site in (firewall, ipsec):
            site.net.router.neighbour("r0", CLIENT, site.wires[0].mac)
            site.net.router.neighbour("r1", SERVER, site.wires[1].mac)
        with ThreadPoolExecutor() as pool:  # compiled side by side
            more = "--config", str(folder / "ipsec.toml")
            started = [pool.submit(firewall.start, undo, "firewall", core)]
            started.append(pool.submit(ipsec.start, undo, "ipsec", core, *more))
            for one in started:
                one.result()
        yield {"firewall": firewall, "ipsec": ipsec}


def test_the_firewall_s_loop(sites: dict[str, Site]) -> None:
    """Connections come, talk and end; there are errors about them, packets without one, refused and rejected ones."""
    site, dice = sites["firewall"], random.Random(5)
    there, back, out, home = [], [], *site.ends
    for number in range(4000):
        source, port = f"172.16.{number >> 8}.{number & 255}", 1024 + dice.randrange(60000)
        ends, other = {"src": CLIENT, "dst": SERVER, **out}, {"src": SERVER, "dst": CLIENT, **home}
        there += [
            tcp(flags="S", src=source, dst=SERVER, sport=port, **out),
            tcp(flags="S", sport=port, dport=80, **ends),
            tcp(flags=dice.choice(["A", "FA", "RA", "PA"]), sport=port, dport=80, **ends),
            udp(bytes(dice.randrange(200)), sport=port, dport=dice.choice([53, 9]), **ends),
            icmp_echo(identifier=number, **ends),
        ]
        back += [
            tcp(flags="SA", sport=80, dport=port, **other),
            udp(sport=53, dport=port, **other),
            tcp(flags="S", sport=port, dport=port, **other),
            ipv4(b"\3\3" + bytes(6) + there[-2][14:42], protocol=1, **other),
        ]
    counted = site.prove(there, back)
    assert counted["filtered"] > 100, "what the server begins"
    assert counted["reject"] > 0


def sealed(sequence: int, inner: bytes, ends: dict[str, str]) -> bytes:
    """An ESP frame by the peer, whose sequence number has 64 bits."""
    key, head, iv = KEYS[0x2001], struct.pack("!II", 0x2001, sequence), struct.pack("!Q", sequence)
    pad = -(len(inner) + 2) % 4
    secret = inner + bytes(range(1, pad + 1)) + bytes([pad, 4])
    box = AESGCM(key[:16]).encrypt(key[16:] + iv, secret, head[:4] + bytes(4) + head[4:])
    return ipv4(head + iv + box, src=SERVER, dst=LOCAL, protocol=50, **ends)


def test_the_gateway_s_loop(sites: dict[str, Site]) -> None:
    """Both ways through libcrypto; ICMP errors of its own; forged and replayed packets."""
    site = sites["ipsec"]
    out, home = site.ends
    there = [udp(bytes(size), src=CLIENT, dst=INSIDE, **out) for size in (0, 1, 64, 500, 1400)]
    there += [udp(bytes(1472), src=CLIENT, dst=INSIDE, **out), udp(ttl=1, src=CLIENT, dst=INSIDE, **out)]
    there += [udp(bytes(size), src=CLIENT, dst=SERVER, **out) for size in (0, 1000)]
    back = [sealed(number, udp(src=INSIDE, dst=CLIENT)[14:], home) for number in range(1, 8001)]
    back += [sealed(100_000 + number, bytes(20), home) for number in range(100)]
    forged = [frame[:38] + b"\1" + frame[39:] for frame in back[:500]]  # sequence numbers far ahead
    counted = site.prove(there, back + forged)
    assert counted["esp-replayed"] > 100
    assert counted["esp-bad-icv"] > 100


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets registers of x86-64")
@pytest.mark.parametrize("name", ["firewall", "ipsec"])
def test_a_system_call_would_have_been_seen(sites: dict[str, Site], name: str) -> None:
    """The last tests: nothing is left of the worker."""
    with sites[name].running() as app:
        assert app.is_sealed()
        force_syscall(app.pid, app.worker["thread"], GETPID)
        wait_until(lambda: app.thread_status("Seccomp") == "", 20, "the worker to be killed")
        beat = app.worker["heartbeat"]
        assert app.process.poll() is None  # the thread died, not the process
        assert app.worker["heartbeat"] == beat
