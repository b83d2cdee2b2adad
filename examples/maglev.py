"""Balance what comes for the address VIP over BACKENDS: `maglev.py -i eth0 192.0.2.80 10.0.1.11 10.0.1.12 10.0.1.13`.

VIP is an address of this host, or routed to it; `Steer` takes it past Linux. Packets keep all but their MAC addresses,
and backends, with VIP on their loopback, answer clients themselves. They are on our links, and are asked once a second
whether they take TCP connections. To give one twice its share, name it twice.

The table is Maglev's (Eisenbud et al., NSDI 2016, 3.4): backends take turns at its slots, each in an order of its own.
Shares are equal, all balancers agree, and where a backend comes or goes, few flows move but its own. ICMP errors go to
the backend they are for (RFC 7690); fragments by addresses alone, all of a datagram together.
"""

import hashlib
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, cycle, islice, repeat

import click

from libfp import Pipeline, stage
from libfp.cli import run
from libfp.ports import XdpPort
from libfp.pyxdp import Steer, look
from libfp.stages import parse, symmetric_hash
from libfp.tables import Array

SLOTS = 65537  # a prime, and a hundred times as many as backends: then shares are right to 1 %
MAC = (1 << 48) - 1

table = Array(SLOTS)  # port << 48 | MAC address of each slot's backend; 0: there is none
macs = Array(256, value="mac")  # of our ports


@stage
def balance(packet, table, macs):
    backend = table[symmetric_hash(packet) * SLOTS >> 32]
    if backend == 0:
        packet.drop("no-backend")
    else:
        packet.ethernet.dst, packet.ethernet.src = backend & MAC, macs[backend >> 48]
        packet.forward(backend >> 48)


def slots_of(name):
    """All slots, in the order in which the backend of that name wants them."""
    digest = hashlib.sha256(name.encode()).digest()
    offset, skip = int.from_bytes(digest[:8]) % SLOTS, int.from_bytes(digest[8:16]) % (SLOTS - 1) + 1
    return ((offset + i * skip) % SLOTS for i in count())


def populate(backends):
    """Whose each slot is. Backends take turns; each takes the first slot that is still free, in its own order."""
    slots, shares = [None] * SLOTS, sorted(Counter(backends).items())
    orders = [(name, slots_of(f"{name} {copy}")) for name, copies in shares for copy in range(copies)]
    for name, order in islice(cycle(orders), SLOTS):
        slots[next(slot for slot in order if slots[slot] is None)] = name
    return slots


def healthy(address, port):
    """Whether it takes a TCP connection; Linux knows its MAC address then."""
    with suppress(OSError), socket.create_connection((address, port), 0.5):
        return True
    return False


def on_links(interfaces):
    """Where our neighbours are, as Linux knows: {address: port << 48 | MAC}."""
    with open("/proc/net/arp") as file:
        rows = [line.split() for line in file if line.split()[-1] in interfaces]
    return {row[0]: interfaces.index(row[-1]) << 48 | int(row[3].replace(":", ""), 16) for row in rows}


@click.command(help=__doc__)
@click.option("-i", "--interface", "interfaces", multiple=True, required=True, help="Where clients and backends are.")
@click.option("--check", type=click.IntRange(1, 65535), default=80, help="TCP port of the health checks; 80.")
@click.argument("vip")
@click.argument("backends", nargs=-1, required=True)
def main(interfaces, check, vip, backends):
    ports = [XdpPort(name, Steer(f"dst {vip}")) for name in interfaces]
    for number, name in enumerate(interfaces):
        macs[number] = look(name).mac
    with Pipeline(parse, balance(table, macs)).start(ports) as app, ThreadPoolExecutor() as pool:
        before = None
        while before is None or app.wait(1):
            well = [name for name, yes in zip(backends, pool.map(healthy, backends, repeat(check)), strict=True) if yes]
            ways = on_links(interfaces)  # that the checks have found
            now = {name: ways[name] for name in well if name in ways}
            if now != before:
                table.load(now.get(name, 0) for name in populate(name for name in well if name in now))
                print("backends:", ", ".join(now) or "none", flush=True)
                before = now


if __name__ == "__main__":
    sys.exit(run(main, "maglev.py"))
