"""The control of the gateway: a file's SAs and policies into the stages' tables and into the kernel, now and at a
SIGHUP, and what `fp ipsec sas` asks for."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from libfp.apps.ipsec import TABLES, config, xfrm
from libfp.apps.ipsec.policies import Policies, Policy
from libfp.apps.ipsec.sa import Sa, SaTable
from libfp.cli import journal, running
from libfp.errors import BadInput, Error
from libfp.tables.table import Table

if TYPE_CHECKING:
    from libfp import Linux, Pipeline
    from libfp.engine.application import Application

__all__ = ["Gateway", "Settings"]

log = logging.getLogger("libfp.ipsec")

PATIENCE = 1.0  # seconds that a worker may take to see what is new
_PR_SET_DUMPABLE = 4


class Settings(running.Settings):
    """Options, and what the file says beside them: `config`. Raises BadInput, and has changed nothing then.

    There are keys in this process from here on: it leaves no core.
    """

    #: Tables of the file beside its options: `tables` of `libfp.cli.options.Command`.
    TABLES = TABLES

    config: config.Config

    def reread(self) -> dict[str, Any]:
        """See `libfp.cli.running.Settings`. Raises BadInput without a file."""
        if self.file is None:
            raise BadInput("no --config", "name the file with the SAs and policies")
        without_cores()
        told = super().reread()
        self.config = config.read(self.file)
        return told


class Gateway:
    """See `running.run` for the order in which its methods are called."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._now = settings.config
        self._sas: dict[Any, tuple[config.SaLine, Sa]] = {}
        self._failed, self._began = "", False

    def run(self, command: str) -> None:
        """From here to its end, as `fp COMMAND`."""
        running.run(
            command,
            self.settings,
            self.pipeline,
            opening=self.opening,
            started=self.started,
            reload=self.reload,
        )

    def opening(self, undo: ExitStack) -> Mapping[str, Any]:
        """The kernel's policies, then the SAs and ours. Raises BadInput, AlreadyRunning, PolicyConflict,
        MissingCapability, Unsupported."""
        first = self._now
        require_forwarding(first.versions, self.settings.interfaces)
        xfrm.require_enabled(self.settings.interfaces)
        self._kernel = undo.enter_context(xfrm.Kernel(xfrm.wanted(first)))
        undo.callback(self._leave)
        warn_of_foreign(first.locals)
        _make_folder(first)
        self.table = undo.enter_context(SaTable(state=first.state))
        self.policies = Policies(self.table, default=first.default)
        self._add(first.sas)
        self.policies.load(_policies(first))
        self.table.start(failed=self._not_kept)
        take = [f"proto esp and dst {local}" for local in first.locals]
        return {"applies": self._kernel.applies, "policy_changed": self._kernel.keep, "take": take}

    def pipeline(self, linux: Linux) -> Pipeline:
        """Of `stages`, over the policies as they are now."""
        from libfp import Pipeline

        self._kernel.keep()  # what has changed before anybody listened
        return Pipeline(*self.stages(linux))

    def stages(self, linux: Linux) -> Sequence[Any]:
        """Those of `libfp.apps.ipsec.stages`; they read `table` and `policies`."""
        from libfp.apps.ipsec.stages import decrypt, protect, select, to_sa, to_tunnel
        from libfp.stages import forward, parse

        sas, policies = self.table, self.policies
        ways = select(sas, policies, linux)
        return parse, to_sa(sas), decrypt(sas, policies), ways, to_tunnel(sas), protect(sas), forward(linux)

    def started(self, app: Application, linux: Linux) -> None:
        """It runs: no policies of an earlier file any more; `fp ipsec sas` may ask."""
        self._began = True
        self._kernel.only(xfrm.wanted(self._now))
        app.control.add("sas", lambda request, caller: {"sas": self.shown()})

    def shown(self) -> list[dict[str, Any]]:
        """The SAs, without keys."""
        return [
            {
                "tunnel": sa.tunnel,
                "direction": sa.direction,
                "spi": sa.spi,
                "local": str(sa.local),
                "remote": str(sa.remote),
                "esn": sa.esn,
                "window": sa.window if sa.direction == "in" else None,
                "sequence": sa.sequence,
                "remaining": sa.remaining,
                "exhausted": sa.exhausted,
                "counters": sa.counters,
            }
            for _, sa in list(self._sas.values())
        ]

    # -- SIGHUP

    def reload(self) -> None:
        """Take over the SAs and policies of the file, or none of them."""
        told = self.settings.config
        try:
            new, gone = self._differences(told)
            self._change(told, new, gone)
        except (Error, OSError) as error:
            log.error("the SAs and policies stay as they were: %s", error)
        else:
            log.warning(
                "read again: %d SAs new, %d gone, %d policies in force", len(new), len(gone), len(told.policies)
            )
        finally:
            for line in told.sas:
                line.secret.wipe()

    def _differences(self, told: config.Config) -> tuple[list[config.SaLine], list[Any]]:
        """SAs that are new, and the names of those that are gone. Raises BadInput for what takes a restart."""
        for name in ("default", "state"):
            if getattr(told, name) != getattr(self._now, name):
                raise BadInput(f"{told.path}: {name} has changed", "that takes a restart")
        if foreign := set(told.locals) - set(self._now.locals):
            raise BadInput(f"{told.path}: the local address {min(foreign)} is new", "that takes a restart")
        require_forwarding(told.versions, self.settings.interfaces)
        xfrm.require_enabled(self.settings.interfaces)
        new = []
        for line in told.sas:
            if line.names not in self._sas:
                new.append(line)
            elif self._sas[line.names][0] != line:
                what = f"{told.path}, line {line.line}: the SA with SPI {line.spi:#x} has changed"
                raise BadInput(what, "a new key, or anything else that is new, takes a new SPI")
        return new, list(self._sas.keys() - {line.names for line in told.sas})

    def _change(self, told: config.Config, new: Sequence[config.SaLine], gone: Sequence[Any]) -> None:
        before = xfrm.wanted(self._now)
        try:
            self._kernel.tighten(xfrm.wanted(told))
            self._add(new)
            self.policies.load(_policies(told))
            _wait_applied(self.policies)
        except BaseException:
            for line in new:
                self._remove(line.names)
            self._kernel.change(before)
            raise
        for names in gone:
            self._remove(names)
        self._now = told
        self._kernel.change(xfrm.wanted(told))

    def _add(self, lines: Sequence[config.SaLine]) -> None:
        """Inbound ones first: the peer may use its new one as soon as it has seen ours."""
        for line in sorted(lines, key=lambda line: line.direction != "in"):
            sa = Sa(
                line.tunnel,
                line.direction,
                spi=line.spi,
                local=line.local,
                remote=line.remote,
                key=line.secret,
                esn=line.esn,
                window=line.window,
            )
            if sa.direction == "out":
                _wait_applied(self.table)  # with those coming in
            self.table.add(sa)
            self._sas[line.names] = line, sa
        self.table.keep()  # so that they may send at once

    def _remove(self, names: Any) -> None:
        if names in self._sas:
            self.table.remove(self._sas.pop(names)[1])

    # -- words

    def _not_kept(self, error: Exception) -> None:
        if str(error) != self._failed:
            self._failed = str(error)
            log.error("sequence numbers cannot be written down, so that soon nothing more is sent: %s", error)

    def _leave(self) -> None:
        """The end: of a start that has come to nothing, nothing is left."""
        if not self._began:
            self._kernel.undo()
            return
        stay = "the XFRM policies stay in the kernel, nothing goes in clear"
        journal.say(f"fp ipsec: {stay}; fp ipsec release --config {self.settings.file}")


def _wait_applied(what: SaTable | Policies) -> None:
    """Until all workers go by it; one that is stuck is not waited for."""
    for table in what.stage_tables():
        if not isinstance(table, Table):  # what workers have for themselves
            continue
        try:
            table.wait_applied(PATIENCE)
        except TimeoutError as error:
            log.warning("%s", error)


def without_cores() -> None:
    """From now on this process leaves no core, and only root may look into it: there are keys in it (prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("a core of this process would have keys: %s", os.strerror(ctypes.get_errno()))


def _make_folder(told: config.Config) -> None:
    try:
        os.makedirs(told.state.parent, mode=0o700, exist_ok=True)
    except OSError as error:
        what = f"cannot make the folder of {told.state}: {error.strerror}"
        raise BadInput(what, 'write state = "/a/folder/of/yours/ipsec.json"') from None


def warn_of_foreign(addresses: Sequence[str]) -> None:
    """Warn of `local` addresses that this host has not (yet): no ESP will come to it."""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind((address, 0))
            except OSError as error:
                log.warning("%s is no address of this host: %s", address, error.strerror)


def require_forwarding(versions: set[int], interfaces: Sequence[str]) -> None:
    """Raise BadInput where Linux does not forward these IP versions, inner or outer: it would get all such packets."""
    for version in sorted(versions):
        scopes = ["all"] if version == 6 else interfaces
        for scope in scopes:
            try:
                with open(f"/proc/sys/net/ipv{version}/conf/{scope}/forwarding") as file:
                    forwards = file.read().strip() != "0"
            except OSError:
                continue  # no such interface: somebody else says so
            if not forwards:
                which = "net.ipv6.conf.all.forwarding" if version == 6 else f"net.ipv4.conf.{scope}.forwarding"
                raise BadInput(f"Linux does not forward IPv{version} (sysctl {which})", f"sysctl -w {which}=1")


def _policies(told: config.Config) -> list[Policy]:
    return [Policy(line.action, str(line.source), str(line.destination), tunnel=line.tunnel) for line in told.policies]
