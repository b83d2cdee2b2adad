"""What is wrong with a stage, in one line: numba says it in a hundred, few of which are about the stage."""

from __future__ import annotations

import difflib
import dis
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType

import numba.core.errors

from libfp.errors import StageError
from libfp.jit.native import class_of

log = logging.getLogger("libfp.stage")

_NOISE = re.compile(r"Failed in nopython|- Resolution failure|>>>|There are|- Of which|Over|File |def |During|None$|\^")
_CALLED = re.compile(r"BoundFunction\(\(<class '[^']*'>, '(\w+)'\) for ([\w.]+)")
_GIVEN = re.compile(r">>> (\w+)\((.*)\)")
_PLACE = re.compile(r' at (/[^\n]+) \((\d+)\)|File "([^"]+)", line (\d+)')
_WHOSE = re.compile(r"CPUDispatcher\(<function (\w+) at")
_READ = "the tutorial's `What a stage may do` says what there is"
_NAMES = {"unicode_type": "a string that only the running stage knows", "int64": "an integer", "float64": "a float"}


def refuse_unfit(function: FunctionType, owner: str) -> None:
    """Raise StageError where a stage, or what it calls, raises an exception or prints: numba would compile it."""
    for code in _codes(function.__code__):
        for one in dis.get_instructions(code):
            if one.opname == "RAISE_VARARGS":
                what, remedy = "raises an exception", 'there is nobody to catch it: packet.drop("a-reason") is counted'
            elif one.opname == "LOAD_GLOBAL" and one.argval == "print" and "print" not in function.__globals__:
                what, remedy = "prints", "packets do not wait for that: `fp trace` shows them, a counter counts them"
            else:
                continue
            line = one.positions.lineno if one.positions else code.co_firstlineno
            raise StageError(f"{owner} ({Path(code.co_filename).name}, line {line}): it {what}", remedy)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@contextmanager
def told(functions: Sequence[FunctionType]) -> Iterator[None]:
    """Have what numba cannot compile of these, the stages, be one StageError. Its own text is logged for debugging."""
    try:
        yield
    except numba.core.errors.NumbaError as error:
        text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
        log.debug("%s", text)
        what, remedy = _said(text)
        raise StageError(f"{_where(text, functions)}: {what}", remedy) from None


def _where(text: str, functions: Sequence[FunctionType]) -> str:
    """The stage, and the innermost line of its file that is named."""
    named = {function.__name__: function for function in functions}
    owner = next((named[name] for name in _WHOSE.findall(text) if name in named), None)
    files = {function.__code__.co_filename for function in functions}
    for absolute, line, path, other in _PLACE.findall(text):
        if (found := absolute or str(Path(path).resolve())) in files:
            owner = owner or next(one for one in functions if one.__code__.co_filename == found)
            return f"stage {owner.__name__!r} ({Path(found).name}, line {line or other})"
    if owner is None:
        return "the stages"
    return f"stage {owner.__name__!r} ({Path(owner.__code__.co_filename).name}, line {owner.__code__.co_firstlineno})"


def _said(text: str) -> tuple[str, str]:
    """What is wrong, and the remedy."""
    lines = (line.strip() for line in text.splitlines())
    cause = next((line for line in lines if line and not _NOISE.match(line)), "it cannot be compiled")
    if found := re.search(r"Unknown attribute '(\w+)' of type ([\w.]+)", cause):
        return _no_attribute(*found.groups())
    if found := re.search(r"Cannot resolve setattr: \(([\w.]+)\)\.(\w+) =", cause):
        return _no_attribute(found[2], found[1])
    if found := re.match(r"(?:NameError: )?(name '\w+' is not defined)", cause):
        return found[1], "define it before the stage, or give it to the stage as an argument"
    if found := re.match(r"Untyped global name '(\w+)'.*<class 'function'>", cause):
        return f"it calls {found[1]!r}, which is not compiled", "decorate that with @kernel of libfp.jit"
    if cause.startswith("NRT required"):
        what = re.search(r'lowering "[^"]*?= (\w+)', text)
        made = {"build_list": "a list", "build_map": "a dict", "build_set": "a set"}.get(what[1] if what else "")
        return f"it makes {made or 'an object'}", "packets allocate nothing: a table bound to the stage has room"
    if cause.startswith("No implementation of function") and (given := _GIVEN.search(text)):
        return _no_call(given, _CALLED.search(text))
    return cause, _READ


def _no_attribute(name: str, type_name: str) -> tuple[str, str]:
    cls = class_of(type_name)
    has = [one for one in dir(cls) if not one.startswith("_")] if cls else []
    near = difflib.get_close_matches(name, has, 1)
    remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(has)}" if len(has) < 12 else _READ
    return f"{_short(type_name)} has no {name!r}", remedy


def _no_call(given: re.Match[str], method: re.Match[str] | None) -> tuple[str, str]:
    arguments = _arguments(given[2])
    if method is None:
        return f"{given[1]}({', '.join(arguments)}) cannot be compiled", _READ
    called = f"{_short(method[2])}.{method[1]}"
    if method[1] in ("drop", "punt"):
        return (
            f"packet.{method[1]}({', '.join(arguments[1:])}): the reason must be written out",
            f'as in packet.{method[1]}("denied"): it names a counter, which is there before the first packet',
        )
    cls = class_of(method[2])
    function = getattr(cls, method[1], None)
    takes = function.__code__.co_varnames[1 : function.__code__.co_argcount] if function else ()
    return f"{called}({', '.join(arguments[1:])}) is no call of it", f"it takes ({', '.join(takes)})"


def _arguments(text: str) -> list[str]:
    return [_short(one) for one in re.split(r", (?![^(<\[]*[)>\]])", text)]


@functools.cache
def _short(name: str) -> str:
    """A type as a user would call it."""
    if literal := re.fullmatch(r"Literal\[(\w+)\]\((.*)\)", name):
        return repr(literal[2]) if literal[1] == "str" else literal[2]
    return _NAMES.get(name, name.partition("<")[0].rpartition(".")[2])
