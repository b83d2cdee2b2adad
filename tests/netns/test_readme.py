"""The README's programs, run as they stand there (but for the cores, which a small machine may not have)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from libfp.testing.instance import running
from libfp.testing.netns import Lab, wait_until

README = Path(__file__).parent.parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
APPLICATION, UNIT_TEST, AF_XDP = BLOCKS
#: The application stands for two; with one, examples/deny.py is the same one, and the same compiled loop.
WORKERS = min(2, len(os.sched_getaffinity(0)))


@pytest.fixture
def lab(request):
    """client -- (eth0 router eth1) -- server; the client has the address that the README blocks, too. The parameter is
    how many queues a wire has."""
    queues = getattr(request, "param", 1)
    with Lab() as lab:
        client, router, server = lab.routed("eth0", "eth1", queues=queues)
        client.address("c0", "192.0.2.7/32")
        router.route("192.0.2.7/32", via="10.0.1.2")
        yield client, router, server


def statistics(process):
    """Of the program's instance, once its workers turn."""
    assert process.poll() is None, process.stderr.read()
    return running(process)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("lab", "workers"), [(WORKERS, WORKERS)], indirect=["lab", "workers"])
def test_the_application(lab, workers):
    client, router, _ = lab
    cores = sorted(os.sched_getaffinity(0))[-workers:]
    code, replaced = re.subn(r"cores=\[2, 3\]", f"cores={cores}", APPLICATION)
    assert replaced == 1
    process = router.popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    reader = wait_until(lambda: statistics(process), 60, "the application to run")
    assert client.ping("10.0.2.2").received == 3
    wait_until(lambda: client.ping("10.0.2.2", 1, source="192.0.2.7", timeout=0.1).received == 0, 5, "the block")
    assert reader.counters()["denied"] >= 1
    assert reader.counters().drops.keys() == {"denied"}
    assert client.ping("10.0.2.2").received == 3
    reader.close()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert client.ping("10.0.2.2").received == 3, "Linux carries on"


@pytest.mark.timeout(120)
def test_the_unit_test():
    definitions = APPLICATION.partition("with Linux")[0]
    code = f"{definitions}\nblocked['192.0.2.7'] = True\n{UNIT_TEST}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_af_xdp_alone(lab):
    client, router, _ = lab
    process = router.popen([sys.executable, "-u", "-c", AF_XDP], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.set_blocking(process.stdout.fileno(), False)
    printed = b""

    def received():
        nonlocal printed
        assert process.poll() is None, process.stderr.read()
        with client.socket() as sock:
            sock.sendto(b"x" * 100, ("10.0.1.1", 4789))
            sock.sendto(b"x" * 200, ("10.0.1.1", 4790))
        printed += process.stdout.read() or b""
        return printed.count(b"\n") >= 3

    wait_until(received, 10, "frames", interval=0.05)
    macs = (router.mac("eth0") + client.mac("c0")).replace(":", "")
    assert set(printed.decode().rpartition("\n")[0].splitlines()) == {f"142 {macs}0800"}, (
        "the other port's datagrams went to Linux"
    )
