"""AF_XDP by itself stays by itself: the package loads neither numba nor anything of the engine."""

from __future__ import annotations

import json
import subprocess
import sys


def test_importing_loads_neither_numba_nor_the_engine():
    code = "import libfp.pyxdp, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert not {"numba", "numpy", "llvmlite", "pyroute2", "scapy", "rich"} & modules
    ours = {name for name in modules if name.startswith("libfp.") and not name.startswith("libfp.pyxdp")}
    assert ours == {"libfp.errors", "libfp.lazy"}
