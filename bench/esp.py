"""The IPsec gateway's stages: encryption and decryption beside the same libcrypto called from C, and what each stage
costs beside the plain router.

`protect` and `decrypt` are the stages themselves, headers, sequence numbers, windows, padding and policies included,
over bursts of 64; the C loop (peers/esp.c) does AES-128-GCM alone, of as many bytes, in the same places. One SA and one
context on either side. A round is 32,768 packets: 512 frames, written anew for each pass, outside the timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import peers
from bench.harness import Case
from libfp.apps.ipsec import record
from libfp.apps.ipsec.esp_in import decrypt
from libfp.apps.ipsec.esp_out import protect
from libfp.apps.ipsec.esp_select import select
from libfp.apps.ipsec.policies import Policies, Policy
from libfp.apps.ipsec.sa import Sa, SaTable
from libfp.jit import Arena, clock, clock_hz, copy64, kernel, load32, load64, store32, store64
from libfp.packet.burst import FRAME, FRAME_SIZE, KIND, LENGTH, MARK, STRIDE, VERDICT, WORKERS, BurstMemory
from libfp.packet.headers import ETHERNET_SIZE
from libfp.packet.verdict import FORWARD, KIND_SHIFT
from libfp.stages import Forward, Routes, forward, parse
from libfp.testing.packets import udp

FRAMES, SLOT, PASSES, BURST = 512, 2048, 64, 64
SIZES = (64, 570, 1420)  # of the packet within
PLAIN, FRONT = 256, 20 + record.ESP_HEADER + record.IV_SIZE  # where plain frames begin, and how much sooner ESP does
ROUTER, DECRYPT, SELECT, PROTECT = range(4)
STAGES = {"decrypt": DECRYPT, "select": SELECT, "protect": PROTECT}
_PARSE, _DECRYPT, _SELECT, _PROTECT, _FORWARD = (
    one.kernel for one in (parse, decrypt, select, protect, forward)
)  # fmt: skip


@kernel
def renew(base, model):  # type: ignore[no-untyped-def]
    """Every frame as it was."""
    for i in range(FRAMES):
        for at in range(PLAIN - 64, SLOT - 128, 64):
            copy64(base + SLOT * i + at, model + SLOT * i + at)


@kernel
def place(burst, base, first, begin, length):  # type: ignore[no-untyped-def]
    """A burst of the frames from `first` on, each `begin` bytes into its slot."""
    burst.base = base
    for i in range(BURST):
        store64(burst.at + FRAME + 8 * i, SLOT * (first + i) + begin)
        store32(burst.at + LENGTH + 4 * i, length)
    burst.begin(BURST)


@kernel
def good_of(what, burst):  # type: ignore[no-untyped-def]
    """How many packets of the burst have become what they should."""
    good = 0
    for i in range(BURST):
        verdict = load32(burst.at + VERDICT + 4 * i)
        kept = load32(burst.at + KIND + 4 * i) & 0x20 != 0
        if what == ROUTER:
            good += verdict >> KIND_SHIFT == FORWARD
        elif what == SELECT:
            good += verdict == 0 and burst.packet(i).mark != 0
        else:
            good += verdict == 0 and kept
    return good


@kernel
def timed(what, burst, base, model, begin, length, own, sas, policies, routes, good):  # type: ignore[no-untyped-def]
    """Ticks of one stage, or of the plain router, over all frames, `PASSES` times. `own`: the record of the SA."""
    ticks, right = 0, 0
    for _ in range(PASSES):
        renew(base, model)
        if what == DECRYPT:
            store64(own + record.WINDOW, 0)
        for first in range(0, FRAMES, BURST):
            place(burst, base, first, begin, length)
            if what != ROUTER:
                _PARSE(burst)
            if what == PROTECT:
                for i in range(BURST):
                    store64(burst.at + MARK + 8 * i, load64(own + record.TICKET))
            start = clock()
            if what == ROUTER:
                _PARSE(burst)
                _FORWARD(burst, routes)
            elif what == DECRYPT:
                _DECRYPT(burst, sas, policies)
            elif what == SELECT:
                _SELECT(burst, sas, policies, routes)
            else:
                _PROTECT(burst, sas)
            ticks += clock() - start
            right += good_of(what, burst)
    store64(good, right)
    return ticks


def _view(table: Any) -> Any:
    """The master of a table, and a worker's part of what has none."""
    return table.view() if hasattr(table, "view") else table.join(0).view


class Bed:
    """Two gateways' tables, and frames of one size, plain and encrypted."""

    def __init__(self, size: int) -> None:
        self.key, inner = bytes(range(20)), udp(bytes(size - 28), src="10.1.0.1", dst="10.2.0.1")
        ends = ["198.51.100.1", "203.0.113.9"]
        self.sas, views = [SaTable(), SaTable()], list[Any]()
        self.records, self.routes = list[int](), Routes(routes=1024, next_hops=16)
        self.routes.fib["0.0.0.0/0"] = self.routes.next_hops.add(Forward(1, bytes(6), bytes(6), 9000))
        nets = ["10.1.0.0/16", "10.2.0.0/16"]
        self._policies = list[Policies]()
        for sas, way, (here, there) in zip(self.sas, ("out", "in"), ((0, 1), (1, 0)), strict=True):
            sa = Sa("t", way, spi=0x1001, local=ends[here], remote=ends[there], key=self.key)  # type: ignore[arg-type]
            sas.add(sa)
            self.records.append(sa.at)
            policies = Policies(sas)
            policies.load([Policy("protect", nets[here], nets[there], tunnel="t")])
            self._policies.append(policies)
            views.append([one.stage_view(_view) for one in (sas, policies)])
        self._views, self._hops = views, self.routes.stage_view(lambda table: table.view())
        self._burst, self._good = BurstMemory(), Arena(64)
        for offset, value in ((WORKERS, 1), (STRIDE, SLOT), (FRAME_SIZE, SLOT)):
            store64(self._burst.burst.at + offset, value)
        self.frames, self.plain, self.sealed = (Arena(FRAMES * SLOT, huge=True) for _ in range(3))
        for i in range(FRAMES):
            self.plain.buffer[SLOT * i + PLAIN : SLOT * i + PLAIN + len(inner)] = inner
        self.length, self.secret = len(inner), size + 2 + (-(size + 2) & 3)
        self.stage(PROTECT)
        self.sealed.words[:] = self.frames.words

    def stage(self, what: int) -> float:
        """Nanoseconds a packet of a stage, or of the plain router."""
        inbound = what == DECRYPT
        begin = PLAIN - FRONT if inbound else PLAIN
        length = ETHERNET_SIZE + FRONT + self.secret + record.ICV_SIZE if inbound else self.length
        model = self.sealed if inbound else self.plain
        ticks = timed(
            what, self._burst.burst, self.frames.address, model.address, begin, length, self.records[inbound],
            *self._views[inbound], self._hops, self._good.address,
        )  # fmt: skip
        assert self._good.words[0] == FRAMES * PASSES, f"{self._good.words[0]} packets of {FRAMES * PASSES}"
        return self._ns(ticks)

    @staticmethod
    def _ns(ticks: int) -> float:
        return ticks * 1e9 / clock_hz() / (FRAMES * PASSES)

    def in_c(self, decrypting: bool) -> float:
        """Nanoseconds a packet of esp.c."""
        ffi, lib = peers.load()
        sa = lib.esp_open(self.key, 16, self.key[16:], int(decrypting))
        offsets = np.arange(FRAMES, dtype=np.uint64) * SLOT + PLAIN - FRONT + ETHERNET_SIZE + 20
        base, at = ffi.cast("uint8_t *", self.frames.address), ffi.cast("uint64_t *", offsets.ctypes.data)
        ticks, good, found = 0, 0, ffi.new("int *")
        for _ in range(PASSES):
            renew(self.frames.address, self.sealed.address)
            ticks += lib.esp_timed(sa, base, at, FRAMES, self.secret, found)
            good += found[0]
        lib.esp_close(sa)
        assert good == FRAMES * PASSES
        return self._ns(ticks)

    def close(self) -> None:
        for sas in self.sas:
            sas.close()


def cases() -> Iterator[Case]:
    """`protect, 64 bytes` and so on beside C; then each stage beside the router that parses and forwards alone."""
    common: dict[str, Any] = {"bench": "esp", "unit": "ns/packet", "better": "lower", "rounds": 15}
    there = peers.found() is not None
    for size in SIZES:
        bed = Bed(size)
        about = f"{size} bytes within, {bed.secret} encrypted, AES-128-GCM, {FRAMES} frames"
        for name in ("protect", "decrypt"):
            ours: Any = lambda what=STAGES[name]: bed.stage(what)  # noqa: B023,E731
            theirs: Any = lambda way=name == "decrypt": bed.in_c(way)  # noqa: B023,E731
            beside = {"peer": "libcrypto from C", "theirs": theirs, "bar": 0.85} if there else {}
            yield Case(case=f"{name}, {size} bytes", ours=ours, about=about, **beside, **common)
        for name, what in STAGES.items():
            ours = lambda what=what: bed.stage(what)  # noqa: B023,E731
            router: Any = lambda: bed.stage(ROUTER)  # noqa: B023,E731
            yield Case(
                case=f"stage {name}, {size} bytes", ours=ours, peer="router", theirs=router, about=about, **common
            )
        bed.close()
