"""Features that are switched off while somebody needs that, and exactly those switched on again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from libfp.errors import Unsupported
from libfp.pyxdp import Steer, look
from libfp.pyxdp.ethtool import Ethtool, SwitchedOff
from libfp.pyxdp.rss import SymmetricHashing
from libfp.testing.netns import Lab

STRIPPING = "rx-vlan-hw-parse"


@pytest.fixture
def host():
    with Lab() as lab:
        host = lab.host("host")
        lab.link(host, "p0", lab.host("far"), "w0", queues=3)
        with host.enter():
            yield host


def features(name="p0"):
    with Ethtool(name) as ethtool:
        return {feature: state.on for feature, state in ethtool.features().items()}


def set_feature(**wanted):
    with Ethtool("p0") as ethtool:
        ethtool.set({name.replace("_", "-"): on for name, on in wanted.items()})


def test_queues_in_use_are_counted(host):
    with Ethtool("p0") as ethtool:
        assert ethtool.queues() == (3, 3)
    assert look("p0").queues == 3


def test_stripping_is_off_while_attached_and_on_again_afterwards(host):
    before = features()
    assert before[STRIPPING]
    with Steer().attach("p0") as attachment:
        assert not features()[STRIPPING]
        assert STRIPPING in attachment.features.names
    assert features() == before


@pytest.mark.parametrize("gro", [False, True])
def test_generic_mode_switches_gro_off_too_and_restores_what_it_found(host, gro):
    set_feature(rx_gro=gro)
    before = features()
    assert before["rx-gro"] is gro
    with Steer().attach("p0", mode="skb") as attachment:
        assert not features()["rx-gro"]
        assert ("rx-gro" in attachment.features.names) is gro
    assert features() == before


def test_native_mode_leaves_gro_alone(host):
    set_feature(rx_gro=True)
    with Steer().attach("p0", mode="native"):
        assert features()["rx-gro"]


def test_what_was_off_before_stays_off(host):
    set_feature(rx_vlan_hw_parse=False)
    before = features()
    with Steer().attach("p0") as attachment:
        assert STRIPPING not in attachment.features.names
    assert features() == before


def test_hashing_that_cannot_be_made_symmetric(host, caplog):
    with caplog.at_level("INFO", "libfp"):
        hashing = SymmetricHashing("p0")  # veth has no such thing
    assert hashing.how == ""
    assert caplog.messages == ["p0: receive hashing cannot be made symmetric: directions of a flow may arrive apart"]
    hashing.restore()


def test_what_the_driver_keeps_on_is_named(host):
    before = features("lo")  # the loopback's receive checksumming cannot be switched off
    off = SwitchedOff("lo", ["rx-checksum", "rx-gro", "no-such-feature"])
    assert (off.names, off.left_on) == (("rx-gro",), ("rx-checksum",))
    off.restore()
    off.restore()
    assert features("lo") == before


def test_restoring_follows_a_rename_and_survives_a_removal(host):
    off = SwitchedOff("p0", [STRIPPING])
    host.down("p0")
    host.netlink("link", "set", index=host.index("p0"), ifname="q0")
    off.restore()
    assert features("q0")[STRIPPING]

    off = SwitchedOff("q0", [STRIPPING])
    host.netlink("link", "del", index=host.index("q0"))
    off.restore()


def test_a_failed_attachment_restores_too(host):
    """The peer's MTU is too large for native XDP on veth, which the kernel tells only after everything else is done."""
    before = features()
    host.lab.hosts["far"].set_mtu("w0", 9000)
    with pytest.raises(Unsupported):
        Steer().attach("p0", mode="native")
    assert features() == before


NO_AF_XDP = """
import ctypes, struct
# A seccomp filter that answers socket(44, ...) as a kernel without AF_XDP does (EAFNOSUPPORT is 97).
rules = struct.pack("HBBI" * 6, 0x20, 0, 0, 0, 0x15, 0, 3, {number}, 0x20, 0, 0, 16, 0x15, 0, 1, 44,
                    6, 0, 0, 0x00050000 | 97, 6, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(rules, len(rules))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, struct.pack("HxxxxxxQ", 6, ctypes.addressof(code)), 0, 0) == 0
from libfp.errors import Error
from libfp.pyxdp import Socket
try:
    Socket("p0")
except Error as error:
    print(type(error).__name__, error)
"""


def test_a_kernel_without_af_xdp_is_a_typed_error(host):
    import platform

    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    done = host.run([sys.executable, "-c", NO_AF_XDP.format(number=number)], timeout=30)
    assert done.stdout == "Unsupported this kernel has no AF_XDP; it needs CONFIG_XDP_SOCKETS\n", done.stderr


def test_the_ethtool_program_agrees(host):
    try:
        text = host.run(["ethtool", "-k", "p0"], check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ethtool to compare with: {error}")
    ours = features()
    shown = dict(line.strip().split(": ", 1) for line in text.splitlines()[1:] if ": " in line)
    compared = {name: state.startswith("on") for name, state in shown.items() if name in ours}
    assert len(compared) > 20
    assert compared == {name: ours[name] for name in compared}
