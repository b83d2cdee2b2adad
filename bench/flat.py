"""The peer of `bench forward`: forwarding as one hand-written kernel, and the frames both sides work on."""

from __future__ import annotations

from typing import Any

from libfp.engine.loop import begin
from libfp.jit import (
    bswap32,
    clock,
    kernel,
    load16be,
    load32,
    load64,
    prefetch,
    shr64,
    store8,
    store16,
    store16be,
    store32,
    store32be,
    store64,
    store_release32,
)
from libfp.packet.burst import FRAME, LENGTH
from libfp.packet.checksum import checksum, is_ipv4_sum
from libfp.ports.rings import COMPLETION, CONSUMER, OWN, TX
from libfp.stages.next_hops import HOP_SIZE
from libfp.stages.routes import is_unusual

SIZE = 60  # the least Ethernet frame, without its checksum


@kernel
def make_frames(base: int, frames: int, stride: int, descs: int) -> None:
    """UDP packets of 60 bytes, and for each a descriptor of 16 bytes, as a receive ring has them."""
    for i in range(frames):
        at = base + i * stride
        store64(descs + 16 * i, i * stride)
        store64(descs + 16 * i + 8, SIZE)
        store16be(at + 12, 0x0800)
        store16be(at + 14, 0x4500)
        store16be(at + 16, SIZE - 14)
        store8(at + 23, 17)
        store32be(at + 26, 0xC6120001 + i)


@kernel
def renew(base: int, frames: int, stride: int, keys: int) -> None:
    """Give every frame its next destination, TTL 64 and a right checksum."""
    for i in range(frames):
        ip = base + i * stride + 14
        store8(ip + 8, 64)
        store32be(ip + 16, load32(keys + 4 * i))
        store16(ip + 10, 0)
        store16be(ip + 10, checksum(ip, 20))


def stages_burst(pipeline: Any) -> Any:
    """A kernel that runs the pipeline over 64 frames, from `first` on, as `PortRings.rx_burst` would deliver them."""
    process = pipeline.module().process

    @kernel
    def run(context, burst, view, base, descs, first):  # type: ignore[no-untyped-def]
        begin(context, burst, 0)
        burst.base = base
        for i in range(64):
            desc = descs + 16 * (first + i)
            frame = load64(desc)
            prefetch(base + frame)
            store64(burst.at + FRAME + 8 * i, frame)
            store32(burst.at + LENGTH + 4 * i, load32(desc + 8))
        burst.begin(64)
        process(context, burst, view)
        for port in range(2):
            rings = context.rings(port)
            rings.publish()
            own = load64(rings.at + TX + OWN)  # the far end takes all at once
            store_release32(load64(rings.at + TX + CONSUMER), own)
            store64(rings.at + COMPLETION + OWN, own)

    return run


def stages_round(pipeline: Any) -> Any:
    """A kernel that runs the pipeline over all frames, chunk by chunk."""
    run = stages_burst(pipeline)

    @kernel
    def round_(context, burst, view, base, frames, stride, descs, keys, chunks):  # type: ignore[no-untyped-def]
        ticks = 0
        for number in range(chunks):
            renew(base, frames, stride, keys + 4 * frames * number)
            start = clock()
            for first in range(0, frames, 64):
                run(context, burst, view, base, descs, first)
            ticks += clock() - start
        return ticks

    return round_


@kernel
def flat_chunk(routes, base, frames, descs, out, scratch):  # type: ignore[no-untyped-def]
    """Forward all frames: descriptors (offset, length) of port p go to its list of 16-byte entries in `out`.

    `out`: packets forwarded, dropped, bytes; then scratch columns, then the lists.
    """
    fib, sources, hops, capacity = routes.fib, routes.sources, routes.hops, routes.capacity
    hits, epoch = routes.hits, routes.epoch
    keys, results, live = scratch, scratch + 256, scratch + 512
    for first in range(0, frames, 64):
        for i in range(64):
            prefetch(base + load64(descs + 16 * (first + i)))
        n = 0
        for i in range(64):
            desc = descs + 16 * (first + i)
            frame, length = load64(desc), load32(desc + 8)
            at = base + frame
            low, high, last = load64(at + 14), load64(at + 22), load32(at + 30)
            total = load16be(at + 16)
            if (
                load32(at + 12) & 0x00FFFFFF != 0x00450008
                or total < 20
                or 14 + total > length
                or not is_ipv4_sum(low, high, last)
                or high & 0xFF < 2
                or is_unusual(sources, shr64(high, 32), last) != 0
            ):
                store64(out + 8, load64(out + 8) + 1)
                continue
            destination = bswap32(last)
            fib.prefetch(destination)
            store32(keys + 4 * n, destination)
            store64(live + 16 * n, frame)
            store64(live + 16 * n + 8, length)
            n += 1
        fib.lookup_burst(keys, results, n)
        for i in range(n):
            prefetch(hops + HOP_SIZE * load32(results + 4 * i))
        for i in range(n):
            hop = load32(results + 4 * i)
            entry = hops + HOP_SIZE * hop
            frame, length = load64(live + 16 * i), load64(live + 16 * i + 8)
            if hop >= capacity or length > load64(entry + 24):
                store64(out + 8, load64(out + 8) + 1)
                continue
            at, last = base + frame, load64(entry + 16)
            word = load32(at + 22) + 0xFFFF
            store64(at, load64(entry + 8))
            store32(at + 8, last)
            store32(at + 22, word + (word + 0x10000 >> 32 << 16))
            store32(hits + 4 * hop, epoch)
            port = shr64(last, 32) & 1
            count = load64(out + 32 + 8 * port)
            desc = out + 4096 + 16384 * port + (count & 1023) * 16
            store64(desc, frame)
            store64(desc + 8, length)
            store64(out + 32 + 8 * port, count + 1)
            store64(out + 16, load64(out + 16) + length)


@kernel
def flat_round(view, base, frames, stride, descs, keys, chunks, out):  # type: ignore[no-untyped-def]
    """As `stages_round`, with `flat_chunk`."""
    ticks = 0
    for k in range(6):
        store64(out + 8 * k, 0)
    for number in range(chunks):
        renew(base, frames, stride, keys + 4 * frames * number)
        start = clock()
        scratch = out + 1024
        flat_chunk(view, base, frames, descs, out, scratch)
        ticks += clock() - start
    store64(out, load64(out + 32) + load64(out + 40))
    return ticks
