"""Verdicts: what becomes of a packet. A 32-bit word: four bits of kind, then 28 bits of reason, or
the port a forwarded packet leaves by, or the worker that goes on with one that is handed off.

A reason is a string literal in a stage. Compiled code stores its hash, a constant; the pipeline, which knows every
literal its stages hold, maps hashes back to names and counters. So compiled code depends on no numbering and can be
cached, and two pipelines in one process never disagree.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import lower_builtin, type_callable

from libfp.jit import INTERPRETED

LIVE, FORWARD, DROP, PUNT, CONSUME, HAND_OFF = range(6)
KIND_SHIFT = 28
REASON_MASK = (1 << KIND_SHIFT) - 1
PORT_MASK = 0xFFFF

#: How each kind is called in outcomes, counters and traces.
KINDS = {LIVE: "pass", FORWARD: "forward", DROP: "drop", PUNT: "punt", CONSUME: "consume", HAND_OFF: "hand-off"}


def reason_code(reason: str) -> int:
    """The 28-bit code of a reason: FNV-1a, folded. Compiled code takes string literals only."""
    value = 0x811C9DC5
    for byte in reason.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return (value >> 4 ^ value) & REASON_MASK


if not INTERPRETED:
    _Literal = types.StringLiteral  # type: ignore[attr-defined]

    @type_callable(reason_code)
    def _of_literal(context):  # type: ignore[no-untyped-def]
        return lambda reason: signature(types.int64, reason) if isinstance(reason, _Literal) else None

    @lower_builtin(reason_code, _Literal)
    def _constant(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return ir.Constant(ir.IntType(64), reason_code(sig.args[0].literal_value))
