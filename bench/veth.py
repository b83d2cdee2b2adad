"""Forwarding on veth through AF_XDP, frames of 64 bytes: `fp router` beside DPDK's testpmd, and beside Linux itself.

Every side has a wire of its own and is stopped (SIGSTOP) while another one is measured, so that the rounds of all sides
follow one another at once. The generator has core 0; the dut has core 1, with all its threads. (Under the policy
`helper` it has both: the helper takes turns with the generator.) Most of the work is the kernel's: copies in and out,
and the receive path of the sink; ours and testpmd share that burden. Linux is spared it, and forwards on core 0, right
where the generator sends, which is the fastest way it has here.

With two workers nobody has a core to himself: on each are a generator, whose frames come by that core's queue, a
worker, and the kernel's part of both. Generator and worker take turns, for testpmd's two threads as for ours.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from bench.harness import Case
from bench.processes import Process, Router, Testpmd, huge_pages, preferred
from bench.wire import SIZE, Generator, Sink, Wire
from libfp.errors import Error, Unsupported
from libfp.testing.netns import Lab
from libfp.testing.wait import wait_until

GENERATOR_CORE, DUT_CORE = 0, 1
BOTH = (GENERATOR_CORE, DUT_CORE)
WARM_UP, MEASURE = 0.4, 1.0  # seconds: a round is one of each
WHOLE, TRIES = 0.94, 5  # of a core, which one that is loaded uses unless others take it; and how often to try for it
START_LIMIT = 120.0  # seconds, for a router that compiles
INSTALL = "apt-get install -y dpdk"


class Side:
    """One way to forward, on its own wire. `process` is None for Linux; `routed`: it counts the TTL down; `generators`
    are the cores that send."""

    def __init__(
        self,
        stack: ExitStack,
        wire: Wire,
        process: Process | None,
        *,
        routed: bool = True,
        generators: Sequence[int] = (GENERATOR_CORE,),
    ) -> None:
        self._generators = [stack.enter_context(Generator(wire, core)) for core in generators]
        self._sink = stack.enter_context(Sink(wire))
        self._process, self._routed = process, routed
        self._share = 1.0 if len(generators) == 1 else 0.5 * len(generators)  # of cores: the generators have the rest
        if process is not None:
            self._wait(process)

    def _wait(self, process: Process) -> None:
        """Until it forwards; then stop it."""

        def forwards() -> bool:
            process.check()
            return process.forwarded() > 0 if isinstance(process, Router) else self._count() > 0

        with self._traffic():
            wait_until(forwards, START_LIMIT, f"{process.command} to forward", interval=0.05)
        process.pause()

    @contextlib.contextmanager
    def _traffic(self) -> Iterator[None]:
        with ExitStack() as stop:
            for generator in self._generators:
                generator.start()
                stop.callback(generator.stop)
            yield

    def _count(self) -> int:
        return self._sink.counts()[int(self._routed)]

    def _round(self) -> tuple[int, float, float]:
        """Packets that arrived, seconds, and seconds of processor time."""
        if self._process is not None:
            self._process.resume()
        with self._traffic():
            time.sleep(WARM_UP)
            used = self._process.cpu_seconds() if self._process is not None else 0.0
            count, began = self._count(), time.monotonic()
            time.sleep(MEASURE)
            packets, seconds = self._count() - count, time.monotonic() - began
            used = self._process.cpu_seconds() - used if self._process is not None else 0.0
        if self._process is not None:
            self._process.check()
            self._process.pause()
        if packets == 0:
            raise Error("no packet arrived at the sink")
        return packets, seconds, used

    def rate(self) -> float:
        """One round: million packets a second. Rounds in which somebody else had the core are repeated, some times."""
        for _ in range(TRIES):
            packets, seconds, used = self._round()
            if self._process is None or used >= WHOLE * seconds * self._share:
                break
        return packets / seconds / 1e6

    def efficiency(self) -> float:
        """One round: million packets for a second of processor time, of all the process's threads."""
        packets, _seconds, used = self._round()
        return packets / max(used, 1e-3) / 1e6


def _two_routers(stack: ExitStack, lab: Lab) -> Side:
    wire = Wire(lab, "-two", queues=2)
    cores = ",".join(map(str, BOTH))
    router = stack.enter_context(Router(wire.dut, set(BOTH), "--kick", "inline", "--cores", cores))
    return Side(stack, wire, router, generators=BOTH)


def _router(stack: ExitStack, lab: Lab, kick: str, cores: set[int]) -> Side:
    wire = Wire(lab, f"-{kick}")
    router = stack.enter_context(Router(wire.dut, cores, "--kick", kick, "--cores", str(DUT_CORE)))
    return Side(stack, wire, router)


def _linux(stack: ExitStack, lab: Lab) -> Side:
    wire = Wire(lab, "-linux")
    wire.dut.offload("d0", "gro", True)  # a veth without XDP takes XDP frames only so
    return Side(stack, wire, None)


def _testpmd(stack: ExitStack, lab: Lab, cores: Sequence[int], generators: Sequence[int]) -> tuple[Side | None, str]:
    """The peer, and what to say about it."""
    if not Testpmd.installed():
        return None, f"without its peer {Testpmd.PROGRAM}: {INSTALL}"
    wire = Wire(lab, f"-testpmd{len(cores)}", queues=len(cores))
    huge = stack.enter_context(huge_pages(wire.dut, Testpmd.MEMORY))
    testpmd = stack.enter_context(Testpmd(wire.dut, cores, huge))
    side = Side(stack, wire, testpmd, routed=False, generators=generators)
    return side, f"testpmd has {'2 MiB' if huge else '4 KiB, since no 2 MiB could be had,'} pages"


def cases() -> Iterator[Case]:
    """`inline` at least 1.0 of testpmd; the others are told for what they are."""
    if not {GENERATOR_CORE, DUT_CORE} <= os.sched_getaffinity(0):
        raise Unsupported("bench veth needs cores 0 and 1: one sends, the other forwards")
    common: dict[str, Any] = {"bench": "veth", "better": "higher"}
    with preferred({GENERATOR_CORE}), Lab() as lab, ExitStack() as stack:
        inline = _router(stack, lab, "inline", {DUT_CORE})
        helper = _router(stack, lab, "helper", {GENERATOR_CORE, DUT_CORE})
        linux = _linux(stack, lab)
        testpmd, about = _testpmd(stack, lab, [DUT_CORE], [GENERATOR_CORE])
        frames = f"frames of {SIZE} bytes, one core"
        common |= {"unit": "Mpps"}
        rates: dict[str, Any] = {"peer": "testpmd", "theirs": testpmd.rate} if testpmd else {}
        yield Case(case="inline", ours=inline.rate, about=f"{frames}; {about}", bar=1.0, **rates, **common)
        yield Case(case="helper", ours=helper.rate, about=f"{frames}, and a helper on the generator's", **common)
        about_linux = "Linux's own forwarding, beside inline; never claim to beat it on veth"
        yield Case(case="linux", ours=inline.rate, peer="linux", theirs=linux.rate, about=about_linux, **common)
        two = _two_routers(stack, lab)
        peer, _ = _testpmd(stack, lab, BOTH, BOTH)
        about = f"frames of {SIZE} bytes, two queues and workers; each shares its core with a generator"
        both: dict[str, Any] = {"peer": "testpmd", "theirs": peer.rate} if peer else {}
        yield Case(case="two workers", ours=two.rate, about=about, **both, **common)
        common |= {"unit": "Mpackets/CPU-second"}
        per: dict[str, Any] = {"peer": "testpmd", "theirs": testpmd.efficiency} if testpmd else {}
        about = "packets for a second of processor time of the whole process"
        yield Case(case="inline per cpu-second", ours=inline.efficiency, about=about, **per, **common)
        yield Case(case="helper per cpu-second", ours=helper.efficiency, about=about, **common)
