"""The policies in the kernel, as XFRM policies: what gets past the fast path must not leave in clear.

For a policy from S to D (as packets leave) the kernel has four: S > D out and forwarded, D > S in and forwarded. They
block what is to be protected or discarded, and allow what may pass; Linux's first match is the file's, by priority.
They are in force before the first packet is taken, they are put back when somebody removes them, and they stay when
the application ends, however it does: Linux then drops what would have been protected. `release` removes them.

The range of priorities tells ours from others; one `fp ipsec` at a time has a network namespace to itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from libfp.apps.ipsec.config import Config
from libfp.errors import AlreadyRunning, Error, PolicyConflict, Unsupported
from libfp.linux import xfrm
from libfp.linux.conflict import Conflict
from libfp.pyxdp.system import missing_capability

log = logging.getLogger("libfp.ipsec")

FIRST, LAST = 0x6C660000, 0x6C66FFFF  # priorities: of the first policy of a file; of what none covers
RETRY = 1.0  # seconds until a policy that could not be put back is tried again
LOCK = "\0libfp-ipsec"  # an abstract socket: there is one of that name in a network namespace
MULTICAST6 = "ff02::/16"


def wanted(config: Config) -> list[xfrm.Policy]:
    """What the kernel is to have for a file: of several with one selector and direction the first."""
    found: dict[tuple[str, str, str], xfrm.Policy] = {}

    def want(source: object, destination: object, directions: Sequence[str], action: str, priority: int) -> None:
        family = socket.AF_INET6 if ":" in str(source) else socket.AF_INET
        for direction in directions:
            key = str(source), str(destination), direction
            found.setdefault(key, xfrm.Policy(family, key[0], key[1], direction, action, priority))

    for number, policy in enumerate(config.policies):
        action = "allow" if policy.action == "bypass" else "block"
        if str(policy.destination) == "::/0":  # neighbours are asked for at multicast addresses
            want(policy.source, MULTICAST6, ["out"], "allow", FIRST + number)
        want(policy.source, policy.destination, ["out", "fwd"], action, FIRST + number)
        want(policy.destination, policy.source, ["in", "fwd"], action, FIRST + number)
    if config.default == "discard":
        want("0.0.0.0/0", "0.0.0.0/0", ["fwd"], "block", LAST)
        if os.path.exists("/proc/sys/net/ipv6"):
            want("::/0", "::/0", ["fwd"], "block", LAST)
    return list(found.values())


@dataclass
class Difference:
    """Between what is wanted and what the kernel has."""

    missing: list[xfrm.Policy]
    stale: list[xfrm.Policy]  # ours, with a selector that nothing wants


def _key(policy: xfrm.Policy) -> tuple[str, str, str]:
    return policy.source, policy.destination, policy.direction


def _ours(policy: xfrm.Policy) -> bool:
    return policy.plain and FIRST <= policy.priority <= LAST


def _there() -> list[xfrm.Policy]:
    """All that the kernel has. Raises MissingCapability."""
    try:
        return xfrm.policies()
    except PermissionError as error:
        raise missing_capability("reading XFRM policies", "CAP_NET_ADMIN") from error


def compare(policies: Iterable[xfrm.Policy]) -> Difference:
    """Raises PolicyConflict where somebody else's policy has a selector that one of ours needs."""
    due = {_key(policy): policy for policy in policies}
    found = _there()
    there = [policy._replace(number=0) for policy in found]
    for policy in there:
        if policy.plain and _key(policy) in due and not _ours(policy):
            raise PolicyConflict(f"{policy} is in the place of one that fp ipsec needs", "remove it (ip xfrm policy)")
    held = set(there)
    return Difference(
        [policy for policy in due.values() if policy not in held],
        [policy for policy in found if _ours(policy) and _key(policy) not in due],
    )


class Kernel:
    """Has the kernel hold `policies`, beside what an earlier run has left to block until `only` or `change` is called.
    Made in the network namespace that it is for: a context manager, whose end leaves them there.

    Raises AlreadyRunning, PolicyConflict, MissingCapability, Unsupported.
    """

    def __init__(self, policies: Sequence[xfrm.Policy]) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._closed = False
        self._wanted: list[xfrm.Policy] = []
        self._held: frozenset[xfrm.Policy] = frozenset()
        self._instance = _alone()
        try:
            self._before = [policy._replace(number=0) for policy in _there() if _ours(policy)]
            self.add(policies)
        except BaseException:
            self._instance.close()
            raise

    def change(self, policies: Sequence[xfrm.Policy]) -> None:
        """Have these instead, the new ones before the old ones go. Raises as the constructor does: then those before
        are in force."""
        self.add(policies)
        self.only(policies)

    def add(self, policies: Sequence[xfrm.Policy]) -> None:
        """Have these, and of what there was only what blocks: an old allowance must not go before a new block. Of a
        selector that is there the new action and priority. See `change`."""
        with self._lock:
            before, keys = self._wanted, {_key(policy) for policy in policies}
            kept = (policy for policy in before if policy.action == "block" and _key(policy) not in keys)
            self._want([*kept, *policies])
            try:
                self._put(self._wanted)
                found = compare(self._wanted)
                if found.missing:
                    raise Unsupported(f"the kernel does not hold {found.missing[0]}", "see ip xfrm policy")
                for policy in found.stale:
                    if policy.action == "allow":
                        xfrm.remove(policy)
            except BaseException:
                self._want(before)
                self._put(before)
                raise

    def tighten(self, policies: Sequence[xfrm.Policy]) -> None:
        """On the way to these: `add` those that block, and no allowance that there is not now. See `change`."""
        compare(policies)  # what it raises for the others it should raise now
        allowed = {_key(policy) for policy in self._wanted if policy.action == "allow"}
        self.add([policy for policy in policies if policy.action == "block" or _key(policy) in allowed])

    def only(self, policies: Sequence[xfrm.Policy]) -> None:
        """Have no others than these of what `add` was told, now or by an earlier run."""
        with self._lock:
            self._want(policies)
            for policy in compare(policies).stale:
                xfrm.remove(policy)

    def undo(self) -> None:
        """Have what was there before this was made: for a start that has come to nothing."""
        self.change(self._before)

    def _want(self, policies: Sequence[xfrm.Policy]) -> None:
        self._wanted, self._held = list(policies), frozenset(policies)

    def _put(self, policies: Sequence[xfrm.Policy]) -> int:
        """Add what is missing; how many those were."""
        missing = compare(policies).missing
        try:
            for policy in missing:
                xfrm.add(policy, replace=True)
        except PermissionError as error:
            raise missing_capability("installing XFRM policies", "CAP_NET_ADMIN") from error
        except OSError as error:
            what = f"this kernel takes no {policy}: {os.strerror(error.errno or 0)}"
            raise Unsupported(what, "fp ipsec needs XFRM: modprobe xfrm_user") from error
        return len(missing)

    def applies(self, conflict: Conflict) -> bool:
        """See `libfp.Linux`: whether this is one of ours."""
        if conflict.kind != "xfrm" or not conflict.direction:
            return False
        fields = {name: getattr(conflict, name) for name in xfrm.Policy._fields if name != "number"}
        return xfrm.Policy(**fields) in self._held

    def keep(self) -> None:
        """Put back what has gone. Nothing is raised: Linux alone would be worse. See `libfp.Linux` policy_changed."""
        with self._lock:
            if self._closed:
                return
            try:
                count = self._put(self._wanted)
            except (Error, OSError) as error:
                log.error("XFRM policies of fp ipsec are gone and cannot be put back: %s", error)
                self._timer = threading.Timer(RETRY, self.keep)
                self._timer.daemon = True
                self._timer.start()
                return
        if count:
            log.warning("%d XFRM policies of fp ipsec were gone or changed: they are back", count)

    def close(self) -> None:
        """Stop looking after them. They stay."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
        self._instance.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _alone() -> socket.socket:
    """Held as long as this is the only one in this network namespace."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(LOCK)
        lock.listen(1)
    except OSError:
        lock.close()
        what = f"fp ipsec runs already in this network namespace{_holder()}"
        raise AlreadyRunning(what, "end it: the policies in the kernel are for all interfaces") from None
    return lock


def _holder() -> str:
    """Who has the lock: anybody can take an abstract name."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as asking,
        contextlib.suppress(OSError),
    ):
        asking.connect(LOCK)
        pid, user, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f" (process {pid} of user {user})"
    return ""


def block(config: Config) -> int:
    """Install the policies without a gateway; how many there are. Raises as `Kernel` does."""
    policies = wanted(config)
    with Kernel(policies) as kernel:
        kernel.only(policies)
    return len(policies)


def require_enabled(interfaces: Collection[str]) -> None:
    """Raise PolicyConflict where Linux is told not to look at policies, for all interfaces or for one of these; warn
    where it is another: what comes or leaves there is not blocked (ip-sysctl: disable_policy, disable_xfrm)."""
    for version in (4, 6):
        folder = f"/proc/sys/net/ipv{version}/conf"
        with contextlib.suppress(OSError):
            for name in sorted(set(os.listdir(folder)) - {"lo", "default"}):
                for setting in ("disable_policy", "disable_xfrm"):
                    which = f"net.ipv{version}.conf.{name}.{setting}"
                    if not _is_set(f"{folder}/{name}/{setting}"):
                        continue
                    if name == "all" or name in interfaces:
                        raise PolicyConflict(
                            f"Linux looks at no XFRM policies (sysctl {which})", f"sysctl -w {which}=0"
                        )
                    log.warning("policies are not for %s: Linux looks at none there (sysctl %s)", name, which)


def _is_set(path: str) -> bool:
    try:
        with open(path) as file:
            return file.read().strip() != "0"
    except OSError:
        return False  # IPv6 has not all of them; or the interface is gone


def release(config: Config) -> int:
    """Remove exactly those policies that this file has put into the kernel; how many were there.

    Raises AlreadyRunning, MissingCapability.
    """
    with _alone():
        due = set(wanted(config))
        found = [policy for policy in _there() if _ours(policy)]
        mine = [policy for policy in found if policy._replace(number=0) in due]
        if len(mine) < len(found):
            others = len(found) - len(mine)
            log.warning("%d policies of fp ipsec stay: they are of another file, or of this one as it was", others)
        try:
            return sum(xfrm.remove(policy) for policy in mine)
        except PermissionError as error:
            raise missing_capability("removing XFRM policies", "CAP_NET_ADMIN") from error
