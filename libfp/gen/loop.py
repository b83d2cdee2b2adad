"""The generator's and the receiver's loop: compiled, on a core of its own; it allocates nothing, and makes no system
call but the port's kick.

A turn: each sender fills frames with what the schedule says and its bucket allows, a burst at most; what has come by
the ports is looked at and its frames given back. The clock is read once a burst on either side, as near to the port as
can be: a packet's time on the way begins before it is published, and ends after it was seen.
"""

from __future__ import annotations

from typing import Any

from libfp.gen import arrivals, histogram
from libfp.gen.arrivals import (
    BYTES,
    FIRST,
    LATENCY,
    LEAST,
    MOST,
    NEXT,
    RECEIVED,
    STREAM,
    TICKS,
    add,
    arrived,
)
from libfp.gen.cable import carry
from libfp.gen.pacing import PER_BYTE, PER_PACKET, fill
from libfp.gen.signature import (
    FCS,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    STREAM_MASK,
    halves,
    is_intact,
    payload_of,
    sign,
    word_of,
)
from libfp.gen.traffic import BLOCK, ENTRY, LENGTH, PAYLOAD, SUM
from libfp.jit import (
    call,
    clock,
    copy64,
    entry,
    kernel,
    load8,
    load16,
    load32,
    load64,
    load_acquire64,
    native,
    pause,
    prefetch,
    store64,
    store_release64,
    unlikely,
    word,
)
from libfp.packet.burst import Burst
from libfp.ports.memif_rings import MemifRings
from libfp.ports.memory import HEADROOM
from libfp.ports.rings import BLOCK as PORT_BLOCK
from libfp.ports.rings import FD, FreeFrames, PortRings

BATCH = 32  # packets that leave together, at most
RECEIVE = 64
AHEAD = 8  # packets

#: Words of the tester, a line each for those of the control plane, those of the loop, and what does not change.
STOP = 0
NOW, TURNS = 64, 72
PORTS, SENDERS, STREAMS, FREE, UMEM, STEP, CABLES, SENDTO, SENDER_AT, STREAM_AT, CABLE_AT, ROOM = range(128, 224, 8)
PACKETS, FOREIGN, CORRUPTED, STALE = range(256, 288, 8)
SIZE = 320

#: Words of a sender: its bucket first; the port, the schedule and where it is, what its packets' first word begins
#: with; how many it may send and until when; and what it has sent.
PORT, ENTRIES, COUNT, CURSOR, WORD, FILLER, LIMIT, UNTIL = range(64, 128, 8)
SENT, SENT_BYTES, FULL, BEGAN, ENDED, DONE = range(128, 176, 8)
SENDER_SIZE = 192
MSG_DONTWAIT = 0x40


@native
class RingPorts:
    """Ports with AF_XDP's rings, of which `at` is the first one's block."""

    at: word

    def rings(self, port: int) -> PortRings:
        return PortRings(self.at + port * PORT_BLOCK)

    def kick(self, port: int, tester: int) -> None:
        """Call the kernel if it asks to be called."""
        rings = self.rings(port)
        fd = load64(rings.at + FD)
        if fd >= 0 and rings.wants_tx_kick():
            call(load64(tester + SENDTO), fd, 0, 0, MSG_DONTWAIT, 0, 0)


@native
class MemifPorts:
    """Ports with memif's rings."""

    at: word

    def rings(self, port: int) -> MemifRings:
        return MemifRings(self.at + port * PORT_BLOCK)

    def kick(self, port: int, tester: int) -> None:
        """Nobody sleeps."""


@kernel
def read_clock(tester):  # type: ignore[no-untyped-def]
    """The time: of the processor, or one that goes on by STEP each turn."""
    return clock() if load64(tester + STEP) == 0 else load64(tester + NOW)


@kernel
def transmit(ports, tester, sender, now):  # type: ignore[no-untyped-def]
    """Send what is due, a burst at most; how many."""
    credit = fill(sender, now)
    room = min(load64(sender + LIMIT) - load64(sender + SENT), BATCH)
    if room <= 0 or now - load64(sender + UNTIL) >= 0:
        if load64(sender + DONE) == 0:
            store64(sender + ENDED, now)
            store_release64(sender + DONE, 1)
        return 0
    per_packet, per_byte = load64(sender + PER_PACKET), load64(sender + PER_BYTE)
    rings, free = ports.rings(load64(sender + PORT)), FreeFrames(load64(tester + FREE))
    if unlikely(credit < per_packet):
        return 0
    rings.reclaim(free)
    room = min(room, free.count)
    entries, count, cursor = load64(sender + ENTRIES), load64(sender + COUNT), load64(sender + CURSOR)
    filler, umem = load64(sender + FILLER), load64(tester + UMEM) + HEADROOM
    sent, total = 0, 0
    time = read_clock(tester)
    first, times = load64(sender + WORD), halves(time)
    if load64(sender + BEGAN) == 0:
        store64(sender + BEGAN, time)
    while sent < room:
        at = entries + ENTRY * cursor
        prefetch(load64(at + ENTRY * AHEAD))  # behind the last entry there are frames: then it asks for nothing useful
        length = load32(at + LENGTH)
        cost = per_packet + per_byte * (length + FCS)
        if credit < cost:
            break
        frame = free.pop()
        if unlikely(not rings.send(frame + HEADROOM, length)):
            free.push(frame)
            add(sender + FULL, 1)
            break
        credit -= cost
        source, target, payload = load64(at), umem + frame, load8(at + PAYLOAD)
        copy64(target, source)
        behind = BLOCK
        rest = filler if payload != 0 else source
        while behind < length:
            copy64(target + behind, rest + behind)
            behind += BLOCK
        if payload != 0:
            sign(target, payload, length, first + sent, time, load16(at + SUM) + times)
        total += length
        sent += 1
        cursor += 1
        if cursor == count:
            cursor = 0
    store64(sender, credit)
    store64(sender + CURSOR, cursor)
    if sent > 0:
        store64(sender + WORD, first + sent)
        store64(sender + SENT_BYTES, load64(sender + SENT_BYTES) + total)
        store_release64(sender + SENT, load64(sender + SENT) + sent)
        rings.publish()
    return sent


@kernel
def take(tester, data, length, now):  # type: ignore[no-untyped-def]
    """Look at a packet that has come."""
    payload = payload_of(data, length)
    if unlikely(payload == 0):
        add(tester + FOREIGN, 1)
        return
    if unlikely(not is_intact(data, payload)):
        add(tester + CORRUPTED, 1)
        return
    first = word_of(data, payload)
    which, sequence = (first >> SEQUENCE_BITS) & STREAM_MASK, first & SEQUENCE_MASK
    stream = load64(tester + STREAM_AT) + arrivals.SIZE * (which & (load64(tester + STREAMS) - 1))
    known = load64(stream + STREAM)
    if unlikely(known != which):
        if known >= 0:
            add(tester + STALE, 1)
            return
        store64(stream + STREAM, which)
        store64(stream + FIRST, sequence)
        store64(stream + NEXT, sequence)
    if arrived(stream, sequence):
        add(stream + RECEIVED, 1)
        add(stream + BYTES, length)
        passed = now - load64(data + payload + 8)
        add(stream + TICKS, passed)
        store64(stream + LEAST, min(load64(stream + LEAST), passed))
        store64(stream + MOST, max(load64(stream + MOST), passed))
        histogram.count(stream + LATENCY, passed, 1)


@kernel
def receive(ports, burst, tester, port):  # type: ignore[no-untyped-def]
    """Look at what has come by a port, a burst at most; how many."""
    rings, free = ports.rings(port), FreeFrames(load64(tester + FREE))
    burst.count = 0
    received = rings.rx_burst(burst, RECEIVE)
    if received > 0:
        now = read_clock(tester)
        for i in range(burst.count):
            take(tester, burst.data(i), burst.length(i), now)
            free.push(burst.frame(i))
        add(tester + PACKETS, received)
    rings.refill(free, RECEIVE)
    return received


@kernel
def turn(ports, burst, tester):  # type: ignore[no-untyped-def]
    """Everything once; how many packets went or came."""
    step = load64(tester + STEP)
    now = clock() if step == 0 else load64(tester + NOW) + step
    store64(tester + NOW, now)
    done = 0
    for k in range(load64(tester + SENDERS)):
        sender = load64(tester + SENDER_AT) + SENDER_SIZE * k
        done += transmit(ports, tester, sender, now)
        ports.kick(load64(sender + PORT), tester)
    for k in range(load64(tester + CABLES)):
        carry(load64(load64(tester + CABLE_AT) + 8 * k), now)
    for port in range(load64(tester + PORTS)):
        done += receive(ports, burst, tester, port)
    return done


@entry
def run(ports: Any, burst: Burst, tester: int) -> None:
    """Turn until told to stop."""
    burst.base = load64(tester + UMEM)
    for port in range(load64(tester + PORTS)):  # before anything is sent: it may come at once
        ports.rings(port).refill(FreeFrames(load64(tester + FREE)), RECEIVE)
    while load_acquire64(tester + STOP) == 0:
        if turn(ports, burst, tester) == 0:
            pause()
        store_release64(tester + TURNS, load64(tester + TURNS) + 1)
