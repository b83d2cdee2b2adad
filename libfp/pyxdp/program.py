"""The steering program as LLVM text: a frame is passed to Linux, or redirected to the socket of its queue.

Redirection falls back to passing, so a queue without a socket belongs to Linux. Multi-byte constants are compared in
wire order as a little-endian processor loads it, so that packets need no swapping.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterable, Sequence

from libfp.pyxdp.filters import Filter, Prefix

CONFIG, SOCKETS, LOCAL, ONLY, LOCAL6, ONLY6 = range(6)  # the order of the maps given to emit.link

CONFIG_SIZE = 32
LONGEST = 0x3FFF  # bytes: the largest frame limit that the program takes
FAMILIES = {"ipv4": 1, "ipv6": 2}  # bits of the word that says which families are taken
IPV4, IPV6 = socket.ntohs(0x0800), socket.ntohs(0x86DD)


def config(mac: bytes, longest: int, families: Iterable[str], marker: bytes) -> bytes:
    """The program's settings: the port's MAC, the longest frame to take in bytes, which FAMILIES to take, and the mark
    of re-injected frames."""
    word = sum(FAMILIES[family] for family in set(families))
    return struct.pack("<6sxxII14sxx", mac, min(longest, LONGEST), word, marker)


_BOUNDS = """
  %data32 = load i32, ptr %context
  %end_at = getelementptr i8, ptr %context, i64 4
  %end32 = load i32, ptr %end_at
  %data = zext i32 %data32 to i64
  %packet = inttoptr i64 %data to ptr
  %end64 = zext i32 %end32 to i64
  %end = inttoptr i64 %end64 to ptr
  %whole_end = getelementptr i8, ptr %packet, i64 {size}
  %short = icmp ugt ptr %whole_end, %end
  br i1 %short, label %{short}, label %whole

whole:
  %type_at = getelementptr i8, ptr %packet, i64 12
  %type = load i16, ptr %type_at
"""


def bounds(size: int, short: str) -> str:
    """What an XDP program begins with: the frame is from %packet to %end; one of at least `size` bytes goes on in the
    block %whole, which starts here with its EtherType in %type, a shorter one to the block `short`."""
    return _BOUNDS.format(size=size, short=short)


def _load(base: str, *fields: tuple[str, str, int]) -> str:
    """%NAME for each field behind the pointer `base`: name, type, offset. LLVM splits loads it takes for unaligned."""
    return "".join(
        f"  %{name}_at = getelementptr i8, ptr {base}, i64 {at}\n"
        f"  %{name} = load {kind}, ptr %{name}_at{', align 8' if kind == 'i64' else ''}\n"
        for name, kind, at in fields
    )


# The keys of longest-prefix maps are made at %key, a length (32 bits) and an address that begins on a whole word.
_HEAD = f"""
declare i64 @llvm.bpf.pseudo(i64, i64)
declare i16 @llvm.bswap.i16(i16)

define i32 @libfp_steer(ptr %context) section "program" {{
  %key_room = alloca [3 x i64]
  %key = getelementptr i8, ptr %key_room, i64 4
  {bounds(34, "pass")}
  %config64 = call i64 @llvm.bpf.pseudo(i64 2, i64 {CONFIG})
  %config = inttoptr i64 %config64 to ptr
  {_load("%packet", ("dmac", "i32", 0), ("dmac_rest", "i16", 4), ("smac", "i16", 6), ("smac_rest", "i32", 8))}
"""

# What the punt path wrote into the TAP comes by here again in generic mode: its mark (14 bytes in front, laid out as an
# Ethernet header with random addresses) comes off, and the frame goes on to Linux.
_REINJECTED = f"""
  {_load("%config", ("mark_dmac", "i32", 16), ("mark_dmac_rest", "i16", 20))}
  {_load("%config", ("mark_smac", "i16", 22), ("mark_smac_rest", "i32", 24), ("mark_type", "i16", 28))}
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

_ETHERNET = f"""
  %limit_at = getelementptr i8, ptr %config, i64 8
  %limit = load i32, ptr %limit_at
  %limit_bounded = and i32 %limit, 16383
  %limit64 = zext i32 %limit_bounded to i64
  %longest = getelementptr i8, ptr %packet, i64 %limit64
  %too_long = icmp ult ptr %longest, %end
  br i1 %too_long, label %pass, label %fits

fits:
  {_load("%config", ("mac", "i32", 0), ("mac_rest", "i16", 4))}
  %mac_differs = xor i32 %dmac, %mac
  %mac_rest_differs = xor i16 %dmac_rest, %mac_rest
  %mac_rest_wide = zext i16 %mac_rest_differs to i32
  %mac_any = or i32 %mac_differs, %mac_rest_wide
  %to_port = icmp eq i32 %mac_any, 0
  %group_bit = trunc i32 %dmac to i1
  %families_at = getelementptr i8, ptr %config, i64 12
  %families = load i32, ptr %families_at
  %ipv4 = icmp eq i16 %type, {IPV4}
  br i1 %ipv4, label %ip_taken, label %not_ipv4

not_ipv4:
  %ipv6 = icmp eq i16 %type, {IPV6}
  br i1 %ipv6, label %ip6_taken, label %pass
"""

_IP = f"""
ip_taken:
  %family = and i32 %families, {FAMILIES["ipv4"]}
  %not_taken = icmp eq i32 %family, 0
  br i1 %not_taken, label %pass, label %ip

ip:
  %ihl_at = getelementptr i8, ptr %packet, i64 14
  %ihl_byte = load i8, ptr %ihl_at
  %ihl_words = and i8 %ihl_byte, 15
  %ihl_short = shl i8 %ihl_words, 2
  %ihl = zext i8 %ihl_short to i64
  %ip_header = getelementptr i8, ptr %packet, i64 14
  {_load("%packet", ("fragment", "i16", 20), ("protocol", "i8", 23), ("src", "i32", 26), ("dst", "i32", 30))}
"""

# A pin-hole leaves what is not IP at a closer look to Linux; the router takes it, to count it by name.
_WHOLE_HEADER = """
  %version_ok = icmp uge i8 %ihl_byte, 69
  %ihl_ok = icmp ule i8 %ihl_byte, 79
  %sound = and i1 %version_ok, %ihl_ok
  br i1 %sound, label %filter0, label %missed
"""

# The address of the transport header is hidden from LLVM in an empty assembly line: the verifier must see the checked
# and the used pointer as one register.
_PORTS = """
  %transport_plain = getelementptr i8, ptr %ip_header, i64 %ihl
  %transport = call ptr asm sideeffect "", "=r,0"(ptr %transport_plain)
  %ports_end = getelementptr i8, ptr %transport, i64 4
  %no_ports = icmp ugt ptr %ports_end, %end
"""

# Linux counts packets that are cut short. The verifier forgets the range of what was swapped, so it is masked again;
# the mask is hidden from LLVM, which knows it to be useless. Neighbour discovery, types 133 to 137 of ICMPv6, is valid
# with a hop limit of 255 only (RFC 4861).
_IP6 = f"""
ip6_taken:
  %family6 = and i32 %families, {FAMILIES["ipv6"]}
  %not_taken6 = icmp eq i32 %family6, 0
  br i1 %not_taken6, label %pass, label %ip6

ip6:
  %payload = getelementptr i8, ptr %packet, i64 54
  %short6 = icmp ugt ptr %payload, %end
  br i1 %short6, label %pass, label %ip6_header

ip6_header:
  %length_at = getelementptr i8, ptr %packet, i64 18
  %length_wire = load i16, ptr %length_at
  %length_short = call i16 @llvm.bswap.i16(i16 %length_wire)
  %length_wide = zext i16 %length_short to i64
  %length_hidden = call i64 asm sideeffect "", "=r,0"(i64 %length_wide)
  %length = and i64 %length_hidden, 65535
  %payload_end = getelementptr i8, ptr %payload, i64 %length
  %cut = icmp ugt ptr %payload_end, %end
  br i1 %cut, label %pass, label %ip6_whole

ip6_whole:
  {_load("%packet", ("next", "i8", 20), ("hops", "i8", 21), ("src6_high", "i64", 22), ("src6_low", "i64", 30))}
  {_load("%packet", ("dst6_high", "i64", 38), ("dst6_low", "i64", 46))}
  %icmp6 = icmp eq i8 %next, 58
  %fresh = icmp eq i8 %hops, 255
  %perhaps = and i1 %icmp6, %fresh
  br i1 %perhaps, label %icmp6_bounds, label %ip6_known

icmp6_bounds:
  %icmp_end = getelementptr i8, ptr %packet, i64 55
  %no_icmp = icmp ugt ptr %icmp_end, %end
  br i1 %no_icmp, label %ip6_known, label %icmp6_type

icmp6_type:
  %icmp_type = load i8, ptr %payload
  %icmp_type_past = sub i8 %icmp_type, 133
  %discovers = icmp ult i8 %icmp_type_past, 5
  br label %ip6_known

ip6_known:
  %discovery = phi i1 [ false, %ip6_whole ], [ false, %icmp6_bounds ], [ %discovers, %icmp6_type ]
"""

_PORTS6 = """
  %transport = getelementptr i8, ptr %packet, i64 54
  %ports_end = getelementptr i8, ptr %packet, i64 58
  %no_ports = icmp ugt ptr %ports_end, %end
"""

_WHOLE_HEADER6 = """
  %version_at = getelementptr i8, ptr %packet, i64 14
  %version_byte = load i8, ptr %version_at
  %version = and i8 %version_byte, 240
  %sound6 = icmp eq i8 %version, 96
  br i1 %sound6, label %six0, label %missed
"""


def _ports(prefix: str, six: bool) -> str:
    """%PREFIX_transport, and %PREFIX_no_ports when the frame ends before the ports do."""
    return re.sub(r"%(transport|ports_end|no_ports)", rf"%{prefix}_\1", _PORTS6 if six else _PORTS)


_TAIL = f"""
redirect:
  %queue_at = getelementptr i8, ptr %context, i64 16
  %queue = load i32, ptr %queue_at
  %sockets64 = call i64 @llvm.bpf.pseudo(i64 1, i64 {SOCKETS})
  %sockets = inttoptr i64 %sockets64 to ptr
  %bpf_redirect_map = inttoptr i64 51 to ptr
  %action = call i64 %bpf_redirect_map(ptr %sockets, i32 %queue, i64 2)
  %action32 = trunc i64 %action to i32
  ret i32 %action32

pass:
  ret i32 2
}}
"""


def _lookup(name: str, map_number: int, six: bool = False) -> str:
    """Look the destination up in a longest-prefix map: %NAME_found is a pointer, null when there is none."""
    words = [("i64", "%dst6_high"), ("i64", "%dst6_low")] if six else [("i32", "%dst")]
    stores = "".join(
        f"  %{name}_at_{n} = getelementptr i8, ptr %key, i64 {4 + 8 * n}\n  store {kind} {word}, ptr %{name}_at_{n}\n"
        for n, (kind, word) in enumerate(words)
    )
    return f"""
  store i32 {128 if six else 32}, ptr %key
{stores}
  %{name}64 = call i64 @llvm.bpf.pseudo(i64 1, i64 {map_number})
  %{name}_map = inttoptr i64 %{name}64 to ptr
  %{name}_lookup = inttoptr i64 1 to ptr
  %{name}_found = call ptr %{name}_lookup(ptr %{name}_map, ptr %key)
  %{name}_none = icmp eq ptr %{name}_found, null
"""


def _unrouted6(name: str) -> str:
    """%NAME_unrouted: this address is multicast, link-local (fe80::/10), or in ::/64 (unspecified, loopback, and IPv4
    addresses in disguise, about which Linux has its own rules)."""
    return f"""
  %{name}_first = and i64 %{name}_high, 255
  %{name}_multicast = icmp eq i64 %{name}_first, 255
  %{name}_ten = and i64 %{name}_high, {socket.ntohs(0xFFC0)}
  %{name}_link = icmp eq i64 %{name}_ten, {socket.ntohs(0xFE80)}
  %{name}_zero = icmp eq i64 %{name}_high, 0
  %{name}_either = or i1 %{name}_multicast, %{name}_link
  %{name}_unrouted = or i1 %{name}_either, %{name}_zero
"""


def router(*, generic: bool, only: bool, take: Sequence[Filter] = ()) -> str:
    """The router's default: everything that Linux would forward, and nothing that is for this host or this link; and
    what any of the filters `take` takes, as in `pinhole`."""
    text = [_HEAD, _REINJECTED if generic else "", _ETHERNET, _IP, _filters(take, False, "router")]
    text += [_router4(only), _IP6, _filters(take, True, "router6"), _router6(only), _TAIL]
    return "".join(text)


def _router4(only: bool) -> str:
    narrowed = f"{_lookup('only', ONLY)}  br i1 %only_none, label %pass, label %redirect" if only else ""
    return f"""
router:
  br i1 %to_port, label %unicast, label %pass

unicast:
  %dst_first = and i32 %dst, 240
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
  {_ports("udp", six=False)}
  br i1 %udp_no_ports, label %addressed, label %ports

ports:
  %dport_at = getelementptr i8, ptr %udp_transport, i64 2
  %dport = load i16, ptr %dport_at
  %to_server = icmp eq i16 %dport, {socket.ntohs(67)}
  %to_client = icmp eq i16 %dport, {socket.ntohs(68)}
  %dhcp = or i1 %to_server, %to_client
  br i1 %dhcp, label %pass, label %addressed

addressed:
  {_lookup("local", LOCAL)}
  br i1 %local_none, label %foreign, label %pass

foreign:
{narrowed or "  br label %redirect"}
"""


def _router6(only: bool) -> str:
    narrowed = f"{_lookup('only6', ONLY6, six=True)}  br i1 %only6_none, label %pass, label %redirect" if only else ""
    return f"""
router6:
  br i1 %to_port, label %unicast6, label %pass

unicast6:
  {_unrouted6("dst6")}{_unrouted6("src6")}
  %hop_by_hop = icmp eq i8 %next, 0
  %either6 = or i1 %dst6_unrouted, %src6_unrouted
  %not_routed6 = or i1 %either6, %hop_by_hop
  br i1 %not_routed6, label %pass, label %not_discovery

not_discovery:
  br i1 %discovery, label %pass, label %routed6

routed6:
  %udp6 = icmp eq i8 %next, 17
  br i1 %udp6, label %transport6, label %addressed6

transport6:
  {_ports("udp6", six=True)}
  br i1 %udp6_no_ports, label %addressed6, label %ports6

ports6:
  %dport6_at = getelementptr i8, ptr %udp6_transport, i64 2
  %dport6 = load i16, ptr %dport6_at
  %to_client6 = icmp eq i16 %dport6, {socket.ntohs(546)}
  %to_server6 = icmp eq i16 %dport6, {socket.ntohs(547)}
  %dhcp6 = or i1 %to_client6, %to_server6
  br i1 %dhcp6, label %pass, label %addressed6

addressed6:
  {_lookup("local6", LOCAL6, six=True)}
  br i1 %local6_none, label %foreign6, label %pass

foreign6:
{narrowed or "  br label %redirect"}
"""


def pinhole(filters: Sequence[Filter], *, generic: bool) -> str:
    """What any of the filters takes, even when it is addressed to this host. Neighbour discovery is taken only by a
    filter that names its protocol: without it, Linux would lose the neighbours that every packet needs."""
    text = [_HEAD, _REINJECTED if generic else "", _ETHERNET]
    return "".join([*text, _IP, _filters(filters, False), _IP6, _filters(filters, True), _TAIL])


def _filters(filters: Sequence[Filter], six: bool, missed: str = "pass") -> str:
    """The blocks of the filters for one family, which lead to %redirect or to the block `missed`."""
    mine = [one for one in filters if one.family != (4 if six else 6)]
    sound, name = (_WHOLE_HEADER6, "six") if six else (_WHOLE_HEADER, "filter")
    text = [sound.replace("%missed", f"%{missed}")]
    for number, filter_ in enumerate(mine):
        otherwise = f"{name}{number + 1}" if number + 1 < len(mine) else missed
        text.append(_filter(f"{name}{number}", filter_, otherwise, six))
    return "".join(text) if mine else f"\n  br label %{missed}\n"


def _words(prefix: Prefix) -> list[tuple[str, str, int, int]]:
    """What to compare of an address: (suffix of its variable, type, mask, value) of each word that matters."""
    size, kind, suffixes = (4, "i32", ("",)) if prefix.version == 4 else (8, "i64", ("6_high", "6_low"))
    words = []
    for number, suffix in enumerate(suffixes):
        part = slice(size * number, size * number + size)
        mask, value = (
            int.from_bytes(address.packed[part], "little") for address in (prefix.netmask, prefix.network_address)
        )
        if mask:
            words.append((suffix, kind, mask, value))
    return words


def _filter(prefix: str, wanted: Filter, missed: str, six: bool) -> str:
    """The blocks of one filter, from %PREFIX to %redirect or to the block `missed`."""
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
        require(compare("proto", "eq", "i8", "%next" if six else "%protocol", wanted.protocol))
    elif six:
        require(compare("other", "eq", "i1", "%discovery", "false"))
    for name, prefix_wanted in (("src", wanted.src), ("dst", wanted.dst)):
        for suffix, kind, mask, value in _words(prefix_wanted) if prefix_wanted is not None else ():
            lines.append(f"  %{prefix}_{name}{suffix}_masked = and {kind} %{name}{suffix}, {mask}")
            require(compare(name + suffix, "eq", kind, f"%{prefix}_{name}{suffix}_masked", value))
    if wanted.sport is not None or wanted.dport is not None:
        if not six:
            # A fragment is left to Linux: only the first one has ports, and all must go the same way.
            lines.append(f"  %{prefix}_part = and i16 %fragment, {socket.ntohs(0x3FFF)}")
            require(compare("whole", "eq", "i16", f"%{prefix}_part", 0))
        lines.append(_ports(prefix, six))
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
