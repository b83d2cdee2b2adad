"""Route between INTERFACES as Linux would, and let each source address send RATE packets a second.

The sources of each worker are flows of its own, of which only one end counts: they come with their first packet, go a
minute after their last, and when there are too many, make room for each other. Ctrl-C prints the worst.
"""

import sys

import click

from libfp import Linux, Pipeline, stage
from libfp.cli import run
from libfp.stages import forward, parse
from libfp.tables import Flow

CREDIT, SEEN, DROPPED = range(3)  # in hundredths of a packet; ticks of 10 ms; packets

sources = Flow(capacity=1_000_000, capacity6=100_000, value=("u64", "u64", "u64"), timeouts=[60])


@stage
def limit(packet, sources, rate, burst):
    """A token bucket a source: `burst` packets at once, `rate` a second."""
    if packet.is_ipv4:
        source = sources.enter4(packet.ipv4.src, 0, 0, 0, 0)
    elif packet.is_ipv6:
        source = sources.enter6(packet.ipv6.src, 0, (0, 0), 0, 0)
    else:
        return
    source.touch()
    now = source.age
    credit = 100 * burst if source.new else source.value(CREDIT) + rate * (now - source.value(SEEN))
    credit = min(credit, 100 * burst)
    source.set_value(SEEN, now)
    if credit < 100:
        source.set_value(CREDIT, credit)
        source.add(DROPPED, 1)
        packet.drop("over-rate")
    else:
        source.set_value(CREDIT, credit - 100)


def worst(count=10):
    """The sources that lost most: (packets, address)."""
    lost = [(source.value[DROPPED], key.src) for part in sources.parts for key, source in part.items()]
    return sorted(lost, reverse=True)[:count]


@click.command(help=__doc__)
@click.argument("rate", type=click.IntRange(1))
@click.argument("interfaces", nargs=-1, required=True)
def main(rate, interfaces):
    with Linux(*interfaces) as linux:
        pipeline = Pipeline(parse, limit(sources, rate, max(1, rate // 10)), forward(linux))
        with pipeline.start(linux.ports) as app:
            app.wait()
            print(f"{app.counters['over-rate']} packets dropped")
            for packets, address in worst():
                print(f"{packets:10}  {address}")


if __name__ == "__main__":
    sys.exit(run(main, "rate_limit.py"))
