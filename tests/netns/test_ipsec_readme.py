"""The two gateways of apps/ipsec/README.md: its files, its commands, in its network."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
from pathlib import Path

import pytest

from libfp.linux import xfrm
from libfp.testing.netns import Lab, wait_until
from libfp.testing.router import AppProcess

README = (Path(__file__).parents[2] / "apps/ipsec/README.md").read_text()
EXAMPLE = README.partition("## Two gateways\n")[2].partition("\n## ")[0]
FILES = re.findall(r"```toml\n(.*?)```", EXAMPLE, re.DOTALL)
KEYS, *COMMANDS = re.findall(r"```sh\n(.*?)```", EXAMPLE, re.DOTALL)
FILE = "/etc/libfp/ipsec.toml"


class Example:
    """left -- (lan0 gw1 wan0) -- world -- (wan0 gw2 lan0) -- right, and what the README has one write and type."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        names = ("left", "gw1", "world", "gw2", "right")
        self.left, gw1, self.world, gw2, self.right = (lab.host(name) for name in names)
        self.gateways = (gw1, gw2)
        self.files = [folder / "gw1.toml", folder / "gw2.toml"]
        for host, end, gateway, here, outer in (
            (self.left, "e1", gw1, "10.1.0", "198.51.100.1"),
            (self.right, "e2", gw2, "10.2.0", "203.0.113.9"),
        ):
            lab.link(host, end, gateway, "lan0")
            lab.link(gateway, "wan0", self.world, f"w{end}")
            host.address(end, f"{here}.2/16")
            gateway.address("lan0", f"{here}.1/16")
            gateway.address("wan0", f"{outer}/24")
            world = outer.rpartition(".")[0] + ".254"
            self.world.address(f"w{end}", f"{world}/24")
            gateway.route("default", via=world)
            host.route("default", via=f"{here}.1")
        self.world.sysctl("net.ipv4.ip_forward", 1)
        self.write()

    def write(self) -> None:
        made = [gw.run(shlex.split(line, comments=True), check=True).stdout.strip()
                for gw, line in zip(self.gateways, KEYS.splitlines(), strict=True)]  # fmt: skip
        for file, text in zip(self.files, FILES, strict=True):
            for name, key in zip(("KEY-A", "KEY-B"), made, strict=True):
                text = text.replace(name, key)
            file.write_text(f'state = "{file.with_suffix(".json")}"\n{text}')

    def start(self, number: int) -> AppProcess:
        """All of a gateway's commands; the last one is `fp ipsec`."""
        *others, last = (shlex.split(line, comments=True) for line in COMMANDS[number].splitlines())
        at, file = self.gateways[number], str(self.files[number])
        for words in others:
            at.run([word.replace(FILE, file) for word in words], check=True)
        assert last[:2] == ["fp", "ipsec"]
        return AppProcess(at, *[word.replace(FILE, file) for word in last[1:]], wait=False)


@pytest.mark.timeout(180)
def test_the_example(tmp_path: Path) -> None:
    with Lab() as lab:
        example = Example(lab, tmp_path)
        with contextlib.ExitStack() as stack:
            for number in (0, 1):  # one after the other: the first may have to compile, together with other tests
                stack.enter_context(example.start(number)).wait_ready(150)
            sniffer = example.world.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
            sniffer.setblocking(False)
            wait_until(lambda: example.left.ping("10.2.0.2", count=1, timeout=0.5).received, 20, "an answer")
            assert example.right.ping("10.1.0.2", count=3, interval=0.01).received == 3
            seen = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    seen.append(sniffer.recv(2048))
            assert {frame[23] for frame in seen} == {50}, "nothing but ESP"
            assert {(frame[26:30], frame[30:34]) for frame in seen} == {
                (socket.inet_aton(one), socket.inet_aton(other))
                for one, other in (("198.51.100.1", "203.0.113.9"), ("203.0.113.9", "198.51.100.1"))
            }
            assert len(example.gateways[0].call(xfrm.policies)) == 4
