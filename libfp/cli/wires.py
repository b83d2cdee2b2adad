"""`fp router memif:... memif:... --routes FILE`: an application between memif ports, with routes from a file.

No Linux stands behind such a port: what the fast path cannot finish is counted and dropped, and nobody answers ARP.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from libfp.cli.routes_file import RoutesFile
from libfp.cli.running import Interrupts, Said, Settings
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
    if settings.only or settings.pcap is not None or settings.out is not None:
        raise BadInput("--only, --pcap and --out are not for memif ports", "leave them out")
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
        from libfp import Pipeline

        routes = table.tables(names)
        linux: Any = SimpleNamespace(synced=True, routes=routes)
        interrupts.check()
        say("compiling the pipeline (seconds at first, then from the cache)")
        made = Pipeline(*stages(routes, names))
        with made.start(ports, settings.cores, name=settings.name or None) as app:
            interrupts.check()
            service.run(app, say.forwarding(app, linux), when_synced=lambda: say.ready(app, linux))
            say.end(app)
