"""What a running instance answers to other processes, and what they are told when it does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from libfp.engine.control import LINE, Control, address, connect
from libfp.engine.stats import StatsPage
from libfp.errors import BadInput, Error, MissingCapability, NoAnswer, NoSuchInstance, TableFull

NAME = f"test-control-{os.getpid()}"
DESCRIPTION: dict[str, Any] = {
    "ports": [], "reasons": [], "workers": 1, "worker_counters": ["consumed"], "port_counters": [],
    "first_port": 64, "port_stride": 64,
}  # fmt: skip


@pytest.fixture
def page() -> Iterator[StatsPage]:
    page = StatsPage(NAME, DESCRIPTION)
    yield page
    page.close()


@pytest.fixture
def control(page: StatsPage) -> Iterator[Control]:
    control = Control()
    control.open(NAME)
    yield control
    control.close()


def test_answers_with_what_the_handler_returns(control: Control) -> None:
    control.add("double", lambda request, caller: {"is": 2 * request["value"], "to": caller.pid})
    with connect(NAME) as instance:
        assert instance.ask("double", value=21) == {"is": 42, "to": os.getpid()}
        assert instance.ask("ping") == {"pid": os.getpid()}


def test_an_answer_in_parts_does_not_hold_up_another_caller(control: Control) -> None:
    def count(request: dict[str, Any], caller: Any) -> Any:
        for number in range(request["to"]):
            yield {"number": number}
        return {"done": True}

    control.add("count", count)
    with connect(NAME) as one, connect(NAME) as two:
        endless = one.parts("count", to=1 << 60)
        assert next(endless) == {"number": 0}
        assert two.ask("count", to=3) == {"done": True}
        assert [part["number"] for part in two.parts("count", to=3)] == [0, 1, 2]


def test_errors_of_the_handler_are_raised_at_the_caller(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(request: dict[str, Any], caller: Any) -> None:
        raise {"full": TableFull("the table is full", "make it larger"), "bug": KeyError("x")}[request["how"]]

    def late(request: dict[str, Any], caller: Any) -> Any:
        yield {}
        raise BadInput("half way", "turn")

    control.add("refuse", refuse)
    control.add("late", late)
    with connect(NAME) as instance:
        with pytest.raises(TableFull, match="the table is full; make it larger"):
            instance.ask("refuse", how="full")
        with pytest.raises(Error, match="failed in the instance"):
            instance.ask("refuse", how="bug")
        with pytest.raises(BadInput, match="half way"):
            instance.ask("late")
        with pytest.raises(BadInput, match=r"knows no command 'nonsense' .it knows late, ping, refuse"):
            instance.ask("nonsense")
        assert instance.ask("ping")


def test_file_descriptors_come_with_the_answer_and_the_end_is_noticed(control: Control) -> None:
    read, write = os.pipe()
    gone = threading.Event()

    def give(request: dict[str, Any], caller: Any) -> dict[str, Any]:
        caller.attach(write)
        caller.on_close(gone.set)
        return {}

    control.add("give", give)
    code = (
        "import os, sys, time; from libfp.engine.control import connect\n"
        f"c = connect({NAME!r}); c.ask('give'); os.write(c.take_files()[0], b'x'); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert os.read(read, 1) == b"x"
        assert not gone.is_set()
    finally:
        child.kill()
        child.wait(10)
        os.close(read)
        os.close(write)
    assert gone.wait(10), "a caller that is killed"


def raw() -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(10)
    one.connect(address(os.getpid(), NAME))
    return one


@pytest.mark.parametrize("line", [b"{", b"[]", b'"x"', b"{}", b'{"command": 7}', b"\xff\xfe", b"9" * 5000])
def test_requests_that_do_not_parse_are_answered_with_an_error(control: Control, line: bytes) -> None:
    with raw() as one:
        one.sendall(line + b"\n" + b'{"command": "ping"}\n')
        answers = one.makefile("rb")
        assert json.loads(answers.readline())["error"]["type"] == "BadInput"
        assert "ok" in json.loads(answers.readline())


def test_a_request_without_end_ends_the_connection(control: Control) -> None:
    with raw() as one, pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            one.sendall(b" " * LINE)
    with connect(NAME) as instance:
        assert instance.ask("ping")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused(control: Control) -> None:
    code = (
        "import os, socket; os.setresuid(65534, 65534, 65534); s = socket.socket(socket.AF_UNIX)\n"
        f's.connect({address(os.getpid(), NAME)!r}); s.sendall(b\'{{"command": "ping"}}\\n\')\n'
        "print(s.recv(1000).decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["error"]["type"] == MissingCapability.__name__


def test_nobody_and_several_to_ask(page: StatsPage) -> None:
    with pytest.raises(NoSuchInstance, match="no instance named 'nobody' is running"):
        connect("nobody")
    other = StatsPage(NAME + "-2", DESCRIPTION)
    try:
        with pytest.raises(NoSuchInstance, match=r"several instances are running: .*; name one"):
            connect()
    finally:
        other.close()


def test_a_page_whose_process_does_not_answer_is_stale(page: StatsPage) -> None:
    with pytest.raises(NoSuchInstance, match=f"page of instance '{NAME}' is stale: process {os.getpid()} holds it"):
        connect(NAME)


def test_an_instance_that_is_stopped_does_not_answer() -> None:
    code = (
        "import sys; from libfp.engine.control import Control; from libfp.engine.stats import StatsPage\n"
        f"p = StatsPage({NAME + '-child'!r}, {DESCRIPTION!r}); c = Control(); c.open(p.name); print(flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            child.send_signal(signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            said = f"'{NAME}-child' .process {child.pid}. does not answer"
            with connect(NAME + "-child", timeout=0.2) as instance, pytest.raises(NoAnswer, match=said):
                instance.ask("ping")
        finally:
            child.kill()
    with pytest.raises(NoSuchInstance):  # a kill leaves nothing
        connect(NAME + "-child")


def test_an_instance_that_ends_says_so(control: Control) -> None:
    with connect(NAME) as instance:
        control.close()
        with pytest.raises(NoSuchInstance, match=r"ended|gone"):
            instance.ask("ping")
