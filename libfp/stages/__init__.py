"""The shared stages: `parse` first, then yours, then `forward` with the `Routes` it reads."""

from libfp.stages.forwarding import forward
from libfp.stages.parsing import parse
from libfp.stages.routes import Drop, Forward, NextHops, Punt, Routes

__all__ = ["Drop", "Forward", "NextHops", "Punt", "Routes", "forward", "parse"]
