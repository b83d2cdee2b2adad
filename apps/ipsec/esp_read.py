"""What is to be read of an ESP packet before it is decrypted: where it is, and whether its outer header is sound."""

from __future__ import annotations

from libfp.apps.ipsec.record import ESP, LEAST, LOCAL, SPI, SasView, is_to_local4, is_to_local6
from libfp.jit import inline, kernel, load8, load16be, load32, load32be, load64
from libfp.packet.burst import Packet
from libfp.packet.checksum import checksum, ipv4_checksum_ok
from libfp.packet.headers import FRAGMENT, IPV6_SIZE


@kernel
@inline
def esp_of(packet: Packet, sas: SasView, ip: int) -> int:
    """Where the ESP header is of a packet to one of the local ends of tunnels; 0 if it is none. A fragment, too."""
    if packet.is_ipv4:
        return ip + ((load8(ip) & 15) << 2) if load8(ip + 9) == ESP and is_to_local4(sas, ip) else 0
    if packet.is_ipv6:
        following = load8(ip + 6)
        if following == FRAGMENT and load16be(ip + 4) >= 8:
            following = load8(ip + IPV6_SIZE)
        return ip + IPV6_SIZE if following == ESP and is_to_local6(sas, ip) else 0
    return 0


@kernel
def end_of(ip: int) -> int:
    """The end of the sound IP packet at `ip`."""
    return ip + (IPV6_SIZE + load16be(ip + 4) if load8(ip) >> 4 == 6 else load16be(ip + 2))


@kernel
def is_fragment(ip: int) -> bool:
    """Whether the IP packet at `ip` is one of several."""
    return load8(ip + 6) == FRAGMENT if load8(ip) >> 4 == 6 else load16be(ip + 6) & 0x3FFF != 0


@kernel
def has_good_header(ip: int, size: int) -> bool:
    """Whether the checksum of the header of that size is right; IPv6 has none."""
    if load8(ip) == 0x45:
        return ipv4_checksum_ok(ip)
    return load8(ip) >> 4 == 6 or checksum(ip, size) == 0


@kernel
def is_local_end(record: int, ip: int) -> bool:
    """Whether the packet at `ip` goes to the SA's local address."""
    if load8(ip) >> 4 == 4:
        return load32(ip + 16) == load64(record + LOCAL) and load64(record + LOCAL + 8) == 0
    return load64(ip + 24) == load64(record + LOCAL) and load64(ip + 32) == load64(record + LOCAL + 8)


@kernel
@inline
def is_another(packet: Packet, ip: int, record: int) -> bool:
    """Whether it is sound, of IPv4 without options, and ESP of the SA of that record: `receive` would take it."""
    return (
        packet.is_ipv4
        and load8(ip) == 0x45
        and load8(ip + 9) == ESP
        and is_local_end(record, ip)
        and load16be(ip + 6) & 0x3FFF == 0
        and load16be(ip + 2) >= 20 + LEAST
        and load16be(ip + 2) & 3 == 0
        and load32be(ip + 20) == load64(record + SPI)
        and ipv4_checksum_ok(ip)
    )
