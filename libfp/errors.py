"""Every error a user can meet: one line that names the thing, and one that names the remedy.

The command line prints ``str(error)`` and exits with status 2; the library raises the types.
"""

from __future__ import annotations

__all__ = [
    "Error",
    "MissingCapability",
    "NoSuchInterface",
    "InterfaceDown",
    "InterfaceBusy",
    "UnsuitableInterface",
    "Unsupported",
    "FrameTooSmall",
    "PolicyConflict",
    "AlreadyRunning",
    "NoSuchInstance",
    "NoAnswer",
    "CacheNotPrivate",
    "TableFull",
    "NotCacheable",
    "StageError",
    "PeerGone",
    "PeerLied",
    "PeerUnsuitable",
    "BadInput",
]


class Error(Exception):
    """Base of all libfp errors: `what` names the thing that failed, `remedy` says what to do about it."""

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}; {remedy}" if remedy else what)


class MissingCapability(Error):
    """The process lacks a Linux capability (CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF, ...)."""


class NoSuchInterface(Error):
    """No interface of that name in this network namespace."""


class InterfaceDown(Error):
    """The interface is administratively down."""


class InterfaceBusy(Error):
    """The interface already carries an XDP program, or its queue another AF_XDP socket."""


class UnsuitableInterface(Error):
    """Bond, bridge, VLAN, macvlan, loopback and the like: the fast path must sit on another device."""


class Unsupported(Error):
    """The kernel or the driver lacks a feature libfp cannot do without (AF_XDP, bpf_link, ...)."""


class FrameTooSmall(Error):
    """The interface's MTU does not fit a frame of the UMEM."""


class PolicyConflict(Error):
    """Linux would decide otherwise than libfp can: libfp refuses to be a way round the policy."""


class AlreadyRunning(Error):
    """Another libfp instance holds this name or these interfaces."""


class NoSuchInstance(Error):
    """No running libfp instance of that name."""


class NoAnswer(Error):
    """A running instance does not answer."""


class CacheNotPrivate(Error):
    """The directory of compiled code can be written by somebody else (its index is a pickle), or not by us."""


class TableFull(Error):
    """A table has no room for another entry."""


class NotCacheable(Error):
    """A stage reads a global or binds an object that cannot be part of a compiled pipeline."""


class StageError(Error):
    """A stage does what cannot be compiled: the message names the line and what is wrong there."""


class PeerGone(Error):
    """The process at the other end of a shared ring has ended, or has not come yet."""


class PeerLied(Error):
    """The process at the other end of a shared ring has stored an index that cannot be."""


class PeerUnsuitable(Error):
    """The process at the other end of a shared wire offers what cannot be used: its version, a ring, its memory."""


class BadInput(Error):
    """A file, an address, a filter or an argument that does not parse."""
