"""A `Policy` kept as the kernel's rules are, while packets pass."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from libfp.apps.firewall import ruleset, scratch
from libfp.apps.firewall.conntrack import Connections, Settings
from libfp.apps.firewall.policy import ESTABLISHED, INVALID, Policy
from libfp.apps.firewall.ranges import members
from libfp.apps.firewall.ruleset import Ruleset
from libfp.errors import BadInput, Error

__all__ = ["Following"]

log = logging.getLogger("libfp.firewall")

SHOWN = 256  # rules in one part of an answer


def require_chain(found: Ruleset, where: str = "the kernel has") -> Ruleset:
    """Raise BadInput if there is no base chain on the hook forward: nothing to apply is hardly what was meant."""
    if not found.chains:
        remedy = "make one (type filter hook forward priority 0; policy drop;), with nft or in a file for --load"
        raise BadInput(f"{where} no nftables chain on the hook forward", remedy)
    return found


def tells_invalid(found: Ruleset) -> bool:
    """Whether a packet that is invalid may fare otherwise than one of an established flow."""

    def tells(states: Any) -> bool:
        return (INVALID in members(states)) != (ESTABLISHED in members(states))

    refuses = any(rule.verdict in ("drop", "punt") for rule in found.rules)
    refuses |= any(chain.policy == "drop" for chain in found.chains)
    return refuses and any(tells(rule.fields["state"]) for rule in found.rules if "state" in rule.fields)


class Following:
    """The rules of this network namespace between ports of these names; `path` is the file of --load, or None.

    Loads that file if there is one, and then what the kernel has. Raises BadInput, Unsupported, MissingCapability; a
    file that cannot be applied is not loaded.
    """

    def __init__(self, names: Sequence[str], path: str | None = None, connections: int = 1 << 18) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.policy = Policy(names)
        if path is not None:
            self._load(path)
        first = require_chain(ruleset.read())
        settings = Settings.read()
        settings.check(tells_invalid(first))
        self.connections = Connections(settings, connections)
        self.policy.load(first)
        self._applied = {(chain.family, chain.table, chain.name) for chain in first.chains}

    def _load(self, path: str) -> None:
        found = require_chain(scratch.after_loading(path), f"{path} makes")
        self.policy.check(found)
        Settings.read().check(tells_invalid(found))
        ruleset.nft("-f", path)

    def applies(self, conflict: Any) -> bool:
        """See `Linux`: the chains on the hook forward are ours to apply."""
        if conflict.kind != "nftables" or conflict.hook != "forward":
            return False
        return (conflict.family, conflict.table, conflict.chain) in self._applied

    def changed(self) -> None:
        """Take over what the kernel has now. Raises as at first, and leaves the rules as they were: Linux forwards."""
        with self._lock:
            found = ruleset.read()
            settings = Settings.read()
            settings.check(tells_invalid(found))
            if settings != self.connections.settings:
                self.connections.apply(settings)
            before = self.policy.ruleset
            if found != before:
                self.policy.load(found)
                self._applied = {(chain.family, chain.table, chain.name) for chain in found.chains}
                if not self.policy.wait_applied():
                    log.error("a worker has not taken the rules over yet: it may hang, see fp stats")
                log.warning("rules taken over: %d where there were %d", len(found.rules), len(before.rules))

    def reload(self) -> None:
        """On SIGHUP: load the file again, if there is one, and read what the kernel has."""
        try:
            if self.path is not None:
                self._load(self.path)
            self.changed()
        except (Error, OSError) as error:
            log.error("the rules stay as they were: %s", error)
        else:
            log.warning("rules read again: %d", len(self.policy.ruleset.rules))

    def answer(self, request: dict[str, Any], caller: Any) -> Iterator[dict[str, Any]]:
        """For `app.control`: parts with "rules", each a dict: those that all workers go by."""
        with self._lock:
            shown = [
                {
                    "family": rule.chain.family, "table": rule.chain.table, "chain": rule.chain.name,
                    "handle": rule.handle, "rule": rule.text, "packets": packets, "bytes": size,
                }
                for rule, packets, size in self.policy.counted()
            ]  # fmt: skip
        for first in range(0, len(shown), SHOWN):
            yield {"rules": shown[first : first + SHOWN]}
