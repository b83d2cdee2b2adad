"""The cost of the walk as text: what each part of the workers' loops takes of a packet's time."""

from __future__ import annotations

from typing import Any


def rows(lap: dict[str, Any]) -> list[tuple[str, float]]:
    """Part and nanoseconds a packet, in the order of the walk, of what `libfp.engine.listen.Stopwatch` has measured."""
    return [(row["part"], row["ns"]) for row in lap["parts"]]


def lines(lap: dict[str, Any]) -> list[str]:
    """For people."""
    packets, bursts = lap["packets"], lap["bursts"]
    if not packets:
        return ["no packets to measure the loop with"]
    parts = rows(lap)
    width = max(len(name) for name, _ in parts)
    whole = sum(ns for _, ns in parts)
    said = [f"{whole:.1f} ns a packet, of {packets:,} packets in bursts of {packets / bursts:.1f}; of these"]
    said += [f"  {name:{width}} {ns:9.1f} ns {100 * ns / whole:5.1f} %" for name, ns in parts]
    return [*said, f"  and {lap['idle_ns'] / 1e9:.1f} s without packets"]
