"""`fp router memif:... memif:... --routes FILE`: an application between memif ports, with routes from a file.

No Linux stands behind such a port: what the fast path cannot finish is counted and dropped, and nobody answers ARP.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from libfp.cli.routes_file import RoutesFile
from libfp.cli.running import Interrupts, Said, Settings, stopwatch
from libfp.cli.service import Service
from libfp.errors import BadInput
from libfp.ports.names import is_memif, memif_ports

if TYPE_CHECKING:
    from libfp.cli.offline import Stages


def asked_for(settings: Settings) -> bool:
    """Whether the ports are memif's, with routes from a file. Raises BadInput if only part of that is there."""
    if not any(map(is_memif, settings.interfaces)):
        return False
    others = [name for name in settings.interfaces if not is_memif(name)]
    if others:
        raise BadInput(f"memif ports beside {', '.join(others)}", "give it ports of one kind")
    if settings.routes is None:
        raise BadInput("memif ports without routes: Linux has none that lead there", "give --routes FILE")
    told = {"only": settings.only, "pcap": settings.pcap, "out": settings.out, "bypass": settings.bypass}
    told |= {"mode": settings.mode != "auto", "kick": settings.kick != "auto"}
    if said := [f"--{name}" for name, one in told.items() if one]:
        raise BadInput(f"not for memif ports: {', '.join(said)}", "leave that out")
    return True


def run(command: str, settings: Settings, stages: Stages) -> None:
    """Run until told to end. Raises BadInput, and what the ports raise."""
    table = RoutesFile(settings.routes)
    ports = memif_ports(settings.interfaces, queues=len(settings.cores or [0]))
    names = [port.name for port in ports]
    if unknown := [device for device in table.devices if device not in names]:
        raise BadInput(
            f"{table.path} has routes out of {unknown[0]}", f"name a port so: memif:SOCKET,name={unknown[0]}"
        )
    with Interrupts() as interrupts, Service(interrupts.asked) as service:
        say = Said(command, settings.as_json)
        say("compiling the pipeline (seconds at first, then from the cache)")
        from libfp import Pipeline

        routes = table.tables(names)
        linux: Any = SimpleNamespace(synced=True, routes=routes)
        interrupts.check()
        made = Pipeline(*stages(routes, names))
        largest = max((route.mtu for route in table.routes.values()), default=0)
        options = {"name": settings.name or f"{command}-{os.getpid()}", "frame_size": _frame_size(largest)}
        with made.start(ports, settings.cores, **options) as app:
            interrupts.check()
            if waiting := [port.name for port in ports if not port.connected]:
                say(f"no peer yet for {', '.join(waiting)}: it may come at any time")
            with ExitStack() as watching:
                watch = stopwatch(app, watching) if settings.profile else None
                service.run(app, say.forwarding(app, linux), when_synced=lambda: say.ready(app, linux))
                if watch is not None:
                    say.profile(app, watch.total())
            say.end(app)


def _frame_size(mtu: int) -> int:
    """Bytes of a frame for packets of `mtu` bytes, Ethernet header and tag, and the headroom: a power of 2."""
    from libfp.ports.memory import HEADROOM  # numba comes with it

    return max(2048, 1 << (mtu + 18 + HEADROOM - 1).bit_length())
