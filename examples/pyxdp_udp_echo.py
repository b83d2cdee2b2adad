"""Answer UDP echo (RFC 862) on an interface's first queue: pyxdp_udp_echo.py INTERFACE [PORT].

Each packet is turned round where it lies: MAC addresses, IP addresses and ports change places, which changes neither
the IP nor the UDP checksum, and the frame goes out again without a copy. Everything else on the interface, ARP
included, stays with Linux.
"""

import signal
import sys

from libfp.pyxdp import Socket

interface, port = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "7"
with Socket(interface, steer=f"udp dport {port}") as sock:
    signal.signal(signal.SIGTERM, lambda number, frame: sock.stop())
    print(f"echo on {interface} port {port}, {sock.mode}", flush=True)
    for frame in sock:
        header = (frame[14] & 15) * 4  # of IP, in bytes
        ports = 14 + header
        frame[0:6], frame[6:12] = bytes(frame[6:12]), bytes(frame[0:6])
        frame[26:30], frame[30:34] = bytes(frame[30:34]), bytes(frame[26:30])
        frame[ports : ports + 2], frame[ports + 2 : ports + 4] = (
            bytes(frame[ports + 2 : ports + 4]),
            bytes(frame[ports : ports + 2]),
        )
        sock.reply(frame)
