"""Netfilter on the way of a forwarded packet: nftables chains by nfnetlink, legacy iptables by their socket option.

A base chain that holds no rule and accepts decides nothing, and is not reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from libfp.linux.conflict import Conflict
from libfp.linux.netlink import NETLINK_NETFILTER, Message, Netlink, attribute_list, attributes, text

GROUP_NFTABLES = 7
GETCHAIN = 10 << 8 | 4  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN
FAMILIES = {1: "inet", 2: "ip", 5: "netdev"}  # those that see forwarded IPv4
FAMILIES6 = FAMILIES | {10: "ip6"}
HOOKS = {0: "prerouting", 2: "forward", 4: "postrouting", 5: "ingress"}
NETDEV_HOOKS = {0: "ingress", 1: "egress"}
NF_DROP, NF_ACCEPT = 0, 1
IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES = 64, 65

_GETINFO = struct.Struct("=32sI5I5III")  # name, valid hooks, where each hook's chain begins, its policy, entries, bytes


def conflicts(ports: Collection[str], ipv6: bool = False) -> Iterator[Conflict]:
    """What netfilter would decide about packets forwarded between these interfaces."""
    yield from nftables(ports, FAMILIES6 if ipv6 else FAMILIES)
    yield from iptables(_IPTABLES)
    if ipv6:
        yield from iptables(_IP6TABLES)


def nftables(ports: Collection[str], families: Mapping[int, str] = FAMILIES) -> Iterator[Conflict]:
    """Base chains on the way that have rules, or a policy other than accept."""
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            chains = netlink.dump_all(GETCHAIN, bytes(4))
    except PermissionError:
        raise  # there may be rules
    except OSError:
        return  # a kernel without nftables
    for message in chains:
        found = _chain(message, ports, families)
        if found is not None:
            yield found


def _chain(message: Message, ports: Collection[str], families: Mapping[int, str]) -> Conflict | None:
    family = message.body[0] if message.body else 0
    chain = attributes(message.body, 4)
    if family not in families or 4 not in chain:  # NFTA_CHAIN_HOOK: only base chains have one
        return None
    hook = attributes(chain[4])
    number = int.from_bytes(hook.get(1, b""), "big")
    name = (NETDEV_HOOKS if families[family] == "netdev" else HOOKS).get(number)
    if name is None:
        return None
    devices = [text(hook[3])] if 3 in hook else []
    devices += [text(value) for kind, value in attribute_list(hook.get(4, memoryview(b""))) if kind == 1]
    if name in NETDEV_HOOKS.values() and not set(devices) & set(ports):
        return None
    policy = int.from_bytes(chain[5], "big") if 5 in chain else NF_ACCEPT
    if policy == NF_ACCEPT and not int.from_bytes(chain.get(6, b""), "big"):  # NFTA_CHAIN_USE: its rules
        return None
    where = f"hook {name}" + ("" if policy == NF_ACCEPT else ", policy drop")
    about = {"family": families[family], "table": text(chain[1]), "chain": text(chain[3])}
    return Conflict(f"nftables chain {' '.join(about.values())} ({where})", "nftables", hook=name, **about)


class _Legacy(NamedTuple):
    """One family's legacy tables: how they are called and asked for, and where an entry has its target's offset."""

    name: str
    names: str
    family: int
    level: int
    target_at: int  # in struct ipt_entry, struct ip6t_entry


_IPTABLES = _Legacy("iptables", "ip_tables_names", socket.AF_INET, socket.SOL_IP, 88)
_IP6TABLES = _Legacy("ip6tables", "ip6_tables_names", socket.AF_INET6, socket.IPPROTO_IPV6, 140)


def iptables(legacy: _Legacy) -> Iterator[Conflict]:
    """Tables of legacy iptables that have rules, or a policy other than accept, on the way of a forwarded packet."""
    try:
        with open(f"/proc/thread-self/net/{legacy.names}") as file:
            names = file.read().split()
    except OSError:
        return
    for name in names:
        for hook, policy in _legacy(name, legacy):
            what = f"{legacy.name} (legacy) table {name}, chain {hook.upper()}" + ("" if policy else " (policy drop)")
            yield Conflict(what, "iptables")


def _legacy(table: str, legacy: _Legacy) -> Iterator[tuple[str, bool]]:
    """(hook, does its policy accept) of the built-in chains on the way that decide something."""
    with contextlib.suppress(OSError), socket.socket(legacy.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        info = _getsockopt(sock, legacy.level, IPT_SO_GET_INFO, table.encode().ljust(_GETINFO.size, b"\0"))
        _, hooks, *rest = _GETINFO.unpack(info)
        begins, policies, size = rest[:5], rest[5:10], rest[11]
        request = struct.pack("=32sI4x", table.encode(), size)  # the entries are aligned to 8 bytes
        entries = _getsockopt(sock, legacy.level, IPT_SO_GET_ENTRIES, request + bytes(size))[len(request) :]
        for number, name in HOOKS.items():
            if number < 5 and hooks >> number & 1:
                # in a standard target the verdict is at 32
                target = policies[number] + struct.unpack_from("=H", entries, policies[number] + legacy.target_at)[0]
                accepts = struct.unpack_from("=i", entries, target + 32)[0] == -NF_ACCEPT - 1
                if begins[number] != policies[number] or not accepts:
                    yield name, accepts


def _getsockopt(sock: socket.socket, level: int, option: int, value: bytes) -> bytes:
    """getsockopt(2) with a value that also goes in, which Python's own lacks."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(value, len(value))
    length = ctypes.c_uint(len(value))
    if libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
