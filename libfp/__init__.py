"""libfp: a packet fast path for Linux, written in Python and compiled by numba.

`import libfp` is cheap: a name is loaded from its module when it is first used, and only then numba, pyroute2 and
cffi with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from libfp.engine import Pipeline as Pipeline
    from libfp.engine import stage as stage
    from libfp.errors import AlreadyRunning as AlreadyRunning
    from libfp.errors import BadInput as BadInput
    from libfp.errors import CacheNotPrivate as CacheNotPrivate
    from libfp.errors import Error as Error
    from libfp.errors import FrameTooSmall as FrameTooSmall
    from libfp.errors import InterfaceBusy as InterfaceBusy
    from libfp.errors import InterfaceDown as InterfaceDown
    from libfp.errors import MissingCapability as MissingCapability
    from libfp.errors import NoAnswer as NoAnswer
    from libfp.errors import NoSuchInstance as NoSuchInstance
    from libfp.errors import NoSuchInterface as NoSuchInterface
    from libfp.errors import NotCacheable as NotCacheable
    from libfp.errors import PeerGone as PeerGone
    from libfp.errors import PeerLied as PeerLied
    from libfp.errors import PeerUnsuitable as PeerUnsuitable
    from libfp.errors import PolicyConflict as PolicyConflict
    from libfp.errors import StageError as StageError
    from libfp.errors import TableFull as TableFull
    from libfp.errors import UnsuitableInterface as UnsuitableInterface
    from libfp.errors import Unsupported as Unsupported
    from libfp.linux import Linux as Linux

_ERRORS = (
    "AlreadyRunning",
    "BadInput",
    "CacheNotPrivate",
    "Error",
    "FrameTooSmall",
    "InterfaceBusy",
    "InterfaceDown",
    "MissingCapability",
    "NoAnswer",
    "NoSuchInstance",
    "NoSuchInterface",
    "NotCacheable",
    "PeerGone",
    "PeerLied",
    "PeerUnsuitable",
    "PolicyConflict",
    "StageError",
    "TableFull",
    "UnsuitableInterface",
    "Unsupported",
)
_HOME = {
    "Linux": "libfp.linux",
    "Pipeline": "libfp.engine",
    "stage": "libfp.engine",
    **dict.fromkeys(_ERRORS, "libfp.errors"),
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
