"""What a running application answers to those who look at its packets and its time: `tap`, `clock` and `explain`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from libfp.engine.control import Caller
from libfp.errors import BadInput
from libfp.jit import clock_hz
from libfp.jit.clock import now

if TYPE_CHECKING:
    from libfp.engine.application import Application


def offer(app: Application) -> None:
    """Let the application's control answer them."""
    clock_hz()  # measured now: 20 ms

    def stages() -> dict[str, Any]:
        names = [bound.stage.__name__ for bound in app.pipeline.stages]
        return {"stages": names, "hz": clock_hz(), "ticks": now(), "ns": time.time_ns()}

    def tap(request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Copies of packets, from now until the caller goes: the rings' file descriptors come with the answer."""
        count, snap = _number(request, "slots", 1024), _number(request, "snap", 256)
        rings = app.taps.open(count=count, snap=snap)
        caller.on_close(lambda: app.taps.close(rings))
        caller.attach(*(one.fd for one in rings.memory))
        verdicts = app.pipeline.reasons.verdicts
        return {**stages(), "slots": count, "snap": snap, "verdicts": verdicts, "ports": [p.name for p in app.ports]}

    def clock(request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Ticks by stage, counted until the caller goes: the pages' file descriptors come with the answer."""
        pages = app.taps.open_clock()
        caller.on_close(app.taps.close_clock)
        caller.attach(*(one.fd for one in pages))
        return stages()

    def explain(request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """The table entry that decided about a packet, given its next hop's number and its first bytes in hex."""
        try:
            packet = bytes.fromhex(str(request.get("packet", "")))
        except ValueError as error:
            raise BadInput(f"a packet that is no hexadecimal number: {error}") from None
        return {"entry": app.pipeline.explain(_number(request, "next_hop", 0), packet)}

    app.control.add("now", lambda request, caller: stages())
    app.control.add("tap", tap)
    app.control.add("clock", clock)
    app.control.add("explain", explain)


def _number(request: dict[str, Any], name: str, default: int) -> int:
    value = request.get(name, default)
    if type(value) is not int:
        raise BadInput(f"{name} is {value!r}", "give a number")
    return value
