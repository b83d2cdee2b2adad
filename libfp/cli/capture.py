"""`fp capture`: packets of a running instance, in and out of its ports, with their verdicts, as a pcapng file."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO

import click

from libfp.cli.options import Seconds
from libfp.cli.watching import Watch
from libfp.errors import BadInput
from libfp.ports.pcapng import INBOUND, OUTBOUND, PcapngWriter

SLOTS = 2048


@click.command()
@click.argument("expression", nargs=-1, metavar="[FILTER]...")
@click.option("-w", "--write", "path", required=True, metavar="FILE", help="Where to; - is standard output.")
@click.option("-c", "--count", type=click.IntRange(1), metavar="N", help="End after N packets.")
@click.option("-n", "--name", metavar="NAME", help="The instance.  [the only one]")
@click.option("-s", "--snap", type=click.IntRange(14, 65536), default=4096, metavar="N", help="Bytes a packet.  [4096]")
@click.option("--seconds", type=Seconds(), metavar="S", help="End after so long.")
def capture(
    expression: tuple[str, ...], path: str, count: int | None, name: str | None, snap: int, seconds: float | None
) -> None:
    """Write packets of a running instance that match FILTER to a pcapng file, until Ctrl-C.

    A packet that is sent is there twice: as it came in, and as it went out. The comment of each says what became of
    it: "forward eth1", "drop blackhole", "punt ttl-expired"; and with several workers, which of them had it. Interfaces
    are the instance's ports. FILTER is that of `fp trace`, and looks at packets as they come in. What Linux itself
    sends and receives is not seen.
    """
    watch = Watch(name, expression, snap=snap, slots=SLOTS, count=count or 0, seconds=seconds)
    written = 0
    with contextlib.suppress(KeyboardInterrupt), _terminable(), watch, _file(path) as file:
        ports = watch.listener.ports
        writer = PcapngWriter(file, ports, snap)
        if path == "-":
            file.flush()
        else:
            click.echo(f"fp: writing to {path}, until Ctrl-C", err=True)
        try:
            by = len(watch.listener.rings) > 1  # then it is told which of them
            for _, worker, record, _ in watch:
                if record.verdict.kind == "hand-off":
                    continue  # what becomes of it, the other worker's record says
                when, verdict = watch.listener.time_ns(record), str(record.verdict)
                if (port := record.verdict.port) is not None:
                    verdict += f" {ports[port]}" if port < len(ports) else f" {port}"
                seen = f", worker {worker}" if by else ""
                if record.lost:
                    verdict += f", lost: {record.lost}"
                writer.write(record.port, when, record.data, record.length, direction=INBOUND, comment=verdict + seen)
                if port is not None and port < len(ports):
                    comment = f"{verdict}, from {ports[record.port]}{seen}"
                    length = record.length_out
                    writer.write(port, when, record.out, length, direction=OUTBOUND, comment=comment)
                written += 1
                if path == "-":
                    file.flush()
        finally:
            watch.report_loss()
    click.echo(f"fp: {written} packet{'s' * (written != 1)}", err=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM ends as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _file(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        if os.isatty(sys.stdout.fileno()):
            raise BadInput("standard output is a terminal", "write to a file, or into: tcpdump -r -")
        yield sys.stdout.buffer
        return
    try:
        file = open(path, "wb")  # noqa: SIM115 -- closed below
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}", "name a file that you may write") from None
    try:
        with file:
            yield file
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}", "what is there is complete up to a packet") from None
