"""Functions of libfp's own on disk, compiled, for new pipelines to be linked from.

Most of what a pipeline takes to compile goes into the functions that libfp gives it, which are the same in the next
one. Each is kept by a name that says all it depends on: `libfp.jit.cache.digest_of` its module, where it is defined in
that, and the types of its arguments; so only functions whose source is in such a digest are, and types made there.

Its symbol is that name, too: code that has been kept in one process and code that another compiles never meet under
one name by accident. What would leave other symbols behind in it is not kept.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
import time
from copy import copy
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
from numba import _dynfunc
from numba.core import types
from numba.core.compiler import compile_result
from numba.core.environment import _rebuild_env

from libfp.errors import Error

_END = "\0"
_types: Any = types
_PLAIN = (_types.Integer, _types.Boolean, _types.NoneType, _types.Array)
_folders: dict[str, Path] = {}
_symbols: set[str] = set()  # of what is kept, in this process


def name_of(function: Any, args: tuple[Any, ...], flags: Any) -> str:
    """What `function` is kept by when it is compiled for arguments of these types; empty if it cannot be."""
    from libfp.jit.cache import digest_of

    module = sys.modules.get(getattr(function, "__module__", ""))
    if (
        not isinstance(function, FunctionType)
        or module is None
        or function.__closure__
        or function.__globals__ is not vars(module)
    ):
        return ""
    told = [digest_of(function.__module__), *(_told(kind, digest_of) for kind in args)]
    if not all(told):
        return ""
    code = function.__code__
    inputs = (function.__module__, function.__qualname__, str(code.co_firstlineno), *told, flags.summary())
    return f"{function.__name__}_{hashlib.sha256(_END.join(inputs).encode()).hexdigest()[:32]}"


def _told(kind: Any, digest_of: Any) -> str:
    """All that a type is, in words; empty if that cannot be said."""
    if isinstance(kind, _types.StringLiteral):
        return f"literal {kind.literal_value!r}"
    if isinstance(kind, _types.Omitted) and isinstance(kind.value, int | None):
        return f"omitted {kind.value!r}"
    cls = getattr(kind, "cls", None)
    if cls is not None and hasattr(cls, "_native_fields"):
        there = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls
        digest = digest_of(cls.__module__)
        return f"{kind} {digest}" if there and digest else ""
    if isinstance(kind, _types.BaseTuple):
        parts = [_told(one, digest_of) for one in kind]
        return f"tuple ({', '.join(parts)})" if all(parts) else ""
    return str(kind) if isinstance(kind, _PLAIN) else ""


def folder() -> Path:
    """Where they are; those of another version, which nobody has used for long, are removed. Raises CacheNotPrivate."""
    from libfp.jit.cache import KEEP_SECONDS, base_digest, directory, refuse_shared

    home = directory() / "parts"
    key = f"{home} {base_digest()}"
    if key not in _folders:
        made = home / base_digest()[:24]
        for one in (home, made):
            one.mkdir(mode=0o700, exist_ok=True)
            refuse_shared(one)
        os.utime(made)
        for other in home.iterdir():
            if other.stat().st_mtime < time.time() - KEEP_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        _folders[key] = made
    return _folders[key]


def load(name: str, state: Any, make_library: Any) -> Any:
    """The function of that name as numba's compiler would return it, or None."""
    try:
        fndesc, signature, bitcode, symbols = pickle.loads((folder() / name).read_bytes())
        module = llvm.parse_bitcode(bitcode)
    except Exception:  # it is not there; or cut short, and compiled again
        return None
    context = state.targetctx
    library = make_library(context.codegen(), fndesc.qualname)
    library._final_module = module
    library._finalize_final_module()
    _symbols.update(symbols)
    environment = _rebuild_env(fndesc.modname, [], fndesc.env_name)
    stands_for = stand_in(fndesc, environment, library)
    context.insert_user_function(stands_for, fndesc, [library])
    return compile_result(
        target_context=context,
        typing_context=state.typingctx,
        entry_point=stands_for,
        typing_error=None,
        type_annotation="",
        library=library,
        call_helper=None,
        signature=signature,
        objectmode=False,
        lifted=(),
        fndesc=fndesc,
        environment=environment,
        metadata=None,
        reload_init=[],
    )


def stand_in(fndesc: Any, environment: Any, library: Any) -> Any:
    """An object by which callers find a function that has no machine code of its own."""
    return _dynfunc.make_function(fndesc.lookup_module(), "inner", "", 0, environment, (library,))


def save(name: str, made: Any) -> None:
    """Keep what has been compiled, if nothing in it is of this process alone."""
    library, fndesc = made.library, copy(made.fndesc)
    module = library._final_module
    _symbols.add(fndesc.mangled_name)
    symbols = {one.name for one in module.functions if not one.is_declaration}
    if library.has_dynamic_globals or made.reload_init or made.environment.consts or not symbols <= _symbols:
        return
    fndesc.typemap = fndesc.calltypes = None
    try:
        data = pickle.dumps((fndesc, made.signature, module.as_bitcode(), symbols))
        partial = folder() / f".{name}.{os.getpid()}"
        partial.write_bytes(data)
        partial.rename(partial.with_name(name))
    except (OSError, Error, pickle.PicklingError, TypeError, AttributeError):
        return  # it is compiled again then
