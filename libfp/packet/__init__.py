"""What a stage sees: bursts, packets, headers, verdicts and checksums."""

from libfp.packet.burst import BURST, Burst, Packet
from libfp.packet.checksum import checksum, ipv4_checksum_ok, update16
from libfp.packet.headers import Ethernet, Icmp, Ipv4, Ipv6, Tcp, Udp

__all__ = [
    "BURST",
    "Burst",
    "Ethernet",
    "Icmp",
    "Ipv4",
    "Ipv6",
    "Packet",
    "Tcp",
    "Udp",
    "checksum",
    "ipv4_checksum_ok",
    "update16",
]
