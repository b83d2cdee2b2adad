"""ESP that goes out (RFC 4303 section 3.3), of the packets that `select` has marked: `to_tunnel`, which gives each to
its SA's worker, and `protect`.
"""

from __future__ import annotations

from libfp.apps.ipsec import libcrypto
from libfp.apps.ipsec.ecn import traffic_class
from libfp.apps.ipsec.esp_in import associate
from libfp.apps.ipsec.esp_read import end_of
from libfp.apps.ipsec.record import (
    BYTES,
    ESN,
    ESP_HEADER,
    EXHAUSTED,
    FLAGS,
    HEADER,
    ICV_SIZE,
    IV,
    IV_SIZE,
    LAST,
    LIMIT,
    MARK,
    MARK_MASK,
    OUTER,
    PACKETS,
    SEQUENCE,
    SPI,
    SasView,
    count,
    owner_of,
)
from libfp.engine.decorator import stage
from libfp.jit import (
    bswap64,
    kernel,
    load8,
    load32,
    load64,
    load_acquire64,
    store8,
    store16be,
    store32,
    store32be,
    store64,
    ult64,
    unlikely,
)
from libfp.packet.burst import Burst, Packet
from libfp.packet.checksum import checksum
from libfp.packet.headers import ETHERNET_SIZE, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from libfp.stages.parsing import parse_again

_IPV4, _IPV6 = 4, 41  # next headers


@stage
def to_tunnel(packet: Packet, sas: SasView) -> None:
    """Hand the packets that `select` has marked to the worker that has their SA."""
    mark = packet.mark
    if mark & MARK_MASK == MARK:
        record = sas.holder(mark)
        if record != 0:  # else `protect` drops it
            packet.hand_off(owner_of(record, Burst(packet.burst)))


@stage.burst
def protect(burst: Burst, sas: SasView) -> None:
    """Encrypt the packets that `select` has given to an SA, and go on with ESP to its peer, kept from Linux.

    Dropped: "no-sa" when the SA has been removed meanwhile; "sa-exhausted" when it has no sequence number left, for
    good; "esp-unreserved" while none is free to be used; "esp-no-room" where the frame has not the room. No verdict
    uses up a sequence number.
    """
    for i in range(burst.count):
        mark = burst.packet(i).mark
        if mark & MARK_MASK == MARK:
            burst.packet(i).mark = 0
            record = sas.holder(mark)
            if unlikely(record == 0):
                burst.drop(i, "no-sa")
            else:
                send(burst, i, record, sas)


@kernel
def send(burst: Burst, i: int, record: int, sas: SasView) -> None:
    """Packet `i` by the SA of `record`."""
    packet, sequence = burst.packet(i), load64(record + SEQUENCE)
    if unlikely(owner_of(record, burst) != burst.worker):
        burst.drop(i, "esp-owner")
        return
    if unlikely(ult64(sequence, load_acquire64(record + LIMIT)) == 0):
        count(record, EXHAUSTED, 1)
        if sequence == load64(record + LAST):
            burst.drop(i, "sa-exhausted")
        else:
            burst.drop(i, "esp-unreserved")
        return
    ip, old, outer = packet.l3, packet.data, load64(record + OUTER)
    size = end_of(ip) - ip
    padding = -(size + 2) & 3
    front, back = outer + ESP_HEADER + IV_SIZE, padding + 2 + ICV_SIZE
    packet.trim(packet.data + packet.length - (ip + size))
    if not packet.prepend(front):
        burst.drop(i, "esp-no-room")
        return
    if not packet.append(back):
        burst.drop(i, "esp-no-room")
        return
    begin = packet.data
    store64(begin, load64(old))  # the addresses, which `forward` replaces
    store32(begin + 8, load32(old + 8))
    decrement(ip)
    for k in range(padding):
        store8(ip + size + k, k + 1)
    store8(ip + size + padding, padding)
    store8(ip + size + padding + 1, _IPV4 if load8(ip) >> 4 == 4 else _IPV6)
    wrap(begin + ETHERNET_SIZE, traffic_class(ip), front + size + back, record)
    sequence += 1
    store64(record + SEQUENCE, sequence)
    at, extended = ip - ESP_HEADER - IV_SIZE, load64(record + FLAGS) & ESN != 0
    store32be(at, load64(record + SPI))
    store32be(at + 4, sequence)
    iv = bswap64(load64(record + IV) + sequence)
    store64(at + ESP_HEADER, iv)
    store64(record + libcrypto.NONCE + 4, iv)
    aad, secret = associate(record, at, sequence, extended), size + padding + 2
    if unlikely(not libcrypto.encrypt(sas.functions, record, record + libcrypto.AAD, aad, ip, secret, ip + secret)):
        burst.drop(i, "esp-failed")
        return
    packet.made()
    parse_again(burst, i)
    count(record, PACKETS, 1)
    count(record, BYTES, size)


@kernel
def decrement(ip: int) -> None:
    """One less TTL or hop limit, of the sound packet at `ip`."""
    if load8(ip) >> 4 == 6:
        store8(ip + 7, load8(ip + 7) - 1)
    else:
        word = load32(ip + 8) + 0xFFFF  # as in `forward`
        store32(ip + 8, word + (word + 0x10000 >> 32 << 16))


@kernel
def wrap(at: int, inner: int, total: int, record: int) -> None:
    """The outer header at `at`, and the EtherType in front of it, of a packet of `total` bytes; `inner` is the traffic
    class of the packet within."""
    header = record + HEADER
    for k in range(0, 16, 8):
        store64(at + k, load64(header + k))
    if load64(record + OUTER) == 20:
        store32(at + 16, load32(header + 16))
        store16be(at - 2, ETHERTYPE_IPV4)
        store8(at + 1, inner)
        store16be(at + 2, total)
        store16be(at + 10, checksum(at, 20))
    else:
        for k in range(16, 40, 8):
            store64(at + k, load64(header + k))
        store16be(at - 2, ETHERTYPE_IPV6)
        store16be(at, 0x6000 | inner << 4)
        store16be(at + 4, total - 40)
