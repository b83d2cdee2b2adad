"""The demo without root: the same pipeline, the same compiled loop, over ports in memory."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from libfp.demo.report import Report, Totals
from libfp.demo.screen import Screen
from libfp.testing.packets import icmp_echo, udp
from libfp.testing.wait import wait_until

CLIENT, SERVER, BLACKHOLE = "10.0.1.2", "10.0.2.2", "203.0.113.0/24"
PICTURE = "  client 10.0.1.2 ──── memory [ parse, forward ] memory ──── 10.0.2.2 server"
BURST, WINDOW = 256, 512  # packets a turn, and on the way at once: rings of 1024 never overflow
PINGS, BLACKHOLED = 5, 100
SILENCE = 2.0  # seconds: what has not come then is lost; a busy machine may keep the worker waiting for some
MAC = {name: bytes([2, 0xFB, 0, 0, 0, number]) for number, name in enumerate(("client", "left", "right", "server"))}


def run(screen: Screen, seconds: float, why: str) -> Report:
    """Packets by hand, a paced stream at half of what the path carries, a flood. No Linux: routes are set here."""
    screen.step("compiling the router (seconds at first, then from the cache)")
    from libfp.demo.wire import FastWire
    from libfp.engine import Pipeline
    from libfp.ports.memory import MemoryPort
    from libfp.stages import forward, parse
    from libfp.stages.next_hops import Drop, Forward
    from libfp.stages.routes import Routes

    routes = Routes()
    for prefix, action in (
        ("10.0.1.0/24", Forward(0, MAC["client"], MAC["left"], 1500)),
        ("10.0.2.0/24", Forward(1, MAC["server"], MAC["right"], 1500)),
        (BLACKHOLE, Drop("blackhole")),
    ):
        routes.fib[prefix] = routes.next_hops.add(action)
    left, right = MemoryPort("left"), MemoryPort("right")
    core = max(os.sched_getaffinity(0))
    report = Report("memory", reason=why, cores=[core], zero_copy=True)
    with Pipeline(parse, forward(routes)).start([left, right], [core], name=f"demo-{os.getpid()}") as app:

        def totals() -> Totals:
            counters = app.counters
            return Totals(counters.received, counters.forwarded, dict(counters.drops), dict(counters.punts))

        screen.picture, screen.sample = PICTURE, totals
        try:
            _by_hand(screen, report, left, right, totals)
            frame = udp(b"\0" * 18, src=CLIENT, dst=SERVER, udp_checksum=0)
            path = _Path(FastWire(left.wires[0], frame), FastWire(right.wires[0]))
            screen.step("measuring what the path carries")
            sent, _, elapsed = path.stream(0.0, 0.5)
            report.capacity_pps = sent / elapsed
            screen.step(f"{report.capacity_pps / 2:,.0f} packets/s for {seconds:g} s")
            report.offered, report.received, elapsed = path.stream(report.capacity_pps / 2, seconds)
            report.paced_pps = report.offered / elapsed
            screen.done(f"stream: {report.offered:,} sent at {report.paced_pps:,.0f}/s, {report.lost:,} lost")
            screen.step(f"flood for {seconds:g} s")
            before = totals().forwarded
            report.flood_offered, report.flood_received, elapsed = path.stream(0.0, seconds)
            report.flood_seconds, report.mpps = elapsed, (totals().forwarded - before) / elapsed / 1e6
            screen.done(f"flood: {report.mpps:.3f} M packets/s forwarded, as many as the generator made")
            report.totals = totals()
        finally:
            screen.sample = None
    return report


def _by_hand(screen: Screen, report: Report, left: Any, right: Any, totals: Any) -> None:
    """An echo request and its answer, a packet at its last hop, packets into a blackhole."""
    screen.step("packets by hand")
    for number in range(PINGS):
        left.inject([icmp_echo(b"ping", 1, number, src=CLIENT, dst=SERVER)])
        (request,) = wait_until(right.collect, 5.0, "the request at the far end")
        right.inject([icmp_echo(b"ping", 1, number, reply=True, src=SERVER, dst=CLIENT)])
        (answer,) = wait_until(left.collect, 5.0, "the answer")
        report.ping_sent += 1
        report.ping_received += (request[:6], request[22], answer[:6]) == (MAC["server"], 63, MAC["client"])
    left.inject([udp(src=CLIENT, dst=SERVER, ttl=1)])
    left.inject([udp(src=CLIENT, dst=BLACKHOLE.replace(".0/24", ".9"))] * BLACKHOLED)
    wait_until(lambda: totals().punts == 1 and totals().drops == BLACKHOLED, 5.0, "one punt, and drops by name")
    screen.done(f"{PINGS} requests and answers, TTL decremented; TTL 1 punted; {BLACKHOLED} blackholed")


class _Path:
    """From one far end through the router to the other; the frames' numbers go on from call to call."""

    def __init__(self, sender: Any, receiver: Any) -> None:
        self._sender, self._receiver, self._next = sender, receiver, 0

    def stream(self, rate: float, seconds: float) -> tuple[int, int, float]:
        """Send at `rate` packets a second (0: as the rings take them): sent, received once each, seconds it took."""
        first, received, begun = self._next, 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < seconds:
            received += self._take(first)
            sent = self._next - first
            due = min(int(elapsed * rate) - sent, BURST) if rate else BURST
            injected = self._sender.inject(self._next, min(due, WINDOW - (sent - received)))
            self._next += injected
            if injected == 0:
                time.sleep(20e-6)
        quiet = time.perf_counter()
        while received < self._next - first and time.perf_counter() - quiet < SILENCE:
            received += self._take(first)
        return self._next - first, received, elapsed

    def _take(self, first: int) -> int:
        """How many numbers of this stream have arrived."""
        numbers = self._receiver.collect()
        return int(np.unique(numbers[numbers >= first]).size)
