"""How hot code is compiled: the one place where numba's options are chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import AnalysisPass, register_pass
from numba.core.typed_passes import AnnotateTypes, NativeLowering

from libfp.errors import CacheNotPrivate
from libfp.jit import parts

F = TypeVar("F", bound=Callable[..., Any])

#: The plain-Python mode (``NUMBA_DISABLE_JIT=1``): every stage, table and ring runs interpreted, with checked memory.
INTERPRETED = bool(numba.config.DISABLE_JIT)

#: The boundscheck build (``LIBFP_BOUNDSCHECK=1``): every compiled load and store is held against the known regions.
BOUNDSCHECK = os.environ.get("LIBFP_BOUNDSCHECK", "") not in ("", "0") and not INTERPRETED

# nogil: workers run beside Python. error_model: no ZeroDivisionError path in a loop. _nrt=False: reference counting
# and allocation do not exist in hot code, so using either is a compile error instead of a slow packet. The wrapper for
# C callers is something nobody here calls.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": BOUNDSCHECK,
    "_nrt": False,
    "no_cfunc_wrapper": True,
}


class _InnerLibrary(JITCodeLibrary):
    """The code of a function that only compiled code calls: LLVM's own, to be linked into that of its callers.

    Optimised already, although its callers are, too: without that a fourth less compile time, and slower packets.
    """

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=False, analysis_only=True)
class _ToInnerLibrary(AnalysisPass):
    _name = "libfp_to_inner_library"

    def __init__(self) -> None:
        AnalysisPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        state.library = _InnerLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        return True


@register_pass(mutates_CFG=False, analysis_only=True)
class _ForCallers(AnalysisPass):
    """What numba does when it has machine code: let callers find the function, by an object that stands for it."""

    _name = "libfp_for_callers"

    def __init__(self) -> None:
        AnalysisPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        made, library = state.cr, state.library
        stands_for = parts.stand_in(made.fndesc, made.env, library)
        state.cr = made._replace(cfunc=stands_for)
        state.targetctx.insert_user_function(stands_for, made.fndesc, [library])
        return True


class Inner(CompilerBase):
    """numba's compiler without machine code, for what is linked into its callers: an eighth of compile time less.

    What is libfp's own is compiled once and kept (`libfp.jit.parts`).
    """

    _kept_as = ""

    def compile_extra(self, func: Any) -> Any:
        state = self.state
        plain = not (BOUNDSCHECK or state.return_type or state.locals)
        name = parts.name_of(func, state.args, state.flags) if plain else ""
        if not name:
            return super().compile_extra(func)
        made = parts.load(name, state, _InnerLibrary)
        if made is None:
            self._kept_as = name
            made = super().compile_extra(func)
            parts.save(name, made)
        return made

    def _compile_bytecode(self) -> Any:
        if self._kept_as:
            self.state.func_id.unique_id = int(self._kept_as[-32:], 16)  # a part of the symbol
        return super()._compile_bytecode()

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_ToInnerLibrary, AnnotateTypes)
        passes.add_pass_after(_ForCallers, NativeLowering)
        passes.finalize()
        return [passes]


def inline(function: F) -> F:
    """Have the compiler put this kernel, or method of a native class, into its callers, however long it is.

    For what a loop calls for each element, where passing the arguments takes as long as the work. Below `kernel`.
    """
    function.forceinline = True  # type: ignore[attr-defined]
    return function


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """What `function` itself asks of numba."""
    return {"forceinline": True} if getattr(function, "forceinline", False) else {}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` for the hot path: for stages and other kernels to call, with int64 and native objects.

    No object of Python's, no exception, no allocation: using one is an error when the pipeline is compiled.

    Never cached by itself: numba would link a stale object into a new caller. Only generated modules are cached
    (`libfp.jit.cache`), whose names are hashes of everything they reach.
    """
    if INTERPRETED:
        return function
    own = _OPTIONS | options(function)
    return _lean(
        numba.njit(**own)(function), numba.njit(no_cpython_wrapper=True, pipeline_class=Inner, **own)(function)
    )


def _lean(dispatcher: Any, inner: Any) -> Any:
    """Have compiled callers of `dispatcher` use `inner`, and spare numba what they need not: most of compile time.

    That is the wrapper for callers in Python, and a version of the function for each literal it is called with; LLVM
    sees the constants anyway, where the function is inlined.
    """
    resolve = inner.get_call_template
    dispatcher.get_overload = inner.get_overload
    dispatcher._compiling_counter = inner._compiling_counter  # numba asks it whether a call is a recursion

    def plain(kind: Any) -> Any:
        literal = isinstance(kind, types.IntegerLiteral | types.BooleanLiteral)
        return kind.literal_type if literal else kind

    def get_call_template(args: Any, kws: Any) -> Any:
        return resolve(tuple(map(plain, args)), {name: plain(kind) for name, kind in kws.items()})

    dispatcher.get_call_template = get_call_template
    return dispatcher


def cached_kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` and keep the result on disk. For generated modules alone: see `libfp.jit.cache`."""
    if INTERPRETED:
        return function
    if BOUNDSCHECK:  # the address of the region table is baked in
        return numba.njit(**_OPTIONS)(function)
    config = numba.config  # beside the module, whose directory was checked, whatever NUMBA_CACHE_DIR says
    elsewhere = config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES
    config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = "", "InTreeCacheLocator"
    try:
        made = numba.njit(cache=True, **_OPTIONS)(function)
    finally:
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = elsewhere
    save = made._cache.save_overload

    def keep(signature: Any, compiled: Any) -> None:
        try:
            save(signature, compiled)
        except OSError as error:
            raise cannot_keep(os.path.dirname(function.__code__.co_filename), error) from None

    made._cache.save_overload = keep
    return made


def cannot_keep(folder: Any, error: OSError) -> CacheNotPrivate:
    """What to raise where compiled code finds no place, on a full disk for one."""
    what = f"cannot keep compiled code in {folder} ({error.strerror})"
    return CacheNotPrivate(what, "make room there, or set LIBFP_CACHE_DIR to a directory of your own")
