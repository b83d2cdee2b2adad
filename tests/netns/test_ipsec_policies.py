"""The gateway's policies in the kernel: installed, adopted, put back, released, and nobody else's touched."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from libfp.apps.ipsec import xfrm as ours
from libfp.apps.ipsec.config import Config, read
from libfp.cli import main
from libfp.errors import AlreadyRunning, PolicyConflict
from libfp.linux import guard, xfrm
from libfp.linux import rtnetlink as rt
from libfp.linux.conflict import Conflict
from libfp.testing.netns import Host, Lab

HEAD = f"""\
default = "bypass"
[[sa]]
tunnel = "t"
direction = "out"
spi = 256
local = "198.51.100.1"
remote = "203.0.113.9"
cipher = "aes-128-gcm"
key = "{"5a" * 20}"
"""
PROTECT = ("protect", "10.1.0.0/16", "10.2.0.0/16")
BYPASS = ("bypass", "10.1.9.0/24", "10.2.0.0/16")
DISCARD6 = ("discard", "2001:db8:1::/48", "2001:db8:2::/48")

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(*policies: tuple[str, str, str], head: str = HEAD) -> Config:
        path = tmp_path / "ipsec.toml"
        path.touch(mode=0o600)
        text = head
        for action, source, destination in policies:
            text += f'[[policy]]\naction = "{action}"\nsource = "{source}"\ndestination = "{destination}"\n'
            text += 'tunnel = "t"\n' * (action == "protect")
        path.write_text(text)
        return read(str(path))

    return make


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab() as lab:
        host = lab.host("gateway")
        try:
            host.call(xfrm.add, FOREIGN)
        except OSError as error:
            pytest.skip(f"this kernel has no XFRM: {error}")
        yield host


FOREIGN = xfrm.Policy(rt.AF_INET, "10.77.0.0/16", "10.78.0.0/16", "fwd", "allow", 7)


def held(host: Host) -> set[xfrm.Policy]:
    """But for the foreign one, which is always there."""
    found = {policy._replace(number=0) for policy in host.call(xfrm.policies)}
    assert FOREIGN in found
    return found - {FOREIGN}


def due(config: Config) -> set[xfrm.Policy]:
    return set(ours.wanted(config))


def test_installed_left_adopted_and_released(host: Host, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first, second = make(PROTECT, ("discard", *BYPASS[1:]), DISCARD6), make(DISCARD6, PROTECT)
    with host.enter():
        with ours.Kernel(ours.wanted(first)):
            assert held(host) == due(first)
            with pytest.raises(AlreadyRunning, match="fp ipsec runs already"):
                ours.Kernel(ours.wanted(second))
            with pytest.raises(AlreadyRunning, match="fp ipsec runs already"):
                ours.release(first)
        assert held(host) == due(first), "they stay"
        with ours.Kernel(ours.wanted(second)) as kernel:
            assert due(second) < held(host), "another priority; and the third is still there"
            kernel.undo()
            assert held(host) == due(first), "as if it had never been"
            kernel.change(ours.wanted(second))
            assert held(host) == due(second)
        assert ours.release(first) == 0, "none of these is there as this file says"
        assert "8 policies of fp ipsec stay: they are of another file, or of this one as it was" in caplog.text
        assert ours.release(second) == 8
        assert held(host) == set()
        assert ours.release(second) == 0
        assert ours.block(first) == len(due(first)) == 12
        assert ours.block(second) == 8
        assert held(host) == due(second)


def test_what_is_on_the_way_to_other_policies_only_blocks_more(host: Host, make: Make) -> None:
    """No packet is forwarded by Linux that neither the policies before nor those to come let pass."""
    first = make(BYPASS, PROTECT)
    second = make(("protect", *BYPASS[1:]), ("bypass", "10.1.8.0/24", "10.2.0.0/16"), ("bypass", *PROTECT[1:]))
    with host.enter():
        ours.block(first)
        with ours.Kernel(ours.wanted(first)) as kernel:
            kernel.tighten(ours.wanted(second))
            assert {one.source for one in held(host) if one.action == "allow"} == set()
            assert {one.source for one in held(host) if one.direction == "out"} == {"10.1.9.0/24", "10.1.0.0/16"}
            kernel.change(ours.wanted(second))
            assert held(host) == due(second)
            kernel.change(ours.wanted(first))
            assert held(host) == due(first)
        with ours.Kernel(ours.wanted(make(PROTECT))):
            assert {one.action for one in held(host)} == {"block"}, "an allowance of an earlier run is gone at once"


def test_linux_told_not_to_look_at_policies(host: Host, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with host.enter():
        ours.require_enabled(["lo"])
        host.sysctl("net.ipv4.conf.all.disable_xfrm", 1)
        with pytest.raises(PolicyConflict, match=r"sysctl net\.ipv4\.conf\.all\.disable_xfrm\); sysctl -w"):
            ours.require_enabled(["l0"])
        host.sysctl("net.ipv4.conf.all.disable_xfrm", 0)
        host.netlink("link", "add", ifname="d0", kind="veth", peer={"ifname": "d1"})
        host.sysctl("net.ipv4.conf.d0.disable_policy", 1)
        with pytest.raises(PolicyConflict, match=r"conf\.d0\.disable_policy=0"):
            ours.require_enabled(["d0", "d1"])
        ours.require_enabled(["d1"])
        assert "policies are not for d0: Linux looks at none there" in caplog.text


def test_what_has_gone_is_put_back(host: Host, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    config = make(PROTECT, DISCARD6)
    with host.enter(), ours.Kernel(ours.wanted(config)) as kernel:
        one, two, *_ = (policy for policy in xfrm.policies() if policy.priority >= ours.FIRST)
        xfrm.remove(one)
        xfrm.add(two._replace(action="allow", number=0), replace=True)
        assert held(host) != due(config)
        kernel.keep()
        assert held(host) == due(config)
        assert "2 XFRM policies of fp ipsec were gone or changed: they are back" in caplog.text
        caplog.clear()
        kernel.keep()
        assert not caplog.records


def test_what_cannot_be_put_back_is_tried_again(
    host: Host, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    with host.enter(), ours.Kernel(ours.wanted(make(PROTECT))) as kernel:
        xfrm.remove(next(policy for policy in xfrm.policies() if policy.priority == ours.FIRST))

        def refuse(policy: xfrm.Policy, replace: bool = False) -> None:
            tried.append(policy)
            raise OSError(12, os.strerror(12))

        monkeypatch.setattr(xfrm, "add", refuse)
        kernel.keep()
        assert tried
        assert "are gone and cannot be put back" in caplog.text
        assert kernel._timer is not None


def test_a_foreign_policy_in_the_place_of_ours(host: Host, make: Make) -> None:
    config = make(PROTECT, ("protect", "10.77.0.0/16", "10.78.0.0/16"))
    with host.enter():
        with pytest.raises(
            PolicyConflict, match=r"allow 10\.77\.0\.0/16 > 10\.78\.0\.0/16 dir fwd priority 7 is in the"
        ):
            ours.Kernel(ours.wanted(config))
        assert held(host) == set(), "none of the others is left there"
        with ours.Kernel(ours.wanted(make(PROTECT))) as kernel:
            before = held(host)
            with pytest.raises(PolicyConflict):
                kernel.change(ours.wanted(config))
            assert held(host) == before


def refused(host: Host, capsys: pytest.CaptureFixture[str], config: Config, interface: str = "lo") -> str:
    """Start it in vain, and return its last line; nothing is left in the kernel, or of what was there nothing lacks."""
    before = held(host)
    with host.enter():
        assert main(["ipsec", interface, "--config", config.path]) == 2
    assert held(host) == before
    return capsys.readouterr().err.splitlines()[-1]


def test_starts_that_come_to_nothing(
    host: Host, make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = f'state = "{tmp_path}/state/ipsec.json"\n'
    config, other = make(PROTECT, head=state + HEAD), FOREIGN._replace(source="10.1.0.0/16", destination="10.2.0.0/16")
    text = refused(host, capsys, config)
    assert text == (
        "fp: Linux does not forward IPv4 (sysctl net.ipv4.conf.lo.forwarding); sysctl -w net.ipv4.conf.lo.forwarding=1"
    )
    host.sysctl("net.ipv4.conf.all.forwarding", 1)
    assert refused(host, capsys, config).startswith("fp: lo is the loopback device")
    assert refused(host, capsys, config, "nope0").startswith("fp: no interface 'nope0'")
    with host.enter(), ours._alone():
        pass
    with host.enter():
        ours.block(config)
    assert refused(host, capsys, config, "nope0").startswith("fp: no interface 'nope0'")
    with host.enter():
        ours.release(config)
        xfrm.add(other)
    try:
        assert "in the place of one that fp ipsec needs; remove it" in refused(host, capsys, config)
    finally:
        with host.enter():
            xfrm.remove(next(one for one in xfrm.policies() if one.source == "10.1.0.0/16"))
    host.sysctl("net.ipv4.conf.all.disable_policy", 1)
    assert "Linux looks at no XFRM policies" in refused(host, capsys, config)
    host.sysctl("net.ipv4.conf.all.disable_policy", 0)
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    (tmp_path / "state").touch()
    assert "cannot make the folder" in refused(host, capsys, config)
    make(PROTECT, ("protect", "2001:db8:1::/48", "2001:db8:2::/48"), head=state + HEAD)
    assert "Linux does not forward IPv6" in refused(host, capsys, config)


def test_without_root(host: Host, make: Make, tmp_path: Path) -> None:
    """One line, for each command that changes something."""
    if (setpriv := shutil.which("setpriv")) is None:
        pytest.skip("setpriv is not installed")
    config = make(PROTECT, head=f'state = "{tmp_path}/ipsec.json"\n' + HEAD).path
    host.sysctl("net.ipv4.conf.all.forwarding", 1)
    powerless = [setpriv, "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "libfp", "ipsec"]
    with host.enter():
        xfrm.remove(next(policy for policy in xfrm.policies()))
        ours.block(read(config))
    done = host.run([setpriv, "--bounding-set=-all,+net_admin", *powerless[2:], "block", "--config", config])
    assert done.returncode == 0, f"as the unit for systemd: {done.stderr}"
    for arguments in (["lo"], ["release"]):
        done = host.run([*powerless, *arguments, "--config", config])
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(r"fp: .*CAP_NET_ADMIN.*\n", done.stderr), done.stderr


def test_ours_are_no_conflict_and_others_are(host: Host, make: Make) -> None:
    with host.enter():
        xfrm.remove(next(policy for policy in xfrm.policies()))
        with ours.Kernel(ours.wanted(make(PROTECT, BYPASS))) as kernel:
            guard.require({}, kernel.applies)
            with pytest.raises(PolicyConflict, match="6 XFRM policies"):
                guard.require({})
            xfrm.add(FOREIGN._replace(priority=ours.FIRST))
            with pytest.raises(PolicyConflict, match="1 XFRM policy for IPv4"):
                guard.require({}, kernel.applies)
            assert not kernel.applies(Conflict("XFRM policies block by default", "xfrm", direction=""))
            assert not kernel.applies(Conflict("qdisc tbf on r1", "qdisc"))
