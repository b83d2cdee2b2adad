"""Both directions of a flow on one worker: a hash that they share, and the stage that hands packets off by it."""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import kernel, load8, load16be, load32, load64, mul64
from libfp.packet.burst import Packet
from libfp.packet.headers import FRAGMENT, ICMP, ICMPV6, IPV6_SIZE
from libfp.stages.multipath import ODD, both, flow4, flow6, is_error, is_error6, mix, upper
from libfp.stages.routes import FIELD_DPORT, FIELD_DST, FIELD_PROTOCOL, FIELD_SPORT, FIELD_SRC

_FIELDS = FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_SPORT | FIELD_DPORT
_SEED = 0x5C1E6F0B9D3A7F25  # not that of paths: what takes one path is spread over the workers


@kernel
def symmetric_hash(packet: Packet) -> int:
    """A number below 2^32 for the flow of `packet`, which is the same in both directions: 0 if it is not IP.

    Of addresses, protocol and, where there are some, ports. All fragments of a datagram, the first included, hash on
    addresses only. ICMP errors (RFC 792, RFC 4443) belong to the flow of the packet that they quote. `parse` has run.
    """
    ip = packet.l3
    if packet.is_ipv4:
        end, l4 = ip + load16be(ip + 2), ip + ((load8(ip) & 15) << 2)
        if load8(ip + 9) == ICMP and load16be(ip + 6) & 0x3FFF == 0 and is_error(l4, end - 20):
            return mix(_quoted4(l4 + 8, end), _SEED) & 0xFFFFFFFF
        return mix(flow4(ip, end, _FIELDS), _SEED) & 0xFFFFFFFF
    if packet.is_ipv6:
        l4 = ip + IPV6_SIZE
        end = l4 + load16be(ip + 4)
        if load8(ip + 6) == ICMPV6 and is_error6(l4, end):
            return mix(_quoted6(l4 + 8, end), _SEED) & 0xFFFFFFFF
        return mix(flow6(ip, _FIELDS), _SEED) & 0xFFFFFFFF
    return 0


@kernel
def _quoted4(ip: int, end: int) -> int:
    """What `flow4` is for the packets of the flow of which one's first bytes are at `ip`, 20 or more before `end`.

    Of a packet that was cut into fragments on its way the first has the ports of the flow.
    """
    fields = _FIELDS if load16be(ip + 6) & 0x1FFF == 0 else FIELD_SRC | FIELD_DST
    l4 = ip + max((load8(ip) & 15) << 2, 20)
    return both(load32(ip + 12), load32(ip + 16)) ^ upper(fields, load8(ip + 9), l4, end)


@kernel
def _quoted6(ip: int, end: int) -> int:
    """The same of `flow6` and the packet quoted at `ip`, whose header ends before `end`."""
    protocol = load8(ip + 6)
    fields = _FIELDS if protocol != FRAGMENT else FIELD_SRC | FIELD_DST
    source = load64(ip + 8) ^ mul64(load64(ip + 16), ODD)
    destination = load64(ip + 24) ^ mul64(load64(ip + 32), ODD)
    return both(source, destination) ^ upper(fields, protocol, ip + IPV6_SIZE, end)


@kernel
def flow_owner(packet: Packet, workers: int) -> int:
    """Which of `workers` has the flow of `packet`, in both directions."""
    return symmetric_hash(packet) * workers >> 32


@stage
def by_flow(packet: Packet) -> None:
    """Hand each packet to the worker that has its flow; those stages follow that must see both directions.

    Spread over the workers that the application began with: one that is added later has no flow, and no flow moves.
    While a worker does not run, packets of its flows are dropped as "bad-worker". What is not IP stays where it is.
    """
    if packet.workers > 1 and (packet.is_ipv4 or packet.is_ipv6):
        packet.hand_off(flow_owner(packet, packet.workers))
