"""Balance what comes for the address VIP over BACKENDS: `maglev.py -i eth0 192.0.2.80 10.0.1.11 10.0.1.12 10.0.1.13`.

VIP is an address of this host, or routed to it; `Steer` takes it past Linux. Packets keep all but their MAC addresses,
and backends, with VIP on their loopback, answer clients themselves. They are on our links, and are asked once a second
whether they take TCP connections. To give one twice its share, name it twice.

The table is Maglev's (Eisenbud et al., NSDI 2016, 3.4): backends take turns at its slots, each in an order of its own.
Shares are equal, all balancers agree without talking, and where a backend comes or goes, few flows move but its own.
ICMP errors go to the backend whose packet they are about (RFC 7690). Fragments go by addresses alone: all of a datagram
to one backend, though not to that of the flow's whole packets; TCP sends none.
"""

import hashlib
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, repeat

import click

from libfp import Pipeline, stage
from libfp.cli import run
from libfp.ports.xdp import XdpPort
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


def populate(weights):
    """Whose each slot is, given {name: weight}: with half the weight of another, a backend has half as many turns."""
    slots, left, most = [None] * SLOTS, SLOTS, max(weights.values(), default=0)
    orders, due = {name: slots_of(name) for name in sorted(weights)}, dict.fromkeys(weights, 0)
    while orders and left:
        for name, order in orders.items():
            due[name] += weights[name]
            if due[name] >= most and left:
                due[name] -= most
                slots[next(slot for slot in order if slots[slot] is None)] = name
                left -= 1
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
    weights, before = Counter(backends), None
    with Pipeline(parse, balance(table, macs)).start(ports) as app, ThreadPoolExecutor() as pool:
        while before is None or app.wait(1):
            well = dict(zip(weights, pool.map(healthy, weights, repeat(check)), strict=True))
            now = {name: way for name, way in on_links(interfaces).items() if well.get(name)}
            if now != before:
                table.load(now.get(name, 0) for name in populate({name: weights[name] for name in now}))
                print("backends:", ", ".join(now) or "none", flush=True)
                before = now


if __name__ == "__main__":
    sys.exit(run(main, "maglev.py"))
