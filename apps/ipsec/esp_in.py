"""ESP that comes in (RFC 4303 section 3.4): `to_sa`, which gives each packet to its SA's worker, and `decrypt`.

Nothing moves a window but a packet whose ICV has been verified.
"""

from __future__ import annotations

from libfp.apps.ipsec import libcrypto
from libfp.apps.ipsec.ecn import combine, traffic_class
from libfp.apps.ipsec.esp_read import end_of, esp_of, has_good_header, is_another, is_fragment, is_local_end
from libfp.apps.ipsec.policies import PROTECT, PoliciesView, is_ipv6
from libfp.apps.ipsec.record import (
    BAD_ICV,
    BAD_PADDING,
    BYTES,
    ESN,
    ESP_HEADER,
    FLAGS,
    ICV_SIZE,
    IV_SIZE,
    LEAST,
    MALFORMED,
    PACKETS,
    REPLAYED,
    SELECTOR,
    SPI,
    TUNNEL,
    WINDOW,
    SasView,
    count,
    owner_of,
)
from libfp.apps.ipsec.replay import Window
from libfp.engine.decorator import stage
from libfp.jit import (
    bswap64,
    inline,
    kernel,
    load8,
    load16be,
    load32,
    load32be,
    load64,
    prefetch,
    prefetch_write,
    shr64,
    store16be,
    store32,
    store64,
    unlikely,
)
from libfp.packet.burst import FOUND, KEY, KIND, KIND_IPV4, KIND_KEPT, PICKED, WIDE, Burst, Packet
from libfp.packet.headers import ETHERNET_SIZE, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from libfp.stages.parsing import parse_again

_IPV4, _IPV6, _NOTHING = 4, 41, 59  # next headers: RFC 4303 section 2.6


@stage
def to_sa(packet: Packet, sas: SasView) -> None:
    """Hand ESP packets to the worker that has their SA."""
    ip = packet.l3
    at = esp_of(packet, sas, ip)
    if unlikely(at != 0) and at + 4 <= end_of(ip):
        record = sas.find(load32be(at))
        if record != 0:
            packet.hand_off(owner_of(record, Burst(packet.burst)))


@stage.burst
def decrypt(burst: Burst, sas: SasView, policies: PoliciesView) -> None:
    """Decrypt ESP packets to the local ends of tunnels, and go on with the packets that they hold, kept from Linux.

    Dropped, each by its name: what is a fragment, too short or of no whole words, of an unknown SPI, of a sequence
    number that is old or has been seen; then what does not decrypt, whose padding is wrong, that holds no sound IP
    packet, or one that is not for the policies of its tunnel. Packets that are no ESP, or not to us, pass.

    Pass after pass over the ESP packets of the burst, in order: the checks of several packets overlap, libcrypto is by
    itself, and what it has written is read when it has left the store buffer. Packet k of them, as passes know it:

        PICKED + 4 * k     its number in the burst; `unwrap` adds what `admit` needs
        KEY + 4 * k        where its SA's record lies among the records, in lines
        FOUND + 4 * k      where ESP begins in the frame << 16 | its size; after `unwrap`, the policies' answer
        WIDE + 16 * k      the nonce; after `unwrap`, the addresses that the policies are asked for
    """
    at, record, n = burst.at, 0, 0
    for i in range(burst.count):
        packet = burst.packet(i)
        ip = packet.l3
        if record != 0 and is_another(packet, ip, record):
            take(burst, i, n, ip + 20, ip + load16be(ip + 2), record, sas)
            n += 1
            continue
        esp = esp_of(packet, sas, ip)
        if unlikely(esp != 0):
            record = receive(burst, i, n, esp, record, sas)
            n += record != 0
    for k in range(n):
        verify(burst, k, record_of(burst, k, sas), sas.functions)
    four = 0
    for k in range(n):
        if burst.is_live(load32(at + PICKED + 4 * k)):
            four += unwrap(burst, k, record_of(burst, k, sas))
    if four != 0:
        policies.inbound4(at + WIDE, at + FOUND, n)
    for k in range(n):
        if burst.is_live(load32(at + PICKED + 4 * k) & 63):
            admit(burst, k, record_of(burst, k, sas), policies)


@kernel
@inline
def receive(burst: Burst, i: int, k: int, at: int, record: int, sas: SasView) -> int:
    """Packet `i`, with its ESP header at `at`, becomes number `k` of those to decrypt, and its SA's record is returned;
    or it gets a verdict, and 0 is. `record` is the SA of an ESP packet before it, or 0."""
    ip = burst.packet(i).l3
    end = end_of(ip)
    if is_fragment(ip):
        burst.drop(i, "esp-fragment")
    elif end - at < LEAST:
        burst.drop(i, "esp-truncated")
    elif end - at & 3 != 0:
        burst.drop(i, "esp-alignment")
    elif not has_good_header(ip, at - ip):
        burst.drop(i, "ipv4-checksum")
    else:
        spi = load32be(at)
        found = record if record != 0 and load64(record + SPI) == spi else sas.find(spi)
        if found == 0 or not is_local_end(found, ip):
            burst.drop(i, "esp-unknown-spi")
        elif owner_of(found, burst) != burst.worker:
            burst.drop(i, "esp-owner")  # `to_sa` has not been asked
        else:
            take(burst, i, k, at, end, found, sas)
            return found
    return 0


@kernel
@inline
def take(burst: Burst, i: int, k: int, at: int, end: int, record: int, sas: SasView) -> None:
    """Packet `i` becomes number `k` of those to decrypt."""
    prefetch_write(at + 64)
    prefetch(end - 1)
    nonce = burst.at + WIDE + 16 * k
    store32(nonce, load32(record + libcrypto.NONCE))
    store64(nonce + libcrypto.SALT_SIZE, load64(at + ESP_HEADER))
    store32(burst.at + PICKED + 4 * k, i)
    store32(burst.at + KEY + 4 * k, record - sas.records >> 6)
    store32(burst.at + FOUND + 4 * k, at - burst.data(i) << 16 | end - at)


@kernel
def record_of(burst: Burst, k: int, sas: SasView) -> int:
    """The record of the SA of number `k` of those to decrypt."""
    return sas.records + (load32(burst.at + KEY + 4 * k) << 6)


@kernel
def verify(burst: Burst, k: int, record: int, functions: int) -> None:
    """Decrypt what the SA's window may take."""
    i, where = load32(burst.at + PICKED + 4 * k), load32(burst.at + FOUND + 4 * k)
    at = burst.data(i) + (where >> 16)
    window, low, extended = Window(record + WINDOW), load32be(at + 4), load64(record + FLAGS) & ESN != 0
    sequence = window.infer(low) if extended else low
    if not window.is_new(sequence):
        count(record, REPLAYED, 1)
        burst.drop(i, "esp-replayed")
        return
    nonce, aad = burst.at + WIDE + 16 * k, associate(record, at, sequence, extended)
    data, tag = at + ESP_HEADER + IV_SIZE, at + (where & 0xFFFF) - ICV_SIZE
    if not libcrypto.decrypt(functions, record, nonce, record + libcrypto.AAD, aad, data, tag - data, tag):
        count(record, BAD_ICV, 1)
        burst.drop(i, "esp-bad-icv")
        return
    window.accept(sequence)


@kernel
def associate(record: int, at: int, sequence: int, extended: bool) -> int:
    """Write the AAD of RFC 4106 section 5 for the ESP header at `at`; its size."""
    if extended:
        store64(record + libcrypto.AAD, load32(at) | bswap64(shr64(sequence, 32)))
        store32(record + libcrypto.AAD + 8, load32(at + 4))
        return 12
    store64(record + libcrypto.AAD, load64(at))
    return 8


@kernel
def is_padded(data: int, size: int) -> bool:
    """Whether the padding of `size` decrypted bytes at `data` is 1, 2, 3, ...: RFC 4303 section 2.4."""
    padding = load8(data + size - 2)
    if padding > size - 2:
        return False
    if padding <= 4:  # all at once; the IV lies before the data
        return load32(data + size - 6) >> 32 - 8 * padding == 0x04030201 & (1 << 8 * padding) - 1
    at, wrong = data + size - 2 - padding, 0
    for k in range(padding):
        wrong |= load8(at + k) ^ (k + 1)
    return wrong == 0


@kernel
def unwrap(burst: Burst, k: int, record: int) -> int:
    """Make a packet the one in its verified bytes, or give it a verdict. Whether the policies for IPv4 are to be asked
    for the addresses at `WIDE`."""
    i, where = load32(burst.at + PICKED + 4 * k), load32(burst.at + FOUND + 4 * k)
    packet, old = burst.packet(i), burst.data(i)
    data = old + (where >> 16) + ESP_HEADER + IV_SIZE
    size = (where & 0xFFFF) - ESP_HEADER - IV_SIZE - ICV_SIZE
    following = load8(data + size - 1)
    if not is_padded(data, size):
        count(record, BAD_PADDING, 1)
        burst.drop(i, "esp-bad-padding")
        return 0
    if following != _IPV4 and following != _IPV6:
        count(record, MALFORMED, 1)
        if following == _NOTHING:
            burst.drop(i, "esp-dummy")
        else:
            burst.drop(i, "esp-next-header")
        return 0
    size -= 2 + load8(data + size - 2)
    store32(burst.at + PICKED + 4 * k, size << 16 | traffic_class(packet.l3) << 8 | i)
    at = data - ETHERNET_SIZE
    store64(at, load64(old))  # the addresses, which `forward` replaces
    store32(at + 8, load32(old + 8))
    store16be(at + 12, ETHERTYPE_IPV4 if following == _IPV4 else ETHERTYPE_IPV6)
    packet.adj(at - old)
    packet.trim(packet.length - ETHERNET_SIZE - size)
    packet.keep()
    if following == _IPV4 and load8(data) == 0x45 and size >= 20 and 20 <= load16be(data + 2) <= size:
        store32(burst.at + KIND + 4 * i, KIND_KEPT | KIND_IPV4)  # as `parse_again` would
    else:
        parse_again(burst, i)
        if not burst.is_live(i):
            count(record, MALFORMED, 1)
            return 0
    packet.trim(packet.data + packet.length - end_of(data))  # what conceals the length: RFC 4303 section 2.7
    pair = burst.at + WIDE + 16 * k
    store64(pair, load64(data + 12))
    store64(pair + 8, 0)
    return following == _IPV4


@kernel
@inline
def admit(burst: Burst, k: int, record: int, policies: PoliciesView) -> None:
    """Ask whether the policies have an unwrapped packet come by its tunnel; its ECN."""
    word = load32(burst.at + PICKED + 4 * k)
    i, outer, size = word & 63, word >> 8 & 0xFF, word >> 16
    ip = burst.data(i) + ETHERNET_SIZE
    said = policies.inbound6(ip + 8) if is_ipv6(ip) else load32(burst.at + FOUND + 4 * k)
    if said != load64(record + TUNNEL) << 2 | PROTECT:
        count(record, SELECTOR, 1)
        burst.drop(i, "esp-selector")
    elif not combine(outer, ip):
        count(record, MALFORMED, 1)
        burst.drop(i, "esp-ecn")
    else:
        count(record, PACKETS, 1)
        count(record, BYTES, size)
