"""The demo in namespaces."""

from __future__ import annotations

from libfp.demo import ending, phases
from libfp.demo.network import PICTURE, DemoFailed, Network, check_af_xdp, last_words, ready
from libfp.demo.report import Report, Totals
from libfp.demo.screen import Screen
from libfp.engine.stats import StatsReader
from libfp.testing.netns import Lab
from libfp.testing.router import RouterProcess
from libfp.testing.wait import wait_until


def totals(reader: StatsReader) -> Totals:
    counters = reader.counters()
    return Totals(counters.received, counters.forwarded, dict(counters.drops), dict(counters.punts))


def run(screen: Screen, seconds: float) -> Report:
    """All steps; whatever ends them, Ctrl-C included (KeyboardInterrupt, then), everything made is removed first.

    Raises `libfp.Error` before anything was measured where namespaces or AF_XDP cannot be had.
    """
    check_af_xdp()
    lab = Lab()
    return ending.run(lambda: _run(screen, seconds, lab), lab.abort)


def _run(screen: Screen, seconds: float, lab: Lab) -> Report:
    report = Report("veth")
    screen.step("making three namespaces and two veth pairs")
    with lab:
        net = Network(lab)
        screen.picture = PICTURE
        core = net.place()
        screen.step("starting fp router (its first start ever compiles: up to 20 s)")
        cores = () if core is None else ("--cores", str(core))
        with RouterProcess(net.router, "r0", "r1", *cores, wait=False) as router:
            reader = ready(router)
            about = reader.description
            report.zero_copy, report.kick, report.cores = about["zero_copy"], about["kick"], about["cores"]
            screen.sample = lambda: totals(reader)
            screen.done(f"fp router: process {router.process.pid}, kick {report.kick}")
            try:
                _steps(net, screen, report, seconds, reader)
            except OSError as error:  # TimeoutError and ChildProcessError are kinds of it
                raise DemoFailed(f"{screen.now}: {error}", last_words(router)) from error
            finally:
                screen.sample = None
                reader.close()
    return report


def _steps(net: Network, screen: Screen, report: Report, seconds: float, reader: StatsReader) -> None:
    phases.ping(net, screen, report)
    phases.tcp(net, screen, report)
    phases.measure(net, screen, report)
    phases.paced(net, screen, report, seconds)
    phases.blackhole(net, screen, report)
    phases.flood(net, screen, report, seconds, lambda: totals(reader))
    wait_until(lambda: totals(reader).dropped.get("blackhole", 0) >= phases.BLACKHOLED, 2.0, "the blackhole's counter")
    report.totals = totals(reader)
