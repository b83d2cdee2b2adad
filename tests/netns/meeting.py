"""A wire between two ports whose stages count flows: ``python meeting.py NAME PORT,PORT CORE,... MAC,MAC,... OPTIONS``.

The addresses are those of a frame sent by the first port, its destination first, then by the second.

It prints {"name": NAME} when it forwards. To each line on its standard input it answers with what it has counted of the
flows from UDP port 7000 + n to the same port: as packets arrived, and where `by_flow` has brought them, for each n, for
each worker, how many came in by each port.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from libfp import Pipeline, stage
from libfp.jit import Arena, load32, load64, native, store32, store64, word
from libfp.ports.xdp import XdpPort
from libfp.stages import by_flow, parse

FLOWS, FIRST = 16, 7000


@native
class Tally:
    """64 bytes for each flow and worker, of which there are two: a count for each port."""

    at: word

    def add(self, packet):  # type: ignore[no-untyped-def]
        if packet.is_udp:
            flow = packet.udp.sport - FIRST
            if flow >= 0 and flow < FLOWS and packet.udp.dport - FIRST == flow:
                at = self.at + 128 * flow + 64 * (packet.worker & 1) + 8 * (packet.port & 1)
                store64(at, load64(at) + 1)


@stage
def arrive(packet, tally):  # type: ignore[no-untyped-def]
    tally.add(packet)


@stage
def meet(packet, tally):  # type: ignore[no-untyped-def]
    tally.add(packet)


@native
class Ends:
    """16 bytes for each port: what a frame sent by it begins with."""

    at: word


@stage
def cross(packet, ends):  # type: ignore[no-untyped-def]
    at = ends.at + 16 * (1 - packet.port)
    store64(packet.data, load64(at))
    store32(packet.data + 8, load32(at + 8))
    packet.forward(1 - packet.port)


def main(name: str, ports: str, cores: str, macs: str, options: str) -> None:
    tallies = [Arena(128 * FLOWS) for _ in range(2)]
    arrived, met = (Tally(one.address) for one in tallies)

    def counted(tally: Arena) -> Any:
        return tally.words.reshape(FLOWS, 2, 8)[:, :, :2].tolist()

    ends = Arena(32)
    for number, mac in enumerate(macs.split(",")):
        ends.buffer[16 * (number >> 1) + 6 * (number & 1) :][:6] = bytes.fromhex(mac.replace(":", ""))
    pipeline = Pipeline(parse, arrive(arrived), by_flow, meet(met), cross(Ends(ends.address)))
    opened = [XdpPort(port) for port in ports.split(",")]
    with pipeline.start(opened, list(map(int, cores.split(","))), name=name, **json.loads(options)):
        print(json.dumps({"name": name}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"arrived": counted(tallies[0]), "met": counted(tallies[1])}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
