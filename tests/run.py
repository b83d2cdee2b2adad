"""Every test, in two runs of pytest: together, as many at once as there are cores; then those that want them all.

    python -m tests.run [ARGUMENTS OF PYTEST]    (`make test ARGS=...`)

The exit status is pytest's: 0, 1 when a test has failed, 5 when neither run has found one to run.
"""

from __future__ import annotations

import signal
import subprocess
import sys

PASSED, FAILED, NONE = 0, 1, 5
TOGETHER = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile", "--no-loadscope-reorder")


def pytest(*arguments: str) -> int:
    return subprocess.call([sys.executable, "-m", "pytest", *arguments])


def main(*arguments: str) -> int:
    stops = any(one in ("-x", "--exitfirst") or one.startswith("--maxfail") for one in arguments)
    first = pytest("--part=together", *TOGETHER, *arguments)
    if first not in (PASSED, FAILED, NONE) or (first == FAILED and stops):
        return first
    second = pytest("--part=alone", *arguments)
    return max({first, second} - {NONE}, default=NONE)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, frame: None)  # is for pytest, which cleans up, and tells
    sys.exit(main(*sys.argv[1:]))
