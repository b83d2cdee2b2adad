"""What an interface is, and whether AF_XDP can sit on it."""

from __future__ import annotations

from dataclasses import dataclass

from libfp.errors import (
    AlreadyRunning,
    BadInput,
    FrameTooSmall,
    InterfaceBusy,
    InterfaceDown,
    NoSuchInterface,
    UnsuitableInterface,
)
from libfp.pyxdp import bpf, netlink
from libfp.pyxdp.ethtool import Ethtool

PROGRAM = "libfp_steer"
XDP_HEADROOM = 256  # the kernel keeps this much in front of every received frame
ETHERNET = 14

# What the hardware may do to frames before we see them, and Linux never did on the wire: a tag taken off is a frame in
# the wrong network, frames merged into one are frames that no longer fit.
BEFORE_XDP = ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse", "rx-lro", "rx-gro-hw")
BEFORE_GENERIC_XDP = (*BEFORE_XDP, "rx-gro", "rx-gro-list", "rx-udp-gro-forwarding")

_UPPER = ("bond", "team", "bridge", "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "vrf")


@dataclass(frozen=True)
class Device:
    """An interface: its index, 6-byte MAC, MTU in bytes, and queues in use; `programs` are the ids of XDP programs."""

    name: str
    index: int
    up: bool
    mtu: int
    mac: bytes
    kind: str
    rx_queues: int
    tx_queues: int
    programs: tuple[int, ...]
    lower: tuple[str, ...]

    @property
    def queues(self) -> int:
        """Queues that a socket can be bound to: 0 to this, exclusive."""
        return max(self.rx_queues, self.tx_queues)


def look(name: str) -> Device:
    """The interface in this thread's network namespace, as it is now. Raises NoSuchInterface."""
    link = netlink.link(name)
    if link is None:
        raise NoSuchInterface(f"no interface {name!r} in this network namespace", "list them: ip link")
    with Ethtool(name) as ethtool:
        queues = ethtool.queues()
    if not queues or not max(queues):
        queues = link.rx_queues, link.tx_queues
    return Device(
        name=link.name,
        index=link.index,
        up=bool(link.flags & netlink.IFF_UP),
        mtu=link.mtu,
        mac=link.mac,
        kind="loopback" if link.flags & netlink.IFF_LOOPBACK else link.kind,
        rx_queues=queues[0],
        tx_queues=queues[1],
        programs=link.programs,
        lower=_lower(link) if link.kind in _UPPER else (),
    )


def _lower(link: netlink.Link) -> tuple[str, ...]:
    members = tuple(other.name for other in netlink.links() if other.master == link.index)
    if members or not link.lower or link.lower_elsewhere:
        return members
    return tuple(other.name for other in netlink.links() if other.index == link.lower)


def check(name: str, queue: int | None = None) -> Device:
    """Look at an interface that is to carry AF_XDP.

    Raises NoSuchInterface, UnsuitableInterface (with the device to use instead), InterfaceDown, and BadInput for a
    queue that does not exist.
    """
    device = look(name)
    if device.kind == "loopback":
        raise UnsuitableInterface(f"{name} is the loopback device", "use a device that leads out of this host")
    if device.kind in ("tun", "ifb", "dummy"):
        raise UnsuitableInterface(
            f"{name} is a {device.kind} device: its packets never leave this host through a driver", "use a real port"
        )
    if device.kind in _UPPER:
        instead = f"use {' and '.join(device.lower)}" if device.lower else "use the device below it"
        raise UnsuitableInterface(f"{name} is a {device.kind} device, which receives through others", instead)
    if len(device.mac) != 6:
        raise UnsuitableInterface(f"{name} is not an Ethernet device", "use an Ethernet device")
    if not device.up:
        raise InterfaceDown(f"{name} is down", f"ip link set {name} up")
    if queue is not None and not 0 <= queue < device.queues:
        raise BadInput(f"{name} has no queue {queue}", f"it has {device.queues}: 0 to {device.queues - 1}")
    return device


def check_frame(device: Device, frame_size: int, headroom: int = 0) -> None:
    """Raise FrameTooSmall when a full-size packet of the interface does not fit a UMEM frame."""
    room = frame_size - XDP_HEADROOM - headroom
    if device.mtu + ETHERNET > room:
        raise FrameTooSmall(
            f"{device.name} has an MTU of {device.mtu}, and a frame of {frame_size} bytes carries {room - ETHERNET}",
            "use frames of 4096 bytes" if frame_size < 4096 else f"ip link set {device.name} mtu {room - ETHERNET}",
        )


def check_free(device: Device) -> None:
    """Raise InterfaceBusy when the interface has an XDP program, AlreadyRunning when that is another libfp's."""
    for number in device.programs:
        name = bpf.program_info(number).name
        pids = sorted(set(bpf.holders(number)))
        by = f" held by process {pids[0]}" if pids else ""
        if name == PROGRAM:
            raise AlreadyRunning(
                f"another libfp already runs on {device.name} (XDP program {name}, id {number}{by})",
                f"stop it first{f': kill {pids[0]}' if pids else ''}",
            )
        raise InterfaceBusy(
            f"{device.name} already has the XDP program {name or '(unnamed)'} (id {number}{by})",
            f"end its owner, or detach it: ip link set dev {device.name} xdp off",
        )
