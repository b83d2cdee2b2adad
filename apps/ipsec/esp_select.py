"""Policies at work (RFC 4301 section 5): the stage `select` finds out what may pass in clear and what an SA protects.

Whatever can be wrong with a packet is said here, before it is encrypted: TTL, and the size that the way to the peer
takes. The ICMP errors meet the policies in turn; those about packets from a tunnel go back through it, or nowhere.
"""

from __future__ import annotations

from libfp.apps.ipsec.esp_read import end_of
from libfp.apps.ipsec.policies import BYPASS, DISCARD, PROTECT, PoliciesView
from libfp.apps.ipsec.record import ESP_HEADER, HEADER, ICV_SIZE, IV_SIZE, OUTER, TICKET, SasView
from libfp.engine.decorator import stage
from libfp.jit import (
    copy,
    kernel,
    load8,
    load32,
    load32be,
    load64,
    load64be,
    shr64,
    store32,
    ult64,
    unlikely,
)
from libfp.packet.burst import KIND, KIND_IPV4, KIND_IPV6, WIDE, Burst
from libfp.packet.checksum import ipv4_checksum_ok
from libfp.packet.verdict import KIND_SHIFT, PUNT, reason_code
from libfp.stages.forwarding4 import source_is_valid
from libfp.stages.icmp import FRAGMENTATION_NEEDED, TIME_EXCEEDED, TIME_EXCEEDED6, TOO_BIG6, UNREACHABLE, icmp_error
from libfp.stages.multipath import path_of
from libfp.stages.next_hops import ACTION_FORWARD, ACTION_MULTIPATH, HOP_SIZE, LOCAL, UNKNOWN
from libfp.stages.routes import RoutesView

EXPIRED = -1  # what is wrong with a packet, beside its size
_UNLIMITED = 1 << 16
_LEAST_MTU6 = 1280
_PORTS = 64  # whose addresses errors may have


@stage.burst
def select(burst: Burst, sas: SasView, policies: PoliciesView, routes: RoutesView) -> None:
    """Let pass what the policies let pass, drop what they discard, and mark what `protect` is to encrypt: from here on
    it is kept from Linux, and `to_tunnel` gives it to the worker of its SA.

    Dropped: "policy-discard"; "policy-clear", what should have come through a tunnel and has not; "no-sa" where the
    tunnel has none; "esp-ttl" and "esp-too-big" where no ICMP error could be made in its place. What is addressed to
    this host itself, or to a group, is left to Linux and its own policies, unless a tunnel has brought it.
    """
    for i in range(burst.count):
        packet = burst.packet(i)
        if not (packet.is_ipv4 or packet.is_ipv6):
            continue
        ip = packet.l3
        out = policies.outbound(ip)
        if packet.is_kept:
            select_kept(burst, i, out, sas, policies, routes)
            continue
        back = policies.inbound(ip)
        here, there = out & 3, back & 3
        if here | there == BYPASS or (here | there == 0 and policies.default == BYPASS):
            continue
        if is_for_linux(burst, i, ip, routes):
            continue
        if there == PROTECT:
            burst.drop(i, "policy-clear")
        elif here != PROTECT or there == DISCARD:
            burst.drop(i, "policy-discard")
        elif is_sound(burst, i, ip, routes):
            fault = offer(burst, i, out >> 2, sas, routes)
            if unlikely(fault != 0):
                complain(burst, i, burst.port, fault, sas, policies, routes)


@kernel
def select_kept(burst: Burst, i: int, out: int, sas: SasView, policies: PoliciesView, routes: RoutesView) -> None:
    """Packet `i`, that has come through a tunnel: on into another, or out in clear, as its policies said."""
    fault = 0
    if out & 3 == DISCARD:
        burst.drop(i, "policy-discard")
    elif out & 3 == PROTECT:
        fault = offer(burst, i, out >> 2, sas, routes)
    else:
        fault = fault_of(burst, i, routes)
    if unlikely(fault != 0):
        port = port_for(burst, i, policies, routes)
        if port >= 0:
            complain(burst, i, port, fault, sas, policies, routes)
        else:
            give_up(burst, i, fault)


@kernel
def hop_of(ip: int, at: int, routes: RoutesView) -> int:
    """The entry of the next hop to the address at `at`, of the family of the header at `ip`; a path, if of several."""
    if load8(ip) >> 4 == 4:
        hop = routes.fib.lookup(load32be(at))
    else:
        hop = routes.fib6.lookup(load64be(at), load64be(at + 8))
    if ult64(hop, routes.capacity) == 0:
        return routes.hops
    entry = routes.hops + HOP_SIZE * hop
    if load64(entry) & 0xFF == ACTION_MULTIPATH:
        hop = path_of(ip, routes, load64(entry + 8))
        entry = routes.hops + HOP_SIZE * (hop if ult64(hop, routes.capacity) else 0)
    return entry


@kernel
def destination(ip: int) -> int:
    """Where the header at `ip` has its destination."""
    return ip + 16 if load8(ip) >> 4 == 4 else ip + 24


@kernel
def is_for_linux(burst: Burst, i: int, ip: int, routes: RoutesView) -> bool:
    """Whether packet `i`, which has come in clear, is for this host itself or for a group, or nobody knows yet."""
    first = load8(destination(ip))
    if load8(ip) >> 4 == 4:
        if first == 0 or first == 127 or first >= 224:
            return True
    elif first == 0xFF or shr64(load64be(ip + 8), 54) == 0x3FA or shr64(load64be(ip + 24), 54) == 0x3FA:
        return True
    entry = hop_of(ip, destination(ip), routes)
    if load64(entry) & UNKNOWN != 0:
        burst.punt(i, "via-linux")
        return True
    broadcast = (PUNT << KIND_SHIFT) + reason_code("broadcast")
    return load64(entry) & LOCAL != 0 or shr64(load64(entry + 16), 32) == broadcast


@kernel
def is_sound(burst: Burst, i: int, ip: int, routes: RoutesView) -> bool:
    """Whether a packet that has come in clear may be encrypted: what `forward` would have asked of it."""
    kind = load32(burst.at + KIND + 4 * i)
    if kind == KIND_IPV6:
        return True
    if kind != KIND_IPV4:
        burst.drop(i, "ip-options")
        return False
    if not ipv4_checksum_ok(ip):
        burst.drop(i, "ipv4-checksum")
        return False
    return source_is_valid(burst, i, routes, load32be(ip + 12), routes.checks(burst.port))


@kernel
def room_of(record: int, routes: RoutesView) -> int:
    """The most bytes of a packet that the SA can send without outgrowing the next hop's MTU, which IP must fit."""
    entry = hop_of(record + HEADER, destination(record + HEADER), routes)
    if load64(entry) & 0xFF != ACTION_FORWARD:
        return _UNLIMITED
    payload = (load64(entry) >> 24 & 0xFFFFFF) - load64(record + OUTER) - ESP_HEADER - IV_SIZE - ICV_SIZE
    return (payload & ~3) - 2


@kernel
def offer(burst: Burst, i: int, tunnel: int, sas: SasView, routes: RoutesView) -> int:
    """Give packet `i` to the SA that the tunnel sends by, if there is one. Otherwise what is wrong with it: EXPIRED, or
    the size that would fit."""
    record, ip = sas.outbound(tunnel), burst.packet(i).l3
    if record == 0:
        burst.drop(i, "no-sa")
        return 0
    if unlikely(ttl_of(ip) < 2):
        return EXPIRED
    room = room_of(record, routes)
    if unlikely(end_of(ip) - ip > room):
        return room
    packet = burst.packet(i)
    packet.mark = load64(record + TICKET)
    packet.keep()
    return 0


@kernel
def fault_of(burst: Burst, i: int, routes: RoutesView) -> int:
    """What is wrong with packet `i`, on its way out in clear: EXPIRED, the size that would fit, or 0 for nothing."""
    ip = burst.packet(i).l3
    what = load64(hop_of(ip, destination(ip), routes))
    if what & 0xFF != ACTION_FORWARD:
        return 0
    if unlikely(ttl_of(ip) < 2):
        return EXPIRED
    mtu = what >> 24 & 0xFFFFFF
    return mtu if unlikely(end_of(ip) - ip > mtu) else 0


@kernel
def ttl_of(ip: int) -> int:
    """TTL or hop limit."""
    return load8(ip + 8) if load8(ip) >> 4 == 4 else load8(ip + 7)


@kernel
def port_for(burst: Burst, i: int, policies: PoliciesView, routes: RoutesView) -> int:
    """A port with whose address an error about packet `i` may go back through a tunnel; -1 if there is none."""
    ip, pair = burst.packet(i).l3, burst.at + WIDE
    for port in range(_PORTS):
        ours = routes.address(port)
        if load8(ip) >> 4 == 4:
            store32(pair, load32(ours))
            store32(pair + 4, load32(ip + 12))
            found = policies.outbound4(pair)
        else:
            copy(pair, ours + 8, 16)
            copy(pair + 16, ip + 8, 16)
            found = policies.outbound6(pair)
        if load64(pair) != 0 and found & 3 == PROTECT:
            return port
    return -1


@kernel
def complain(
    burst: Burst, i: int, port: int, fault: int, sas: SasView, policies: PoliciesView, routes: RoutesView
) -> None:
    """An ICMP error in place of packet `i`, with that port's address, where policies have it go."""
    mine, tunnelled, made = burst.port, burst.packet(i).is_kept, False
    burst.port = port
    if fault == EXPIRED:
        made = icmp_error(burst, i, routes, TIME_EXCEEDED if burst.is_ipv4(i) else TIME_EXCEEDED6, 0, 0)
    elif burst.is_ipv4(i):
        made = icmp_error(burst, i, routes, UNREACHABLE, FRAGMENTATION_NEEDED, fault)
    else:
        made = icmp_error(burst, i, routes, TOO_BIG6, 0, max(fault, _LEAST_MTU6))
    burst.port = mine
    if not made:
        give_up(burst, i, fault)
        return
    out = policies.outbound(burst.packet(i).l3)
    if out & 3 == PROTECT:
        if offer(burst, i, out >> 2, sas, routes) != 0:
            burst.drop(i, "esp-too-big")
    elif tunnelled or out & 3 == DISCARD:
        burst.drop(i, "policy-discard")


@kernel
def give_up(burst: Burst, i: int, fault: int) -> None:
    """No error can be made about it."""
    if fault == EXPIRED:
        burst.drop(i, "esp-ttl")
    else:
        burst.drop(i, "esp-too-big")
