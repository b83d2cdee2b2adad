"""Python classes that are also structs in compiled code, with methods and properties, and no reference counts.

    @native
    class Ring:
        base: word          # an int64, copied when the object enters compiled code
        size: constant      # part of the type: the compiler sees the number

        def slot(self, index):
            return self.base + (index & (self.size - 1)) * 8

The annotations make the constructor, in both worlds. Everything in the class body compiles when compiled code uses
it: methods, properties with setters, ``in``, indexing and ``len``. Fields are copies taken at the call and never
stored to from compiled code: a word that changes lives behind an address.

One numba type per class and set of constants. Types pickle by the name of the class, so cached code finds them.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typing.templates import AttributeTemplate, signature
from numba.extending import (
    NativeValue,
    infer_getattr,
    lower_builtin,
    lower_getattr,
    lower_setattr,
    models,
    overload,
    overload_attribute,
    overload_method,
    register_model,
    type_callable,
    typeof_impl,
    unbox,
)

from libfp.jit.policy import BOUNDSCHECK, INTERPRETED, Inner, options

C = TypeVar("C", bound=type)

#: Annotation of a field that is an int64.
word = int
#: Annotation of a field that is part of the type: a number known when compiling.
if TYPE_CHECKING:
    constant = int
else:
    constant = type("constant", (int,), {"__doc__": "Marks a compile-time constant."})

# neither C nor Python ever calls a method that has been compiled
_COMPILE = {
    "boundscheck": BOUNDSCHECK,
    "no_cfunc_wrapper": True,
    "no_cpython_wrapper": True,
    "pipeline_class": Inner,
}
_OPERATORS = {"__contains__": operator.contains, "__getitem__": operator.getitem, "__len__": len}


class NativeType(types.Type):
    """The numba type of one native class with one set of constants."""

    def __init__(self, cls: Any, constants: tuple[int, ...]) -> None:
        self.cls, self.constants = cls, constants
        values = ",".join(map(str, constants))
        super().__init__(name=f"{cls.__module__}.{cls.__qualname__}" + (f"<{values}>" if constants else ""))

    def __reduce__(self) -> Any:
        return _type_of, (self.cls.__module__, self.cls.__qualname__, self.constants)


_classes: dict[tuple[str, str], Any] = {}  # the latest class of each name


def _type_of(module: str, name: str, constants: tuple[int, ...]) -> NativeType:
    """A pickled type. Its class is there already, whatever function made it, or its module makes it."""
    if (module, name) not in _classes:
        importlib.import_module(module)
    return _classes[module, name]._native_type(constants)


def class_of(name: str) -> Any:
    """The native class whose numba type has this name (without constants), or None."""
    module, _, qualname = name.rpartition(".")
    return _classes.get((module, qualname))


@dataclass_transform()
def native(cls: C) -> C:
    """Make `cls` a struct in compiled code, too: its annotations are its fields and the arguments of its constructor.

        @native
        class Bucket:
            base: word          # an int64, copied when the object enters compiled code
            size: constant      # part of the type: the compiler sees the number

            def slot(self, index):
                return self.base + (index & (self.size - 1)) * 8

    A field may also be another native class without constants. Methods, properties with setters, ``in``, indexing and
    ``len`` compile when compiled code uses them; a class with constants is made in Python only. Fields are never stored
    to from compiled code: a word that changes lives behind an address. Raises TypeError for any other annotation.
    """
    fields = inspect.get_annotations(cls, eval_str=True)
    for name, kind in fields.items():
        nested = hasattr(kind, "_native_fields") and "constant" not in dict(kind._native_fields).values()
        if kind is not word and kind is not constant and not nested:
            raise TypeError(
                f"{cls.__qualname__}.{name}: {kind!r} is no word, constant, or native class without constants"
            )
    made: Any = cls
    made._native_fields = tuple((name, getattr(kind, "__qualname__", "")) for name, kind in fields.items())
    _add_constructor(cls, fields)
    if not INTERPRETED:
        with global_compiler_lock:  # another thread that compiles walks through what is registered
            _Compiled(cls, fields).register()
    _classes[cls.__module__, cls.__qualname__] = cls
    return cls


def _add_constructor(cls: Any, fields: dict[str, Any]) -> None:
    body = "\n".join(f"    self.{name} = {name}" for name in fields) or "    pass"
    scope: dict[str, Any] = {}
    exec(f"def __init__(self{''.join(f', {name}' for name in fields)}):\n{body}", scope)
    cls.__init__ = scope["__init__"]
    cls.__slots__ = ()
    shown = tuple(fields)
    if "__repr__" not in vars(cls):
        cls.__repr__ = lambda self: (
            f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"
        )


class _Compiled:
    """Registers one class with numba."""

    def __init__(self, cls: Any, fields: dict[str, Any]) -> None:
        self.cls = cls
        self.constants = [name for name, kind in fields.items() if kind is constant]
        self.fields = {name: kind for name, kind in fields.items() if kind is not constant}
        self.kind: Any = type(cls.__name__ + "Type", (NativeType,), {})

    def register(self) -> None:
        cls, kind, made = self.cls, self.kind, {}

        def native_type(constants: tuple[int, ...]) -> NativeType:
            if constants not in made:
                made[constants] = kind(cls, constants)
            return made[constants]

        cls._native_type = staticmethod(native_type)
        members = [
            (name, field._native_type(()) if hasattr(field, "_native_type") else types.int64)
            for name, field in self.fields.items()
        ]

        @register_model(kind)
        class Model(models.StructModel):
            def __init__(self, manager: Any, fe_type: Any) -> None:
                super().__init__(manager, fe_type, members)

        constants = self.constants
        typeof_impl.register(cls)(
            lambda value, context: native_type(tuple(int(getattr(value, name)) for name in constants))
        )
        self._unbox(members)
        self._attributes(members)
        if not constants:
            self._construct(members)
        for name, value in list(vars(cls).items()):
            if isinstance(value, property):
                self._property(name, value)
            elif inspect.isfunction(value) and name not in ("__init__", "__repr__"):
                self._method(name, value)

    def _unbox(self, members: list[tuple[str, Any]]) -> None:
        @unbox(self.kind)
        def unbox_fields(typ: Any, obj: Any, c: Any) -> NativeValue:
            native_value = cgutils.create_struct_proxy(typ)(c.context, c.builder)
            failed = cgutils.alloca_once_value(c.builder, cgutils.false_bit)
            for name, field in members:  # nothing is asked of Python once it has raised an exception
                with c.builder.if_then(c.builder.not_(c.builder.load(failed))):
                    attribute = c.pyapi.object_getattr_string(obj, name)
                    with c.builder.if_else(cgutils.is_null(c.builder, attribute)) as (missing, there):
                        with missing:
                            c.builder.store(cgutils.true_bit, failed)
                        with there:
                            given = c.unbox(field, attribute)
                            setattr(native_value, name, given.value)
                            c.builder.store(given.is_error, failed)
                            c.pyapi.decref(attribute)
            return NativeValue(native_value._getvalue(), is_error=c.builder.load(failed))

    def _attributes(self, members: list[tuple[str, Any]]) -> None:
        known = dict(members) | dict.fromkeys(self.constants, types.int64)

        @infer_getattr
        class Fields(AttributeTemplate):
            key = self.kind

            def generic_resolve(self, typ: Any, attribute: str) -> Any:
                return known.get(attribute)

        for name, _ in members:
            self._field(name)
        for at, name in enumerate(self.constants):
            self._constant(name, at)

    def _field(self, name: str) -> None:
        @lower_getattr(self.kind, name)
        def get(context: Any, builder: Any, typ: Any, value: Any) -> Any:
            return getattr(cgutils.create_struct_proxy(typ)(context, builder, value=value), name)

    def _constant(self, name: str, at: int) -> None:
        @lower_getattr(self.kind, name)
        def get(context: Any, builder: Any, typ: Any, value: Any) -> Any:
            return ir.Constant(ir.IntType(64), typ.constants[at])

    def _construct(self, members: list[tuple[str, Any]]) -> None:
        made = self.cls._native_type(())
        sig = signature(made, *[field for _, field in members])
        names = ", ".join(name for name, _ in members)

        @type_callable(self.cls)
        def typer(context: Any) -> Any:
            scope: dict[str, Any] = {"sig": sig}
            exec(f"def resolve({names}): return sig", scope)
            return scope["resolve"]

        @lower_builtin(self.cls, *[field for _, field in members])
        def construct(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = cgutils.create_struct_proxy(made)(context, builder)
            for (name, _), given in zip(members, args, strict=True):
                setattr(value, name, given)
            return value._getvalue()

    def _method(self, name: str, annotated: Callable[..., Any]) -> None:
        # overload_method wants a function with the method's own parameters that returns the implementation
        function = _bare(annotated)
        scope = {"function": function}
        exec(f"def resolve{_parameters(function)}: return function", scope)
        # What takes a literal is compiled with it at once: numba would first try without, and again at each call.
        literal = bool({str, "str"} & set(annotated.__annotations__.values()))
        made = overload_method(self.kind, name, jit_options=_COMPILE | options(annotated), prefer_literal=literal)
        made(scope["resolve"])
        if name in _OPERATORS:
            kind, arguments = self.kind, ", ".join(inspect.signature(function).parameters)
            scope = {"kind": kind, "isinstance": isinstance}
            source = f"def resolve({arguments}):\n"
            source += f"    if isinstance(self, kind):\n        return lambda {arguments}: self.{name}("
            source += f"{arguments.partition(', ')[2]})"
            exec(source, scope)
            overload(_OPERATORS[name], jit_options=_COMPILE)(scope["resolve"])

    def _property(self, name: str, value: property) -> None:
        getter: Any = _bare(value.fget)
        overload_attribute(self.kind, name, jit_options=_COMPILE)(lambda self: getter)
        if value.fset is None:
            return
        setter: Any = _bare(value.fset)

        @lower_setattr(self.kind, name)
        def set_value(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.compile_internal(builder, setter, types.void(*sig.args), args)


def _parameters(function: Callable[..., Any]) -> str:
    return f"({', '.join(map(str, inspect.signature(function).parameters.values()))})"


def _bare(function: Any) -> Any:
    """The same function without annotations, which numba would hold against the overload's signature."""
    bare = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    bare.__module__ = function.__module__
    return bare
