"""The shared stages: `parse` first, then yours, then `forward` with the `Routes` it reads."""

from libfp.stages.forwarding import forward
from libfp.stages.parsing import parse
from libfp.stages.routes import Drop, Forward, Multipath, NextHops, Punt, Routes

__all__ = ["Drop", "Forward", "Multipath", "NextHops", "Punt", "Routes", "forward", "parse"]
