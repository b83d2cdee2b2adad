"""Both directions of a flow on one worker: a hash that they share, and the stage that hands packets off by it."""

from __future__ import annotations

from libfp.engine.decorator import stage
from libfp.jit import kernel, load16be
from libfp.packet.burst import Packet
from libfp.stages.multipath import flow4, flow6, mix
from libfp.stages.routes import FIELD_DPORT, FIELD_DST, FIELD_PROTOCOL, FIELD_SPORT, FIELD_SRC

_FIELDS = FIELD_SRC | FIELD_DST | FIELD_PROTOCOL | FIELD_SPORT | FIELD_DPORT
_SEED = 0x5C1E6F0B9D3A7F25  # not that of paths: what takes one path is spread over the workers


@kernel
def symmetric_hash(packet: Packet) -> int:
    """A number below 2^32 for the flow of `packet`, which is the same in both directions: 0 if it is not IP.

    Of addresses, protocol and, where there are some, ports. All fragments of a datagram, the first included, hash on
    addresses only, and so do ICMP errors, on their own. `parse` has run.
    """
    if packet.is_ipv4:
        ip = packet.l3
        return mix(flow4(ip, ip + load16be(ip + 2), _FIELDS), _SEED) & 0xFFFFFFFF
    if packet.is_ipv6:
        return mix(flow6(packet.l3, _FIELDS), _SEED) & 0xFFFFFFFF
    return 0


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
