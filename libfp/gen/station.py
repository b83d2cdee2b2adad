"""`Generator` and `Receiver`: ports, what they send, a thread on a core that runs the compiled loop, and its counts."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from libfp.errors import BadInput, Error, PeerGone
from libfp.gen import arrivals, histogram, loop, pacing
from libfp.gen.cable import Cable
from libfp.gen.histogram import Histogram
from libfp.gen.report import Report, Stream
from libfp.gen.signature import FCS, first_word
from libfp.gen.traffic import Schedule, Traffic
from libfp.jit import Arena, clock_hz, load64, load_acquire64, store64, store_release64
from libfp.jit.clock import now
from libfp.jit.libc import address_of
from libfp.packet.burst import BURST, BurstMemory
from libfp.packet.headers import ETHERNET_SIZE
from libfp.ports.frames import BlockWords, FrameMemory, OpenPort
from libfp.ports.memif_rings import MemifRings
from libfp.ports.memory import HEADROOM, MemoryPort
from libfp.ports.rings import COUNTER_NAMES, COUNTERS_SIZE, PortBlocks

MOST_PORTS = 16
FOREVER = 1 << 62
LONGEST = 1e8  # seconds, three years: ticks of the clock have to fit
QUIET = 0.05  # seconds without a packet, after which none is waited for any more
STOP_SECONDS = 5.0
_LEARNS = -1  # a stream that is not known yet


@dataclass(frozen=True)
class Virtual:
    """A clock for tests: it begins at 0, and each turn of the loop is so many of its ticks later; `hz` are a second.

    What is paced, lost and found is then the same on any machine.
    """

    step: int = 1000
    hz: int = 1_000_000_000


class Station:
    """What a generator and a receiver have in common: ports that are open, and a loop that can run."""

    def __init__(
        self,
        ports: Sequence[Any],
        traffic: Traffic | Sequence[Traffic] | None,
        sending: Sequence[Any],
        *,
        core: int | None = None,
        cables: Sequence[Cable] = (),
        clock: Virtual | None = None,
    ) -> None:
        if not ports:
            raise BadInput("no ports", "name at least one")
        if len(ports) > MOST_PORTS or len({id(port) for port in ports}) < len(ports):
            raise BadInput(f"{len(ports)} ports", f"{MOST_PORTS} at most, each once")
        if len({type(port).open_all for port in ports}) > 1:
            kinds = ", ".join(sorted({type(port).__name__ for port in ports}))
            raise BadInput(f"ports of several kinds in one test ({kinds})", "give it ports of one kind")
        allowed = sorted(os.sched_getaffinity(0))
        if core is not None and core not in allowed:
            raise BadInput(f"no core {core}", f"this process may use {', '.join(map(str, allowed))}")
        self.ports, self.core, self.clock = list(ports), allowed[-1] if core is None else core, clock
        self.hz = clock.hz if clock else clock_hz()
        self.cables = list(cables)
        self._sending = list(sending)
        self.traffics = _each(traffic, self._sending)
        self.schedules: list[Schedule] = []
        self._closers: list[Callable[[], None]] = []
        self._taken: list[Any] = []
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._ceased = False
        self._run = random.SystemRandom().randrange(1 << 12)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # -- memory

    def _own(self, made: Any) -> Any:
        self._closers.append(made.close)
        return made

    def _open(self) -> None:
        self._closers.append(self._close_schedules)
        self._make_schedules(self.traffics)
        longest = max((one.longest for one in (*self.schedules, *self.ports) if hasattr(one, "longest")), default=0)
        frame_size = 2048
        while frame_size < HEADROOM + -(-longest // 64) * 64:
            frame_size *= 2
        ring = max(port.ring_size for port in self.ports)
        self.frames = self._own(FrameMemory(3 * ring * len(self.ports) + BURST, frame_size))
        self._closers += [port.close for port in self.ports]
        opened: list[OpenPort] = type(self.ports[0]).open_all(self.ports, 0, self.frames)
        self._closers += [port.close for port in opened]
        self._burst = BurstMemory()
        self._closers.append(self._burst.arena.close)
        self._blocks = PortBlocks(len(self.ports))
        self._closers.append(self._blocks.arena.close)
        self._counters = self._own(Arena(COUNTERS_SIZE * len(self.ports)))
        self._tester = self._own(Arena(loop.SIZE))
        self._senders = self._own(Arena(max(loop.SENDER_SIZE * len(self._sending), 8)))
        self._streams = self._own(Arena(MOST_PORTS * arrivals.SIZE))
        self._cables = self._own(Arena(8 * len(self.cables) + 8))
        self._closers += [one.close for one in self.cables]
        for number, one in enumerate(self.cables):
            store64(self._cables.address + 8 * number, one.connect(self.hz))
        self._watched = self._own(Arena(8))
        for number, port in enumerate(opened):
            counters = self._counters.address + COUNTERS_SIZE * number
            port.fill_in(self._blocks, number, self.frames, BlockWords(counters, self._watched.address, False))
        memif = getattr(type(self.ports[0]), "rings", None) is MemifRings
        self._loop_ports: Any = (loop.MemifPorts if memif else loop.RingPorts)(self._blocks.arena.address)
        values = {
            loop.PORTS: len(self.ports),
            loop.SENDERS: len(self._sending),
            loop.STREAMS: MOST_PORTS,
            loop.FREE: self.frames.free.at,
            loop.UMEM: self.frames.address,
            loop.STEP: self.clock.step if self.clock else 0,
            loop.CABLES: len(self.cables),
            loop.CABLE_AT: self._cables.address,
            loop.SENDTO: address_of("sendto"),
            loop.SENDER_AT: self._senders.address,
            loop.STREAM_AT: self._streams.address,
        }
        for offset, value in values.items():
            store64(self._tester.address + offset, value)
        for number, port in enumerate(self._sending):
            at = self._senders.address + loop.SENDER_SIZE * number
            store64(at + loop.PORT, self.ports.index(port))
        self._follow_schedule()
        store_release64(self._tester.address + loop.STOP, 1)
        self._call()  # compiles
        for port in self.ports:
            self._taken.append(port)
            port.take(0)

    def _make_schedules(self, traffics: Sequence[Traffic]) -> None:
        """One for each port that sends; ports that send the same share it."""
        made: dict[Traffic, Schedule] = {}
        try:
            for traffic in traffics:
                made.setdefault(traffic, Schedule(traffic))
            frames: FrameMemory | None = getattr(self, "frames", None)
            longest = max((one.longest for one in made.values()), default=0)
            for port in self._sending:
                if longest > getattr(port, "longest", longest):
                    what = f"{port.name} carries frames of {port.longest + FCS:,} bytes, not of {longest + FCS:,}"
                    raise BadInput(what, f"ip link set {port.name} mtu {longest - ETHERNET_SIZE}, or send shorter ones")
            if frames is not None and longest > frames.frame_size - HEADROOM:
                raise BadInput(f"frames of {longest} bytes", "make the generator with the longest ones")
        except BaseException:
            for one in made.values():
                one.close()
            raise
        self._close_schedules()
        self.traffics, self.schedules = list(traffics), [made[traffic] for traffic in traffics]

    def _close_schedules(self) -> None:
        for one in dict.fromkeys(self.schedules):
            one.close()
        self.schedules = []

    def _follow_schedule(self) -> None:
        for number, schedule in enumerate(self.schedules):
            at = self._senders.address + loop.SENDER_SIZE * number
            store64(at + loop.ENTRIES, schedule.address)
            store64(at + loop.COUNT, schedule.count)
            store64(at + loop.FILLER, schedule.filler)

    def _call(self) -> None:
        loop.run(self._loop_ports, self._burst.burst, self._tester.address)

    # -- a test

    def _begin(self, pps: float, bps: float, seconds: float | None, packets: int | None) -> None:
        """Start the loop, from nothing."""
        self._end()
        self._run = (self._run + 1) % (1 << 12)
        tester = self._tester.address
        begin = 0 if self.clock else now()
        for offset in (loop.NOW, loop.TURNS, loop.PACKETS, loop.FOREIGN, loop.CORRUPTED, loop.STALE):
            store64(tester + offset, 0)
        self._counters.words[:] = 0
        for one in self.cables:
            one.begin(begin)
        longest = max((one.longest for one in self.schedules), default=0)
        for number in range(len(self._sending)):
            at = self._senders.address + loop.SENDER_SIZE * number
            pacing.set_rate(at, self.hz, pps=pps, bps=bps, longest=longest)
            until = begin + round(seconds * self.hz) if seconds is not None else FOREVER
            values = {pacing.LAST: begin, loop.CURSOR: 0, loop.WORD: first_word(self._stream(number))}
            values |= {loop.LIMIT: FOREVER if packets is None else packets, loop.UNTIL: until}
            values |= dict.fromkeys((loop.SENT, loop.SENT_BYTES, loop.FULL, loop.BEGAN, loop.ENDED, loop.DONE), 0)
            for offset, value in values.items():
                store64(at + offset, value)
        for number in range(MOST_PORTS):
            at = self._streams.address + arrivals.SIZE * number
            words = np.frombuffer(self._streams.buffer[arrivals.SIZE * number :][: arrivals.SIZE], np.int64)
            if load64(at + arrivals.NEXT) or load64(at + arrivals.STREAM):
                words[:] = 0
            store64(at + arrivals.LEAST, FOREVER)
            store64(at + arrivals.STREAM, self._expected(number))
        store_release64(tester + loop.STOP, 0)
        self._failed, self._ceased = None, False
        self._thread = threading.Thread(target=self._loop, name="libfp-gen", daemon=True)
        self._thread.start()

    def _stream(self, number: int) -> int:
        return self._run << 4 | number

    def _expected(self, number: int) -> int:
        return self._stream(number) if number < len(self._sending) else _LEARNS if not self._sending else 1 << 20

    def _loop(self) -> None:
        try:
            os.sched_setaffinity(0, {self.core})
            self._call()
        except BaseException as error:
            self._failed = error

    def _end(self) -> None:
        """Stop the loop."""
        if self._thread is None:
            return
        store_release64(self._tester.address + loop.STOP, 1)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            raise Error("the generator's loop does not end", "look at the load of its core")
        self._thread = None
        if self._failed is not None:
            raise Error(f"the generator's loop failed: {self._failed}") from self._failed

    @property
    def running(self) -> bool:
        """The loop runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """There is something to wait for: packets to send; of a receiver, such that may come, or captures to read."""
        if self._sending:
            return self.sending
        files = all(hasattr(port, "busy") for port in self.ports)
        return self.running and (self._pending() or not files)

    @property
    def sending(self) -> bool:
        """There is still something to send."""
        ends = [self._senders.address + loop.SENDER_SIZE * number + loop.DONE for number in range(len(self._sending))]
        return self.running and not all(load_acquire64(at) for at in ends)

    @property
    def _turns(self) -> int:
        return load_acquire64(self._tester.address + loop.TURNS)

    @property
    def _seen(self) -> int:
        return load64(self._tester.address + loop.PACKETS)

    def report(self) -> Report:
        """How it stands; while the loop runs, counts may be a burst apart."""
        tester = self._tester.address
        count = len(self._sending) or MOST_PORTS
        streams = [stream for number in range(count) if (stream := self._report(number)) is not None]
        signed = all(traffic.signed for traffic in self.traffics)
        words = (loop.PACKETS, loop.CORRUPTED, loop.FOREIGN, loop.STALE)
        packets, corrupted, foreign, stale = (load64(tester + at) for at in words)
        return Report(streams, packets, corrupted, foreign, stale, signed, self._port_counters())

    def _port_counters(self) -> dict[str, dict[str, int]]:
        rows = self._counters.words.reshape(-1, COUNTERS_SIZE // 8)[:, : len(COUNTER_NAMES)]
        return {
            port.name: dict(zip(COUNTER_NAMES, map(int, row), strict=True))
            for port, row in zip(self.ports, rows, strict=True)
        }

    def _report(self, number: int) -> Stream | None:
        at = self._streams.address + arrivals.SIZE * number
        words = {name: load64(at + getattr(arrivals, name.upper())) for name in ("received", "duplicates", "reordered")}
        words |= {name: load64(at + getattr(arrivals, name.upper())) for name in ("extent", "late")}
        start = arrivals.SIZE * number + arrivals.LATENCY
        counts = np.frombuffer(self._streams.buffer[start : start + histogram.SIZE], np.int64)
        words |= {"latency": Histogram(counts, self.hz), "received_bytes": load64(at + arrivals.BYTES)}
        if not self._sending:  # what was sent is only known by the numbers that came
            if load64(at + arrivals.STREAM) == _LEARNS:
                return None
            stream = load64(at + arrivals.STREAM)
            sent = load64(at + arrivals.NEXT) - load64(at + arrivals.FIRST)
            return Stream(f"stream {stream:#06x}", sent, 0, 0.0, **words)
        sender = self._senders.address + loop.SENDER_SIZE * number
        sent, began = load_acquire64(sender + loop.SENT), load64(sender + loop.BEGAN)
        ended = load64(sender + loop.ENDED) or self._now()
        seconds = (ended - began) / self.hz if began else 0.0
        full = load64(sender + loop.FULL)
        name = self._sending[number].name
        return Stream(name, sent, load64(sender + loop.SENT_BYTES), seconds, ring_full=full, **words)

    def _now(self) -> int:
        return load64(self._tester.address + loop.NOW) if self.clock else now()

    def _settle(self, wait: float) -> None:
        """Until all that was sent has come, or for a while nothing has."""
        last, seen, turns = time.monotonic(), -1, self._turns
        end = last + wait
        while self.running and (here := time.monotonic()) < end:
            if self._seen != seen:
                last, seen = here, self._seen
            report = self.report() if self._sending else None
            if report is not None and report.signed and report.received >= report.sent:
                break
            if here - last > QUIET and self._turns - turns > 1000 and not self._pending():
                break
            time.sleep(0.001)

    def _pending(self) -> bool:
        """Whether a port still has something to send; it says so in `busy`, if it can."""
        return any(getattr(port, "busy", False) for port in self.ports)

    def finish(self, wait: float = 2.0) -> Report:
        """Wait until everything is sent, then until it has come, or nothing has for 50 ms, `wait` seconds at most
        (RFC 2544, 23: two); end the test. A receiver waits for captures that it reads, and for that."""
        while self.sending or (self.running and not self._ceased and not self._sending and self._pending()):
            self.check()
            time.sleep(0.001)
        self._settle(wait)
        self.check()
        return self.stop()

    def check(self) -> None:
        """Raise what has befallen a port: a capture that cannot be written, or read."""
        for port in self.ports:
            failed = getattr(port, "failed", None)
            if failed is not None:
                raise failed

    def cease(self) -> None:
        """Send no more, and wait for no capture's end; what is on the way still arrives."""
        self._ceased = True
        for number in range(len(self._sending)):
            store64(self._senders.address + loop.SENDER_SIZE * number + loop.UNTIL, 0)

    def stop(self) -> Report:
        """Stop at once, without waiting for what is on the way."""
        self._end()
        return self.report()

    def close(self) -> None:
        """Give up the ports."""
        try:
            self._end()
        finally:
            while self._taken:
                self._taken.pop().leave(0)
            while self._closers:
                self._closers.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _each(traffic: Traffic | Sequence[Traffic] | None, sending: Sequence[Any]) -> list[Traffic]:
    """What each port sends."""
    if traffic is None:
        return []
    if isinstance(traffic, Traffic):
        return [traffic] * len(sending)
    if len(traffic) != len(sending):
        raise BadInput(f"traffic for {len(traffic)} of {len(sending)} ports", "one for all, or one for each")
    return list(traffic)


class Generator(Station):
    """Sends `traffic`, or to each port its own, by `ports`, each a stream of its own; receives by these and by `to`.

        with Generator([a], Traffic(size=64), to=[b]) as generator:
            report = generator.run(pps=1_000_000, seconds=1)
        assert report.lost == 0

    ports: all of one kind, as for a pipeline; queue 0 of each is used, and nobody else may have it. core: of its
    thread, which never sleeps, the last one by default. cables: between ports in memory. clock: of tests.
    Ctrl-C ends waiting, as any exception does; `close`, or the end of the `with` block, ends everything.

    Raises BadInput, and what opening the ports raises.
    """

    def __init__(
        self,
        ports: Sequence[Any],
        traffic: Traffic | Sequence[Traffic],
        *,
        to: Sequence[Any] = (),
        core: int | None = None,
        cables: Sequence[Cable] = (),
        clock: Virtual | None = None,
    ) -> None:
        if not ports:
            raise BadInput("no port to send by", "name at least one")
        super().__init__([*ports, *to], traffic, ports, core=core, cables=cables, clock=clock)

    def load(self, traffic: Traffic | Sequence[Traffic]) -> None:
        """Send other traffic from the next test on; its frames may not be longer than room was made for. Raises
        BadInput, and nothing has changed then."""
        self._end()
        self._make_schedules(_each(traffic, self._sending))
        self._follow_schedule()

    def start(
        self, *, pps: float = 0, bps: float = 0, seconds: float | None = None, packets: int | None = None
    ) -> None:
        """Begin a test, each port at so many packets, or bits, a second (neither: as fast as it can), until `seconds`
        have passed or `packets` have been sent, or until `stop`. One that runs is stopped."""
        if (seconds is not None and not 0 < seconds <= LONGEST) or (packets is not None and packets < 0):
            raise BadInput(f"a test of {seconds} seconds, {packets} packets", f"above 0, and {LONGEST:g} s at most")
        self._begin(pps, bps, seconds, packets)

    def wait_connected(self, seconds: float = 10.0) -> None:
        """Until there is somebody at the other end of each port that has a peer (memif's do). Raises PeerGone."""
        ports = [port for port in self.ports if hasattr(port, "connected")]
        self.start(packets=0)
        end = time.monotonic() + seconds
        while missing := [port for port in ports if not port.connected]:
            if time.monotonic() > end:
                why = getattr(missing[0], "error", None)
                what = f"{missing[0].name}: nobody at the other end for {seconds:g} s"
                raise PeerGone(what, why.what if why else "start it, or look at the socket and the role")
            time.sleep(0.005)
        self.stop()

    def run(
        self,
        *,
        pps: float = 0,
        bps: float = 0,
        seconds: float | None = None,
        packets: int | None = None,
        wait: float = 2.0,
    ) -> Report:
        """A whole test: `start` and `finish`. It needs `seconds` or `packets`. Raises BadInput."""
        if seconds is None and packets is None:
            raise BadInput("a test without an end", "give it seconds or packets")
        self.start(pps=pps, bps=bps, seconds=seconds, packets=packets)
        return self.finish(wait)


class Receiver(Station):
    """Receives by `ports` what a generator elsewhere sends, and tells of each stream what came of it.

    What was sent after the last packet that came is not known, so not missed. Times are right on one machine only.
    """

    def __init__(
        self,
        ports: Sequence[Any],
        *,
        core: int | None = None,
        cables: Sequence[Cable] = (),
        clock: Virtual | None = None,
    ) -> None:
        super().__init__(ports, None, (), core=core, cables=cables, clock=clock)

    def start(self) -> None:
        """Begin, from nothing."""
        self._begin(0, 0, None, None)


def loopback(name: str = "memory", ring_size: int = 1024) -> tuple[MemoryPort, Cable]:
    """A port in memory that receives what it sends, and the cable that makes it so."""
    port = MemoryPort(name, ring_size=ring_size)
    return port, Cable(port, port)
