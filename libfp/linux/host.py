"""`Linux`: this host's ports and forwarding tables, kept as Linux has them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

from libfp.errors import BadInput, Error, PolicyConflict
from libfp.linux import guard
from libfp.linux import rtnetlink as rt
from libfp.linux.conflict import Applies, summed
from libfp.linux.decide import Direct, Via
from libfp.linux.explain import explain
from libfp.linux.mirror import Mirror
from libfp.linux.neighbours import SHORTEST, HitMarks, interval
from libfp.linux.ports import HostPort, PortPolicy, hash_fields, own_address, policy
from libfp.linux.punt import PuntPath
from libfp.linux.state import Changes, State
from libfp.pyxdp import LocalAddresses, Steer
from libfp.pyxdp.device import ETHERNET, XDP_HEADROOM, Device, check, check_frame, check_free
from libfp.pyxdp.filters import parse_prefix
from libfp.pyxdp.steer import Family
from libfp.pyxdp.system import has_capability, missing_capability
from libfp.stages.routes import Routes

if TYPE_CHECKING:
    from libfp.engine.punt import PuntRing

log = logging.getLogger("libfp.linux")

LOOK_AGAIN = 5.0  # seconds between looks at settings and policies that nothing announces
KEPT_LOOK = 0.05  # seconds between looks for neighbours that only packets which Linux never sees have asked for
FRAME_SIZES = (2048, 4096)
LOOPBACK = rt.Prefix(127 << 24, 8)  # as a source it is a martian anyway


class Linux:
    """The interfaces `names` as ports, and this host's routes and neighbours as tables: a context manager.

        with Linux("eth0", "eth1") as linux:
            Pipeline(parse, forward(linux)).start(linux.ports)

    Linux stays in charge: its routes, neighbours, addresses and settings are followed while the block runs, and what
    the fast path cannot finish arrives at Linux as if it had just been received. When the kernel would decide
    otherwise than its routes say (netfilter, policy rules, XFRM, tc, a bridge), nothing is started; `bypass=True`
    starts nevertheless, and forwarded packets go past those policies.

    applies: asked about each conflict (`libfp.linux.Conflict`) that the kernel's policies are, at the start
    and whenever they are looked at again; True says that the application applies this policy itself, or has put it
    there, so that it is none. policy_changed: called in the mirror's thread when nftables or XFRM have changed, before
    that look; what it raises leaves all packets to Linux until the next change. take: filters (see
    `libfp.pyxdp.filters`) of packets that come to the ports though they are addressed to this host.

    mode: how XDP is attached, "auto", "native" or "skb". binding: AF_XDP's "auto", "zero-copy" or "copy". only: a
    canary, destination prefixes outside of which everything is left to Linux. frame_size: bytes of a UMEM frame, 2048
    or 4096; by default what the largest MTU needs. capacity: how many prefixes the tables have room for, the routes and
    the neighbours that are on a port's own link. progress: called with (what, done, total) while the first copy of
    the tables is made, from another thread; total is 0 while it is not known.

    wait: enter the block when the tables are complete. Otherwise they are copied meanwhile: a pipeline may start at
    once, and Linux forwards alone until the kernel's routes have been read. Then every packet goes by its own route, by
    the fast path if that is in the tables already, else by Linux; `wait_forwarding` waits for the beginning of this,
    `wait_synced` for the end.

    Everything is opened in the network namespace of the thread that enters. Raises NoSuchInterface, InterfaceDown,
    UnsuitableInterface, InterfaceBusy, AlreadyRunning, FrameTooSmall, PolicyConflict, MissingCapability, Unsupported,
    TableFull, BadInput; nothing is left behind then.
    """

    def __init__(
        self,
        *names: str,
        bypass: bool = False,
        mode: Literal["auto", "native", "skb"] = "auto",
        binding: Literal["auto", "zero-copy", "copy"] = "auto",
        only: Iterable[str] = (),
        take: Iterable[str] = (),
        applies: Applies | None = None,
        policy_changed: Callable[[], None] | None = None,
        frame_size: int | None = None,
        ring_size: int = 1024,
        capacity: int = 1 << 20,
        progress: Callable[[str, int, int], None] | None = None,
        wait: bool = True,
    ) -> None:
        if not names:
            raise BadInput("no interface named", "name the interfaces to route between")
        if len(set(names)) < len(names):
            raise BadInput(f"an interface named twice in {', '.join(names)}", "name each interface once")
        self.names, self.bypass = names, bypass
        self._mode, self._binding = mode, binding
        self._only = tuple(str(parse_prefix(prefix)) for prefix in only)
        self._take, self._applies, self._policy_changed = tuple(take), applies, policy_changed
        self._frame_size, self._ring_size, self._progress = frame_size, ring_size, progress
        self._capacity, self._wait = capacity, wait
        self._resources = ExitStack()
        self._policies: dict[int, PortPolicy] = {}
        self._hashing: dict[Literal[4, 6], int] = {}
        self._marked = 0.0
        self._addresses: dict[int, tuple[bytes, bytes]] = {}  # each port's own, of both families
        self._local: dict[rt.Prefix, int] = {}  # of the local table, with their types
        self._announced = False
        self._carrying = threading.Lock()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._open(undo)
            self._resources = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, undo: ExitStack) -> None:
        self.devices: list[Device] = [check(name) for name in self.names]
        self.frame_size = self._frame_size or _frame_size(self.devices)
        for device in self.devices:
            check_frame(device, self.frame_size)
            check_free(device)
        if not has_capability("CAP_NET_ADMIN"):
            raise missing_capability("routing beside Linux", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF")
        self._indexes = {device.index: number for number, device in enumerate(self.devices)}
        self._guarded = {device.index: device.name for device in self.devices}
        if not self.bypass:
            guard.require(self._guarded, self._applies)
        self.local = undo.enter_context(LocalAddresses())
        self.routes = Routes(routes=self._capacity)
        self.ports: Sequence[HostPort] = [
            HostPort(
                name,
                Steer(only=self._only, take=self._take, local=self.local),
                xdp=self._mode,
                binding=self._binding,
                ring_size=self._ring_size,
                owner=self,
            )
            for name in self.names
        ]
        self.punt = PuntPath([(device.index, device.mtu) for device in self.devices])
        undo.callback(self.punt.close)
        self._marks = HitMarks()
        undo.callback(self._marks.close)
        self._watch = guard.Watch(quiet=self.bypass and self._policy_changed is None)
        undo.callback(self._watch.close)
        self.mirror = Mirror(self.routes, self._indexes, self._changed, self._pause, self._progress)
        undo.callback(self.mirror.close)
        self.mirror.every(SHORTEST, self._mark)
        self.mirror.every(KEPT_LOOK if self._take else SHORTEST, self._resolve_kept)
        self.mirror.every(LOOK_AGAIN, self._look_again)
        for netlink in self._watch.sockets:
            self.mirror.watch(netlink, self._heard)
        self._pause()  # until the mirror has begun
        self.mirror.start()
        if self._wait:
            self.mirror.wait_synced()

    # -- for users

    @property
    def policies(self) -> list[PortPolicy]:
        """What Linux's settings say about each port, in the order of `ports`."""
        return [self._policies.get(device.index, PortPolicy()) for device in self.devices]

    @property
    def stage_reasons(self) -> tuple[str, ...]:
        """See `Routes.stage_reasons`: a `Linux` is bound to a stage for its routes."""
        return self.routes.stage_reasons

    def stage_tables(self) -> Iterable[Any]:
        """See `libfp.engine.Bindable`."""
        return self.routes.stage_tables()

    def stage_view(self, replica: Callable[[Any], Any]) -> Any:
        """See `libfp.engine.Bindable`."""
        return self.routes.stage_view(replica)

    def explain(self, next_hop: int, packet: bytes) -> str:
        """See `libfp.Pipeline.explain`."""
        return explain(self.routes, self.mirror, next_hop, packet)

    def set_bypass(self, bypass: bool) -> None:
        """Change `bypass` while packets pass: policies of Linux's get the traffic, or do not any more."""
        self.bypass = bypass
        self.mirror.call((lambda: self.mirror.resume("policy")) if bypass else self._look_for_conflicts)

    def wait_forwarding(self, timeout: float | None = None) -> None:
        """Return when the first routes are in the tables. Raises TimeoutError, and what entering the block raises."""
        self.mirror.wait_begun(timeout)

    @property
    def synced(self) -> bool:
        """Whether the tables have been complete."""
        return self.mirror.synced

    def wait_synced(self, timeout: float | None = 10.0) -> None:
        """Return when all workers go by everything that Linux was told before this call. Raises TimeoutError."""
        timeout = 3600.0 if timeout is None else timeout
        self.mirror.barrier(timeout)
        for table in self.routes.stage_tables():
            table.wait_applied(timeout)

    def resync(self) -> None:
        """Have everything read from Linux again. Forwarding is not disturbed; `wait_synced` waits for it."""
        self.mirror.resync()

    def close(self) -> None:
        """Stop following Linux and remove the TAPs. Stop the application first. May be called again."""
        self._resources.close()

    # -- for the application that runs on the ports

    def started(self, rings: Sequence[PuntRing | None]) -> None:
        """An application runs, or has more workers: their punt rings are drained from now on."""
        for port, tap in zip(self.ports, self.punt.taps, strict=True):
            tap.mark(port.attachment.marker if port.attachment is not None else b"")
        self._pause()  # what has changed while the programs were attached
        self.punt.start([ring for ring in rings if ring is not None])

    def stopped(self) -> None:
        """The application has stopped: what its punt rings hold is delivered."""
        self.punt.stop()

    # -- in the mirror's thread (but `_pause`)

    def _mark(self) -> None:
        self._marks.resolve(self.mirror.fib.publisher.unresolved())
        if time.monotonic() >= self._marked + interval(self.names) - SHORTEST / 2:
            self._marked = time.monotonic()
            self._marks.mark(self.mirror.fib.publisher.used(), self.mirror.state)

    def _resolve_kept(self) -> None:
        wanted = {self._neighbour_for(hop, address) for hop, address in self.routes.wanted()} - {None}
        if wanted:
            self._marks.want(key for key in wanted if key is not None)

    def _neighbour_for(self, hop: int, address: bytes) -> tuple[int, bytes] | None:
        """The (link, address) of the neighbour that a packet to `address` lacks, by a next hop without one."""
        via = self.mirror.fib.publisher.via(hop)
        found = via or self.mirror.fib.lookup(int.from_bytes(address, "big"), 8 * len(address))
        if isinstance(found, Direct):
            return found.link, address
        return (found.link, found.gateway) if isinstance(found, Via) else None

    def _changed(self, state: State, changes: Changes) -> None:
        if not self._announced:
            self._announced = True
            self._announce(state)
        local = state.rib.local | state.rib6.local
        if local != self._local:
            self._follow_local(local)
        for index in changes.links & self._indexes.keys():
            self._follow_link(state, index)
        if changes.links:
            self._marks.retry()
        if changes.addresses or changes.links:
            self._follow_addresses(state)
        if changes.policy and not self.bypass:
            self._look_for_conflicts()
        if changes.netconf or changes.links or changes.policy:
            self._follow_settings(state)

    def _heard(self) -> None:
        self._watch.drain()
        if self._policy_changed is not None:
            try:
                self._policy_changed()
            except (Error, OSError) as error:
                self.mirror.suspend("application", str(error))
            else:
                self.mirror.resume("application")
        if not self.bypass:
            self._look_for_conflicts()

    def _look_again(self) -> None:
        if not self.bypass:
            self._look_for_conflicts()
        self._follow_settings(self.mirror.state)

    def _look_for_conflicts(self) -> None:
        """A policy that appears while we run has the last word: Linux forwards alone until it is gone."""
        present = {index: name for index, name in self._guarded.items() if index in self.mirror.state.links}
        try:
            guard.require(present, self._applies)
        except PolicyConflict as conflict:
            self.mirror.suspend("policy", conflict.what)
        else:
            self.mirror.resume("policy")

    def _follow_local(self, local: dict[rt.Prefix, int]) -> None:
        """What is addressed to this host never leaves Linux, and nobody else may send from its addresses."""
        for prefix in local.keys() - self._local.keys():
            self.local.add(str(prefix))
        for prefix in self._local.keys() - local.keys():
            self.local.remove(str(prefix))
        self._local = local
        ipv4 = (prefix for prefix, kind in local.items() if kind == rt.LOCAL and prefix.bits == 32)
        self.routes.set_local(prefix[:2] for prefix in ipv4 if not LOOPBACK.covers(prefix))

    def _follow_link(self, state: State, index: int) -> None:
        number = self._indexes[index]
        link, port = state.links.get(index), self.ports[number]
        if link is None:
            log.warning("port %s is gone: what went out by it goes to Linux", port.name)
            return
        if port.attachment is not None and len(link.mac) == 6:
            room = self.frame_size - XDP_HEADROOM - ETHERNET
            port.attachment.update(mac=link.mac, mtu=min(link.mtu, room))
        if link.mtu != self.punt.taps[number].mtu:
            self.punt.taps[number].set_mtu(link.mtu)

    def _follow_addresses(self, state: State) -> None:
        for number, device in enumerate(self.devices):
            before = self._addresses.get(device.index, (b"", b""))
            now = own_address(state, device.index, 32, before[0]), own_address(state, device.index, 128, before[1])
            if now != before:
                self._addresses[device.index] = now
                self.routes.set_address(number, *now)

    def _set_port(self, number: int) -> None:
        index = self.devices[number].index
        now = self._policies.get(index, PortPolicy())
        self.routes.set_port(number, rp_filter=now.rp_filter, redirects=now.redirects, accept_local=now.accept_local)

    def _follow_settings(self, state: State) -> None:
        for number, device in enumerate(self.devices):
            now = policy(state, device.index, device.name)
            before = self._policies.get(device.index)
            if now != before:
                self._policies[device.index] = now
                self._set_port(number)
                present = device.index in state.links  # of one that is gone `_follow_link` has spoken
                if present and not now.forwarding and (before is None or before.forwarding):
                    log.warning(
                        "Linux does not forward the IPv4 that arrives on %s (sysctl net.ipv4.ip_forward): it gets all",
                        device.name,
                    )
                if now.forwarding6 and not (before is not None and before.forwarding6) and not self.bypass:
                    self._look_for_conflicts()  # IPv6 policies count from now on
        for version, fields in hash_fields().items():
            if self._hashing.get(version) != fields:
                self._hashing[version] = fields
                self.routes.set_hashing(fields, version)
        self._pause()

    def _pause(self) -> None:
        """Give Linux what it does not forward, or all when only Linux can forward."""
        with self._carrying:  # so that the last word is what is so at last, whoever is told first
            for port, now in zip(self.ports, self.policies, strict=True):
                forwarded: tuple[tuple[Family, bool], ...] = (("ipv4", now.forwarding), ("ipv6", now.forwarding6))
                port.carry(family for family, yes in forwarded if yes and not self.mirror.suspended)

    def _announce(self, state: State) -> None:
        """Say at start what goes to Linux that might have been expected to go past it."""
        if self.bypass:
            for conflict in summed(guard.conflicts(self._guarded)):
                log.warning("bypassed: %s", conflict)
        others: dict[str, int] = {}
        for routes, count in [*state.rib.counts().items(), *state.rib6.counts().items()]:
            for link in {hop.link for hop in routes[0].hops if routes[0].type == rt.UNICAST}:
                if link not in self._indexes and link in state.links:
                    name = state.links[link].name
                    others[name] = others.get(name, 0) + count
        for name, count in sorted(others.items()):
            log.info("%d route%s out of %s, which is not a port: via Linux", count, "s" * (count != 1), name)
        if state.default_table:
            log.info("table default holds routes: what only they match goes via Linux")


def _frame_size(devices: Iterable[Device]) -> int:
    largest = max(device.mtu for device in devices)
    return next((size for size in FRAME_SIZES if largest + ETHERNET <= size - XDP_HEADROOM), FRAME_SIZES[-1])
