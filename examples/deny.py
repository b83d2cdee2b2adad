"""Route between INTERFACES as Linux would, and drop what comes from addresses that you block while it runs.

Type an address to block it, -192.0.2.7 to let that one pass again; Ctrl-C ends.
"""

import contextlib
import sys

import click

from libfp import Error, Linux, Pipeline, stage
from libfp.cli import run
from libfp.stages import forward, parse
from libfp.tables import Hash

blocked = Hash(key="ipv4", capacity=4096)  # each core has its own copy


@stage
def deny(packet, blocked):
    if packet.is_ipv4 and packet.ipv4.src in blocked:
        packet.drop("denied")  # is a counter


def change(line):
    """Block the address in `line`, or with a minus in front, let it pass."""
    if line.startswith("-"):
        blocked.pop(line[1:], None)
    else:
        blocked[line] = True  # every core has it within a burst or two; no lock anywhere


@click.command(help=__doc__)
@click.argument("interfaces", nargs=-1, required=True)
def main(interfaces):
    with Linux(*interfaces) as linux, Pipeline(parse, deny(blocked), forward(linux)).start(linux.ports) as app:
        with contextlib.suppress(KeyboardInterrupt):
            for line in filter(None, map(str.strip, sys.stdin)):
                try:
                    change(line)
                    print("blocked:", ", ".join(blocked) or "nobody", flush=True)
                except Error as error:
                    print(error, flush=True)
            app.wait()  # nothing more will be typed
        print(f"{app.counters['denied']} packets denied")


if __name__ == "__main__":
    sys.exit(run(main, "deny.py"))
