"""The guard: what in this host's kernel would decide about forwarded packets otherwise than libfp can.

libfp copies routes and neighbours, and no policy. A host with a policy on the way of forwarded packets is refused by
name, unless the application applies the policy itself, or is told to bypass it. Rules that concern only packets to or
from the host itself do not matter: those never leave Linux.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator, Mapping

from libfp.errors import PolicyConflict
from libfp.linux import netfilter, xfrm
from libfp.linux import rtnetlink as rt
from libfp.linux.conflict import Applies, Conflict, summed
from libfp.linux.netlink import NETLINK_NETFILTER, NETLINK_XFRM, Malformed, Netlink, Overrun, attributes, text
from libfp.linux.ports import setting
from libfp.pyxdp import bpf
from libfp.pyxdp.system import missing_capability

XFRM_WAY = ("out", "fwd")  # a forwarded packet is routed by the one and checked against the other
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


def require(ports: Mapping[int, str], applies: Applies | None = None) -> None:
    """Raise PolicyConflict, naming everything found but what `applies` says yes to: the application applies that.

    `ports` maps link indexes to names. Raises MissingCapability.
    """
    try:
        found = [one for one in conflicts(ports) if applies is None or not applies(one)]
    except PermissionError as error:
        raise missing_capability("looking for policies", "CAP_NET_ADMIN") from error
    if found:
        raise PolicyConflict("Linux would decide otherwise than libfp: " + "; ".join(summed(found)), REMEDY)


def conflicts(ports: Mapping[int, str]) -> Iterator[Conflict]:
    """What decides about packets forwarded between the ports, in this thread's network namespace.

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


def _rules(netlink: Netlink, family: int) -> Iterator[Conflict]:
    missing = dict(DEFAULT_RULES[family])
    for message in netlink.dump_all(rt.RTM_GETRULE, struct.pack("=B11x", family)):
        if message.type != rt.RTM_NEWRULE:
            continue
        rule = rt.rule(message.body)
        if rule.plain and missing.get(rule.priority) == rule.table:
            del missing[rule.priority]
        else:
            yield Conflict(rule.what + " (IPv6)" * (family == rt.AF_INET6), "rule")
    for priority, table in missing.items():
        which = "IPv6 policy rule" if family == rt.AF_INET6 else "policy rule"
        yield Conflict(f"{which} {priority}: from all lookup {rt.TABLE_NAMES[table]} is missing", "rule")


def _membership(netlink: Netlink, ports: Mapping[int, str]) -> Iterator[Conflict]:
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
            yield Conflict(f"{name} is a member of {kind} {master.name if master else link.master}", "member")


def _queues(netlink: Netlink, ports: Mapping[int, str]) -> Iterator[Conflict]:
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
                    yield Conflict(f"tc filters on {ports[index]} {word}", "tc")
        elif kind not in PLAIN_QDISCS:
            yield Conflict(f"qdisc {kind} on {ports[index]}", "qdisc")


def _tcx(ports: Mapping[int, str]) -> Iterator[Conflict]:
    for index, name in ports.items():
        for attach, word in ((bpf.ATTACH_TCX_INGRESS, "ingress"), (bpf.ATTACH_TCX_EGRESS, "egress")):
            for number in bpf.attached(index, attach):
                program = bpf.program_info(number)
                what = f"tcx program {program.name or '(unnamed)'} (id {program.id}) on {name} {word}"
                yield Conflict(what, "tcx")


def _xfrm(families: Collection[int]) -> Iterator[Conflict]:
    for policy in xfrm.policies():
        if policy.family in (rt.AF_UNSPEC, *families) and policy.direction in XFRM_WAY:
            yield Conflict(str(policy), "xfrm", **policy._asdict())
    with contextlib.suppress(OSError), Netlink(NETLINK_XFRM) as netlink:  # Linux 5.14
        if xfrm.blocks_by_default(netlink):
            what = "XFRM policies block by default (ip xfrm policy getdefault)"
            yield Conflict(what, "xfrm", direction="")


def _settings(ports: Mapping[int, str]) -> Iterator[Conflict]:
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ip_forward_use_pmtu") as file:
        if file.read().strip() != "0":
            what = "sysctl net.ipv4.ip_forward_use_pmtu (path MTUs that Linux has learned are not mirrored)"
            yield Conflict(what, "setting")
    for name in ports.values():
        if setting("route_localnet", "all", name):  # 127.0.0.0/8 is a martian to `forward`
            yield Conflict(f"sysctl net.ipv4.conf.{name}.route_localnet", "setting")


class Watch:
    """Hears of changes to nftables and XFRM policies, so that somebody looks again. `sockets` are to be polled.

    `quiet` for those who would not look: there are none then.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.sockets: list[Netlink] = []
        if quiet:
            return
        for protocol, group in ((NETLINK_NETFILTER, netfilter.GROUP_NFTABLES), (NETLINK_XFRM, xfrm.GROUP_POLICY)):
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
