"""`fp router --pcap`, `fp firewall --pcap`: an application's own pipeline over a capture, with routes from a file. No
root, no interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from libfp.cli.routes_file import MOST_PORTS, RoutesFile
from libfp.engine.slots import PORT_MASK
from libfp.errors import BadInput
from libfp.ports.pcap import Capture, Frame, PcapWriter
from libfp.ports.pcapng import PcapngWriter

if TYPE_CHECKING:
    from libfp.stages import Routes

BURST = 64

#: Makes the stages, of the routes and the names of the ports.
Stages = Callable[["Routes", Sequence[str]], Sequence[Any]]


def run(pcap: str, routes: str, out: str | None, as_json: bool, stages: Stages) -> None:
    """Forward what the capture holds, write what leaves, print a summary. Raises BadInput; `out` is then as before."""
    table = RoutesFile(routes)
    with Capture(pcap) as capture:
        began = time.monotonic()
        with _output(out, pcap) as file:
            told = _forward(capture, table, file, out or "", stages)
        told["seconds"] = round(time.monotonic() - began, 3)
    if as_json:
        click.echo(json.dumps(told))
        return
    for name in ("packets", "forwarded", "dropped", "punted"):
        click.echo(f"{told[name]:>12,}  {name}")
        for reason, count in sorted(told.get({"dropped": "drops", "punted": "punts"}.get(name, ""), {}).items()):
            click.echo(f"{count:>14,}  {reason}")


def _forward(capture: Capture, table: RoutesFile, file: IO[bytes] | None, out: str, make: Stages) -> dict[str, Any]:
    from libfp import Pipeline
    from libfp.engine.replay import Replay

    packets = sum(1 for _ in capture)  # all of it is read before anything is made of it: its interfaces are known then
    incoming = [name or f"in{number}" for number, name in enumerate(capture.interfaces)] or ["in0"]
    names = list(dict.fromkeys([*incoming, *table.devices]))
    if len(names) > MOST_PORTS:
        raise BadInput(f"{capture.path} and {table.path} name {len(names)} ports", f"{MOST_PORTS} are the most")
    numbers = [names.index(name) for name in incoming]
    stages = make(table.tables(names), names)
    reasons = {reason for _, reason in Pipeline(*stages).reasons.names}
    with contextlib.ExitStack() as undo:
        replay = Replay(Pipeline(*stages, rates=dict.fromkeys(reasons, 0)), names)
        undo.callback(replay.close)
        writer: Any = None
        if file is not None:
            writer = PcapngWriter(file, names) if out.endswith(".pcapng") else PcapWriter(file)
        source = undo.enter_context(_readable(capture))
        for burst in _bursts(capture):
            places, port = [(frame.at, frame.size) for frame in burst], numbers[burst[0].interface]
            for frame, outcome in zip(burst, replay.run(source, places, port), strict=True):
                if outcome.data and writer is not None:
                    writer.write(outcome.verdict & PORT_MASK, frame.time_ns, outcome.data)
        told = replay.counters.as_dict()
    return {"packets": packets, **{k: v for k, v in told.items() if k not in ("workers", "received")}}


def _bursts(frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    """What a worker would receive at once: neighbours in the file that came in by one interface."""
    some: list[Frame] = []
    for frame in frames:
        if some and (len(some) == BURST or frame.interface != some[0].interface):
            yield some
            some = []
        some.append(frame)
    if some:
        yield some


@contextlib.contextmanager
def _readable(capture: Capture) -> Iterator[int]:
    """The address of the capture's bytes, which compiled code may read."""
    import numpy as np

    from libfp.jit import memory

    data = np.frombuffer(capture.data, np.uint8)
    memory.register(data.ctypes.data, len(data))
    try:
        yield data.ctypes.data
    finally:
        memory.unregister(data.ctypes.data)


@contextlib.contextmanager
def _output(path: str | None, source: str) -> Iterator[IO[bytes] | None]:
    """A file that is at `path` when the block has ended well, and not before; a pipe or device is written as it is."""
    if path is None:
        yield None
        return
    try:
        there = os.stat(path) if os.path.exists(path) else None
        if there is not None and os.path.samestat(there, os.stat(source)):
            raise BadInput(f"{path} is what is read, too", "write to another file")
        if there is not None and not stat.S_ISREG(there.st_mode):
            with open(path, "wb") as file:
                yield file
            return
        part = f"{path}.{os.getpid()}.part"
        try:
            with open(part, "wb") as file:
                yield file
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}", "name a file that you may write") from None
