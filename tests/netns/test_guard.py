"""The guard: hosts whose kernel decides about forwarded packets are refused, and what is in the way is named."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from libfp.errors import PolicyConflict
from libfp.linux import guard, netfilter, xfrm
from libfp.linux import rtnetlink as rt
from libfp.linux.conflict import Conflict, summed
from libfp.linux.netlink import NETLINK_XFRM, NLM_F_ACK, NLM_F_CREATE, Netlink
from libfp.linux.tap import Tap
from libfp.testing.netns import Host, Lab

nft = pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft (apt-get install nftables)")
tc = pytest.mark.skipif(shutil.which("tc") is None, reason="needs tc (apt-get install iproute2)")


@pytest.fixture
def router() -> Iterator[Host]:
    with Lab() as lab:
        router, far = lab.host("router"), lab.host("far")
        lab.link(router, "r0", far, "f0")
        lab.link(router, "r1", far, "f1")
        yield router


def found_on(router: Host) -> list[Conflict]:
    ports = {router.index(name): name for name in ("r0", "r1")}
    return router.call(lambda: list(guard.conflicts(ports)))


def conflicts(router: Host) -> list[str]:
    """As the error names them."""
    return list(summed(found_on(router)))


def run(router: Host, *commands: str) -> None:
    for command in commands:
        router.run(command.split(), check=True)


def test_plain_host(router: Host) -> None:
    assert conflicts(router) == []
    router.call(guard.require, {router.index("r0"): "r0"})


@nft
@pytest.mark.parametrize(
    ("ruleset", "found"),
    [
        ("inet t { chain c { type filter hook forward priority 0; } }", None),
        ("inet t { chain c { type filter hook input priority 0; policy drop; tcp dport 22 accept; } }", None),
        ("ip6 t { chain c { type filter hook forward priority 0; policy drop; } }", None),
        ("inet t { chain c { ip daddr 192.0.2.1 drop; } }", None),
        (
            "inet t { chain c { type filter hook forward priority 0; tcp dport 22 drop; } }",
            "nftables chain inet t c (hook forward)",
        ),
        (
            "ip t { chain c { type filter hook forward priority 0; policy drop; } }",
            "nftables chain ip t c (hook forward, policy drop)",
        ),
        (
            "ip t { chain c { type nat hook postrouting priority 100; masquerade; } }",
            "nftables chain ip t c (hook postrouting)",
        ),
        (
            "inet t { chain c { type filter hook prerouting priority -300; notrack; } }",
            "nftables chain inet t c (hook prerouting)",
        ),
        (
            "netdev t { chain c { type filter hook ingress devices = { r0, r1 } priority 0; policy drop; } }",
            "nftables chain netdev t c (hook ingress, policy drop)",
        ),
        (
            "netdev t { chain c { type filter hook ingress device lo priority 0; policy drop; } }",
            None,
        ),
        (
            "inet t { chain c { type filter hook ingress device r1 priority 0; policy drop; } }",
            "nftables chain inet t c (hook ingress, policy drop)",
        ),
    ],
)
def test_nftables(router: Host, ruleset: str, found: str | None) -> None:
    family, name, chain = ruleset.split(" ", 2)
    router.run(["nft", f"table {family} {name} {chain.removesuffix(' }')}; }}"], check=True)
    assert conflicts(router) == ([found] if found else [])
    for conflict in found_on(router):
        assert (conflict.kind, conflict.family, conflict.table, conflict.chain) == ("nftables", family, "t", "c")
        assert f"hook {conflict.hook}" in conflict


def test_policy_rules(router: Host) -> None:
    router.netlink("rule", "add", src="10.0.0.0/8", table=7, priority=100)
    router.netlink("rule", "add", iifname="r0", table=8, priority=101)
    assert conflicts(router) == [
        "policy rule 100: from 10.0.0.0/8 lookup 7",
        "policy rule 101: from all iif r0 lookup 8",
    ]
    with pytest.raises(PolicyConflict, match=r"policy rule 100: from 10\.0\.0\.0/8 lookup 7"):
        router.call(guard.require, {router.index("r0"): "r0"})
    router.netlink("rule", "del", src="10.0.0.0/8", table=7, priority=100)
    router.netlink("rule", "del", iifname="r0", table=8, priority=101)
    router.netlink("rule", "del", table=253, priority=32767)
    assert conflicts(router) == ["policy rule 32767: from all lookup default is missing"]


def policy(direction: str, family: int = rt.AF_INET, action: str = "block", priority: int = 0) -> xfrm.Policy:
    prefixes = ("10.0.0.0/8", "11.0.0.0/8") if family == rt.AF_INET else ("2001:db8:a::/48", "2001:db8:b::/48")
    return xfrm.Policy(family, *prefixes, direction, action, priority)


def add(router: Host, one: xfrm.Policy) -> None:
    try:
        router.call(xfrm.add, one)
    except OSError as error:
        pytest.skip(f"this kernel has no XFRM: {error}")


def test_xfrm_policies(router: Host) -> None:
    add(router, policy("in"))
    assert conflicts(router) == [], "a policy for packets to this host"
    add(router, policy("fwd", rt.AF_INET6))
    assert conflicts(router) == []
    add(router, policy("fwd", priority=7))
    assert conflicts(router) == ["1 XFRM policy for IPv4 (ip xfrm policy)"]
    add(router, policy("out", action="allow"))
    assert conflicts(router) == ["2 XFRM policies for IPv4 (ip xfrm policy)"]
    router.sysctl("net.ipv6.conf.all.forwarding", 1)
    assert conflicts(router) == ["3 XFRM policies for IPv4 and IPv6 (ip xfrm policy)"]
    found = {(one.family, one.direction, one.action, one.priority) for one in found_on(router)}
    assert found == {
        (rt.AF_INET, "fwd", "block", 7),
        (rt.AF_INET, "out", "allow", 0),
        (rt.AF_INET6, "fwd", "block", 0),
    }
    one = found_on(router)[0]
    assert (one.kind, one.source, one.destination, one.plain) == ("xfrm", "10.0.0.0/8", "11.0.0.0/8", True)


def test_xfrm_policies_are_added_and_removed_one_by_one(router: Host) -> None:
    ours, other = policy("fwd", priority=7), policy("out", rt.AF_INET6, "allow")
    add(router, ours)
    add(router, other)
    with pytest.raises(FileExistsError):
        router.call(xfrm.add, ours._replace(action="allow"))
    found = router.call(xfrm.policies)
    assert {one._replace(number=0) for one in found} == {ours, other}
    assert all(one.number for one in found)
    mine = next(one for one in found if one.priority == 7)
    assert router.call(xfrm.remove, mine)
    assert not router.call(xfrm.remove, mine)
    assert [one._replace(number=0) for one in router.call(xfrm.policies)] == [other]
    with pytest.raises(AttributeError, match="kind setting has no direction"):
        Conflict("sysctl", "setting").direction  # noqa: B018


def test_xfrm_policy_of_more_than_prefixes_is_not_plain(router: Host) -> None:
    """A template (ESP in tunnel mode) and a protocol."""
    body = bytearray(xfrm._selector(policy("out")) + xfrm._FOREVER + xfrm._INFO.pack(0, 0, 1, 0, 0, 0))
    body[45] = 6  # the protocol
    template = (
        bytes(16)
        + struct.pack("=IB3xH2x", 0, 50, rt.AF_INET)
        + bytes(16)
        + struct.pack("=IBBBxIII", 1, 1, 0, 0, 0, 0, 0)
    )
    body += struct.pack("=HH", 4 + len(template), xfrm.TEMPLATES) + template

    def install() -> None:
        with Netlink(NETLINK_XFRM) as netlink:
            netlink.ask(xfrm.NEWPOLICY, bytes(body), NLM_F_ACK | NLM_F_CREATE)

    try:
        router.call(install)
    except OSError as error:
        pytest.skip(f"this kernel has no XFRM: {error}")
    (one,) = router.call(xfrm.policies)
    assert (one.templates, one.plain) == (1, False)


def test_what_the_application_applies_is_no_conflict(router: Host) -> None:
    add(router, policy("fwd", priority=7))
    router.netlink("rule", "add", src="10.0.0.0/8", table=7, priority=100)
    asked = []

    def applies(conflict: Conflict) -> bool:
        asked.append(conflict.kind)
        return conflict.kind == "xfrm" and conflict.priority == 7

    ports = {router.index("r0"): "r0"}
    with pytest.raises(PolicyConflict, match=r"libfp: policy rule 100: from 10\.0\.0\.0/8 lookup 7; remove it"):
        router.call(guard.require, ports, applies)
    assert sorted(asked) == ["rule", "xfrm"]
    router.netlink("rule", "del", src="10.0.0.0/8", table=7, priority=100)
    router.call(guard.require, ports, applies)
    add(router, policy("out"))
    with pytest.raises(PolicyConflict, match="1 XFRM policy for IPv4"):
        router.call(guard.require, ports, applies)


def block_by_default() -> None:
    with Netlink(NETLINK_XFRM) as netlink:
        netlink.ask(0x27, bytes([0, 1, 0, 0]))  # XFRM_MSG_SETDEFAULT, forward: block


def test_xfrm_default(router: Host) -> None:
    try:
        router.call(block_by_default)
    except OSError as error:
        pytest.skip(f"this kernel has no XFRM default policy: {error}")
    assert conflicts(router) == ["XFRM policies block by default (ip xfrm policy getdefault)"]


@tc
def test_queueing_disciplines(router: Host) -> None:
    run(router, "tc qdisc add dev r0 clsact")
    assert conflicts(router) == [], "clsact without filters decides nothing"
    run(router, "tc qdisc add dev r1 root tbf rate 1mbit burst 10k latency 10ms")
    assert conflicts(router) == ["qdisc tbf on r1"]


@tc
@pytest.mark.parametrize(
    ("qdisc", "parent", "word"),
    [("clsact", "ingress", "ingress"), ("clsact", "egress", "egress"), ("ingress", "parent ffff:", "ingress")],
)
def test_tc_filters(router: Host, qdisc: str, parent: str, word: str) -> None:
    run(router, f"tc qdisc add dev r1 {qdisc}")
    run(router, f"tc filter add dev r1 {parent} protocol ip u32 match u32 0 0 flowid 1:1")
    assert conflicts(router) == [f"tc filters on r1 {word}"]


def test_tcx_programs(router: Host) -> None:
    def attached() -> list[str]:
        with Tap("t0", socket.if_nametoindex("r0"), 1500) as tap:
            return list(guard.conflicts({tap.index: "t0"}))

    (found,) = router.call(attached)
    assert found.startswith("tcx program libfp_punt (id ")
    assert found.endswith(") on t0 ingress")


def test_bridge_member(router: Host) -> None:
    router.netlink("link", "add", ifname="br0", kind="bridge")
    router.netlink("link", "set", index=router.index("r1"), master=router.index("br0"))
    assert conflicts(router) == ["r1 is a member of bridge br0"]


def test_settings(router: Host) -> None:
    router.sysctl("net.ipv4.ip_forward_use_pmtu", 1)
    router.sysctl("net.ipv4.conf.r1.route_localnet", 1)
    assert conflicts(router) == [
        "sysctl net.ipv4.ip_forward_use_pmtu (path MTUs that Linux has learned are not mirrored)",
        "sysctl net.ipv4.conf.r1.route_localnet",
    ]


def set_legacy_policy(table: str, hook: int, verdict: int) -> None:
    """Replace the policy of a legacy iptables chain, as iptables(8) does: read the table, change it, write it."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        name = table.encode().ljust(32, b"\0")
        info = netfilter._getsockopt(sock, socket.SOL_IP, netfilter.IPT_SO_GET_INFO, name.ljust(84, b"\0"))
        _, hooks, *rest = struct.unpack("=32sI5I5III", info)
        begins, policies, count, size = rest[:5], rest[5:10], rest[10], rest[11]
        request = struct.pack("=32sI4x", name, size)
        entries = bytearray(
            netfilter._getsockopt(sock, socket.SOL_IP, netfilter.IPT_SO_GET_ENTRIES, request + bytes(size))[40:]
        )
        struct.pack_into("=i", entries, policies[hook] + 112 + 32, verdict)
        counters = ctypes.create_string_buffer(16 * count)
        replace = struct.pack("=32sIII5I5II", name, hooks, count, size, *begins, *policies, count)
        replace += struct.pack("=Q", ctypes.addressof(counters))
        sock.setsockopt(socket.IPPROTO_IP, 64, replace + bytes(entries))  # IPT_SO_SET_REPLACE


def test_legacy_iptables(router: Host) -> None:
    def table_of_ours() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            netfilter._getsockopt(
                sock, socket.SOL_IP, netfilter.IPT_SO_GET_INFO, b"filter".ljust(84, b"\0")
            )  # makes it

    try:
        router.call(table_of_ours)
    except OSError as error:
        pytest.skip(f"this kernel has no legacy iptables: {os.strerror(error.errno or 0)}")
    assert router.call(Path("/proc/thread-self/net/ip_tables_names").read_text) == "filter\n"
    assert conflicts(router) == [], "an empty table that accepts"
    router.call(set_legacy_policy, "filter", 1, -1)
    assert conflicts(router) == [], "the policy of INPUT"
    router.call(set_legacy_policy, "filter", 2, -1)
    assert conflicts(router) == ["iptables (legacy) table filter, chain FORWARD (policy drop)"]


def test_watch_hears_of_changes(router: Host) -> None:
    watch: guard.Watch = router.call(guard.Watch)
    try:
        assert not any(sock.ready() for sock in watch.sockets)
        add(router, policy("fwd"))
        assert any(sock.ready(2) for sock in watch.sockets)
        watch.drain()
        assert not any(sock.ready() for sock in watch.sockets)
    finally:
        watch.close()
