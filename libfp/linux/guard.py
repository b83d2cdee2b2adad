"""The guard: what in this host's kernel would decide about forwarded packets otherwise than libfp can.

libfp copies routes and neighbours, and no policy. A host with a policy on the way of forwarded packets is refused by
name, unless it is told to bypass it. Rules that concern only packets to or from the host itself do not matter: those
never leave Linux.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator, Mapping

from libfp.errors import PolicyConflict
from libfp.linux import netfilter
from libfp.linux import rtnetlink as rt
from libfp.linux.netlink import NETLINK_NETFILTER, NETLINK_XFRM, Malformed, Netlink, Overrun, attributes, text
from libfp.linux.ports import setting
from libfp.pyxdp import bpf
from libfp.pyxdp.system import missing_capability

GROUP_XFRM_POLICY = 4
XFRM_GETPOLICY, XFRM_GETDEFAULT = 0x15, 0x28
XFRM_OUT, XFRM_FORWARD = 1, 2  # a forwarded packet is checked against the one and routed by the other
XFRM_BLOCK = 1
DEFAULT_RULES = {
    rt.AF_INET: {0: rt.TABLE_LOCAL, 32766: rt.TABLE_MAIN, 32767: rt.TABLE_DEFAULT},
    rt.AF_INET6: {0: rt.TABLE_LOCAL, 32766: rt.TABLE_MAIN},
}
# Queues that only queue. AF_XDP sends past whatever else is configured: shapers, policers.
PLAIN_QDISCS = frozenset(
    ("noqueue", "noop", "mq", "mqprio", "pfifo_fast", "pfifo", "bfifo", "fq_codel", "fq", "codel", "sfq", "multiq")
)
TC_POINTS = {"clsact": {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}, "ingress": {"ingress": 0xFFFF0000}}
REMEDY = "remove it, or use --bypass if forwarded packets may go past it"


def require(ports: Mapping[int, str]) -> None:
    """Raise PolicyConflict, naming everything found. `ports` maps link indexes to names. Raises MissingCapability."""
    try:
        found = list(conflicts(ports))
    except PermissionError as error:
        raise missing_capability("looking for policies", "CAP_NET_ADMIN") from error
    if found:
        raise PolicyConflict("Linux would decide otherwise than libfp: " + "; ".join(found), REMEDY)


def conflicts(ports: Mapping[int, str]) -> Iterator[str]:
    """What decides about packets forwarded between the ports, one line each, in this thread's network namespace.

    What concerns IPv6 alone is looked at where Linux forwards IPv6.
    """
    families = (rt.AF_INET, rt.AF_INET6) if forwards_ipv6() else (rt.AF_INET,)
    yield from netfilter.conflicts(ports.values(), rt.AF_INET6 in families)
    with Netlink() as netlink:
        for family in families:
            yield from _rules(netlink, family)
        yield from _membership(netlink, ports)
        yield from _queues(netlink, ports)
    yield from _tcx(ports)
    yield from _xfrm(families)
    yield from _settings(ports)


def forwards_ipv6() -> bool:
    """Whether Linux forwards IPv6 at all, in this thread's network namespace."""
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv6/conf/all/forwarding") as file:
        return file.read().strip() != "0"
    return False


def _rules(netlink: Netlink, family: int) -> Iterator[str]:
    missing = dict(DEFAULT_RULES[family])
    for message in netlink.dump_all(rt.RTM_GETRULE, struct.pack("=B11x", family)):
        if message.type != rt.RTM_NEWRULE:
            continue
        rule = rt.rule(message.body)
        if rule.plain and missing.get(rule.priority) == rule.table:
            del missing[rule.priority]
        else:
            yield rule.what + " (IPv6)" * (family == rt.AF_INET6)
    for priority, table in missing.items():
        which = "IPv6 policy rule" if family == rt.AF_INET6 else "policy rule"
        yield f"{which} {priority}: from all lookup {rt.TABLE_NAMES[table]} is missing"


def _membership(netlink: Netlink, ports: Mapping[int, str]) -> Iterator[str]:
    links = {}
    for message in netlink.dump_all(rt.RTM_GETLINK, bytes(16)):
        link = rt.link(message.body) if message.type == rt.RTM_NEWLINK else None
        if link is not None:
            links[link.index] = link
    for index, name in ports.items():
        link = links.get(index)
        if link is not None and link.master:
            master = links.get(link.master)
            kind = link.master_kind or (master.kind if master else "") or "device"
            yield f"{name} is a member of {kind} {master.name if master else link.master}"


def _queues(netlink: Netlink, ports: Mapping[int, str]) -> Iterator[str]:
    for message in netlink.dump_all(rt.RTM_GETQDISC, bytes(20)):
        if len(message.body) < 20:
            raise Malformed("a queueing discipline without its header")
        (index,) = struct.unpack_from("=4xi", message.body)
        found = attributes(message.body, 20)
        kind = text(found[1]) if 1 in found else ""
        if index not in ports or not kind:
            continue
        if kind in TC_POINTS:
            for word, point in TC_POINTS[kind].items():
                if netlink.dump_all(rt.RTM_GETTFILTER, struct.pack("=4xiIII", index, 0, point, 0)):
                    yield f"tc filters on {ports[index]} {word}"
        elif kind not in PLAIN_QDISCS:
            yield f"qdisc {kind} on {ports[index]}"


def _tcx(ports: Mapping[int, str]) -> Iterator[str]:
    for index, name in ports.items():
        for attach, word in ((bpf.ATTACH_TCX_INGRESS, "ingress"), (bpf.ATTACH_TCX_EGRESS, "egress")):
            for number in bpf.attached(index, attach):
                program = bpf.program_info(number)
                yield f"tcx program {program.name or '(unnamed)'} (id {program.id}) on {name} {word}"


def _xfrm(families: Collection[int]) -> Iterator[str]:
    try:
        netlink = Netlink(NETLINK_XFRM)
    except OSError:
        return  # a kernel without XFRM
    with netlink:
        count = 0
        for message in netlink.dump_all(XFRM_GETPOLICY, bytes(64)):
            # struct xfrm_userpolicy_info: the selector's family is at 40, the direction at 160
            if len(message.body) >= 161:
                family, direction = struct.unpack_from("=H", message.body, 40)[0], message.body[160]
                count += family in (rt.AF_UNSPEC, *families) and direction in (XFRM_OUT, XFRM_FORWARD)
        if count:
            names = "IPv4 and IPv6" if rt.AF_INET6 in families else "IPv4"
            yield f"{count} XFRM polic{'y' if count == 1 else 'ies'} for {names} (ip xfrm policy)"
        with contextlib.suppress(OSError):  # Linux 5.14
            for message in netlink.ask(XFRM_GETDEFAULT, bytes(4)):
                if len(message.body) >= 3 and XFRM_BLOCK in message.body[1:3]:
                    yield "XFRM policies block by default (ip xfrm policy getdefault)"


def _settings(ports: Mapping[int, str]) -> Iterator[str]:
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ip_forward_use_pmtu") as file:
        if file.read().strip() != "0":
            yield "sysctl net.ipv4.ip_forward_use_pmtu (path MTUs that Linux has learned are not mirrored)"
    for name in ports.values():
        if setting("route_localnet", "all", name):  # 127.0.0.0/8 is a martian to `forward`
            yield f"sysctl net.ipv4.conf.{name}.route_localnet"


class Watch:
    """Hears of changes to nftables and XFRM policies, so that somebody looks again. `sockets` are to be polled.

    `quiet` for those who would not look: there are none then.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.sockets: list[Netlink] = []
        if quiet:
            return
        for protocol, group in ((NETLINK_NETFILTER, netfilter.GROUP_NFTABLES), (NETLINK_XFRM, GROUP_XFRM_POLICY)):
            with contextlib.suppress(OSError):  # a kernel without it
                self.sockets.append(Netlink(protocol, groups=(group,)))

    def drain(self) -> None:
        """Forget what has been heard; that there was something is all that counts."""
        for netlink in self.sockets:
            while netlink.ready():
                with contextlib.suppress(Overrun, Malformed):
                    netlink.receive()

    def close(self) -> None:
        for netlink in self.sockets:
            netlink.close()
