"""Public helpers for testing what is built with libfp: packets, private networks, traffic, machine code.

The builders of frames are here; what needs root or more libraries is in its own module: `libfp.testing.netns`,
`libfp.testing.traffic`, `libfp.testing.machine_code`.
"""

from libfp.testing.packets import ethernet, icmp_echo, icmp_error, internet_checksum, ipv4, ipv6, tcp, udp
from libfp.testing.wait import wait_until

__all__ = ["ethernet", "icmp_echo", "icmp_error", "internet_checksum", "ipv4", "ipv6", "tcp", "udp", "wait_until"]
