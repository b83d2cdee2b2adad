"""How Sphinx builds these pages: `make docs`, into build/docs. Nothing is fetched from anywhere.

The reference in `api` is written by the docstrings: a block

    ```{public} libfp.tables
    ```

stands for the docstring of that module and of everything in its `__all__`, in that order. Docstrings are plain text
with `names` in backticks and programs indented by four, not reStructuredText: `as_rst` makes it of them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.pycode import ModuleAnalyzer

# Kernels and entry points are plain functions then, and nothing is compiled.
os.environ["NUMBA_DISABLE_JIT"] = "1"

import libfp
from libfp.engine import Stage

HERE = Path(__file__).parent

project, author, copyright = "libfp", "The libfp authors", "The libfp authors, Apache-2.0"  # noqa: A001
release = version = libfp.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["bench/*.json"]

html_theme, html_title = "furo", f"libfp {release}"
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
html_copy_source = False

myst_heading_anchors = 3
highlight_language = "default"

default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r".*"),  # what is in backticks need not be a name; what is one, and documented, becomes a link
    (r"py:class", r"(?!libfp\.).*"),  # of Python and of numpy, which are documented elsewhere
    (r"py:class", r"libfp\.[\w.]+\.[A-Z]"),  # type variables
    # what only the engine and tables hand to each other
    (r"py:class", r"libfp\.(tables\.words\.Words|tables\.table\.Subscriber|engine\.replicas\.Replicas)"),
    (r"py:class", r"libfp\.(stages\.next_hops\.NextHopsView|ports\.rings\.RingAddresses|jit\.cache\.Entry)"),
    (r"py:class", r"libfp\.ports\.(rings\.PortBlocks|frames\.BlockWords|memif_rings\.MemifRings)"),
    (r"py:class", r"libfp\.apps\.ipsec\.(record\.SasView|policies\.PoliciesView)"),
]

#: What other calls return, or stages are given, as all views: how they are made is no part of the surface.
NOT_MADE_BY_USERS = {
    "libfp.engine.Bindable",
    "libfp.engine.BoundStage",
    "libfp.engine.Counters",
    "libfp.engine.Stage",
    "libfp.engine.Worker",
    "libfp.packet.Burst",
    "libfp.packet.Packet",
    "libfp.ports.Port",
    "libfp.pyxdp.Attachment",
    "libfp.rings.SharedSpsc",
    "libfp.tables.FlowEntry",
    "libfp.tables.FlowPart",
    "libfp.tables.Table",
    "libfp.testing.netns.Host",
    "libfp.testing.ping.PingResult",
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100


_PUBLIC = re.compile(r"^```\{public\} ([\w.]+)\n```$", re.MULTILINE)


@functools.cache
def modules() -> tuple[str, ...]:
    """The documented modules, as the pages name them; `libfp` itself first."""
    pages = sorted(HERE.glob("api/*.md"))
    return tuple(sorted({name for page in pages for name in _PUBLIC.findall(page.read_text())}))


@functools.cache
def homes() -> dict[int, str]:
    """Under which name each class and function is described, by identity: once, though several modules export it."""
    found: dict[int, str] = {}
    for name in modules():
        module = importlib.import_module(name)
        for member in module.__all__:
            found.setdefault(id(getattr(module, member)), f"{name}.{member}")
    return found


def _expand(app: Any, page: str, source: list[str]) -> None:
    """Put directives of autodoc in the place of a page's `{public}` blocks; links to files that are pages here."""
    source[0] = source[0].replace("(../bench/README.md)", "(measuring.md)")
    if page == "index":  # of applications whose page is still to come nothing is said
        there = {one.stem for one in HERE.glob("*.md")}
        source[0] = re.sub(r"^(\w+)\n", lambda one: one[0] if one[1] in there else "", source[0], flags=re.M)
    source[0] = _PUBLIC.sub(lambda found: "```{eval-rst}\n" + _directives(found[1]) + "```", source[0])


def _directives(name: str) -> str:
    module = importlib.import_module(name)
    text = f".. automodule:: {name}\n\n"
    for member in module.__all__:
        value, full = getattr(module, member), f"{name}.{member}"
        if member == "__version__":
            continue
        if callable(value) and homes()[id(value)] != full:
            text += f"`{member}`\n   is :py:obj:`{homes()[id(value)]}`.\n\n"
        elif inspect.isclass(value):
            kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
            text += f".. {kind}:: {full}\n   :members:\n   :show-inheritance:\n\n"
        else:
            text += f".. autofunction:: {full}\n\n" if callable(value) else _data(module, member, value)
    return text


def _data(module: Any, member: str, value: Any) -> str:
    """A constant, with the `#:` comment of the module that it is from."""
    for name, one in sorted(sys.modules.items()):
        if name.startswith(module.__name__) and getattr(one, member, None) is value and one.__file__:
            found = ModuleAnalyzer.for_module(name).find_attr_docs().get(("", member))
            if found:
                doc = "\n   ".join(as_rst(found))
                return f".. py:data:: {member}\n   :module: {module.__name__}\n\n   {doc}\n\n"
    raise LookupError(f"{module.__name__}.{member} has no `#:` comment")


_MARKED = re.compile(r"``.+?``|`[^`]+`")
_NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText: what is indented by four is a program, all else is text."""
    made: list[str] = []
    program = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and indented != program:
            program = indented
            made += ["", "::", ""] if program else [""]
        made.append(line if program else _escape(line))
    return made


def _escape(line: str) -> str:
    made, at = "", 0
    for found in _MARKED.finditer(line):
        made += _plain(line[at : found.start()])
        inside, at = found.group().strip("`"), found.end()
        mark = f"`{inside}`" if _NAME.fullmatch(inside) else f"``{inside}``"
        made += ("\\ " if made and not made[-1].isspace() else "") + mark
        made += "\\ " if at < len(line) and not line[at].isspace() else ""
    return made + _plain(line[at:])


def _plain(text: str) -> str:
    return re.sub(r"([\\*|]|_\b|`)", r"\\\1", text)


def _docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    if isinstance(value, Stage):
        given = ", ".join(list(inspect.signature(value.function).parameters)[1:])
        use = f"`{value.__name__}({given})`" if given else f"`{value.__name__}`"
        lines[:0] = [f"A stage of {'bursts' if value.per_burst else 'packets'}; in a pipeline: {use}.", ""]
    lines[:] = as_rst(lines)


def _signature(app: Any, what: str, name: str, value: Any, options: Any, given: str, returned: str) -> Any:
    """What users are given and never make is shown without a constructor."""
    return ("", returned) if name in NOT_MADE_BY_USERS or name.endswith("View") else None


def _bases(app: Any, name: str, value: Any, options: Any, bases: list[Any]) -> None:
    bases[:] = [base for base in bases if base is not object] or bases


def _skip(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    return True if str(getattr(value, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Any) -> None:
    app.connect("source-read", _expand)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-bases", _bases)
    app.connect("autodoc-skip-member", _skip)
    app.add_lexer("nft", TextLexer)  # rulesets: Pygments has none for them
