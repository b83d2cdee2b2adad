"""What `fp router` refuses: exit status 2, one line that names the thing and the remedy, and nothing left behind."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libfp import Error, Linux, Pipeline
from libfp.engine.stats import instances
from libfp.pyxdp import bpf, emit
from libfp.pyxdp.device import look
from libfp.stages import forward, parse
from libfp.testing.netns import Lab, wait_until
from libfp.testing.probe import IcmpError, udp_probe
from libfp.testing.router import Crossroads, RouterProcess, footprint

pytestmark = pytest.mark.timeout(120)

CLIENT, SERVER, OTHER = Crossroads.CLIENT, Crossroads.SERVER, Crossroads.OTHER

# Start libfp without some capabilities (by number): for root, who starts a program, the bounding set is what counts.
WITHOUT = """
import ctypes, os, sys
for number in sys.argv[1].split(","):
    if ctypes.CDLL(None).prctl(24, int(number), 0, 0, 0):  # PR_CAPBSET_DROP
        raise SystemExit("prctl")
os.execv(sys.executable, [sys.executable, "-m", "libfp", *sys.argv[2:]])
"""
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21, "CAP_BPF": 39}

# Start libfp on a kernel that has no AF_XDP, as far as it can tell: socket(44, ...) fails with EAFNOSUPPORT.
NO_AF_XDP = """
import ctypes, os, struct, sys
socket_number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
code = b"".join(struct.pack("=HBBI", *i) for i in [
    (0x20, 0, 0, 0), (0x15, 0, 3, socket_number),   # the system call's number
    (0x20, 0, 0, 16), (0x15, 0, 1, 44),             # its first argument
    (0x06, 0, 0, 0x00050000 | 97), (0x06, 0, 0, 0x7FFF0000),
])
buffer = ctypes.create_string_buffer(code, len(code))
program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
if ctypes.CDLL(None).prctl(22, 2, ctypes.c_char_p(program), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    raise SystemExit("prctl")
os.execv(sys.executable, [sys.executable, "-m", "libfp", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Crossroads]:
    with Lab() as lab:
        yield Crossroads(lab)


@pytest.fixture(scope="module")
def wide(workers: int) -> Iterator[Crossroads]:
    """For the tests in which a router runs; the others are over before there is a worker, whatever their number."""
    with Lab() as lab:
        yield Crossroads(lab, workers)


def refused(net: Crossroads, *arguments: str, **kwargs: Any) -> str:
    """Run ``fp router ARGUMENTS``, which must not start, and return its error."""
    before = footprint(net.router)
    with RouterProcess(net.router, *arguments, wait=False, **kwargs) as process:
        status = process.wait(60)
        said = process.said()
        assert not process.ready
    assert status == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if not line.startswith("fp router: ")]
    assert footprint(net.router) == before
    assert process.process.pid not in {pid for pid, _ in instances().values()}
    return errors[-1]


def test_no_such_interface(net: Crossroads) -> None:
    error = refused(net, "r0", "nope0")
    assert error == "fp: no interface 'nope0' in this network namespace; list them: ip link"


def test_interface_down(net: Crossroads) -> None:
    net.router.down("r1")
    try:
        assert refused(net, "r0", "r1") == "fp: r1 is down; ip link set r1 up"
    finally:
        net.router.up("r1")


def test_mtu_larger_than_a_frame(net: Crossroads) -> None:
    for host, name in ((net.server, "s0"), (net.router, "r1")):
        host.set_mtu(name, 9000)
    try:
        error = refused(net, "r0", "r1")
        assert error.startswith("fp: r1 has an MTU of 9000, and a frame of 4096 bytes carries 3826;")
        assert error.endswith("ip link set r1 mtu 3826")
    finally:
        for host, name in ((net.server, "s0"), (net.router, "r1")):
            host.set_mtu(name, 1500)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("bridge", "fp: up0 is a bridge device, which receives through others; use r2"),
        ("macvlan", "fp: up0 is a macvlan device, which receives through others; use r2"),
        ("tuntap", "fp: up0 is a tun device: its packets never leave this host through a driver; use a real port"),
        ("lo", "fp: lo is the loopback device; use a device that leads out of this host"),
    ],
)
def test_unsuitable_device(net: Crossroads, kind: str, error: str) -> None:
    if kind == "lo":
        assert refused(net, "r0", "lo") == error
        return
    lower = {"link": net.router.index("r2")} if kind == "macvlan" else {}
    extra = {"mode": "tap"} if kind == "tuntap" else {}
    net.router.netlink("link", "add", ifname="up0", kind=kind, **lower, **extra)
    try:
        if kind == "bridge":
            net.router.netlink("link", "set", index=net.router.index("r2"), master=net.router.index("up0"))
        net.router.up("up0")
        assert refused(net, "r0", "up0") == error
    finally:
        net.router.netlink("link", "del", index=net.router.index("up0"))


def test_foreign_xdp_program(net: Crossroads) -> None:
    text = 'define i32 @alien(ptr %c) section "program" {\n  ret i32 2\n}'
    with (
        net.router.enter(),
        bpf.Program(emit.compile_bpf(text), "alien") as alien,
        bpf.Link(alien, look("r1").index),
    ):
        number = alien.id
        error = refused(net, "r0", "r1")
    assert error == (
        f"fp: r1 already has the XDP program alien (id {number} held by process {os.getpid()}); "
        "end its owner, or detach it: ip link set dev r1 xdp off"
    )


def test_second_instance(wide: Crossroads) -> None:
    with RouterProcess(wide.router, "r0", "r1", *wide.options) as first:
        pid = first.process.pid
        error = refused(wide, "r1", "r2")
        assert re.fullmatch(
            rf"fp: another libfp already runs on r1 \(XDP program libfp_steer, id \d+ held by process {pid}\); "
            rf"stop it first: kill {pid}",
            error,
        )
        error = refused(wide, "r2", "--name", first.ready["name"])
        assert (
            error == f"fp: an instance named '{first.ready['name']}' is running (process {pid}); choose another --name"
        )
        assert wide.client.ping(SERVER).received == 3
        assert first.counters().received >= 6, "the first one has not noticed"


@pytest.mark.parametrize("missing", [["CAP_NET_ADMIN"], ["CAP_NET_RAW"], ["CAP_BPF", "CAP_SYS_ADMIN"]])
def test_missing_capability(net: Crossroads, missing: list[str]) -> None:
    numbers = ",".join(str(CAPABILITIES[name]) for name in missing)
    error = refused(net, "r0", "r1", command=(sys.executable, "-c", WITHOUT, numbers))
    assert re.fullmatch(rf"fp: .* needs {missing[0]}; run as root, or with .*{missing[0]}.*", error)


def test_kernel_without_af_xdp(net: Crossroads) -> None:
    error = refused(net, "r0", "r1", command=(sys.executable, "-c", NO_AF_XDP))
    assert "AF_XDP" in error
    assert "CONFIG_XDP_SOCKETS" in error


@pytest.mark.parametrize("how", ["writable", "replaceable"])
def test_cache_that_others_can_write(net: Crossroads, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "open" / "cache"
    folder.mkdir(parents=True)
    (folder if how == "writable" else folder.parent).chmod(0o777)
    error = refused(net, "r0", "r1", environment={"LIBFP_CACHE_DIR": str(folder)})
    assert str(folder) in error
    assert "LIBFP_CACHE_DIR" in error


def test_too_few_queues(net: Crossroads) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    error = refused(net, "r0", "r1", "--cores", cores)
    assert error.startswith("fp: r0 has 1 queues, too few for 2 workers; use at most 1 cores")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no interface named"),
        (["r0", "r0"], "named twice in r0 r0"),
        (["r0", "--cores", "one"], "--cores 'one' does not parse at 'one'"),
        (["r0", "--cores", "4095"], "no core 4095"),
        (["r0", "--only", "10.0.0.0/33"], "10.0.0.0/33"),
        (["r0", "--only", "somewhere"], "somewhere"),
        (["r0", "--kick", "hard"], "'hard' is not one of"),
        (["r0", "--mode", "fast"], "'fast' is not one of"),
        (["r0", "--capacity", "0"], "--capacity"),
        (["r0", "--speed", "11"], "--speed"),
    ],
)
def test_wrong_arguments(net: Crossroads, arguments: list[str], words: str) -> None:
    assert words in refused(net, *arguments)


def test_full_table(wide: Crossroads) -> None:
    """At start it is an error; later Linux forwards everything by itself, until there is room again."""
    for number in range(30):
        wide.router.route(f"198.18.{number}.0/24", via=SERVER)
    error = refused(wide, *wide.PORTS, "--capacity", "20")
    assert error.startswith("fp: a table of 20 routes is full; ")
    with RouterProcess(wide.router, *wide.PORTS, *wide.options, "--capacity", "64") as process:
        assert wide.client.ping(SERVER).received == 3

        def fast() -> bool:
            before = process.counters().forwarded
            assert wide.client.ping(SERVER, count=10, interval=0.001).received == 10
            return process.counters().forwarded - before >= 20

        wait_until(fast)
        for number in range(30, 80):
            wide.router.route(f"198.18.{number}.0/24", type="unreachable" if number % 2 else "blackhole")
        process.wait_said("Linux forwards alone: a table of 64 routes is full")
        wait_until(lambda: not fast())
        assert udp_probe(wide.client, "198.18.79.1") == IcmpError(3, 1, "10.0.1.1"), "as Linux has it"
        for number in range(30, 80):
            wide.router.unroute(f"198.18.{number}.0/24", type="unreachable" if number % 2 else "blackhole")
        process.wait_said("forwarding again")
        wait_until(fast)


def test_the_library_leaves_nothing_open(net: Crossroads) -> None:
    """The same from inside: no thread, no descriptor, whatever the step that fails."""

    def fail(*names: str, **kwargs: Any) -> None:
        with net.router.enter(), pytest.raises(Error), Linux(*names, **kwargs) as linux:
            Pipeline(parse, forward(linux)).start(linux.ports, [4095])

    def held() -> tuple[int, set[str]]:
        return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}

    failing: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("r0", "nope0"), {}),
        (("r0", "r1"), {"frame_size": 1024}),
        (("r0", "r1"), {"capacity": 5}),
        (("r0", "r1"), {}),
    ]
    for names, kwargs in failing:  # what is loaded and compiled once stays
        fail(*names, **kwargs)
    before = held()
    for names, kwargs in failing:
        fail(*names, **kwargs)
        assert held() == before, kwargs
