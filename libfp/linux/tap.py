"""A TAP whose frames arrive at another interface: written here, received there.

The interface exists as long as its file descriptor: nothing remains of a process that was killed. It has no addresses,
speaks neither ARP nor IPv6, and a program at its ingress hands every frame to the ingress of the real port, so that to
Linux the frame came in there: reverse path filter, `iif` rules, nft `iifname` and the source of ICMP errors are right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import Self

from libfp.errors import AlreadyRunning, Unsupported
from libfp.linux import rtnetlink as rt
from libfp.linux.netlink import NLM_F_ACK, NLM_F_CREATE, Netlink, attribute
from libfp.pyxdp import bpf, emit
from libfp.pyxdp.system import missing_capability

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_TUN_EXCL = 0x400454CA, 0x0002, 0x1000, 0x8000
IFLA_MTU, IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_NONE = 4, 26, 8, 1
RTM_NEWQDISC, RTM_NEWTFILTER = 36, 44
CLSACT, INGRESS = 0xFFFF0000, 0xFFFFFFF2
TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS, DIRECT_ACTION = 6, 7, 8, b"\1\0\0\0"

# The first entry of map 0 is the marker to put in front of each frame, all zero for none: see
# `libfp.pyxdp.steer.Attachment`. Helpers: 43 bpf_skb_change_head, 9 bpf_skb_store_bytes, 23 bpf_redirect.
_PROGRAM = """
declare i64 @llvm.bpf.pseudo(i64, i64)

define i32 @libfp_punt(ptr %context) section "program" {{
  %config64 = call i64 @llvm.bpf.pseudo(i64 2, i64 0)
  %config = inttoptr i64 %config64 to ptr
  %type_at = getelementptr i8, ptr %config, i64 12
  %type = load i16, ptr %type_at
  %plain = icmp eq i16 %type, 0
  br i1 %plain, label %redirect, label %mark

mark:
  %change_head = inttoptr i64 43 to ptr
  %no_room = call i64 %change_head(ptr %context, i32 14, i64 0)
  %store_bytes = inttoptr i64 9 to ptr
  %unwritten = call i64 %store_bytes(ptr %context, i32 0, ptr %config, i32 14, i64 0)
  %either = or i64 %no_room, %unwritten
  %failed = icmp ne i64 %either, 0
  br i1 %failed, label %drop, label %redirect

redirect:
  %bpf_redirect = inttoptr i64 23 to ptr
  %action = call i64 %bpf_redirect(i32 {index}, i64 1)
  %action32 = trunc i64 %action to i32
  ret i32 %action32

drop:
  ret i32 2
}}"""


class Tap:
    """A TAP named `name` that delivers to the interface `index`, with that interface's MTU.

    `fd` takes whole Ethernet frames, one a write, and never blocks. Made in the calling thread's network namespace.
    Raises AlreadyRunning when the name is taken, MissingCapability, Unsupported without tun or BPF.
    """

    def __init__(self, name: str, index: int, mtu: int, *, tcx: bool = True) -> None:
        self.name, self.mtu = name, mtu
        with contextlib.ExitStack() as undo:
            self.fd = open_tap(name)
            undo.callback(os.close, self.fd)
            self.index = socket.if_nametoindex(name)
            _silence(name)
            self._config = undo.enter_context(bpf.Map(bpf.ARRAY, 4, 16, 1, "libfp_punt"))
            code = emit.link(emit.compile_bpf(_PROGRAM.format(index=index)), [self._config.fd])
            program = undo.enter_context(bpf.Program(code, "libfp_punt", bpf.ATTACH_TCX_INGRESS))
            # Kept for as long as the TAP: an index means this interface in this socket's namespace only, and whoever
            # calls later may be in another one.
            self._netlink = undo.enter_context(Netlink())
            try:
                if not tcx:
                    raise OSError(errno.EINVAL, "as before Linux 6.6")
                undo.enter_context(bpf.Link(program, self.index))
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                _classify(self._netlink, self.index, program.fd)
            _up(self._netlink, self.index, mtu)
            self._resources = undo.pop_all()

    def mark(self, marker: bytes) -> None:
        """Put these 14 bytes in front of every frame from now on; empty for none."""
        self._config[bytes(4)] = marker.ljust(16, b"\0")

    def set_mtu(self, mtu: int) -> None:
        """Follow the real interface's MTU (bytes)."""
        _up(self._netlink, self.index, mtu)
        self.mtu = mtu

    def write(self, frame: bytes) -> None:
        """Have one Ethernet frame arrive at the real interface. Raises OSError, EIO when the TAP is down."""
        os.write(self.fd, frame)

    def close(self) -> None:
        """Remove the interface. May be called again."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_tap(name: str) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise missing_capability("opening /dev/net/tun", "CAP_NET_ADMIN") from error
        raise Unsupported(f"no TAP interfaces: /dev/net/tun: {error.strerror}", "modprobe tun") from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL))
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EPERM, errno.EACCES):
            raise missing_capability(f"making the TAP {name}", "CAP_NET_ADMIN") from error
        if error.errno in (errno.EBUSY, errno.EEXIST, errno.EINVAL):
            raise AlreadyRunning(
                f"the interface {name} exists already", "stop the libfp that runs on its port"
            ) from error
        raise
    return fd


def _silence(name: str) -> None:
    """No IPv6 on it, before it comes up: no router solicitation, no duplicate address detection."""
    with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as file:
        file.write("1")


def _up(netlink: Netlink, index: int, mtu: int) -> None:
    flags = rt.IFF_UP | rt.IFF_NOARP
    body = struct.pack("=BxHiII", rt.AF_UNSPEC, 0, index, flags, flags) + attribute(IFLA_MTU, struct.pack("=I", mtu))
    netlink.ask(rt.RTM_NEWLINK, body)
    mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([ADDR_GEN_NONE]))
    body = struct.pack("=BxHiII", rt.AF_UNSPEC, 0, index, 0, 0)
    with contextlib.suppress(OSError):  # a kernel without IPv6
        netlink.ask(rt.RTM_NEWLINK, body + attribute(IFLA_AF_SPEC, attribute(rt.AF_INET6, mode)))


def _classify(netlink: Netlink, index: int, program: int) -> None:
    """Attach by clsact and cls_bpf, as before Linux 6.6; both go with the interface."""
    head = struct.pack("=BxxxiIII", rt.AF_UNSPEC, index, CLSACT, 0xFFFFFFF1, 0)
    netlink.ask(RTM_NEWQDISC, head + attribute(1, b"clsact\0"), NLM_F_ACK | NLM_F_CREATE)
    # The last word of the header is priority 1 and, in network byte order, the protocol ETH_P_ALL.
    everything = 1 << 16 | int.from_bytes(struct.pack("!H", 3), "little")
    head = struct.pack("=BxxxiIII", rt.AF_UNSPEC, index, 1, INGRESS, everything)
    options = {TCA_BPF_FD: struct.pack("=I", program), TCA_BPF_NAME: b"libfp_punt\0", TCA_BPF_FLAGS: DIRECT_ACTION}
    encoded = b"".join(attribute(kind, value) for kind, value in options.items())
    netlink.ask(RTM_NEWTFILTER, head + attribute(1, b"bpf\0") + attribute(2, encoded), NLM_F_ACK | NLM_F_CREATE)
