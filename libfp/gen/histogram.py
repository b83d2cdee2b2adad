"""A histogram of 64-bit values in buckets a 32nd as wide as what is in them: HdrHistogram's idea, log-linear.

A bucket's number is made of the value's highest bit and the five below: a count costs one load and one store, and no
value is too large. From Python: percentiles, and a drawing in text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from libfp.jit import clz64, inline, kernel, load64, shr64, store64

SUB = 5
BUCKETS = (64 - SUB) << SUB
SIZE = 8 * BUCKETS


@kernel
@inline
def bucket_of(value):  # type: ignore[no-untyped-def]
    """The bucket of a value; of a negative one the first."""
    value = max(value, 0)
    shift = max(63 - SUB - clz64(value), 0)
    return (shift << SUB) + shr64(value, shift)


@kernel
@inline
def count(at, value, times):  # type: ignore[no-untyped-def]
    """Count `value` so many times in the histogram at address `at`."""
    bucket = at + 8 * bucket_of(value)
    store64(bucket, load64(bucket) + times)


def lowest(bucket: int) -> int:
    """The lowest value of a bucket."""
    shift = max((bucket >> SUB) - 1, 0)
    return (bucket - (shift << SUB)) << shift


class Histogram:
    """Values in a unit of which `unit` make a second; `counts` are of `BUCKETS` buckets.

    What is asked is answered in seconds, as the middle of a bucket: 1.6 % off at most.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, unit: float) -> None:
        self.counts, self.unit = np.array(counts, np.int64), unit
        self.total = int(self.counts.sum())

    def _seconds(self, bucket: int) -> float:
        return (lowest(bucket) + lowest(bucket + 1) - 1) / 2 / self.unit

    def percentile(self, percent: float) -> float:
        """What so many percent of the values are not above; 0 if there is none."""
        if not self.total:
            return 0.0
        wanted = max(percent / 100 * self.total, 1)
        return self._seconds(int(np.searchsorted(np.cumsum(self.counts), wanted)))

    @property
    def minimum(self) -> float:
        """The least value; 0 if there is none."""
        return self._seconds(int(np.flatnonzero(self.counts)[0])) if self.total else 0.0

    @property
    def maximum(self) -> float:
        """The greatest value; 0 if there is none."""
        return self._seconds(int(np.flatnonzero(self.counts)[-1])) if self.total else 0.0

    @property
    def mean(self) -> float:
        """The mean; 0 if there is none."""
        if not self.total:
            return 0.0
        middles = np.array([self._seconds(int(one)) for one in np.flatnonzero(self.counts)])
        return float((middles * self.counts[self.counts > 0]).sum() / self.total)

    def as_dict(self) -> dict[str, float]:
        """Microseconds, for JSON."""
        found = {f"p{percent:g}": self.percentile(percent) for percent in (50, 90, 99, 99.9)}
        found = {"min": self.minimum, "mean": self.mean, **found, "max": self.maximum}
        return {name: round(seconds * 1e6, 3) for name, seconds in found.items()}

    def octaves(self) -> Iterator[tuple[float, float, int]]:
        """(from, to, how many) for each power of 2 between the first that is not empty and the last."""
        edges = [0, *(1 << SUB << n for n in range(63 - SUB + 1))]
        starts = [0, *((n + 1) << SUB for n in range(64 - SUB - 1)), BUCKETS]
        sums = [int(self.counts[a:b].sum()) for a, b in itertools.pairwise(starts)]
        used = [n for n, found in enumerate(sums) if found]
        for n in range(used[0], used[-1] + 1) if used else ():
            yield edges[n] / self.unit, edges[n + 1] / self.unit, sums[n]

    def draw(self, width: int = 40) -> list[str]:
        """A line for each power of 2, with a bar as long as its share of the fullest."""
        rows = list(self.octaves())
        most = max((found for _, _, found in rows), default=1)
        lines = []
        for first, last, found in rows:
            eighths = -(-found * width * 8 // most)
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
            share = 100 * found / self.total
            lines.append(f"{microseconds(first):>9} to {microseconds(last):>9} {share:6.2f} % {bar}")
        return lines


def microseconds(seconds: float) -> str:
    """A time as people read it."""
    for unit, factor in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5 or unit == "ms":
            return f"{seconds * factor:.3g} {unit}" if unit != "ms" else f"{seconds * factor:,.4g} ms"
    raise AssertionError
