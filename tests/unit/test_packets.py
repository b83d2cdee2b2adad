"""The packet builders against scapy, which dissects and recomputes independently."""

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether

from libfp.testing.packets import ethernet, icmp_echo, internet_checksum, ipv4, tcp, udp

ADDRESSES = {"src": "192.0.2.1", "dst": "198.51.100.7"}
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")


@pytest.mark.parametrize("payload", [b"", b"x", b"hello", bytes(range(256))])
def test_transport_builders_equal_scapy(payload):
    ip = IP(**ADDRESSES, id=0, flags=0)
    assert udp(payload, sport=1, dport=2, **ADDRESSES) == bytes(ETHER / ip / UDP(sport=1, dport=2) / payload)
    segment = TCP(sport=1, dport=2, flags="SA", seq=5, ack=6, window=7)
    assert tcp(payload, sport=1, dport=2, flags="SA", seq=5, ack=6, window=7, **ADDRESSES) == bytes(
        ETHER / ip / segment / payload
    )
    assert icmp_echo(payload, 3, 4, **ADDRESSES) == bytes(ETHER / ip / ICMP(type=8, id=3, seq=4) / payload)


def test_ipv4_header_fields_equal_scapy():
    ours = ipv4(
        b"12345678",
        **ADDRESSES,
        protocol=99,
        ttl=1,
        tos=0x2E,
        identification=0xABCD,
        more_fragments=True,
        fragment_offset=16,
        options=b"\x94\x04\x00\x00",
    )
    theirs = IP(**ADDRESSES, proto=99, ttl=1, tos=0x2E, id=0xABCD, flags="MF", frag=2, options=b"\x94\x04\x00\x00")
    assert ours == bytes(ETHER / theirs / b"12345678")
    assert IP(ipv4(dont_fragment=True)[14:]).flags == "DF"


def test_malformed_headers_keep_what_was_asked_for():
    frame = ipv4(version=6, header_words=4, total_length=3, checksum=0xBEEF)
    assert frame[14] == 0x64
    assert frame[16:18] == b"\0\3"
    assert frame[24:26] == b"\xbe\xef"
    with pytest.raises(ValueError, match="multiple of 8"):
        ipv4(fragment_offset=4)


def test_ethernet_tag_and_padding():
    frame = udp(vlan=5, pad=64)
    assert len(frame) == 64
    assert Ether(frame)[Dot1Q].vlan == 5
    with pytest.raises(ValueError, match="MAC"):
        ethernet(b"", eth_dst="02:00")


def test_udp_checksum_is_never_zero_by_accident():
    # A payload that makes the sum 0xffff: the checksum would be 0, which means "none" and is sent as 0xffff.
    base = udp(b"\0\0", src="0.0.0.0", dst="0.0.0.0", sport=0, dport=0)
    checksum = int.from_bytes(base[40:42], "big")
    frame = udp(checksum.to_bytes(2, "big"), src="0.0.0.0", dst="0.0.0.0", sport=0, dport=0)
    assert frame[40:42] == b"\xff\xff"


def test_internet_checksum_of_rfc_1071():
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF
