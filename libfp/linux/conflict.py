"""A policy in Linux's way of forwarded packets, as text and as what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from libfp.linux import rtnetlink as rt


class Conflict(str):
    """The text names the policy. `kind` is "nftables", "iptables", "xfrm", "rule", "qdisc", "tc", "tcx", "member" or
    "setting". One of nftables has also `family` ("inet", "ip", "ip6", "netdev"), `table`, `chain` and `hook`; one of
    XFRM is about one policy, and has the attributes of a `libfp.linux.xfrm.Policy`; but for "blocks by default", whose
    `direction` is empty."""

    kind: str

    def __new__(cls, text: str, kind: str, **about: Any) -> Conflict:
        self = super().__new__(cls, text)
        self.__dict__.update(about, kind=kind)
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a conflict of kind {self.__dict__.get('kind')} has no {name}")


Applies = Callable[[Conflict], bool]


def summed(conflicts: Iterable[Conflict]) -> Iterator[str]:
    """One line for each, but for XFRM policies: one for all of them, since there may be thousands."""
    policies, lines = [], []
    for conflict in conflicts:
        if conflict.kind == "xfrm" and conflict.direction:
            policies.append(conflict)
            if len(policies) > 1:
                continue
        lines.append(conflict)
    for line in lines:
        yield _policies(policies) if policies and line is policies[0] else str(line)


def _policies(found: list[Conflict]) -> str:
    families = {one.family for one in found}
    names = [name for name, family in (("IPv4", rt.AF_INET), ("IPv6", rt.AF_INET6)) if family in families]
    which = f" for {' and '.join(names)}" if names else ""
    return f"{len(found)} XFRM polic{'y' if len(found) == 1 else 'ies'}{which} (ip xfrm policy)"
