"""A packet generator and receiver on any port: what came of each packet, and how long it took.

    port, cable = loopback()
    with Generator([port], Traffic(size=64, flows=100), cables=[cable]) as generator:
        report = generator.run(pps=100_000, seconds=0.1)
    print(report.sent, report.lost, report.latency.percentile(99))

`fp gen` is the same from the command line. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libfp.gen.cable import Cable as Cable
    from libfp.gen.histogram import Histogram as Histogram
    from libfp.gen.report import Report as Report
    from libfp.gen.report import Stream as Stream
    from libfp.gen.rfc2544 import Throughput as Throughput
    from libfp.gen.rfc2544 import Trial as Trial
    from libfp.gen.rfc2544 import search as search
    from libfp.gen.rfc2544 import throughput as throughput
    from libfp.gen.rfc2544 import traffics as traffics
    from libfp.gen.sink import Sink as Sink
    from libfp.gen.station import Generator as Generator
    from libfp.gen.station import Receiver as Receiver
    from libfp.gen.station import Station as Station
    from libfp.gen.station import Virtual as Virtual
    from libfp.gen.station import loopback as loopback
    from libfp.gen.traffic import IMIX as IMIX
    from libfp.gen.traffic import RFC2544_SIZES as RFC2544_SIZES
    from libfp.gen.traffic import Traffic as Traffic

_HOME = {
    "Generator": "station",
    "Receiver": "station",
    "Sink": "sink",
    "Station": "station",
    "Traffic": "traffic",
    "IMIX": "traffic",
    "RFC2544_SIZES": "traffic",
    "Throughput": "rfc2544",
    "Trial": "rfc2544",
    "search": "rfc2544",
    "throughput": "rfc2544",
    "traffics": "rfc2544",
    "Report": "report",
    "Stream": "report",
    "Histogram": "histogram",
    "Cable": "cable",
    "loopback": "station",
    "Virtual": "station",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"libfp.gen.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
