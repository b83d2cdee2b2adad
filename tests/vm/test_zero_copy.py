"""Zero-copy for real: a newer kernel's virtio-net, in a guest, does what this machine's interfaces cannot.

`make test-vm` runs these. guest.py is what runs inside; here is what must have come of it.
"""

from __future__ import annotations

import signal

import pytest

from tests.vm.machine import Seen

pytestmark = pytest.mark.timeout(900)  # the first test waits for the guest


def test_zero_copy_bind(seen: Seen) -> None:
    bind = seen("bind")
    assert bind["mode"] == "zero-copy"
    assert bind["option"], "XDP_OPTIONS, the kernel's own word"
    assert bind["auto"] == ["zero-copy", ""]
    assert bind["received"] == bind["sent"]
    assert bind["in_order"]
    assert bind["returned"] == bind["sent"]
    assert bind["statistics"]["rx_dropped"] == bind["statistics"]["tx_invalid_descs"] == 0


def test_router_between_zero_copy_ports(seen: Seen) -> None:
    router = seen("forwards")
    assert router["ready"]["zero_copy"] is True
    assert router["ready"]["ports"] == ["r0", "r1"]
    assert router["compiled"] == 0, "what this machine has compiled did for the guest"
    assert router["pings"] == 5
    assert router["received"] == router["offered"]
    assert router["reordered"] == 0
    assert router["forwarded"] >= 10 + router["offered"], "by the fast path, not by Linux"
    assert router["tcp_intact"]


def test_tagged_frames_are_linux_s(seen: Seen) -> None:
    vlan = seen("vlan")
    assert vlan["zero_copy"] is True
    assert vlan["to_router"] == 5
    assert vlan["to_server"] == 5
    assert vlan["taken"] == 0, "the steering program has put a tagged frame into the ring"
    assert vlan["punted"] >= 5, "the server's answers, which leave by the VLAN device"


def test_a_member_of_a_vrf_is_refused_by_name(seen: Seen) -> None:
    vrf = seen("vrf")
    assert vrf["status"] == 2
    assert "r0 is a member of vrf red" in vrf["said"]
    assert "Traceback" not in vrf["said"]


def test_killed_it_leaves_the_traffic_to_linux(seen: Seen) -> None:
    killed = seen("killed")
    assert killed["status"] == -signal.SIGKILL
    assert killed["running"] == {"r0": 1, "r1": 1}
    assert killed["left"] == {"r0": 0, "r1": 0}
    assert killed["pings"] == 5
    assert not [name for name in killed["interfaces"] if name.startswith("lfp")], "a TAP was left"
    assert killed["again"] == "zero-copy"


def test_a_mixed_group_falls_back_to_copy_mode(seen: Seen) -> None:
    mixed = seen("mixed")
    assert mixed["ready"]["zero_copy"] is False
    assert "v0 cannot do zero-copy" in mixed["said"], "which port it was"
    assert mixed["pings"] == 5
    assert mixed["forwarded"] >= 10, "requests and replies, by the fast path"
    assert mixed["status"] == 0
