"""What outer and inner header have in common: DSCP (RFC 2474) and ECN, which RFC 6040 has tunnels copy and combine."""

from __future__ import annotations

from libfp.jit import kernel, load8, load16, load16be, shr64, store8, store16be
from libfp.packet.checksum import update16

_CE = 3
# RFC 6040 figure 4: two bits for each (outer ECN, inner ECN), the inner one lowest. What arrives as not ECN-capable
# under a header that has met congestion is to be dropped, and is not in it.
_DECAPSULATED = 0
for _outer, _row in enumerate(((0, 1, 2, 3), (0, 1, 1, 3), (0, 1, 2, 3), (0, 3, 3, 3))):
    for _inner, _result in enumerate(_row):
        _DECAPSULATED |= _result << 2 * (4 * _outer + _inner)


@kernel
def traffic_class(ip: int) -> int:
    """The byte of DSCP and ECN of the IP header, of either version, at `ip`."""
    return load16be(ip) >> 4 & 0xFF if load8(ip) >> 4 == 6 else load8(ip + 1)


@kernel
def set_traffic_class(ip: int, value: int) -> None:
    """Change that byte, and the checksum of IPv4 with it."""
    if load8(ip) >> 4 == 6:
        store16be(ip, load16be(ip) & 0xF00F | value << 4)
    else:
        before = load16(ip)
        store8(ip + 1, value)
        update16(ip + 10, before, load16(ip))


@kernel
def combine(outer: int, ip: int) -> bool:
    """Give the packet at `ip` the ECN that it has behind an outer header of that traffic class; False: drop it."""
    inner = traffic_class(ip)
    if outer & 3 == _CE and inner & 3 == 0:
        return False
    result = shr64(_DECAPSULATED, 2 * ((outer & 3) << 2 | inner & 3)) & 3
    if result != inner & 3:
        set_traffic_class(ip, inner & 0xFC | result)
    return True
