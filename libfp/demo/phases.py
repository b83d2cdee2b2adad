"""What the demo does to a running router, one function a step. Each waits for its end, and adds to the report."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from libfp.demo.network import BLACKHOLE, CLIENT, SERVER, DemoFailed, Network
from libfp.demo.report import Report, Totals
from libfp.demo.screen import Screen
from libfp.testing.traffic import UdpStream, tcp_transfer

TCP_BYTES = 20_000_000
PROBES, PROBE_SECONDS = 10, 0.5
LOSS, LOWER = 0.001, 0.8  # a rate is carried when at most this share is lost; otherwise try this much of it
BLACKHOLED = 100


def ping(net: Network, screen: Screen, report: Report) -> None:
    """The first packet meets no neighbour entry: it goes to Linux, which resolves, and none is lost."""
    screen.step("ping, and one with TTL 1")
    result = net.client.ping(SERVER, count=5)
    report.ping_sent, report.ping_received = result.sent, result.received
    if result.times:
        report.ping_ms = 1000 * statistics.median(result.times)
    expired = net.client.ping(SERVER, count=1, ttl=1).errors
    said = f"; at TTL 1 Linux answers from {expired[0][2]}" if expired else ""
    screen.done(f"ping: {result.received} of {result.sent} answered, {report.ping_ms or 0:.2f} ms{said}")


def tcp(net: Network, screen: Screen, report: Report) -> None:
    """A transfer each way; the digests at both ends must agree."""
    screen.step(f"TCP, {TCP_BYTES // 1_000_000} MB each way")
    there = tcp_transfer(net.client, net.server, SERVER, TCP_BYTES)
    back = tcp_transfer(net.server, net.client, CLIENT, TCP_BYTES)
    if not (there.intact and back.intact):
        raise DemoFailed("a TCP transfer arrived changed")
    report.tcp_mbit_s = (there.bytes + back.bytes) * 8 / (there.seconds + back.seconds) / 1e6
    screen.done(f"TCP: {there.mbit_s:,.0f} Mbit/s there, {back.mbit_s:,.0f} Mbit/s back, intact")


def measure(net: Network, screen: Screen, report: Report) -> None:
    """What the path carries, sender and receiver included: its throughput in the sense of RFC 2544, the rate at which
    (next to) nothing is lost. Starts from what arrives of a flood, and goes down.
    """
    screen.step("measuring what the path carries")
    with UdpStream(net.client, net.server, SERVER, rate=0, seconds=PROBE_SECONDS) as stream:
        rate = stream.wait().received_rate
    for _ in range(PROBES):
        with UdpStream(net.client, net.server, SERVER, rate=rate, seconds=PROBE_SECONDS) as stream:
            result = stream.wait()
        report.capacity_pps = result.received_rate
        if result.lost <= result.offered * LOSS:
            break
        rate *= LOWER
    screen.done(f"path: carries {report.capacity_pps:,.0f} packets/s end to end")


def paced(net: Network, screen: Screen, report: Report, seconds: float) -> None:
    """A stream at half of that: nothing should be lost."""
    rate = report.capacity_pps / 2
    screen.step(f"UDP, {rate:,.0f} packets/s for {seconds:g} s")
    with UdpStream(net.client, net.server, SERVER, rate=rate, seconds=seconds) as stream:
        result = stream.wait()
    report.offered, report.received = result.offered, result.received
    report.duplicates, report.reordered = result.duplicates, result.reordered
    report.paced_pps = result.offered_rate
    screen.done(f"UDP: {result.offered:,} sent at {result.offered_rate:,.0f}/s, {result.lost:,} lost")


def blackhole(net: Network, screen: Screen, report: Report) -> None:
    """A route whose packets Linux would drop silently: so does the router, and counts them by that name."""
    screen.step("datagrams into a blackhole route")
    address = BLACKHOLE.replace(".0/24", ".9")
    with net.client.socket() as sock:
        for _ in range(BLACKHOLED):
            sock.sendto(b"nobody will read this", (address, 9))
    screen.done(f"blackhole: {BLACKHOLED} datagrams sent to {BLACKHOLE}, dropped by name")


def flood(net: Network, screen: Screen, report: Report, seconds: float, read: Callable[[], Totals]) -> None:
    """As fast as one sender can, for what the router itself forwards a second; much of it is lost, and counted."""
    screen.step(f"flood for {seconds:g} s")
    before = read().forwarded
    with UdpStream(net.client, net.server, SERVER, rate=0, seconds=seconds) as stream:
        result = stream.wait()
    report.flood_offered, report.flood_received, report.flood_seconds = result.offered, result.received, result.seconds
    report.mpps = (read().forwarded - before) / result.seconds / 1e6
    screen.done(f"flood: {result.offered_rate / 1e6:.3f} M packets/s offered, {report.mpps:.3f} M forwarded")
