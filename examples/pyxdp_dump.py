"""Print every VXLAN packet that comes in by an interface's first queue: pyxdp_dump.py [INTERFACE]."""

import sys

from libfp.pyxdp import Socket

with Socket(sys.argv[1] if len(sys.argv) > 1 else "eth0", queue=0, steer="udp dport 4789") as sock:
    for frame in sock:  # a memoryview, valid until the next turn
        print(len(frame), bytes(frame[:14]).hex(), flush=True)
