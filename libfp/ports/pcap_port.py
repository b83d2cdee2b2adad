"""A port that is a capture: what it sends is written to a file, or what it receives is read from one.

It is a port in memory, with a thread at the far end. Nothing is lost on the way: the reader waits for room, and a full
ring makes the sender wait.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Literal

from libfp.errors import BadInput, Error
from libfp.ports.memory import MemoryPort
from libfp.ports.pcap import Capture, PcapWriter
from libfp.ports.pcapng import PcapngWriter

IDLE = 0.001  # seconds between two looks at rings where nothing happens


class PcapPort(MemoryPort):
    """The capture at `path`, pcap or pcapng to read ("r"), pcap, or pcapng by that name, to write ("w"), by one worker.

    `busy`: there is still something to read, or to write. `failed`: why the thread has ended, if not by `leave`. Both
    are written by that thread. Opening raises BadInput.
    """

    def __init__(
        self, path: str | Path, mode: Literal["r", "w"] = "r", *, name: str = "", ring_size: int = 1024
    ) -> None:
        super().__init__(name or Path(path).name, ring_size=ring_size)
        if mode not in ("r", "w"):
            raise BadInput(f"{path}: no mode {mode!r}", "r or w")
        self.path, self.mode, self.failed = str(path), mode, None
        self.busy = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    failed: Error | None

    def take(self, queue: int) -> None:
        """Begin to read or to write."""
        if queue:
            raise BadInput(f"{self.path} is one queue", "one worker")
        if self._thread is not None:
            return
        self._end.clear()
        self.failed, self.busy = None, self.mode == "r"
        if self.mode == "r":
            self._thread = threading.Thread(target=self._guarded, args=(self._read, Capture(self.path)), daemon=True)
        else:
            try:
                file = open(self.path, "wb")  # noqa: SIM115  the thread closes it
            except OSError as error:
                raise BadInput(f"cannot write {self.path}: {error.strerror}", "name a file you may write") from None
            self._thread = threading.Thread(target=self._guarded, args=(self._write, file), daemon=True)
        self._thread.name = f"libfp-pcap-{self.name}"
        self._thread.start()

    def leave(self, queue: int) -> None:
        """End: what has been sent is in the file then."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """See `leave`, which comes before."""

    def _guarded(self, work: object, given: object) -> None:
        try:
            work(given)  # type: ignore[operator]
        except Error as error:
            self.failed = error
        except OSError as error:
            self.failed = BadInput(f"{self.path}: {error.strerror}", "make room, or write elsewhere")
        finally:
            self.busy = False

    def _read(self, capture: Capture) -> None:
        with capture:
            wire = self.wires[0]
            for frame in capture:
                data = bytes(capture.data[frame.at : frame.at + frame.size])
                if len(data) > wire.frames.frame_size:
                    raise BadInput(f"{self.path}: a packet of {len(data)} bytes", "make larger frames")
                while not wire.inject([data]):
                    if self._end.wait(IDLE):
                        return

    def _write(self, file: object) -> None:
        with file as opened:  # type: ignore[attr-defined]
            ng = self.path.endswith(".pcapng")
            writer = PcapngWriter(opened, [self.name]) if ng else PcapWriter(opened)
            wire = self.wires[0]
            while True:
                ending = self._end.is_set()
                packets = wire.collect()
                now = time.time_ns()
                self.busy = bool(packets)
                for packet in packets:
                    writer.write(0, now, packet)
                if not packets:
                    if ending:
                        return
                    self._end.wait(IDLE)
