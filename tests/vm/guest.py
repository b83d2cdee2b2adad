"""What runs inside the guest, as its first process: the checks that `test_zero_copy` asks for.

Each check is a function that returns what it has seen; a line of JSON with that, or with what went wrong, goes to the
second serial line. No verdict is given here.

    client 10.0.1.2 c0 ======== r0 10.0.1.1 router r1 10.0.2.1 ======== s0 10.0.2.2 server      (=== virtio-net)
                                                   v0 10.0.3.1 -------- o0 10.0.3.2 other       (--- veth)
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYS_FINIT_MODULE = 313
RB_POWER_OFF = 0x4321FEDC
CACHE = "/root/.cache/libfp"
PATIENCE = 120.0  # seconds for a start, which compiles nothing
WIRES = {"c0": "02:00:00:00:10:01", "r0": "02:00:00:00:10:02", "r1": "02:00:00:00:20:01", "s0": "02:00:00:00:20:02"}
CLIENT, SERVER, OTHER = "10.0.1.2", "10.0.2.2", "10.0.3.2"
DATAGRAMS = 2000


def main() -> None:
    """The first process of the guest."""
    with open_results() as results:

        def report(name: str, **seen: Any) -> None:
            results.write(json.dumps({"name": name, "at": round(time.monotonic(), 1), **seen}) + "\n")
            results.flush()

        try:
            prepare()
            report("booted", kernel=os.uname().release)
            run(report)
        except BaseException:
            report("failed", error=traceback.format_exc())
    os.sync()
    ctypes.CDLL(None).reboot(RB_POWER_OFF)


def open_results() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
        if libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None):
            print(f"cannot mount {where}: {os.strerror(ctypes.get_errno())}", flush=True)
    import termios

    results = open("/dev/ttyS1", "w")  # noqa: SIM115 -- main closes it
    settings = termios.tcgetattr(results)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(results, termios.TCSANOW, settings)
    return results


def prepare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for path in sorted(Path("/modules").iterdir()):
        with path.open("rb") as file:
            if libc.syscall(SYS_FINIT_MODULE, file.fileno(), b"", 0):
                raise OSError(ctypes.get_errno(), f"cannot load {path.name}")
    os.environ.update(HOME="/root", PATH="/usr/bin:/bin", LANG="C.UTF-8", LIBFP_CACHE_DIR=CACHE)
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path[:2]), NUMBA_CPU_NAME="generic")
    os.makedirs(CACHE, mode=0o700)
    with tarfile.open("/code.tar") as tar:
        tar.extractall(CACHE)
    os.chmod(f"{CACHE}/__pycache__", 0o700)


def compiled() -> int:
    """Compiled functions in the cache."""
    return len(list(Path(CACHE).glob("__pycache__/*.nbc")))


def run(report: Callable[..., None]) -> None:
    from libfp.testing import router
    from libfp.testing.netns import Lab

    router.START_LIMIT = PATIENCE
    with Lab() as lab:
        net = Net(lab)
        report("connected")
        for check in (bind, forwards, vlan, killed, mixed, vrf):
            try:
                report(check.__name__, seen=check(net))
            except BaseException:
                report(check.__name__, error=traceback.format_exc())
        net.stop()
    report("done")


class Net:
    """The hosts, and the router's process while there is one."""

    def __init__(self, lab: Any) -> None:
        from pyroute2 import IPRoute

        self.lab = lab
        self.client, self.router, self.server, self.other = map(lab.host, ("client", "router", "server", "other"))
        self.process: Any = None
        with IPRoute() as here:
            links = {link.get_attr("IFLA_ADDRESS"): link["index"] for link in here.get_links()}
            for name, mac in WIRES.items():
                host = {"c": self.client, "r": self.router, "s": self.server}[name[0]]
                here.link("set", index=links[mac], ifname=name, net_ns_fd=host._fd)
                host.up(name)
        lab.link(self.router, "v0", self.other, "o0")
        for host, name, address in (
            (self.client, "c0", CLIENT),
            (self.router, "r0", "10.0.1.1"),
            (self.router, "r1", "10.0.2.1"),
            (self.server, "s0", SERVER),
            (self.router, "v0", "10.0.3.1"),
            (self.other, "o0", OTHER),
        ):
            host.address(name, f"{address}/24")
        for number, host in enumerate((self.client, self.server, self.other)):
            host.route("default", via=f"10.0.{number + 1}.1")
        self.router.sysctl("net.ipv4.ip_forward", 1)

    def start(self, *ports: str) -> Any:
        from libfp.testing.router import RouterProcess

        self.process = RouterProcess(self.router, *ports, "--kick", "inline")
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    def settle(self, address: str) -> None:
        """Until a request to `address` and its reply both went by the fast path: Linux resolves neighbours first."""
        from libfp.testing.netns import wait_until

        def both() -> bool:
            before = self.process.counters().forwarded
            replied = self.client.ping(address, count=1).received
            return bool(replied and self.process.counters().forwarded == before + 2)

        wait_until(both, 30, f"the fast path to reach {address}")


# -- the checks


def bind(net: Net) -> dict[str, Any]:
    """Two sockets of libfp.pyxdp: frames out of one, through the emulated wire, into Linux, and back into the other."""
    from libfp.pyxdp import Socket
    from libfp.pyxdp.mapped import SOL_XDP
    from libfp.pyxdp.socket import OPTIONS_ZEROCOPY, XDP_OPTIONS
    from libfp.testing.packets import udp
    from libfp.testing.probe import Wire

    def numbered(source: str, destination: str) -> list[bytes]:
        there = {"src": CLIENT, "dst": "10.0.1.1", "eth_src": WIRES[source], "eth_dst": WIRES[destination]}
        return [udp(dport=4789, payload=number.to_bytes(8, "big"), **there) for number in range(200)]

    frames, back = numbered("c0", "r0"), numbered("r0", "c0")
    seen: dict[str, Any] = {"sent": len(frames)}
    with net.router.enter():
        sock = Socket("r0", queue=0, steer="udp dport 4789", mode="zero-copy")
    with sock, Wire(net.client, "c0") as wire:
        options = sock._rings.socket.getsockopt(SOL_XDP, XDP_OPTIONS)
        seen |= {"mode": sock.mode, "option": bool(options & OPTIONS_ZEROCOPY)}
        wire.send(*frames)
        received = []
        while (frame := sock.recv(timeout=5.0)) is not None:
            received.append(frame)
            if len(received) == len(frames):
                break
        seen["in_order"] = received == frames
        seen["received"] = len(received)
        for frame in back:
            sock.send(frame)
        sock.flush()
        returned = []
        while (found := wire.receive(lambda frame: frame in back, timeout=5.0)) is not None:
            returned.append(found)
            if len(returned) == len(back):
                break
        seen["returned"] = len(returned)
        seen["statistics"] = vars(sock.statistics)
    with net.router.enter():
        sock = Socket("r0", queue=0)  # "auto"; and the queue is free again
    with sock:
        seen["auto"] = sock.mode, sock.reason
    return seen


def vrf(net: Net) -> dict[str, Any]:
    """`fp router` on a member of a VRF; the last check, because the kernel keeps a rule that came with the VRF."""
    router = net.router
    router.netlink("link", "add", ifname="red", kind="vrf", vrf_table=10)
    router.up("red")
    router.netlink("link", "set", index=router.index("r0"), master=router.index("red"))
    done = router.run([sys.executable, "-m", "libfp", "router", "r0", "r1"], timeout=PATIENCE)
    return {"status": done.returncode, "said": done.stderr}


def forwards(net: Net) -> dict[str, Any]:
    """`fp router` between two zero-copy ports; it goes on running for the next two checks."""
    from libfp.testing.netns import wait_until
    from libfp.testing.traffic import UdpStream, tcp_transfer

    before = compiled()
    began = time.monotonic()
    process = net.start("r0", "r1")
    seen = {"ready": process.ready, "start_seconds": time.monotonic() - began, "compiled": compiled() - before}
    net.settle(SERVER)
    forwarded = process.counters().forwarded
    seen["pings"] = net.client.ping(SERVER, count=5).received
    with UdpStream(net.client, net.server, SERVER, rate=500, count=DATAGRAMS) as stream:
        result = stream.wait(60.0)
    wait_until(lambda: process.counters().forwarded >= forwarded + 10 + result.received, what="the counters")
    seen |= {"offered": result.offered, "received": result.received, "reordered": result.reordered}
    seen["forwarded"] = process.counters().forwarded - forwarded
    transfer = tcp_transfer(net.client, net.server, SERVER, 1_000_000, timeout=60.0)
    seen |= {"tcp_intact": transfer.intact, "counters": process.counters().as_dict()}
    return seen


def vlan(net: Net) -> dict[str, Any]:
    """Tagged frames are Linux's while the fast path runs: what it answers, and what it forwards of them.

    To the server they leave untagged by r1; the answers come in there, and their way back is not by a port.
    """
    for host, device, address in ((net.client, "c0", "10.7.0.2"), (net.router, "r0", "10.7.0.1")):
        name = f"{device}.7"
        host.netlink("link", "add", ifname=name, kind="vlan", link=host.index(device), vlan_id=7)
        host.up(name)
        host.address(name, f"{address}/24")

    def received(port: str) -> int:
        return int(net.process.counters().as_dict()["ports"][port]["rx_packets"])

    before, punted = received("r0"), net.process.counters().punted
    seen = {"zero_copy": net.process.ready["zero_copy"], "to_router": net.client.ping("10.7.0.1", count=5).received}
    net.client.route(f"{SERVER}/32", via="10.7.0.1", dev="c0.7")
    try:
        seen["to_server"] = net.client.ping(SERVER, count=5).received
    finally:
        net.client.unroute(f"{SERVER}/32")
    seen |= {"taken": received("r0") - before, "punted": net.process.counters().punted - punted}
    return seen | {"counters": net.process.counters().as_dict()}


def killed(net: Net) -> dict[str, Any]:
    """SIGKILL under load; then what was left behind, whether Linux forwards, and whether zero-copy can be had again."""
    from libfp.pyxdp import Socket, look
    from libfp.testing.netns import wait_until
    from libfp.testing.traffic import UdpStream

    process = net.process
    with UdpStream(net.client, net.server, SERVER, rate=500) as stream:
        before = process.counters().forwarded
        wait_until(lambda: process.counters().forwarded > before + 200, 30, "the fast path to forward")
        running = {name: len(net.router.call(look, name).programs) for name in ("r0", "r1")}
        status = process.stop(signal.SIGKILL)
        received = stream.received
        wait_until(lambda: stream.received > received + 500, 30, "Linux to forward")
    seen = {"status": status, "running": running, "offered": stream.result.offered, "lost": stream.result.lost}
    net.stop()
    seen["left"] = {name: len(net.router.call(look, name).programs) for name in ("r0", "r1")}
    seen["interfaces"] = net.router.interfaces()
    seen["pings"] = net.client.ping(SERVER, count=5).received
    with net.router.enter():
        sock = Socket("r0", queue=0, mode="zero-copy", patience=5.0)
    with sock:
        seen["again"] = sock.mode
    return seen


def mixed(net: Net) -> dict[str, Any]:
    """A port that can do zero-copy beside one that cannot: both in copy mode, and one is told which."""
    process = net.start("r0", "v0")
    seen = {"ready": process.ready, "said": process.said()}
    net.settle(OTHER)
    forwarded = process.counters().forwarded
    seen["pings"] = net.client.ping(OTHER, count=5).received
    seen["forwarded"] = process.counters().forwarded - forwarded
    seen["status"] = process.stop()
    net.stop()
    return seen
