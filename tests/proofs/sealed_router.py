"""The router, its worker sealed by seccomp's strict mode: run by test_no_syscall.py, in a namespace, as a process.

It is a process of its own because a sealed worker cannot come back from its loop: whatever Python does with a thread
that ends is a system call. For each line "fault" on standard input the pipeline makes one, at its next packet.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from libfp import Linux, Pipeline, stage
from libfp.jit import call
from libfp.jit.libc import address_of
from libfp.stages import forward, parse
from libfp.tables import Hash


@stage
def fault(packet: Any, functions: Any) -> None:
    """Call the C function whose address is entry 0, unless it is 0."""
    address = functions.get(0, 0)
    if address != 0:
        call(address, 0, 0, 0, 0, 0, 0)


def main(name: str, core: int) -> None:
    functions = Hash(key="u64", value="u64", capacity=8)
    functions[0] = 0
    with Linux("r0", "r1") as linux:
        pipeline = Pipeline(parse, fault(functions), forward(linux))
        options: dict[str, Any] = {"kick": "helper", "idle": "spin", "sealed": True}
        pipeline.start(linux.ports, [core], name=name, **options)
        print(json.dumps({"name": name}), flush=True)
        for line in sys.stdin:
            if line.strip() == "fault":
                functions[0] = address_of("getpid")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
