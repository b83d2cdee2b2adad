"""`fp gen` on interfaces: through a host that forwards, and to one that only counts; both sides agree to the packet."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from libfp.gen import Generator, Receiver, Traffic
from libfp.ports import XdpPort
from libfp.pyxdp import Steer
from libfp.testing.netns import Host, Lab, wait_until

PACKETS, RATE = 3000, 20_000
START = 60.0


@pytest.fixture(scope="module")
def net():
    """tester (t0) -- (d0 device d1) -- (t1) tester: Linux forwards, both families."""
    with Lab(ipv6=True) as lab:
        tester, device = lab.host("tester"), lab.host("device")
        lab.link(tester, "t0", device, "d0")
        lab.link(tester, "t1", device, "d1")
        for number in (0, 1):
            device.address(f"d{number}", f"10.0.{number}.1/24")
            device.address(f"d{number}", f"2001:db8:{number}::1/64")
            mac = tester.mac(f"t{number}")
            device.neighbour(f"d{number}", f"10.0.{number}.2", mac)
            device.neighbour(f"d{number}", f"2001:db8:{number}::2", mac)
        device.sysctl("net.ipv4.ip_forward", 1)
        device.sysctl("net.ipv6.conf.all.forwarding", 1)
        yield tester, device


def traffic(device: Host, **more: Any) -> Traffic:
    made = {"source": "10.0.0.2", "to": "10.0.1.2", "source6": "2001:db8::2", "to6": "2001:db8:1::2"} | more
    return Traffic(eth_dst=device.mac("d0"), **made)


def port(name: str) -> XdpPort:
    return XdpPort(name, Steer("udp dport 7"))


@pytest.mark.timeout(120)
def test_what_linux_forwards_is_counted_to_the_packet(net: tuple[Host, Host]) -> None:
    tester, device = net
    with tester.enter(), Generator([port("t0")], traffic(device, size={84: 3, 600: 1}, families=(4, 6), flows=50),
                                   to=[port("t1")]) as generator:  # fmt: skip
        report = generator.run(pps=RATE, packets=PACKETS)
        assert (report.sent, report.received, report.corrupted, report.duplicates) == (PACKETS, PACKETS, 0, 0)
        assert report.counters["t0"]["tx_packets"] == report.counters["t1"]["rx_packets"] == PACKETS
        assert report.streams[0].received_bytes == report.streams[0].sent_bytes
        assert report.latency.minimum > 0
        # what Linux must drop is lost, and nothing else
        generator.load(traffic(device, to="10.0.1.0/30", flows=4))
        report = generator.run(pps=RATE, packets=400)
        assert (report.sent, report.received, report.lost) == (400, 100, 300)


@pytest.mark.timeout(120)
def test_sender_and_receiver_in_two_processes_agree(net: tuple[Host, Host]) -> None:
    tester, device = net
    command = [sys.executable, "-m", "libfp", "gen"]
    with tester.enter(), Receiver([port("t1")]) as receiver:
        receiver.start()
        sender = tester.popen(
            [*command, "t0", "--packets", f"{PACKETS}", "--pps", f"{RATE}", "--json", "--dst-mac", device.mac("d0"),
             "--source", "10.0.0.2", "--dst", "10.0.1.2", "--size", "64:7,570:4,1518:1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        out, errors = sender.communicate(timeout=START)
        assert (sender.returncode, errors) == (0, "")
        sent = json.loads(out)
        wait_until(lambda: receiver.report().received == PACKETS, 10.0, "the last packet")
        report = receiver.stop()
    assert (sent["sent"], sent["packets"], sent["lost"]) == (PACKETS, 0, PACKETS)  # it receives by t0 alone
    assert (report.received, report.sent, report.corrupted, report.stale) == (PACKETS, PACKETS, 0, 0)
    assert report.streams[0].received_bytes == sent["streams"][0]["sent_bytes"]


def test_an_interface_needs_to_know_for_whom_frames_are(net: tuple[Host, Host]) -> None:
    tester, _ = net
    command = [sys.executable, "-m", "libfp", "gen", "t0", "--packets", "1"]
    refused = tester.run(command, check=False)
    assert refused.returncode == 2
    assert "--dst-mac" in refused.stderr
    refused = tester.run([*command, "--dst-mac", "02:00:00:00:00:01", "--size", "1519"], check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "t0 carries frames of 1,518 bytes, not of 1,519" in refused.stderr
