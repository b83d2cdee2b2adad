"""The stage `filter`: what connection tracking says of each packet, and then what the rules say.

Linux's order: a packet of a known flow changes that flow whatever the rules say of it; a flow comes to be when the
packet that begins it has been accepted. So three passes over a burst. The first reads the packets and looks up their
flows side by side. The second takes known flows on, in order, and asks the rules about all packets at once. The third
gives verdicts, in order: a packet without a flow asks for it once more, since an earlier one of the burst may have made
it.
"""

from __future__ import annotations

from libfp.apps.firewall.conntrack import HEADERS4, HEADERS6, RESULTS4, RESULTS6, WHAT
from libfp.apps.firewall.conntrack_tcp import (
    ACK,
    LOOSE,
    NOTES,
    REOPENED,
    SEEN_REPLY,
    SYN,
    tcp_open,
    tcp_packet,
)
from libfp.apps.firewall.policy import (
    ACCEPT,
    ACTION,
    DROP,
    ESTABLISHED,
    INVALID,
    NEW,
    NUMBER,
    RELATED,
    where,
)
from libfp.apps.firewall.reading import (
    DATAGRAM,
    ECHO,
    ERROR,
    REPLY,
    REQUEST,
    SEGMENT,
    UNKNOWN,
    UNSOUND,
    WHOLE_KIND,
    read4,
    read6,
)
from libfp.engine.decorator import stage
from libfp.jit import kernel, load8, load16be, load32, load64, store16be, store32, store64, unlikely
from libfp.packet.burst import KIND as BURST_KIND
from libfp.packet.burst import KIND_IPV4, KIND_IPV6, KIND_KEPT, KIND_MADE, NEXT_HOP, Burst
from libfp.packet.headers import IPV6_SIZE
from libfp.stages.routes import RoutesView, out_port
from libfp.tables.flow_record import ASSURED, CREATED_AT, FLAGS, NOW, TIMEOUTS, set_deadline
from libfp.tables.flow_table import enter, entry_of, find
from libfp.tables.flow_view import HASH, KIND, LINE

__all__ = ["filter"]

_UDP, _UDP_STREAM, _ICMP, _ICMPV6 = 12, 13, 14, 15  # states of flows
_STREAM_AFTER = 200  # ticks
_CROSSED = -2  # of `_track`
_MANY = 12  # headers that are looked up faster all 64 than one by one


@stage.burst
def filter(burst: Burst, routes: RoutesView, acl, acl6, hits, connections):  # type: ignore[no-untyped-def]  # noqa: A001
    """Drop what the rules drop ("filtered"), punt what they reject ("reject"); what they accept goes on to `rewrite`.

    `parse`, `by_flow` and `route` have run. `acl`, `acl6` and `hits` are those of one `Policy`. ICMP errors that libfp
    has made pass: they are this host's own, which Linux's hook forward does not see either.
    """
    at, lines = burst.at, connections.flows.lines
    rules, scratch = connections.rules, connections.scratch
    four, six, n = 0, 0, burst.count
    for i in range(n):
        kind = load32(at + BURST_KIND + 4 * i)
        plain, ip, line = kind & ~KIND_KEPT & 0xFF, burst.data(i) + 14 + (kind >> 8), lines + LINE * i
        if plain == KIND_IPV4:
            word = read4(burst, i, ip, line, scratch + HEADERS4 + 16 * four, rules) | four << 16
            four += word & 0xFFFF != 0
        elif plain == KIND_IPV6:
            word = read6(burst, i, ip, line, scratch + HEADERS6 + 40 * six, rules) | 64 + six << 16
            six += word & 0xFFFF != 0
        else:
            if kind & KIND_MADE == 0:
                burst.punt(i, "untracked-protocol")
            store64(line + KIND, 0)
            word = 0
        store32(scratch + WHAT + 4 * i, word)
    connections.flows.find_lines(n)
    for i in range(n):
        word = load32(scratch + WHAT + 4 * i)
        if word & 0xFFFF != 0:
            _first_look(burst, i, word, routes, connections)
    _classify(acl, scratch + HEADERS4, scratch + RESULTS4, 16, four)
    _classify(acl6, scratch + HEADERS6, scratch + RESULTS6, 40, six)
    for i in range(n):
        word = load32(scratch + WHAT + 4 * i)
        what, slot = word & 0xFFFF, word >> 16
        if what == 0:
            continue
        value = load32(scratch + RESULTS4 + 4 * slot)  # behind which are those of IPv6
        if unlikely(what & UNKNOWN != 0):
            value = _unknown(burst, i, word & ~UNKNOWN, value, routes, acl, acl6, connections)
            if not burst.is_live(i):
                continue
        hits.count(value >> NUMBER, _length(burst, i))
        action = value & ACTION
        if action == DROP:
            burst.drop(i, "filtered")
        elif action != ACCEPT:
            burst.punt(i, "reject")


@kernel
def _length(burst, i):  # type: ignore[no-untyped-def]
    """Bytes of IP."""
    ip = burst.packet(i).l3
    return IPV6_SIZE + load16be(ip + 4) if load8(ip) >> 4 == 6 else load16be(ip + 2)


@kernel
def _classify(acl, headers, results, size, count):  # type: ignore[no-untyped-def]
    """Look up so many headers; where there are many, 64, whose memory is there, side by side."""
    if count >= _MANY:
        acl.lookup_burst(headers, results, 64)
    else:
        for k in range(count):
            store32(results + 4 * k, acl.lookup(headers + size * k))


@kernel
def _header(slot, scratch):  # type: ignore[no-untyped-def]
    """The address of a packet's header for the Acl."""
    return scratch + HEADERS4 + 16 * slot if slot < 64 else scratch + HEADERS6 + 40 * (slot - 64)


@kernel
def _place(burst, i, routes, slot, scratch, state):  # type: ignore[no-untyped-def]
    """Write the last two bytes of a packet's header."""
    out = out_port(routes, load32(burst.at + NEXT_HOP + 4 * i))
    at = _header(slot, scratch) + (14 if slot < 64 else 38)
    store16be(at, where(burst.port & 63, out & 63, state))


@kernel
def _ask(burst, i, routes, slot, scratch, state, acl, acl6):  # type: ignore[no-untyped-def]
    """What the rules say of a packet in that state."""
    _place(burst, i, routes, slot, scratch, state)
    header = _header(slot, scratch)
    return acl.lookup(header) if slot < 64 else acl6.lookup(header)


@kernel
def _first_look(burst, i, word, routes, connections):  # type: ignore[no-untyped-def]
    """The state of a packet, by its flow as far as there is one."""
    what, slot = word & 0xFFFF, word >> 16
    scratch = connections.scratch
    state = INVALID
    if what != UNSOUND:
        flow = connections.flows.at(i)
        state = REOPENED
        if flow.found:
            state = _track(burst, i, what, flow, connections.rules)
        if unlikely(state < 0):
            if state == _CROSSED:
                burst.punt(i, "crossed-echo")
                store32(scratch + WHAT + 4 * i, 0)
                return
            store32(scratch + WHAT + 4 * i, word | UNKNOWN)
            state = _state_of_unknown(what, connections.rules)
    _place(burst, i, routes, slot, scratch, state)


@kernel
def _state_of_unknown(what, rules):  # type: ignore[no-untyped-def]
    """The state of a packet without a flow."""
    if what == DATAGRAM or what == SEGMENT | SYN or what == ECHO | REQUEST:
        return NEW
    if what == SEGMENT | ACK and load64(rules + LOOSE) != 0:
        return NEW  # the middle of a connection, whose beginning nobody saw
    return INVALID


@kernel
def _track(burst, i, what, flow, rules):  # type: ignore[no-untyped-def]
    """The state of a packet of a known flow, which learns from it. REOPENED: it is none of that flow. Or _CROSSED."""
    table, at = flow.table, flow.at
    way, whole = 1 if flow.reply else 0, what & WHOLE_KIND
    ip = burst.packet(i).l3
    six = load8(ip) >> 4 == 6
    if whole == SEGMENT:
        if six:
            return tcp_packet(rules, table, at, way, ip + IPV6_SIZE, ip + IPV6_SIZE + load16be(ip + 4))
        return tcp_packet(rules, table, at, way, ip + 20, ip + load16be(ip + 2))
    if what & (REQUEST | REPLY) != 0 and whole != DATAGRAM and what & 3 != REQUEST + way:
        return REOPENED if whole == ERROR else _CROSSED  # pings of one identifier, both ways: Linux may know that one
    if whole == ERROR:
        return RELATED
    notes = load64(at + NOTES)
    state = ESTABLISHED if way | notes & SEEN_REPLY != 0 else NEW
    kind = _ICMPV6 if six else _ICMP
    if whole == DATAGRAM:
        kind = _UDP
        if notes & SEEN_REPLY != 0 and (load64(table + NOW) - load32(at + CREATED_AT)) & 0xFFFFFFFF > _STREAM_AFTER:
            kind = _UDP_STREAM
            store32(at + FLAGS, load32(at + FLAGS) | ASSURED)
        store32(at + FLAGS, load32(at + FLAGS) & ~0xFF | kind)
    store64(at + NOTES, notes | SEEN_REPLY * way)
    set_deadline(table, at, load64(table + TIMEOUTS + 8 * kind))
    return state


@kernel
def _open(burst, i, what, flow, rules):  # type: ignore[no-untyped-def]
    """What a new flow knows."""
    table, at, ip = flow.table, flow.at, burst.packet(i).l3
    six = load8(ip) >> 4 == 6
    if what & WHOLE_KIND == SEGMENT:
        l4 = ip + (IPV6_SIZE if six else 20)
        tcp_open(rules, table, at, l4, ip + (IPV6_SIZE + load16be(ip + 4) if six else load16be(ip + 2)))
        return
    kind = _UDP if what == DATAGRAM else _ICMPV6 if six else _ICMP
    store32(at + FLAGS, load32(at + FLAGS) & ~0xFF | kind)
    set_deadline(table, at, load64(table + TIMEOUTS + 8 * kind))


@kernel
def _unknown(burst, i, word, value, routes, acl, acl6, connections):  # type: ignore[no-untyped-def]
    """The value that decides about a packet for which there was no flow; a flow, if it begins one. Or a verdict."""
    flows, rules, scratch = connections.flows, connections.rules, connections.scratch
    what, slot, line = word & 0xFFFF, word >> 16, connections.flows.lines + LINE * i
    kind = load64(line + KIND)
    table, words, swapped = flows.table(kind), kind & 0xFF, kind >> 8
    if kind != 0:
        number = find(table, words, line, load64(line + HASH))
        if number >= 0:  # an earlier packet of the burst has made it
            state = _track(burst, i, what, entry_of(table, number, swapped, 0), rules)
            if state == _CROSSED:
                burst.punt(i, "crossed-echo")
                return 0
            if state != REOPENED:
                return _ask(burst, i, routes, slot, scratch, state, acl, acl6)
    action = value & ACTION
    if action == ACCEPT and _state_of_unknown(what, rules) == NEW:
        if kind == 0:
            burst.punt(i, "flows-full")  # no room for IPv6 at all
            return 0
        flow = enter(table, words, line, load64(line + HASH), swapped)
        if not flow.found:
            burst.drop(i, "flows-full")
            return 0
        _open(burst, i, what, flow, rules)
    elif action == DROP and what not in (SEGMENT | SYN, ECHO | REQUEST) and not burst.packet(i).is_kept:
        for known in (ESTABLISHED, RELATED):
            if _ask(burst, i, routes, slot, scratch, known, acl, acl6) & ACTION == ACCEPT:
                burst.punt(i, "flow-unknown")  # Linux may know it
                return 0
    return value
