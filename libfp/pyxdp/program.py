"""The steering program as LLVM text: a frame is passed to Linux, or redirected to the socket of its queue.

Redirection falls back to passing, so a queue without a socket belongs to Linux. Multi-byte constants are compared in
wire order as a little-endian processor loads it, so that packets need no swapping.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence

from libfp.pyxdp.filters import Filter

CONFIG, SOCKETS, LOCAL, ONLY = range(4)  # the order of the maps given to emit.link

CONFIG_SIZE = 32
MARKER_AT, MARKER_SIZE = 16, 14
LONGEST = 0x3FFF  # bytes: the largest frame limit that the program takes


def config(mac: bytes, longest: int, marker: bytes) -> bytes:
    """The program's settings: the port's MAC, the longest frame to take in bytes, the mark of re-injected frames."""
    return struct.pack("<6sxxIxxxx14sxx", mac, min(longest, LONGEST), marker)


_HEAD = """
declare i64 @llvm.bpf.pseudo(i64, i64)
declare i16 @llvm.bswap.i16(i16)

define i32 @libfp_steer(ptr %context) section "program" {{
  %key = alloca {{ i32, i32 }}
  %data32 = load i32, ptr %context
  %end_at = getelementptr i8, ptr %context, i64 4
  %end32 = load i32, ptr %end_at
  %data = zext i32 %data32 to i64
  %packet = inttoptr i64 %data to ptr
  %end64 = zext i32 %end32 to i64
  %end = inttoptr i64 %end64 to ptr
  %config64 = call i64 @llvm.bpf.pseudo(i64 2, i64 {config})
  %config = inttoptr i64 %config64 to ptr
  %headers = getelementptr i8, ptr %packet, i64 34
  %short = icmp ugt ptr %headers, %end
  br i1 %short, label %pass, label %whole

whole:
  %dmac = load i32, ptr %packet
  %dmac_rest_at = getelementptr i8, ptr %packet, i64 4
  %dmac_rest = load i16, ptr %dmac_rest_at
  %smac_at = getelementptr i8, ptr %packet, i64 6
  %smac = load i16, ptr %smac_at
  %smac_rest_at = getelementptr i8, ptr %packet, i64 8
  %smac_rest = load i32, ptr %smac_rest_at
  %type_at = getelementptr i8, ptr %packet, i64 12
  %type = load i16, ptr %type_at
  %fragment_at = getelementptr i8, ptr %packet, i64 20
  %fragment = load i16, ptr %fragment_at
  %protocol_at = getelementptr i8, ptr %packet, i64 23
  %protocol = load i8, ptr %protocol_at
  %src_at = getelementptr i8, ptr %packet, i64 26
  %src = load i32, ptr %src_at
  %dst_at = getelementptr i8, ptr %packet, i64 30
  %dst = load i32, ptr %dst_at
"""

# What the punt path wrote into the TAP comes by here again in generic mode: its mark (14 bytes in front, laid out as an
# Ethernet header with random addresses) comes off, and the frame goes on to Linux.
_REINJECTED = """
  %mark_dmac_at = getelementptr i8, ptr %config, i64 16
  %mark_dmac = load i32, ptr %mark_dmac_at
  %mark_dmac_rest_at = getelementptr i8, ptr %config, i64 20
  %mark_dmac_rest = load i16, ptr %mark_dmac_rest_at
  %mark_smac_at = getelementptr i8, ptr %config, i64 22
  %mark_smac = load i16, ptr %mark_smac_at
  %mark_smac_rest_at = getelementptr i8, ptr %config, i64 24
  %mark_smac_rest = load i32, ptr %mark_smac_rest_at
  %mark_type_at = getelementptr i8, ptr %config, i64 28
  %mark_type = load i16, ptr %mark_type_at
  %mark_1 = icmp eq i32 %dmac, %mark_dmac
  %mark_2 = icmp eq i16 %dmac_rest, %mark_dmac_rest
  %mark_3 = icmp eq i16 %smac, %mark_smac
  %mark_4 = icmp eq i32 %smac_rest, %mark_smac_rest
  %mark_5 = icmp eq i16 %type, %mark_type
  %mark_12 = and i1 %mark_1, %mark_2
  %mark_34 = and i1 %mark_3, %mark_4
  %mark_1234 = and i1 %mark_12, %mark_34
  %mark = and i1 %mark_1234, %mark_5
  br i1 %mark, label %reinjected, label %arrived

reinjected:
  %bpf_xdp_adjust_head = inttoptr i64 44 to ptr
  %adjusted = call i64 %bpf_xdp_adjust_head(ptr %context, i32 14)
  ret i32 2

arrived:
"""

_ETHERNET = """
  %limit_at = getelementptr i8, ptr %config, i64 8
  %limit = load i32, ptr %limit_at
  %limit_bounded = and i32 %limit, 16383
  %limit64 = zext i32 %limit_bounded to i64
  %longest = getelementptr i8, ptr %packet, i64 %limit64
  %too_long = icmp ult ptr %longest, %end
  br i1 %too_long, label %pass, label %fits

fits:
  %ipv4 = icmp eq i16 %type, 8
  br i1 %ipv4, label %ip, label %pass

ip:
  %mac = load i32, ptr %config
  %mac_rest_at = getelementptr i8, ptr %config, i64 4
  %mac_rest = load i16, ptr %mac_rest_at
  %mac_same = icmp eq i32 %dmac, %mac
  %mac_rest_same = icmp eq i16 %dmac_rest, %mac_rest
  %to_port = and i1 %mac_same, %mac_rest_same
  %group_bit = trunc i32 %dmac to i1
  %ihl_at = getelementptr i8, ptr %packet, i64 14
  %ihl_byte = load i8, ptr %ihl_at
  %ihl_words = and i8 %ihl_byte, 15
  %ihl_short = shl i8 %ihl_words, 2
  %ihl = zext i8 %ihl_short to i64
"""

# A pin-hole leaves what is not IPv4 at a closer look to Linux; the router takes it, to count it by name.
_WHOLE_HEADER = """
  %version_ok = icmp uge i8 %ihl_byte, 69
  %ihl_ok = icmp ule i8 %ihl_byte, 79
  %sound = and i1 %version_ok, %ihl_ok
  br i1 %sound, label %filter0, label %pass
"""

# The address of the transport header is hidden from LLVM in an empty assembly line: the verifier must see the checked
# and the used pointer as one register.
_PORTS = """
  %transport_plain = getelementptr i8, ptr %ip_header, i64 %ihl
  %transport = call ptr asm sideeffect "", "=r,0"(ptr %transport_plain)
  %ports_end = getelementptr i8, ptr %transport, i64 4
  %no_ports = icmp ugt ptr %ports_end, %end
"""

_TAIL = """
redirect:
  %queue_at = getelementptr i8, ptr %context, i64 16
  %queue = load i32, ptr %queue_at
  %sockets64 = call i64 @llvm.bpf.pseudo(i64 1, i64 {sockets})
  %sockets = inttoptr i64 %sockets64 to ptr
  %bpf_redirect_map = inttoptr i64 51 to ptr
  %action = call i64 %bpf_redirect_map(ptr %sockets, i32 %queue, i64 2)
  %action32 = trunc i64 %action to i32
  ret i32 %action32

pass:
  ret i32 2
}}
"""


def _wire32(address: ipaddress.IPv4Address) -> int:
    return struct.unpack("<I", address.packed)[0]


def _lookup(name: str, map_number: int) -> str:
    """Look the destination up in a longest-prefix map: %NAME_found is a pointer, null when there is none."""
    return f"""
  store i32 32, ptr %key
  %{name}_address_at = getelementptr i8, ptr %key, i64 4
  store i32 %dst, ptr %{name}_address_at
  %{name}64 = call i64 @llvm.bpf.pseudo(i64 1, i64 {map_number})
  %{name}_map = inttoptr i64 %{name}64 to ptr
  %{name}_lookup = inttoptr i64 1 to ptr
  %{name}_found = call ptr %{name}_lookup(ptr %{name}_map, ptr %key)
  %{name}_none = icmp eq ptr %{name}_found, null
"""


def router(*, generic: bool, only: bool) -> str:
    """The router's default: everything that Linux would forward, and nothing that is for this host or this link."""
    dst_first = "%dst_first = and i32 %dst, 240"
    text = [_HEAD.format(config=CONFIG), _REINJECTED if generic else "", _ETHERNET]
    text.append(f"""
  br i1 %to_port, label %unicast, label %pass

unicast:
  {dst_first}
  %multicast = icmp eq i32 %dst_first, 224
  %broadcast = icmp eq i32 %dst, -1
  %dst_net = and i32 %dst, 65535
  %dst_link = icmp eq i32 %dst_net, {socket.ntohs(0xA9FE)}
  %src_net = and i32 %src, 65535
  %src_link = icmp eq i32 %src_net, {socket.ntohs(0xA9FE)}
  %either_1 = or i1 %multicast, %broadcast
  %either_2 = or i1 %dst_link, %src_link
  %not_routed = or i1 %either_1, %either_2
  br i1 %not_routed, label %pass, label %routed

routed:
  %udp = icmp eq i8 %protocol, 17
  %offset = and i16 %fragment, {socket.ntohs(0x1FFF)}
  %first_fragment = icmp eq i16 %offset, 0
  %has_ports = and i1 %udp, %first_fragment
  br i1 %has_ports, label %transport_header, label %addressed

transport_header:
  %ip_header = getelementptr i8, ptr %packet, i64 14
  {_PORTS}
  br i1 %no_ports, label %addressed, label %ports

ports:
  %dport_at = getelementptr i8, ptr %transport, i64 2
  %dport = load i16, ptr %dport_at
  %to_server = icmp eq i16 %dport, {socket.ntohs(67)}
  %to_client = icmp eq i16 %dport, {socket.ntohs(68)}
  %dhcp = or i1 %to_server, %to_client
  br i1 %dhcp, label %pass, label %addressed

addressed:
  {_lookup("local", LOCAL)}
  br i1 %local_none, label %foreign, label %pass

foreign:""")
    if only:
        text.append(f"{_lookup('only', ONLY)}  br i1 %only_none, label %pass, label %redirect\n")
    else:
        text.append("  br label %redirect\n")
    text.append(_TAIL.format(sockets=SOCKETS))
    return "".join(text)


def pinhole(filters: Sequence[Filter], *, generic: bool) -> str:
    """What any of the filters takes, even when it is addressed to this host."""
    text = [_HEAD.format(config=CONFIG), _REINJECTED if generic else "", _ETHERNET]
    text.append(_WHOLE_HEADER)
    for number, filter_ in enumerate(filters):
        missed = f"filter{number + 1}" if number + 1 < len(filters) else "pass"
        text.append(_filter(number, filter_, missed))
    text.append(_TAIL.format(sockets=SOCKETS))
    return "".join(text)


def _filter(number: int, wanted: Filter, missed: str) -> str:
    """The blocks of one filter, from %filterN to %redirect or to the block `missed`."""
    prefix = f"filter{number}"
    lines = [f"\n{prefix}:"]
    steps = 0

    def require(condition: str) -> None:
        nonlocal steps
        steps += 1
        lines.append(f"  br i1 {condition}, label %{prefix}_{steps}, label %{missed}\n\n{prefix}_{steps}:")

    def compare(name: str, operation: str, kind: str, value: str, other: object) -> str:
        lines.append(f"  %{prefix}_{name} = icmp {operation} {kind} {value}, {other}")
        return f"%{prefix}_{name}"

    require("%group_bit" if wanted.group else "%to_port")
    if wanted.protocol is not None:
        require(compare("proto", "eq", "i8", "%protocol", wanted.protocol))
    for name, prefix_wanted in (("src", wanted.src), ("dst", wanted.dst)):
        if prefix_wanted is not None and prefix_wanted.prefixlen:
            mask, address = _wire32(prefix_wanted.netmask), _wire32(prefix_wanted.network_address)
            lines.append(f"  %{prefix}_{name}_masked = and i32 %{name}, {mask}")
            require(compare(name, "eq", "i32", f"%{prefix}_{name}_masked", address))
    if wanted.sport is not None or wanted.dport is not None:
        # A fragment is left to Linux: only the first one has ports, and all must go the same way.
        lines.append(f"  %{prefix}_part = and i16 %fragment, {socket.ntohs(0x3FFF)}")
        require(compare("whole", "eq", "i16", f"%{prefix}_part", 0))
        lines.append(f"  %{prefix}_ip_header = getelementptr i8, ptr %packet, i64 14")
        ports = _PORTS.replace("%transport", f"%{prefix}_transport").replace("%ip_header", f"%{prefix}_ip_header")
        ports = ports.replace("%ports_end", f"%{prefix}_ports_end").replace("%no_ports", f"%{prefix}_no_ports")
        lines.append(ports)
        lines.append(f"  %{prefix}_has_ports = xor i1 %{prefix}_no_ports, true")
        require(f"%{prefix}_has_ports")
        for name, at, ports_wanted in (("sport", 0, wanted.sport), ("dport", 2, wanted.dport)):
            if ports_wanted is not None:
                low, high = ports_wanted
                lines.append(f"  %{prefix}_{name}_at = getelementptr i8, ptr %{prefix}_transport, i64 {at}")
                lines.append(f"  %{prefix}_{name}_wire = load i16, ptr %{prefix}_{name}_at")
                lines.append(f"  %{prefix}_{name} = call i16 @llvm.bswap.i16(i16 %{prefix}_{name}_wire)")
                require(compare(f"{name}_low", "uge", "i16", f"%{prefix}_{name}", low))
                require(compare(f"{name}_high", "ule", "i16", f"%{prefix}_{name}", high))
    lines.append("  br label %redirect\n")
    return "\n".join(lines)
