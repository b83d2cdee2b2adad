"""Verdicts: what becomes of a packet. A 32-bit word: four bits of kind, then 28 bits of reason, or
the port a forwarded packet leaves by.

A reason is a string literal in a stage. Compiled code stores its hash, a constant; the pipeline, which knows every
literal its stages hold, maps hashes back to names and counters. So compiled code depends on no numbering and can be
cached, and two pipelines in one process never disagree.
"""

from __future__ import annotations

from numba.core import types
from numba.extending import overload

from libfp.jit import INTERPRETED

LIVE, FORWARD, DROP, PUNT, CONSUME = range(5)
KIND_SHIFT = 28
REASON_MASK = (1 << KIND_SHIFT) - 1
PORT_MASK = 0xFFFF

#: How each kind is called in outcomes, counters and traces.
KINDS = {LIVE: "pass", FORWARD: "forward", DROP: "drop", PUNT: "punt", CONSUME: "consume"}


def reason_code(reason: str) -> int:
    """The 28-bit code of a reason: FNV-1a, folded. Compiled code takes string literals only."""
    value = 0x811C9DC5
    for byte in reason.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return (value >> 4 ^ value) & REASON_MASK


if not INTERPRETED:

    @overload(reason_code, prefer_literal=True)
    def _reason_code(reason):  # type: ignore[no-untyped-def]  # numba compares the annotations of both
        if not isinstance(reason, types.StringLiteral):  # type: ignore[attr-defined]
            return None
        code = reason_code(reason.literal_value)
        return lambda reason: code
