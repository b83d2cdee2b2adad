"""A packet generator and receiver on any port: what came of each packet, and how long it took.

    port, cable = loopback()
    with Generator([port], Traffic(size=64, flows=100), cables=[cable]) as generator:
        report = generator.run(pps=100_000, seconds=0.1)
    print(report.sent, report.lost, report.latency.percentile(99))

`fp gen` is the same from the command line. Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from libfp.lazy import lazy

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

__all__, __getattr__, __dir__ = lazy(__name__, {
    "station": "Generator Receiver Station Virtual loopback",
    "sink": "Sink",
    "traffic": "Traffic IMIX RFC2544_SIZES",
    "rfc2544": "Throughput Trial search throughput traffics",
    "report": "Report Stream",
    "histogram": "Histogram",
    "cable": "Cable",
})  # fmt: skip
