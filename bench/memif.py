"""The race: frames from libfp's generator through a device under test and back, over memif, without a kernel.

The generator sends by one memif and receives by another, both made by it (client): ring and buffer sizes, and the very
memory, are the same for every device. It has core 0; the device has core 1, and is stopped (SIGSTOP) while another one
is measured. What counts is what has come back; that it is intact is looked at beforehand (`libfp.gen.blaster`). Beside
each case the generator alone is measured, into a sink that looks at nothing: where it is not `FASTER` times as fast as
the faster side, it is the generator that was measured, and the case says so and claims nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from bench import l3fwd, rib
from bench.harness import Case
from bench.processes import add_pages, prefer, preferred
from libfp.errors import Error, Unsupported
from libfp.gen import IMIX, Traffic, search
from libfp.gen.blaster import Blaster
from libfp.gen.histogram import Histogram
from libfp.gen.report import Report
from libfp.ports.memif import MemifPort
from libfp.testing import testpmd
from libfp.testing.netns import marked

GENERATOR_CORE, DUT_CORE = 0, 1
RING, BUFFER = 1024, 2048  # packets, bytes
BURST, LATENCY_BURST = 256, 32  # of testpmd's, for the highest rate and the least latency: see `Theirs`
WARM_UP, MEASURE = 0.15, 0.5  # seconds: a round is one of each
FASTER = 1.3  # times as fast as the fastest device a generator has to be
FLOWS = 1 << 18  # destinations in the full table
TRIAL, RESOLUTION = 0.25, 0.04  # of the search for the highest rate without loss
PROBES = 20_000  # packets
PERCENTILES = (50, 99)
HUGE_PAGES = 128
INSTALL = "apt-get install -y dpdk"
_numbers = itertools.count()

# How a device of libfp's has its ports: those of every race; and, for one case, those that make the memory themselves.
SERVER = {"role": "server"}
COPYING = {"role": "client", "ring_size": RING, "buffer_size": BUFFER}
MOVING = {**COPYING, "share": "race"}

#: Case -> frames, what libfp does, what testpmd does (or that it is l3fwd, or libfp that copies), the claim.
CASES: dict[str, tuple[Any, str, str, float | None]] = {
    "64 macswap": (64, "macswap", "macswap", 1.2),
    "64 one route": (64, "one route", "macswap", 1.0),
    "64 full table": (64, "full table", "macswap", 0.8),
    "570 macswap": (570, "macswap", "macswap", 1.0),
    "1518 macswap": (1518, "macswap", "macswap", 1.0),
    "imix macswap": (IMIX, "macswap", "macswap", 1.0),
    "64 io": (64, "io", "io", None),
    "64 one route, l3fwd": (64, "one route", "l3fwd", None),
    "1518 macswap, moved": (1518, "macswap", "copying", None),
}


class Device(Protocol):
    """What is between the generator's ports."""

    @property
    def pid(self) -> int: ...

    def check(self) -> None: ...

    def forward(self) -> None: ...


class Ours:
    """A process of libfp's, on core `DUT_CORE`: `bench.device`."""

    def __init__(self, stack: ExitStack, kind: str, sockets: Sequence[str], port: dict[str, Any]) -> None:
        asked = {"kind": kind, "sockets": sockets, "port": port, "core": DUT_CORE, "around": GENERATOR_CORE}
        command = [sys.executable, "-c", "from bench.device import main; main()", json.dumps(asked)]
        pipe, here = subprocess.PIPE, Path(__file__).parent.parent
        first: Any = {"start_new_session": True, "preexec_fn": lambda: prefer(os.getpid())}
        self._process = subprocess.Popen(command, env=marked(), stdin=pipe, stdout=pipe, cwd=here, **first)
        self._kind = kind
        stack.callback(self._close)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise Error(f"libfp's {kind} does not start: status {self._process.wait()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        if (status := self._process.poll()) is not None:
            raise Error(f"libfp's {self._kind} has ended with status {status}")

    def forward(self) -> None:
        """It does."""

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()


def pages(stack: ExitStack) -> tuple[Sequence[str], bool]:
    """EAL's options for memory, and whether it is in huge pages."""
    added = add_pages(HUGE_PAGES)
    stack.callback(add_pages, -added)
    huge = added == HUGE_PAGES
    return (("--in-memory", "-m", "256") if huge else testpmd.SMALL_PAGES), huge


def servers(sockets: Sequence[str]) -> list[testpmd.Vdev]:
    """A peer's ports."""
    return [testpmd.Vdev(one, "server", ring_log2=RING.bit_length() - 1, buffer_size=BUFFER) for one in sockets]


class Theirs:
    """testpmd in a mode, as it is fastest: on 2 MiB pages if it can have them, in bursts of 256.

    Of 64-byte macswap it carries more so than in bursts of 32 (its default), 64 or 128, with mbcache=512, with 4,096
    buffers in its pool, or as the client, whose zero-copy offers huge pages that are not sealed, which we do not map
    (`libfp.ports.memif_memory`). Its latency is least in bursts of 32.
    """

    def __init__(self, stack: ExitStack, mode: str, sockets: Sequence[str], burst: int) -> None:
        memory, self.huge = pages(stack)
        vdevs, options = servers(sockets), [f"--burst={burst}"]
        self._testpmd = stack.enter_context(
            testpmd.Testpmd(vdevs, mode=mode, core=DUT_CORE, memory=memory, options=options)
        )

    @property
    def pid(self) -> int:
        return self._testpmd.process.pid

    def check(self) -> None:
        if (status := self._testpmd.process.poll()) is not None:
            raise Error(f"testpmd has ended with status {status}: {self._testpmd.said[-300:]}")

    def forward(self) -> None:
        self._testpmd.start()
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            prefer(int(thread))


@contextlib.contextmanager
def _before_nobody() -> Iterator[None]:
    """For a while: what is to start needs others, such as the kernel's for its terminal, which may not get a core from
    somebody who spins there and goes before all."""
    prefer(os.getpid(), 0)
    try:
        yield
    finally:
        prefer(os.getpid())


def _on_both_cores(make: Callable[[Sequence[str]], Device], sockets: Sequence[str]) -> Device:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {GENERATOR_CORE, DUT_CORE})
    try:
        return make(sockets)
    finally:
        os.sched_setaffinity(0, allowed)


class Side:
    """A device, and the generator on its wire; it runs while it is measured."""

    def __init__(
        self, stack: ExitStack, make: Callable[[Sequence[str]], Device], ports: int, role: Literal["server", "client"]
    ) -> None:
        name = f"@libfp-race-{os.getpid()}-{next(_numbers)}"
        sockets = [name + end for end in ("l", "r")[:ports]]
        left, *right = [
            MemifPort(f"gen{k}", socket=one, role=role, ring_size=RING, buffer_size=BUFFER)
            for k, one in enumerate(sockets)
        ]
        self._traffic = Traffic()
        with _before_nobody():
            self.device = _on_both_cores(make, sockets)
            self.generator = stack.enter_context(Blaster([left], self._traffic, to=right, core=GENERATOR_CORE))
            self.generator.wait_connected()
            self.device.forward()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.kill(self.device.pid, number)  # all its threads

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.device.check()
        self._signal(signal.SIGCONT)
        try:
            yield
            self.device.check()
        finally:
            self._signal(signal.SIGSTOP)

    def load(self, traffic: Traffic) -> None:
        """Send that from now on."""
        if traffic is not self._traffic:
            self.generator.load(traffic)
            self._traffic = traffic
            if len(self.generator.ports) > 1:
                self.verify()

    def verify(self) -> None:
        """Look at what comes back. Raises Error if it is not what was sent."""
        with self.running(), self._looking():
            self.generator.run(packets=PROBES // 10, pps=PROBES)  # the first ones may find no buffers
            report = self.generator.run(packets=PROBES, pps=10 * PROBES)
        if report.corrupted or report.foreign or report.duplicates or report.received < 0.9 * report.sent:
            what = f"{report.received} of {report.sent} packets came back, {report.corrupted} of them changed"
            raise Error(f"{what}, {report.duplicates} twice, and {report.foreign} that nobody sent")

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        self.generator.looking = True
        try:
            yield
        finally:
            self.generator.looking = False

    def rates(self) -> tuple[float, float]:
        """One round: packets a second sent, and come back."""
        with self.running():
            self.generator.start()
            time.sleep(WARM_UP)
            before, began = self.generator.report(), time.monotonic()
            time.sleep(MEASURE)
            after, seconds = self.generator.report(), time.monotonic() - began
            self.generator.stop()
        return (after.sent - before.sent) / seconds, (after.packets - before.packets) / seconds

    def _run(self, pps: float, seconds: float) -> Report:
        """As the generator's own `run`, which looks every millisecond how far it is: on its core that shows."""
        self.generator.start(pps=pps, seconds=seconds)
        time.sleep(seconds)
        return self.generator.finish(wait=0.2)

    def lossless(self) -> float:
        """The highest rate at which every packet comes back: packets a second."""

        def trial(pps: float) -> Report:
            report = self._run(pps, TRIAL)
            report.signed = False  # counted, not looked at
            return report

        with self.running():
            self._run(0, WARM_UP)
            found = search(trial, resolution=RESOLUTION)
        if found.best is None:
            raise Error("no rate without loss")
        return found.best.report.pps

    def latency(self, pps: float) -> Histogram:
        """One round at that rate: how long packets were on the way."""
        with self.running(), self._looking():
            self._run(pps, WARM_UP)
            report = self._run(pps, MEASURE)
        if report.received == 0:
            raise Error("no packet has come back")
        return report.latency


class Race:
    """The sides, each made when it is first wanted."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._sides = stack, dict[tuple[str, str], Side]()
        self._traffics = dict[str, Traffic]()
        self.half = 0.0

    def ours(self, kind: str, port: dict[str, Any] = SERVER) -> Side:
        """libfp as a device of that kind (`bench.device.PIPELINES`), or as a sink."""
        ports: int = 1 if kind == "sink" else 2
        role: Literal["server", "client"] = "client" if port["role"] == "server" else "server"
        return self._side((kind, str(port)), lambda sockets: Ours(self._stack, kind, sockets, port), ports, role)

    def theirs(self, mode: str, burst: int = BURST) -> Side:
        name = mode if burst == BURST else f"{mode} {burst}"

        def make(sockets: Sequence[str]) -> Device:
            if mode == "l3fwd":
                return l3fwd.L3fwd(self._stack, servers(sockets), DUT_CORE, pages(self._stack)[0])
            return Theirs(self._stack, mode, sockets, burst)

        return self._side(("theirs", name), make)

    def _side(
        self,
        name: tuple[str, str],
        make: Callable[[Sequence[str]], Device],
        ports: int = 2,
        role: Literal["server", "client"] = "client",
    ) -> Side:
        """The side of that name, with its number of ports; `role` is the generator's."""
        if name not in self._sides:
            self._sides[name] = Side(self._stack, make, ports, role)
        return self._sides[name]

    def traffic(self, size: Any, table: bool = False) -> Traffic:
        """Frames of one size or a mix, of one flow; or, for a table, each to a destination of its own in it."""
        key = f"{size} {table}"
        if key not in self._traffics:
            self._traffics[key] = Traffic(size, flows=FLOWS, prefixes=self._keys()) if table else Traffic(size)
        return self._traffics[key]

    def _keys(self) -> str:
        """A file of `FLOWS` destinations in the full table, drawn at random."""
        addresses, lengths, _ = rib.ipv4()
        keys = np.unique(rib.inside(addresses, lengths, FLOWS + FLOWS // 2))
        keys = np.random.default_rng(4).permutation(keys)[:FLOWS]
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="libfp-race-")))
        lines = (".".join(map(str, row)) for row in keys.astype(">u4").view(np.uint8).reshape(-1, 4).tolist())
        (folder / "keys").write_text("\n".join(lines) + "\n")
        return str(folder / "keys")

    def case(self, name: str, peer: str) -> Case:
        """A case of `CASES` beside `peer`, if any: rates, with the generator's own measured in between."""
        size, kind, mode, bar = CASES[name]
        alone, rates, lost = list[float](), {"ours": list[float](), "theirs": list[float]()}, dict[str, float]()

        def rate(who: str, side: Side) -> float:
            side.load(self.traffic(size, kind == "full table"))
            sent, received = side.rates()
            rates[who].append(received)
            lost[who] = 1 - received / max(sent, 1)
            if received == 0:
                raise Error("no packet has come back")
            return received / 1e6

        def ours() -> float:
            sink = self.ours("sink")
            sink.load(self.traffic(size, kind == "full table"))
            alone.append(sink.rates()[0])
            measured = rate("ours", self.ours(kind, MOVING if mode == "copying" else SERVER))
            judge()
            return measured

        def theirs() -> float:
            measured = rate("theirs", self.ours(kind, COPYING) if mode == "copying" else self.theirs(mode))
            judge()
            return measured

        def judge() -> None:
            fastest = max(statistics.median(some[1:] or some) for some in rates.values() if some)
            case.about, counts = verdict(statistics.median(alone[1:] or alone), fastest)
            case.bar = bar if counts else None
            shares = ", ".join(f"{who} {100 * max(share, 0):.2g} %" for who, share in lost.items())
            case.about += f"; lost in the last round: {shares}; {self._about(size, kind, mode)}"
            if bar is not None and not counts:
                case.about += f"; so {bar:g} of {peer} is not judged"

        common: dict[str, Any] = {"bench": "memif", "case": name, "unit": "Mpps", "better": "higher", "bar": bar}
        with_peer: dict[str, Any] = {"peer": peer, "theirs": theirs} if peer else {}
        case = Case(ours=ours, **with_peer, **common)
        return case

    def _about(self, size: Any, kind: str, mode: str) -> str:
        said = [f"testpmd {mode} in bursts of {BURST}, the fastest that was found"]
        if mode == "l3fwd":
            said = ["l3fwd"]
        elif mode == "copying":
            said = ["clients of the generator: ours share a region of buffers, the copying one's do not"]
        side = self._sides.get(("theirs", mode))
        if side is not None and isinstance(side.device, Theirs):
            said.append("2 MiB pages" if side.device.huge else "4 KiB pages, since no 2 MiB could be had")
        if kind == "full table":
            said.append(f"{len(rib.ipv4()[0])} routes ({rib.ipv4()[2]}), {FLOWS} destinations drawn alike")
        return ", ".join(said)

    def latencies(self) -> Iterator[Case]:
        """p50 and p99 of macswap at half of the highest rate without loss: of the slower side, for both."""
        for percent in PERCENTILES:
            yield self._latency(percent)

    def _latency(self, percent: int) -> Case:
        sides = {"ours": lambda: self.ours("macswap"), "testpmd": lambda: self.theirs("macswap", LATENCY_BURST)}
        met = {who: list[Histogram]() for who in sides}
        began = list[tuple[list[int], float]]()

        def one(who: str) -> float:
            side = sides[who]()
            if not self.half:
                found = {who: make().lossless() for who, make in self._loaded(sides)}
                self.half = min(found.values()) / 2
                self.found = ", ".join(f"{who} {pps / 1e6:.3g}" for who, pps in found.items())
            side.load(self.traffic(64))
            if not began:
                began.append((steal(), time.monotonic()))
            histogram = side.latency(self.half)
            met[who].append(histogram)
            tell()
            return histogram.percentile(percent) * 1e6

        def tell() -> None:
            stolen = [after - before for before, after in zip(began[0][0], steal(), strict=True)]
            ticks = (time.monotonic() - began[0][1]) * os.sysconf("SC_CLK_TCK")
            share = "/".join(f"{100 * one / ticks:.2g}" for one in stolen)
            tails = "; ".join(f"{who}: {tail(some)}" for who, some in met.items() if some)
            case.about = (
                f"at {self.half / 1e6:.3g} Mpps, half of the slower one's highest rate without loss ({self.found} Mpps)"
                f", testpmd in bursts of {LATENCY_BURST}"
                f"; {tails}; steal on cores {GENERATOR_CORE}/{DUT_CORE}: {share} %"
            )

        common: dict[str, Any] = {"bench": "memif", "unit": "us", "better": "lower", "bar": 1.0, "peer": "testpmd"}
        ours, theirs = (lambda: one("ours")), (lambda: one("testpmd"))
        case = Case(case=f"64 latency p{percent}", ours=ours, theirs=theirs, **common)
        return case

    def _loaded(self, sides: dict[str, Callable[[], Side]]) -> Iterator[tuple[str, Callable[[], Side]]]:
        for who, make in sides.items():
            make().load(self.traffic(64))
            yield who, make


def verdict(alone: float, fastest: float) -> tuple[str, bool]:
    """What to say of a generator that sends so many packets a second into a sink; whether the devices were measured."""
    counts = alone >= FASTER * fastest
    text = f"the generator alone {alone / 1e6:.3g} Mpps, {alone / fastest:.2f} of the fastest side"
    return text if counts else f"{text}: below {FASTER:g}, THE GENERATOR IS WHAT WAS MEASURED", counts


def tail(some: Sequence[Histogram]) -> str:
    """p99.9 and the longest of all rounds together."""
    whole = Histogram(np.sum([one.counts for one in some], axis=0), some[0].unit)
    return f"p99.9 {whole.percentile(99.9) * 1e6:.3g} us, max {whole.maximum * 1e6:.4g} us"


def steal() -> list[int]:
    """Ticks that the hypervisor gave to others instead of our two cores (/proc/stat)."""
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return [int(row[8]) for core in (GENERATOR_CORE, DUT_CORE) for row in rows if row[0] == f"cpu{core}"]


def cases() -> Iterator[Case]:
    """`CASES`, and latency. Without testpmd libfp alone, and no latency."""
    if not {GENERATOR_CORE, DUT_CORE} <= os.sched_getaffinity(0):
        raise Unsupported("bench memif needs cores 0 and 1: one sends and receives, the other forwards")
    peer = testpmd.installed()
    print(
        f"memif: generator on core {GENERATOR_CORE} (clients), device on core {DUT_CORE} (servers), rings of {RING}, "
        f"buffers of {BUFFER} bytes, one queue"
        + ("" if l3fwd.program() else "; without l3fwd, which Debian does not package: L3FWD=/where/it/is")
        + ("" if peer else f"; without its peer {testpmd.PROGRAM}: {INSTALL}"),
        file=sys.stderr,
    )
    with preferred({GENERATOR_CORE}), ExitStack() as stack:
        race = Race(stack)
        for name, (_, _, mode, _) in CASES.items():
            if mode == "copying":
                yield race.case(name, "libfp, copying")
            elif mode != "l3fwd":
                yield race.case(name, "testpmd" if peer else "")
            elif l3fwd.program():
                yield race.case(name, mode)
        if peer:
            yield from race.latencies()
