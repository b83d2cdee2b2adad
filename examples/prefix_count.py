"""Route between INTERFACES as Linux would, and count by destination prefix: a live table, the busiest first.

FILE has a prefix a line, and may be what `ip route` prints: `(ip route; ip -6 route) | prefix_count.py - eth0 eth1`.
Each packet counts for the longest prefix that holds its destination. Ctrl-C ends.
"""

import sys
from contextlib import suppress

import click
import rich
from rich.live import Live
from rich.table import Table

from libfp import Linux, Pipeline, stage
from libfp.cli import run
from libfp.errors import BadInput
from libfp.jit import Arena, load64, native, store64, word
from libfp.stages import forward, parse
from libfp.tables import Lpm4, Lpm6, PerWorker

names = ["everything else"]  # of prefixes, by their numbers
prefixes, prefixes6 = Lpm4(), Lpm6()  # to numbers; what they do not hold is number 0


@native
class Rows:
    """A worker's own counters, which nobody else writes: two words a prefix."""

    at: word

    def add(self, number, length):
        row = self.at + 16 * number
        store64(row, load64(row) + 1)
        store64(row + 8, load64(row + 8) + length)


class Part:
    def __init__(self, rows):
        self.memory = Arena(16 * rows)
        self.view, self.close = Rows(self.memory.address), self.memory.close


class Counters(PerWorker):
    def make(self, worker):
        return Part(len(names))

    def totals(self):
        """(packets, bytes) by number, of all workers together."""
        return sum(part.memory.words[: 2 * len(names)].reshape(-1, 2) for part in self.parts).tolist()


counters = Counters()


@stage
def count(packet, prefixes, prefixes6, counters):
    number = 0
    if packet.is_ipv4:
        number = prefixes.lookup(packet.ipv4.dst)
    elif packet.is_ipv6:
        number = prefixes6.lookup(*packet.ipv6.dst)
    counters.add(number, packet.length)


def read(file):
    """Number the prefixes in `file`: the first word of each line."""
    for line, words in enumerate(map(str.split, file), 1):
        if not words or words[0] == "default":
            continue
        try:
            (prefixes6 if ":" in words[0] else prefixes)[words[0]] = len(names)
        except BadInput as error:
            raise BadInput(f"{file.name}:{line}: {error.what}", error.remedy) from None
        names.append(words[0])


def busiest(rows=20):
    """A table of what has counted, by bytes."""
    table = Table("prefix", "packets", "bytes", box=None)
    found = [(size, packets, name) for (packets, size), name in zip(counters.totals(), names, strict=True) if packets]
    for size, packets, name in sorted(found, reverse=True)[:rows]:
        table.add_row(name, str(packets), str(size))
    return table


@click.command(help=__doc__)
@click.argument("file", type=click.File())
@click.argument("interfaces", nargs=-1, required=True)
def main(file, interfaces):
    read(file)
    with Linux(*interfaces) as linux:
        pipeline = Pipeline(parse, count(prefixes, prefixes6, counters), forward(linux))
        with pipeline.start(linux.ports) as app:
            with suppress(KeyboardInterrupt), Live(transient=True) as screen:  # Ctrl-C while it draws
                screen.console.print(f"counting by {len(names) - 1} prefixes; Ctrl-C ends with the table")
                while app.wait(1):
                    screen.update(busiest())
            rich.print(busiest())


if __name__ == "__main__":
    sys.exit(run(main, "prefix_count.py"))
