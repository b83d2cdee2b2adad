"""libfp: a packet fast path for Linux, written in Python and compiled by numba.

`import libfp` is cheap: a name is loaded from its module when it is first used, and only then numba, pyroute2 and
cffi with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from libfp.lazy import lazy

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

__all__, __getattr__, __dir__ = lazy(__name__, {
    "engine": "Pipeline stage",
    "linux": "Linux",
    "errors": """
        AlreadyRunning BadInput CacheNotPrivate Error FrameTooSmall InterfaceBusy InterfaceDown MissingCapability
        NoAnswer NoSuchInstance NoSuchInterface NotCacheable PeerGone PeerLied PeerUnsuitable PolicyConflict StageError
        TableFull UnsuitableInterface Unsupported
    """,
})  # fmt: skip
__all__ += ["__version__"]
