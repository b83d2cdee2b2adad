"""The benches' network, a generator, a device under test (dut) and a sink in namespaces, joined by veth:

    gen g0 ──── d0 dut d1 ──── s1 sink

`Generator` and `Sink` are XDP programs: they cost little, and the same for whatever forwards between them.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from typing import Self

from libfp.pyxdp import bpf, emit, program
from libfp.pyxdp.system import bpf_number, failed, ffi, libc
from libfp.testing.netns import Host, Lab
from libfp.testing.packets import udp

SOURCE, DESTINATION = "10.0.1.2", "10.0.2.2"
TTL = 64
SIZE = 64  # bytes of a frame
BATCH = 64  # frames that the generator sends at once
REPEAT = (1 << 31) - 1  # frames of one call; between two calls the kernel takes 10 ms, so it is one until `stop`
LIVE_FRAMES = 1 << 1  # BPF_F_TEST_XDP_LIVE_FRAMES
INTERRUPT = signal.SIGURG  # by itself it does nothing


class Wire:
    """Three hosts in a `Lab`, joined by links of so many queues.

    Addresses, permanent neighbours and forwarding are set, and Linux forwards.
    """

    def __init__(self, lab: Lab, name: str = "", queues: int = 1) -> None:
        self.gen, self.dut, self.sink = (lab.host(f"{part}{name}") for part in ("gen", "dut", "sink"))
        lab.link(self.gen, "g0", self.dut, "d0", queues=queues)
        lab.link(self.dut, "d1", self.sink, "s1", queues=queues)
        ends = (
            (self.gen, "g0", SOURCE, self.dut, "d0", "10.0.1.1"),
            (self.sink, "s1", DESTINATION, self.dut, "d1", "10.0.2.1"),
        )
        for end, port, address, dut, dut_port, gateway in ends:
            end.address(port, f"{address}/24")
            dut.address(dut_port, f"{gateway}/24")
            end.route("default", via=gateway)
            end.neighbour(port, gateway, dut.mac(dut_port))
            dut.neighbour(dut_port, address, end.mac(port))
        self.dut.sysctl("net.ipv4.ip_forward", 1)

    def frame(self) -> bytes:
        """The UDP frame that the generator sends, to be routed to the sink; its destination port is discard (9)."""
        payload, to, source = bytes(SIZE - 14 - 20 - 8), self.dut.mac("d0"), self.gen.mac("g0")
        return udp(payload, src=SOURCE, dst=DESTINATION, ttl=TTL, eth_dst=to, eth_src=source)


# Frames come back to be sent again as whoever forwarded them left them: the program writes all 64 bytes every time.
_SEND = """
define i32 @bench_send(ptr %context) section "program" {{
{bounds}
{stores}
  ret i32 3

drop:
  ret i32 1
}}"""

# Counts frames to the destination by their TTL: map 0 is an array of one entry, 256 counters of 64 bits.
_COUNT = """
declare i64 @llvm.bpf.pseudo(i64, i64)

define i32 @bench_count(ptr %context) section "program" {{
{bounds}
  %counts64 = call i64 @llvm.bpf.pseudo(i64 2, i64 0)
  %counts = inttoptr i64 %counts64 to ptr
  %ipv4 = icmp eq i16 %type, {ipv4}
  %dst_at = getelementptr i8, ptr %packet, i64 30
  %dst = load i32, ptr %dst_at
  %ours = icmp eq i32 %dst, {destination}
  %both = and i1 %ipv4, %ours
  br i1 %both, label %count, label %other

count:
  %ttl_at = getelementptr i8, ptr %packet, i64 22
  %ttl = load i8, ptr %ttl_at
  %index = zext i8 %ttl to i64
  %counter = getelementptr i64, ptr %counts, i64 %index
  %before = atomicrmw add ptr %counter, i64 1 seq_cst
  ret i32 1

other:
  ret i32 2
}}"""


class Generator:
    """Sends a wire's frame as fast as one core can, from `start` to `stop`: the kernel itself sends, by XDP_TX.

    It comes to the dut by the queue of that core's number, modulo the number of queues (veth has it so).

    A context manager that owns the program, for the main thread. Raises OSError where BPF_PROG_TEST_RUN has no live
    frames (before Linux 5.18).
    """

    def __init__(self, wire: Wire, core: int) -> None:
        self._host, self._core = wire.gen, core
        frame = wire.frame()
        words = enumerate(struct.unpack("<8q", frame))
        stores = "".join(
            f"  %at_{n} = getelementptr i8, ptr %packet, i64 {8 * n}\n  store i64 {word}, ptr %at_{n}\n"
            for n, word in words
        )
        text = _SEND.format(bounds=program.bounds(SIZE, "drop"), stores=stores)
        self._program = bpf.Program(emit.compile_bpf(text), "bench_send")
        self._frame = ffi.from_buffer(frame)
        # struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        context = struct.pack("=IIIIII", 0, SIZE, 0, self._host.index("g0"), 0, 0)
        self._context = ffi.from_buffer(context)
        self._handler = signal.signal(INTERRUPT, lambda number, frame: None)  # without one, no call is interrupted
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._error: OSError | None = None

    def start(self) -> None:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="bench-generator", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        os.sched_setaffinity(0, {self._core})  # of this thread
        try:
            with self._host.enter():  # the index of g0 is looked up in the caller's namespace
                while not self._stopped.is_set():
                    self._send()
        except OSError as error:
            self._error = error

    def _send(self) -> None:
        at = [int(ffi.cast("uintptr_t", one)) for one in (self._frame, self._context)]
        # fd, retval, data sizes and addresses, repeat, duration, context sizes and addresses, flags, cpu, batch size
        attributes = struct.pack("=IIIIQQ", self._program.fd, 0, SIZE, 0, at[0], 0)
        attributes += struct.pack("=IIIIQQIII", REPEAT, 0, 24, 0, at[1], 0, LIVE_FRAMES, 0, BATCH)
        buffer = ffi.new("char[]", attributes.ljust(128, b"\0"))
        result = libc.syscall(bpf_number(), ffi.cast("long", bpf.PROG_TEST_RUN), buffer, ffi.cast("unsigned long", 128))
        if result < 0 and ffi.errno != errno.EINTR:
            raise failed("BPF_PROG_TEST_RUN with live frames")

    def stop(self) -> None:
        """Return when nothing is sent any more. Raises what sending raised."""
        self._stopped.set()
        while self._thread is not None:
            if self._thread.ident is not None and self._thread.is_alive():
                signal.pthread_kill(self._thread.ident, INTERRUPT)  # may come a moment before the call it is for
            self._thread.join(0.01)
            if not self._thread.is_alive():
                self._thread = None
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._error = None
        self.stop()
        self._program.close()
        signal.signal(INTERRUPT, self._handler)


class Sink:
    """Counts and drops what arrives at the sink's end of a wire. A context manager that owns the program."""

    def __init__(self, wire: Wire) -> None:
        destination = struct.unpack("<i", bytes(map(int, DESTINATION.split("."))))[0]
        self._counts = bpf.Map(bpf.ARRAY, 4, 8 * 256, 1, "bench_count")
        text = _COUNT.format(bounds=program.bounds(34, "other"), ipv4=program.IPV4, destination=destination)
        code = emit.link(emit.compile_bpf(text), [self._counts.fd])
        self._program = bpf.Program(code, "bench_count")
        host: Host = wire.sink
        self._link = host.call(bpf.Link, self._program, host.index("s1"), bpf.NATIVE_MODE)

    def counts(self) -> tuple[int, int]:
        """Frames so far: (as they were sent, routed: with a TTL one less)."""
        counters = struct.unpack("=256Q", self._counts[bytes(4)])
        return counters[TTL], counters[TTL - 1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for one in (self._link, self._program, self._counts):
            one.close()
