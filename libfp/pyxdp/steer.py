"""Steer: which packets come to AF_XDP at all. Everything else goes to Linux as if nothing were there."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Iterable
from typing import Literal, Self

from libfp.errors import BadInput, InterfaceBusy, Unsupported
from libfp.pyxdp import bpf, emit, program
from libfp.pyxdp.device import (
    BEFORE_GENERIC_XDP,
    BEFORE_XDP,
    ETHERNET,
    PROGRAM,
    Device,
    check,
    check_free,
    look,
)
from libfp.pyxdp.ethtool import SwitchedOff
from libfp.pyxdp.filters import parse_filter
from libfp.pyxdp.local import LocalAddresses, PrefixSet
from libfp.pyxdp.system import missing_capability

MARK_TYPE = 0x88B5  # IEEE 802 local experimental Ethertype: nothing else on this host has a claim to it
Family = Literal["ipv4", "ipv6"]
log = logging.getLogger("libfp.pyxdp")


class Steer:
    """Which received frames are redirected to AF_XDP sockets.

    Without arguments it is the router's default: IPv4 unicast frames sent to the port's MAC address that are not for
    this host, and IPv6 ones where `families` has "ipv6". To Linux go: other Ethertypes, tagged frames, frames for other
    MAC addresses (a port may be promiscuous), multicast and broadcast, link-local addresses (source or destination),
    DHCP, everything in `local`, and frames longer than the port's MTU (segments that the kernel or the NIC has merged).
    Of IPv6 also: addresses in ::/64 (unspecified, loopback, mapped), neighbour discovery whatever its addresses,
    packets with a hop-by-hop header, and those that end before their payload does. With `only`, a canary: just the
    destinations in these prefixes are taken. With `take`, what any of these filters takes is taken beside the default
    (or beside `only`), *also* when it is addressed to this host: ESP that this host's application decrypts.

    With filters it is a pin-hole: what any of the filters takes, and nothing else, *also* when it is addressed to this
    host; the grammar is in `libfp.pyxdp.filters`. A filter takes both families unless it names one; of an IPv6 packet
    only the next header of the IPv6 header itself is looked at, so that UDP behind an extension header stays with
    Linux. Filters with ports leave fragments to Linux, those without `proto icmp6` neighbour discovery. Multicast or
    broadcast is taken by a filter that names it (`dst 239.1.1.1`).

    `families`, "ipv4" and "ipv6" or one of them, narrows either kind; by default a pin-hole takes what its filters say
    and the router IPv4 only. `Attachment.update` changes it while packets flow.

    A tag that is not in the frame cannot be seen: stripping by the port's hardware is switched off while attached, but
    a veth peer hands tags over beside the frame until `ethtool -K PEER tx-vlan-offload off` (as with checksums).

    `local` is shared between ports and kept current by its owner; without it the host's addresses at the time of
    `attach` are used. Raises BadInput, naming the token that does not parse.
    """

    def __init__(
        self,
        *filters: str,
        only: Iterable[str] = (),
        take: Iterable[str] = (),
        local: LocalAddresses | None = None,
        families: Iterable[Family] | None = None,
    ) -> None:
        self.filters = tuple(parse_filter(text) for text in filters)
        self.only, self._take_texts = tuple(only), tuple(take)
        self.take = tuple(map(parse_filter, self._take_texts))
        self.local = local
        default: tuple[Family, ...] = ("ipv4", "ipv6") if filters else ("ipv4",)
        self.families = default if families is None else _families(families)
        self._texts = filters
        if self.filters and (self.only or self.take):
            what = "only= narrows" if self.only else "take= adds to"
            raise BadInput(f"{what} the router's default and cannot be used with a filter", "put it in the filter")

    def __repr__(self) -> str:
        named = (("only", self.only), ("take", self._take_texts))
        arguments = [*map(repr, self._texts), *(f"{name}={list(texts)}" for name, texts in named if texts)]
        return f"Steer({', '.join([*arguments, f'families={self.families}'])})"

    def text(self, generic: bool) -> str:
        """The program as LLVM text; `generic` is for generic (skb) mode, where re-injected frames come by again."""
        if self.filters:
            return program.pinhole(self.filters, generic=generic)
        return program.router(generic=generic, only=bool(self.only), take=self.take)

    def attach(self, interface: str, *, mode: Literal["auto", "native", "skb"] = "auto") -> Attachment:
        """Switch off what hardware does to frames before XDP sees them, load the program and attach it.

        No packet is taken before `Attachment.set_socket`. "auto" is native mode where the driver has it and generic
        (skb) mode elsewhere. The attachment ends with `close`, and with this process.

        Raises NoSuchInterface, UnsuitableInterface, InterfaceDown, InterfaceBusy (another XDP program, by name and
        id), AlreadyRunning (another libfp), MissingCapability, Unsupported.
        """
        if mode not in ("auto", "native", "skb"):
            raise BadInput(f"no XDP mode {mode!r}", "use auto, native or skb")
        device = check(interface)
        check_free(device)
        return Attachment(self, device, mode)


class Attachment:
    """A steering program on an interface, held by a bpf_link: it is gone when this is closed or the process ends.

    `families` is what is taken at present. `mode` is "native" or "skb"; `reason` says why it is not native where "auto"
    tried that. `marker` must be put in front of every frame that is re-injected at this port's ingress: it is empty in
    native mode; in generic mode re-injected frames pass this program again, and the 14 bytes of the marker (taken off
    by the program) tell them from what the wire brings. They are random, so that nobody on the wire can know them.
    """

    def __init__(self, steer: Steer, device: Device, mode: str) -> None:
        self.interface = device.name
        self.index = device.index
        self.mode: Literal["native", "skb"] = "native"
        self.reason = ""
        self.marker = b""
        self._resources = contextlib.ExitStack()
        try:
            self._attach(steer, device, mode)
        except BaseException:
            self._resources.close()
            raise

    def _attach(self, steer: Steer, device: Device, mode: str) -> None:
        hold = self._resources.enter_context
        local = steer.local
        if local is None and not steer.filters:
            local = hold(LocalAddresses.of_host())
        only = hold(PrefixSet(steer.only, capacity=len(steer.only))) if steer.only else None
        # Queues may be added later (ethtool -L); an entry is a pointer.
        self._sockets = hold(bpf.Map(bpf.XSKMAP, 4, 4, max(64, device.queues), "libfp_sockets"))
        self._config = hold(bpf.Map(bpf.ARRAY, 4, program.CONFIG_SIZE, 1, "libfp_config"))
        self._maps = [
            self._config.fd,
            self._sockets.fd,
            local.map.fd if local is not None else -1,
            only.map.fd if only is not None else -1,
            local.map6.fd if local is not None else -1,
            only.map6.fd if only is not None else -1,
        ]
        self._mac, self._longest, self.families = device.mac, device.mtu + ETHERNET, steer.families

        if mode == "skb":
            self._link(steer, device, "skb")
            return
        try:
            self._link(steer, device, "native")
        except Unsupported as refusal:
            if mode == "native":
                raise
            self.reason = refusal.what
            log.info("%s; using generic mode", refusal.what)
            self._link(steer, device, "skb")

    def _link(self, steer: Steer, device: Device, mode: Literal["native", "skb"]) -> None:
        generic = mode == "skb"
        with contextlib.ExitStack() as undo:
            features = SwitchedOff(device.name, BEFORE_GENERIC_XDP if generic else BEFORE_XDP)
            undo.callback(features.restore)
            self.marker = os.urandom(12) + struct.pack("!H", MARK_TYPE) if generic else b""
            self._configure()
            code = emit.link(emit.compile_bpf(steer.text(generic)), self._maps)
            loaded = undo.enter_context(bpf.Program(code, PROGRAM))
            try:
                link = bpf.Link(loaded, device.index, bpf.SKB_MODE if generic else bpf.NATIVE_MODE)
            except OSError as error:
                raise _refused(error, device, mode) from error
            undo.enter_context(link)
            self.mode, self.program_id, self._bpf_link, self.features = mode, loaded.id, link, features
            self._resources.push(undo.pop_all())

    def _configure(self) -> None:
        self._config[bytes(4)] = program.config(self._mac, self._longest, self.families, self.marker)

    def update(
        self, *, mac: bytes | None = None, mtu: int | None = None, families: Iterable[Family] | None = None
    ) -> None:
        """Tell the program that the port's MAC address (6 bytes, wire order) or MTU (bytes) has changed, or which
        `families` to take from the next packet on; those not named go to Linux. Raises BadInput."""
        if families is not None:
            self.families = _families(families)
        self._mac = mac or self._mac
        self._longest = mtu + ETHERNET if mtu else self._longest
        self._configure()

    def set_socket(self, queue: int, fd: int) -> None:
        """Redirect what the program takes on this receive queue to the AF_XDP socket `fd`.

        Raises BadInput for a queue out of range; OSError when `fd` is no AF_XDP socket. The kernel removes the entry by
        itself when the socket is closed.
        """
        if not 0 <= queue < self._sockets.entries:
            raise BadInput(f"{self.interface} has no queue {queue}", f"queues are 0 to {self._sockets.entries - 1}")
        self._sockets[struct.pack("=I", queue)] = struct.pack("=I", fd)

    def clear(self, queue: int) -> None:
        """Leave this queue's packets to Linux from the next one on; nothing happens where they are already."""
        if self._sockets.fd >= 0:
            self._sockets.discard(struct.pack("=I", queue))

    @property
    def attached(self) -> bool:
        """False once the interface is gone, or somebody has detached the link by force."""
        # struct bpf_link_info: type, id, prog_id, padding, then for XDP the interface
        return bool(struct.unpack_from("=I", self._bpf_link.info(), 16)[0])

    def close(self) -> None:
        """Detach, then restore the interface's features. Packets go to Linux from here on. May be called again."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _families(names: Iterable[Family]) -> tuple[Family, ...]:
    wanted = {names} if isinstance(names, str) else set(names)
    if unknown := wanted - program.FAMILIES.keys():
        raise BadInput(f"no address family {sorted(unknown)[0]!r}", "use ipv4 and ipv6")
    return tuple(family for family in ("ipv4", "ipv6") if family in wanted)


def _refused(error: OSError, device: Device, mode: str) -> Exception:
    """What an error number of BPF_LINK_CREATE means; the kernel's own words go to a trace point only."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return missing_capability(f"attaching XDP to {device.name}", "CAP_NET_ADMIN", "CAP_BPF")
    if error.errno in (errno.EBUSY, errno.EEXIST):
        check_free(look(device.name))
        return InterfaceBusy(f"{device.name} is busy with another XDP program", "stop whatever uses it")
    why = {
        errno.EOPNOTSUPP: "its driver has none",
        errno.ERANGE: "its MTU, or its peer's, is too large for it",
        errno.ENOSPC: "it has fewer receive queues than its peer has transmit queues",
        errno.EINVAL: "the driver refuses it in the present configuration",
    }.get(error.errno or 0, os.strerror(error.errno or 0))
    return Unsupported(f"{device.name} takes no {mode} XDP program: {why}", "use mode skb" if mode == "native" else "")
