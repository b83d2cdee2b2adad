"""Pairs of a plain-Python definition and the instructions that numba emits in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import Signature, signature
from numba.extending import lower_builtin, type_callable

F = TypeVar("F", bound=Callable[..., Any])

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
MASK64 = (1 << 64) - 1


def signed64(value: int) -> int:
    """The int64 with the low 64 bits of `value`: what a register would hold."""
    return ((value & MASK64) ^ (1 << 63)) - (1 << 63)


def primitive(emit: Callable[..., Any], *, void: bool = False) -> Callable[[F], F]:
    """Let compiled code use `emit(context, builder, *int64 values)` where it calls the decorated function.

    The decorated function is the definition: it runs from Python and in the interpreted mode. All arguments are
    int64, the result too, unless `void`.
    """

    def pair(python: F) -> F:
        arity = len(inspect.signature(python).parameters)
        result = types.void if void else types.int64
        sig = signature(result, *[types.int64] * arity)

        @type_callable(python)
        def typer(context: Any) -> Any:
            names = ", ".join(f"a{i}" for i in range(arity))
            scope = {"check": lambda *given: sig if all(_integer(one) for one in given) else None}
            exec(f"def resolve({names}): return check({names})", scope)
            return scope["resolve"]

        @lower_builtin(python, *[types.int64] * arity)
        def lower(context: Any, builder: Any, sig: Signature, args: Any) -> Any:
            value = emit(context, builder, *args)
            return context.get_dummy_value() if void else value

        return python

    return pair


def _integer(given: Any) -> bool:
    return isinstance(given, (types.Integer, types.Boolean, types.IntegerLiteral))


def declare(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An LLVM intrinsic of the module being built."""
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)
