"""The two directions of a flow arrive on two workers and meet on one: hand-off between two-queue ports."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from libfp.testing.instance import Instance
from libfp.testing.netns import Lab, wait_until
from libfp.testing.router import Crossroads

CORES = sorted(os.sched_getaffinity(0))[:2]
pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")]

FLOWS, FIRST, ROUNDS = 16, 7000, 50
KICKS = ["inline", "helper"] if os.environ.get("LIBFP_FULL") else ["inline"]


@pytest.fixture(scope="module")
def net() -> Iterator[Crossroads]:
    with Lab() as lab:
        net = Crossroads(lab, 2)
        assert net.client.ping(Crossroads.SERVER).received == 3
        yield net


@contextlib.contextmanager
def echoes(net: Crossroads) -> Iterator[list[socket.socket]]:
    """The client's sockets of all flows; the server sends back what comes."""
    with contextlib.ExitStack() as undo:
        servers, clients = (
            [undo.enter_context(host.socket()) for _ in range(FLOWS)] for host in (net.server, net.client)
        )
        for flow in range(FLOWS):
            servers[flow].bind((net.SERVER, FIRST + flow))
            clients[flow].bind((net.CLIENT, FIRST + flow))
            clients[flow].connect((net.SERVER, FIRST + flow))
            clients[flow].settimeout(10.0)
        ended, told = os.pipe()
        undo.callback(os.close, ended)

        def answer() -> None:
            while ended not in (ready := select.select([*servers, ended], [], [])[0]):
                for one in ready:
                    one.sendto(*one.recvfrom(100))

        thread = threading.Thread(target=answer)
        thread.start()
        undo.callback(thread.join)
        undo.callback(os.close, told)  # the end of the file wakes it
        yield clients


@pytest.mark.parametrize("kick", KICKS)
def test_both_directions_of_a_flow_meet_on_one_worker(net: Crossroads, kick: str) -> None:
    with contextlib.ExitStack() as undo:
        ends = (net.client, "c0"), (net.router, "r0"), (net.server, "s0"), (net.router, "r1")
        arguments = [f"meeting-{os.getpid()}", "r0,r1", ",".join(map(str, CORES))]
        arguments += [",".join(host.mac(name) for host, name in ends), json.dumps({"kick": kick})]
        program = str(Path(__file__).with_name("meeting.py"))
        app = Instance(net.router, undo, program, *arguments, prefer="nothing")
        with echoes(net) as clients:
            for number in range(ROUNDS):
                for client in clients:
                    client.send(b"%d" % number)
                for client in clients:
                    assert client.recv(100) == b"%d" % number, "none is lost, nor out of order"
        seen = app.tell("counted")
        apart = 0
        for arrived, met in zip(seen["arrived"], seen["met"], strict=True):
            assert [sum(by) for by in zip(*arrived, strict=True)] == [ROUNDS, ROUNDS], "each way"
            assert sorted(met) == [[0, 0], [ROUNDS, ROUNDS]], "both ways on one worker, and nothing on the other"
            apart += arrived[0] != arrived[1] and [ROUNDS, ROUNDS] not in arrived
        assert apart > 0, "of some flow the directions arrived on two workers, or nothing is shown"
        assert all(sum(met[worker][0] for met in seen["met"]) > 0 for worker in (0, 1)), "and both have flows"
        workers = app.counters.workers
        assert all(one["handed_off"] > 0 for one in workers)
        wait_until(lambda: all(one["handed_off"] == one["returned"] for one in app.counters.workers))
        assert app.counters.dropped == 0
        wait_until(
            lambda: all(
                one["parks"] > before["parks"] + 2 for one, before in zip(app.counters.workers, workers, strict=True)
            )
        )
