"""Everything the machine code of a stage depends on, as text to hash: what numba's own cache does not look at.

Walks from a function through the functions, native classes and globals it names, in its bytecode. libfp's own hot
modules are in every hash already (`libfp.jit.cache.base_digest`) and contribute only their reasons.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import re
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numba.core.caching import NullCache
from numba.core.types import Type

from libfp.engine.decorator import Stage, is_constant
from libfp.engine.mistakes import refuse_unfit
from libfp.errors import NotCacheable
from libfp.jit.cache import Entry, is_hot

_REASON = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}", re.IGNORECASE)
_VERSIONED = ("numpy", "numba", "llvmlite", "math", "builtins", "operator", "typing", "_operator")
_EMPTY = object()


class Digest:
    """Collects `parts`, text that changes whenever the compiled code must, and `strings`, possible reasons."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.strings: set[str] = set()
        self.hands_off = False  # whether something in it calls `hand_off`
        self._seen: set[int] = set()

    def text(self) -> str:
        return "\n".join(self.parts)

    def merge(self, other: Digest) -> None:
        self.parts += other.parts
        self.strings |= other.strings
        self._seen |= other._seen

    def add_function(self, function: Any, owner: str) -> None:
        """`function` and everything it reaches; `owner` is how errors call the stage."""
        if id(function) in self._seen or function.__module__.startswith("libfp.jit."):
            return
        self._seen.add(id(function))
        code: CodeType = function.__code__
        hot = is_hot(function.__module__)
        if not hot:
            self.parts.append(f"def {function.__module__}.{function.__qualname__}{function.__defaults__!r}")
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._add_code(code, function, cells, owner, hot)

    def _add_code(self, code: CodeType, function: Any, cells: dict[str, Any], owner: str, hot: bool) -> None:
        self.hands_off |= "hand_off" in code.co_names and function.__module__ != "libfp.packet.burst"
        constants = []
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._add_code(constant, function, cells, owner, hot)
                continue
            constants.append(constant)
            if constant != function.__doc__:
                self.add_strings(constant)
        if not hot:
            # a docstring is no part of the machine code, nor is where the file lies
            kept = [c for c in constants if not (isinstance(c, str) and c == function.__doc__)]
            self.parts.append(f"{code.co_code.hex()} {kept!r} {code.co_names!r} {code.co_varnames!r}")
        for path, value in _reads(code, function.__globals__, cells):
            self._add_value(path, value, owner, hot)

    def _add_value(self, path: str, value: Any, owner: str, hot: bool) -> None:
        if isinstance(value, Stage | Entry):
            value = value.function
        elif hasattr(value, "py_func"):
            _refuse_cached(path, value, owner)
            value = value.py_func
            if not is_hot(value.__module__):
                refuse_unfit(value, owner)
        if is_constant(value) or isinstance(value, float | bytes | np.generic):
            self.parts.append(f"{path} = {type(value).__name__} {value!r}")
            self.add_strings(value)
        elif isinstance(value, FunctionType):
            if value.__module__.partition(".")[0] not in _VERSIONED:
                self.add_function(value, owner)
        elif inspect.isclass(value) and hasattr(value, "_native_fields"):
            self._add_class(value, owner)
        elif not hot and not _versioned(value):
            what = f"{owner} reads the global {path!r}, a {type(value).__name__}, which cannot be compiled in"
            raise NotCacheable(what, "bind it to the stage, or make it a number, a string or a tuple")

    def add_strings(self, value: Any) -> None:
        """The reasons that `value`, a constant, may be or hold."""
        if isinstance(value, tuple):
            for one in value:
                self.add_strings(one)
        elif isinstance(value, str) and _REASON.fullmatch(value):
            self.strings.add(value)

    def add_object(self, value: Any) -> None:
        """The classes of a native object and of those in its fields."""
        self._add_class(type(value), type(value).__qualname__)
        for name, _ in value._native_fields:
            if hasattr(type(field := getattr(value, name)), "_native_fields"):
                self.add_object(field)

    def _add_class(self, cls: Any, owner: str) -> None:
        if id(cls) in self._seen:
            return
        self._seen.add(id(cls))
        self.parts.append(f"class {cls.__module__}.{cls.__qualname__} {cls._native_fields!r}")
        for value in vars(cls).values():
            for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
                if isinstance(function, FunctionType) and function.__name__ not in ("__init__", "<lambda>", "__repr__"):
                    self.add_function(function, owner)


def _refuse_cached(path: str, value: Any, owner: str) -> None:
    if not isinstance(getattr(value, "_cache", None), NullCache | None):
        what = f"{owner} calls {path!r}, which numba caches by itself: its code would outlive what it is made of"
        raise NotCacheable(what, "decorate it with libfp.jit.kernel")


def _versioned(value: Any) -> bool:
    """A module, type or function of a library whose version is in every hash; a value never is."""
    if isinstance(value, ModuleType):
        home = value.__name__
    elif isinstance(value, Type | np.ufunc):
        home = type(value).__module__
    elif callable(value):
        home = getattr(value, "__module__", None) or ""
    else:
        return False
    return home.partition(".")[0] in _VERSIONED


def _reads(code: CodeType, scope: dict[str, Any], cells: dict[str, Any]) -> list[tuple[str, Any]]:
    """The values a function reads by name: globals, closure cells, and attributes of modules among them."""
    found, path, value = [], "", _EMPTY
    for instruction in [*(one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG"), None]:
        if (
            instruction is not None
            and isinstance(value, ModuleType)
            and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        ):
            path, value = f"{path}.{instruction.argval}", getattr(value, instruction.argval, _EMPTY)
            continue
        if value is not _EMPTY:
            found.append((path, value))
        path, value = "", _EMPTY
        if instruction is None:
            break
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            path, value = name, scope.get(name, getattr(builtins, str(name), _EMPTY))
        elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in cells:
            path, value = name, cells[name].cell_contents
    return found
