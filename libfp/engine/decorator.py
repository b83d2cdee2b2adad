"""Stages: Python functions of a packet, or of a burst, and what is bound to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

from libfp.errors import NotCacheable
from libfp.jit import kernel


@runtime_checkable
class Bindable(Protocol):
    """What a stage can be given besides numbers, strings, tuples and native objects: something that each worker sees
    through an object of its own."""

    def stage_tables(self) -> Iterable[Any]:
        """The tables of which each worker needs a replica."""

    def stage_view(self, replica: Callable[[Any], Any]) -> Any:
        """The native object one worker's stage receives; `replica(table)` is that worker's view of a table.

        If its class has a method ``each_turn``, the loop calls it once a turn: see `libfp.tables.PerWorker`.
        """


class Stage:
    """A compiled step of a pipeline. Calling it binds objects to the parameters after the first.

    Made by `stage` or `stage.burst`; `function` stays plain Python. Put it, or what calling it returns, into a
    `Pipeline`.
    """

    def __init__(self, function: FunctionType, per_burst: bool, headers_only: bool = False) -> None:
        functools.update_wrapper(self, function)
        self.headers_only = headers_only
        self.function = function
        self.per_burst = per_burst
        self.kernel = kernel(function)
        self._parameters = list(inspect.signature(function).parameters)
        if not self._parameters:
            what = f"stage {function.__name__!r} takes no parameter"
            raise NotCacheable(what, f"its first is the {'burst' if per_burst else 'packet'}")

    def __call__(self, *arguments: Any, **named: Any) -> BoundStage:
        """Bind `arguments` to the stage's parameters after the first. TypeError if they do not fit."""
        bound = inspect.signature(self.function).bind(None, *arguments, **named)
        bound.apply_defaults()
        return BoundStage(self, tuple(bound.args[1:]))

    def __repr__(self) -> str:
        return f"<stage {self.__name__}>"

    __name__: str


class BoundStage:
    """A stage with its arguments."""

    def __init__(self, stage: Stage, arguments: tuple[Any, ...]) -> None:
        self.stage, self.arguments = stage, arguments
        for name, value in zip(stage._parameters[1:], arguments, strict=True):
            _refuse_unbindable(stage, name, value)

    def __repr__(self) -> str:
        return f"<stage {self.stage.__name__}({', '.join(map(repr, self.arguments))})>"


def is_constant(value: Any) -> bool:
    """Numbers, strings and tuples of them: part of the compiled code."""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    return value is None or isinstance(value, int | str)


def _refuse_unbindable(stage: Stage, name: str, value: Any) -> None:
    if is_constant(value) or isinstance(value, Bindable) or hasattr(type(value), "_native_fields"):
        return
    what = f"stage {stage.__name__!r} cannot bind {name}={value!r} ({type(value).__name__})"
    raise NotCacheable(what, "bind a table, a Linux, a native object, a number, a string or a tuple")


def as_bound(given: Stage | BoundStage) -> BoundStage:
    """`given`, with nothing bound if it is a bare stage. Raises NotCacheable if it needs arguments."""
    if isinstance(given, BoundStage):
        return given
    if isinstance(given, Stage):
        try:
            return given()
        except TypeError as error:
            raise NotCacheable(f"stage {given.__name__!r} in the pipeline: {error}", "bind it by calling it") from None
    raise NotCacheable(f"{given!r} is not a stage", "decorate the function with @stage or @stage.burst")


class _StageDecorator:
    """``@stage`` for functions of a packet, ``@stage.burst`` for functions of a burst.

    A stage sets verdicts; it never frees or sends. ``@stage def deny(packet, blocked)`` runs for each live packet,
    inlined into the worker's loop; ``@stage.burst def route(burst, fib)`` once a burst, whose ``burst.count`` packets
    are all live when it begins.
    """

    def __call__(self, function: Callable[..., Any]) -> Stage:
        assert isinstance(function, FunctionType)
        return Stage(function, per_burst=False)

    def burst(self, function: Callable[..., Any]) -> Stage:
        assert isinstance(function, FunctionType)
        return Stage(function, per_burst=True)

    def headers_only(self, made: Stage) -> Stage:
        """``@stage.headers_only`` above ``@stage``: it reads and writes nothing of a packet behind the first 192 bytes
        that were received (`libfp.ports.frames.HEADERS`). Where all stages say so, a port may leave the rest where it
        is."""
        return Stage(made.function, made.per_burst, headers_only=True)


stage = _StageDecorator()
