"""The first stage of every pipeline that looks at packets: where the headers are, and that they lie in the frame."""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import load8, load16, load16be, load32, load64, store32, unlikely
from libfp.packet.burst import FRAME, KIND, KIND_IPV4, LENGTH, Burst
from libfp.packet.headers import ETHERNET_SIZE

_IPV4_TYPE = 0x0008  # 0x0800 as the machine loads it
_PLAIN = 0x0045_0008  # the same, then version 4 with a header of five words: nearly every packet
_IPV4_MIN = ETHERNET_SIZE + 20


@stage.burst
def parse(burst: Burst) -> None:
    """Mark sound IPv4 packets (RFC 791, RFC 1812 section 5.2.2 without the checksum, which `forward` verifies).

    Afterwards `packet.is_ipv4` says that the header, options and all `total_length` bytes are inside the frame.
    Malformed packets are dropped by name; other protocols pass unmarked.
    """
    columns, base = burst.at, burst.base
    for i in range(burst.count):
        length = load32(columns + LENGTH + 4 * i)
        if unlikely(length < _IPV4_MIN):
            if length < ETHERNET_SIZE:
                burst.drop(i, "ethernet-truncated")
            elif load16(burst.data(i) + 12) == _IPV4_TYPE:
                burst.drop(i, "ipv4-truncated")
            continue
        at = base + load64(columns + FRAME + 8 * i)
        if load32(at + 12) & 0x00FF_FFFF == _PLAIN:
            header = 20
        elif load16(at + 12) != _IPV4_TYPE:
            continue
        elif load8(at + ETHERNET_SIZE) >> 4 != 4:
            burst.drop(i, "ipv4-version")
            continue
        else:
            header = (load8(at + ETHERNET_SIZE) & 15) << 2
        total = load16be(at + ETHERNET_SIZE + 2)
        if unlikely((header < 20) | (total < header)):
            burst.drop(i, "ipv4-header-length")
        elif unlikely(ETHERNET_SIZE + total > length):
            burst.drop(i, "ipv4-truncated")
        else:
            store32(columns + KIND + 4 * i, KIND_IPV4)
