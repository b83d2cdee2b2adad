"""Is what we have what Linux has? Every mirrored entry compared with a fresh dump, and with the forwarding tables.

In the mirror's thread: everything is dumped anew, what was told meanwhile goes into both copies, and then they must be
the same. Then everything is decided anew and compared with what the tables of the control plane hold; replicas follow
those word by word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from libfp.errors import Error
from libfp.linux import rtnetlink as rt
from libfp.linux.prefixes import prefixes
from libfp.linux.state import State

if TYPE_CHECKING:
    from libfp.linux.fib import Fib
    from libfp.linux.mirror import Mirror

TIMES = 3  # how often it is looked again before a difference counts: some things change without a word
SHOWN = 20  # differences that are named


@dataclass
class Verification:
    """How many entries were compared, and what differs: how many, and the first of them in words."""

    links: int = 0
    neighbours: int = 0
    ipv4_routes: int = 0
    ipv6_routes: int = 0
    table_entries: int = 0
    differences: int = 0
    examples: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def note(self, what: str, count: int = 1) -> None:
        """There is a difference, or there are so many like it."""
        self.differences += count
        if len(self.examples) < SHOWN:
            self.examples.append(what)


def verify(mirror: Mirror, timeout: float = 120.0) -> Verification:
    """Compare a running mirror with the kernel, from any thread. Notifications wait meanwhile, forwarding does not.

    Raises TimeoutError, libfp.Error when the mirror has stopped, OSError when the kernel cannot be asked.
    """
    return mirror.call(lambda: in_thread(mirror), timeout)


def in_thread(mirror: Mirror) -> Verification:
    """The same, in the mirror's own thread."""
    for _ in range(TIMES):
        found = compare(mirror.state, mirror.fresh())
        tables(found, mirror.fib)
        if not found.differences:
            break
    return found


def compare(state: State, fresh: State) -> Verification:
    """Two copies of the kernel's state, whose routes are numbered alike."""
    found = Verification(len(fresh.links), len(fresh.neighbours), len(fresh.rib), len(fresh.rib6))
    for what, ours, linux in (
        ("link", state.links, fresh.links),
        ("settings of link", state.netconf, fresh.netconf),
        ("IPv6 settings of link", state.netconf6, fresh.netconf6),
        ("addresses of link", _there(state.addresses), _there(fresh.addresses)),
        ("IPv6 addresses of link", _there(state.addresses6), _there(_told(fresh.addresses6, state.addresses6))),
        ("neighbour", _usable(state), _usable(fresh)),
    ):
        _differ(found, what, ours, linux)
    for bits, rib in fresh.ribs.items():
        rows = rib.map.differences(state.ribs[bits].map)
        for prefix in prefixes(rows[:SHOWN], bits):
            known = state.ribs[bits].routes.get(prefix, ())
            found.note(f"route {prefix}: Linux has {_said(rib.routes.get(prefix, ()))}, libfp {_said(known)}")
        found.differences += max(0, len(rows) - SHOWN)
    return found


def _differ(found: Verification, what: str, ours: dict[Any, Any], linux: dict[Any, Any]) -> None:
    for key in ours.keys() | linux.keys():
        if ours.get(key) != linux.get(key):
            found.note(f"{what} {key}: Linux has {linux.get(key)}, libfp {ours.get(key)}")


def _said(routes: Any) -> str:
    return " then ".join(map(str, routes)) or "none"


def _there(addresses: dict[int, set[rt.Address]]) -> dict[int, set[rt.Address]]:
    """By link, those that have any."""
    return {link: {one._replace(tentative=False) for one in there} for link, there in addresses.items() if there}


def _told(fresh: dict[int, set[rt.Address]], ours: dict[int, set[rt.Address]]) -> dict[int, set[rt.Address]]:
    """Those of `fresh` that Linux has told of: it does not of those that it makes itself while they are tentative."""
    known = _there(ours)
    return {
        link: {one for one in there if not one.tentative or one._replace(tentative=False) in known.get(link, ())}
        for link, there in fresh.items()
    }


def _usable(state: State) -> dict[tuple[int, bytes], bytes]:
    """MAC addresses of usable neighbours: how one grows old is not told in every step, nor that Linux made up one
    that needs no resolution (those of multicast groups).
    """
    found = ((key, state.usable(*key)) for key in state.neighbours)
    return {key: one.mac for key, one in found if one is not None and one.state != rt.NUD_NOARP}


def tables(found: Verification, fib: Fib) -> None:
    """What the tables hold, with what would be decided now."""
    for wrong, held in fib.check():
        found.table_entries += held
        for prefix, ours, due in wrong[:SHOWN]:
            found.note(f"table entry {prefix}: holds {ours} instead of {due}")
        found.differences += max(0, len(wrong) - SHOWN)
    for key, held_action, due_action in fib.publisher.check():
        found.note(f"next hop {key}: does {held_action} instead of {due_action}")


def handler(mirror: Mirror) -> Callable[[dict[str, Any], Any], Iterator[dict[str, Any]]]:
    """For `application.control.add("verify", handler(linux.mirror))`: the answer is a `Verification` as a dict."""

    def answer(request: dict[str, Any], caller: Any) -> Any:
        job = mirror.submit(lambda: in_thread(mirror))
        while not job.done():
            try:
                job.result(0.1)
            except TimeoutError:
                yield {}
            except OSError as error:
                raise Error(f"the kernel cannot be asked: {error}") from error
        return job.result().as_dict()

    return answer
