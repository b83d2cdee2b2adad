"""What nftables would make of a file, tried in a network namespace of its own: the host's rules are not touched."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from libfp.apps.firewall import ruleset
from libfp.apps.firewall.ruleset import Ruleset
from libfp.errors import BadInput, Error, MissingCapability
from libfp.linux.tap import open_tap

CLONE_NEWNET = 0x40000000
_FLUSHES = re.compile(r"^\s*flush\s+ruleset\b", re.MULTILINE)


def text_of(path: str) -> str:
    """What is in the file of rules at `path`. Raises BadInput."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "name a file of rules for nft -f") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text", "name a file of rules for nft -f") from None


def after_loading(path: str) -> Ruleset:
    """The rules that this thread's network namespace would have after ``nft -f PATH``. Raises what `ruleset.read` does,
    naming file and line where nft does.
    """
    text = text_of(path)
    present = "" if _FLUSHES.search(text) else ruleset.nft("-s", "list", "ruleset")
    links = [name for _, name in socket.if_nameindex() if name != "lo" and name in text + present]
    return _read(path, present, links)


def of_file(path: str, links: Iterable[str]) -> Ruleset:
    """The rules that a network namespace with these links would have after ``nft -f PATH``."""
    return _read(path, "", [name for name in links if name != "lo"])


def _read(path: str, present: str, links: list[str]) -> Ruleset:
    def inside() -> Ruleset:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            what = f"cannot make a network namespace to try rules in: {os.strerror(ctypes.get_errno())}"
            raise MissingCapability(what, "run as root, or with CAP_SYS_ADMIN")
        with contextlib.ExitStack() as undo:
            for name in links:
                undo.callback(os.close, open_tap(name))
            if present.strip():
                try:
                    ruleset.nft("-f", "-", text=present)
                except Error as error:
                    what = f"the rules that the kernel has cannot be tried together with those of {path}: {error.what}"
                    raise BadInput(what, f"begin {path} with: flush ruleset") from None
            ruleset.nft("-f", os.path.abspath(path))
            return ruleset.read()

    with ThreadPoolExecutor(1, "libfp-scratch") as thread:  # with its end the namespace is gone
        return thread.submit(inside).result()
