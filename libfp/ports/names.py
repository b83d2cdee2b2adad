"""Ports by name, as a command line has them: ``memif:/run/vpp/memif.sock,role=client,id=3,name=vpp``.

What follows the first comma are `MemifPort`'s arguments, with - for _. "memif:@name" is an abstract socket. The name,
by which routes and counters know the port, is memif0, memif1 and so on, where none is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from libfp.errors import BadInput

if TYPE_CHECKING:
    from libfp.ports.memif import MemifPort

MEMIF = "memif:"
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "role": str,
    "id": int,
    "secret": str,
    "name": str,
    "ring_size": int,
    "buffer_size": int,
    "queues": int,
    "share": str,
    "mode": lambda text: int(text, 8),
}


def is_memif(name: str) -> bool:
    """Whether `name` is a memif port's."""
    return name.startswith(MEMIF)


def memif_ports(names: Sequence[str], *, queues: int) -> list[MemifPort]:
    """The ports of these names, each of `queues` queues if it does not say otherwise. Raises BadInput."""
    from libfp.ports.memif import MemifPort

    made: list[MemifPort] = []
    for number, text in enumerate(names):
        socket, options = _parse(text)
        made.append(MemifPort(**{"name": f"memif{number}", "queues": queues, **options}, socket=socket))
    for port in made:
        if not port.name:
            raise BadInput("a memif port without a name", "leave name= out, or give one")
        if sum(port.name == other.name for other in made) > 1:
            raise BadInput(f"two ports called {port.name}", "name them: memif:SOCKET,name=NAME")
    return made


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    if not is_memif(text):
        raise BadInput(f"{text!r} is no memif port", "write memif:SOCKET,role=client,id=0")
    socket, *rest = text.removeprefix(MEMIF).split(",")
    options: dict[str, Any] = {}
    for one in rest:
        key, _, value = one.partition("=")
        key = key.replace("-", "_")
        try:
            options[key] = _OPTIONS[key](value)
        except KeyError:
            known = ", ".join(_OPTIONS).replace("_", "-")
            raise BadInput(f"{text!r} does not parse at {one!r}", f"there are {known}") from None
        except ValueError:
            kind = "octal, such as 600" if key == "mode" else "a number"
            raise BadInput(f"{text!r} does not parse at {one!r}", f"{key.replace('_', '-')} is {kind}") from None
    return socket, options
