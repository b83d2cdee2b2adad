"""The router's configuration file, and what it tells a service manager and the journal."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import libfp.apps
from libfp.apps.router.cli import router
from libfp.cli import config, journal, main
from libfp.cli.service import Service, notify, watchdog
from libfp.errors import BadInput

APPS = ("router", "firewall", "ipsec")


def unit_of(app: str) -> Path:
    return Path(libfp.apps.__file__).parent / app / f"libfp-{app}.service"


def read(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    return config.read(str(path), router, click.Context(router))


def test_every_option_has_a_key_of_the_same_name(tmp_path: Path) -> None:
    shown = [p for p in router.params if not getattr(p, "hidden", False)]
    options = {option.removeprefix("--") for p in shown for option in p.opts if option.startswith("--")}
    assert set(config.keys(router)) == options - {"config"} | {"interfaces"}
    told = read(
        tmp_path / "router.toml",
        """
        interfaces = ["eth0", "eth1"]
        cores = "2-3"
        kick = "helper"   # a comment
        idle = "spin"
        only = ["198.51.100.0/24"]
        mode = "skb"
        capacity = 1000
        bypass = true
        name = "edge"
        json = false
        log = "info"
        """,
    )
    assert told == {
        "interfaces": ("eth0", "eth1"), "cores": [2, 3], "kick": "helper", "idle": "spin",
        "only": ("198.51.100.0/24",), "mode": "skb", "capacity": 1000, "bypass": True, "name": "edge",
        "as_json": False, "log": "info",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["cores = 2", 'cores = "2"', "cores = [2]"])
def test_cores_can_be_written_as_one_likes(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "router.toml", text) == {"cores": [2]}


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("nonsense = 1", 3, "there is no 'nonsense'; there are bypass, capacity, "),
        ('"non sense" = 1', 3, "there is no 'non sense'"),
        ("[section]\nx = 1", 3, "there is no 'section'"),
        ("a.b = 1", 3, "there is no 'a'"),
        ('config = "other"', 3, "there is no 'config'"),
        ("interfaces = 'eth0'", 3, "interfaces is not a list of words"),
        ("interfaces = [1]", 3, "interfaces is not a list of words"),
        ("kick = 'x'", 3, "kick: 'x' is not one of 'auto', 'inline', 'helper'"),
        ("kick = true", 3, "kick is True"),
        ("capacity = '5'", 3, "capacity is '5'; write a number"),
        ("capacity = true", 3, "capacity is True; write a number"),
        ("capacity = 0", 3, "capacity: 0 is not in the range"),
        ("bypass = 1", 3, "bypass is 1; write true or false"),
        ("cores = 'x'", 3, "--cores 'x' does not parse at 'x'"),
        ("cores = 1.5", 3, "cores is 1.5"),
        ("name = ", 3, "Invalid value"),
        ("\n\nname", 5, "Expected '='"),
        ("name = 'a'\nname = 'b'", 4, "Cannot overwrite a value"),
        ("name = [", 3, "Invalid value|Unclosed array"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "router.toml", f"# first\nidle = 'park'\n{text}")
    assert re.search(rf"/router\.toml, line {line}: ({what}|.*{what})", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", "--config", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fp: cannot read {tmp_path}/none: No such file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert main(["router", "--config", str(tmp_path / "binary")]) == 2
    assert "is no text" in capsys.readouterr().err


def test_the_command_line_has_the_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "router.toml").write_text(f'pcap = "{tmp_path}/none"\nroutes = "{tmp_path}/none.txt"\n')
    (tmp_path / "routes.txt").write_text("nonsense")
    assert main(["router", "--config", str(tmp_path / "router.toml")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert main(["router", "--config", str(tmp_path / "router.toml"), "--routes", str(tmp_path / "routes.txt")]) == 2
    assert "routes.txt, line 1" in capsys.readouterr().err


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "notify"))
        one.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield one


def test_notifications_reach_the_manager(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert notify("READY=1", "STATUS=fine")
    assert manager.recv(1000) == b"READY=1\nSTATUS=fine"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        abstract.bind(f"\0libfp-test-{os.getpid()}")
        abstract.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@libfp-test-{os.getpid()}")
        assert notify("STOPPING=1")
        assert abstract.recv(1000) == b"STOPPING=1"


def test_a_manager_that_does_not_read_stops_nobody(manager: socket.socket) -> None:
    sent = [notify(f"STATUS={number}", patience=0.0) for number in range(1000)]
    assert sent[0]
    assert not sent[-1]
    assert not notify("WATCHDOG=1", patience=0.01)


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    assert not caplog.records
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    assert not notify("READY=1")
    assert "cannot tell the service manager READY=1: No such file" in caplog.text


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"), [("", "", 0), ("3000000", "", 3), ("3000000", "1", 0), ("x", "", 0)]
)
def test_the_watchdog_is_for_this_process(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, seconds: float) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog() == seconds
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog() == (3 if usec == "3000000" else 0)


def test_the_watchdog_hears_nothing_of_a_worker_that_stands_still(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    workers = [SimpleNamespace(heartbeat=0), SimpleNamespace(heartbeat=0)]
    turns = iter(range(6))

    def wait(seconds: float) -> None:
        turn = next(turns)
        app.ended = turn == 5
        for number, worker in enumerate(workers):
            worker.heartbeat += 1 if number == 0 or turn in (1, 3) else 0

    counters = SimpleNamespace(forwarded=1, dropped=2, punted=3)
    app = SimpleNamespace(workers=workers, wait=wait, ended=False, counters=counters)
    Service(lambda: False).run(app, "forwarding")
    manager.settimeout(0.5)
    heard = []
    try:
        while True:
            heard.append(manager.recv(1000))
    except TimeoutError:
        pass
    assert heard[0].startswith(b"READY=1\nSTATUS=forwarding\n")
    assert heard.count(b"WATCHDOG=1") == 2
    assert b"STATUS=forwarding: 1 forwarded, 2 dropped, 3 punted" in heard
    assert heard[-1] == b"STOPPING=1"


def test_the_manager_hears_of_progress_before_and_after_packets_are_forwarded(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libfp.cli.service.PROGRESS_EVERY", 0.0)
    service, said, looks = Service(lambda: False), list[str](), iter((False, False, True))
    service.progress("routes", 70, 0)
    assert manager.recv(1000) == b"STATUS=reading Linux's routes: 70\nEXTEND_TIMEOUT_USEC=60000000"
    app = SimpleNamespace(workers=[], ended=False, counters=SimpleNamespace(forwarded=1, dropped=2, punted=3))

    def wait(seconds: float) -> None:
        service.progress("routes", 10, 70)
        app.ended = bool(said)

    app.wait = wait
    service.run(app, "forwarding", lambda: next(looks), lambda: said.append("synced"))
    assert said == ["synced"]
    heard = [manager.recv(1000) for _ in range(3)]
    assert heard[0].startswith(b"READY=1\nSTATUS=forwarding\n"), "from the first route on"
    assert b"STATUS=10 of 70 routes are in the tables" in heard, "and that is no start any more that takes longer"


def test_lines_in_the_journal_have_priorities(tmp_path: Path) -> None:
    code = "import sys; from libfp.cli import main; sys.exit(main(['router', '--config', '/nonexistent']))"
    with (tmp_path / "journal").open("w+") as file:
        there = os.fstat(file.fileno())
        for stream, start in ((f"{there.st_dev}:{there.st_ino}", "<3>fp: cannot"), ("1:1", "fp: cannot")):
            file.seek(0)
            file.truncate()
            environment = {**os.environ, "JOURNAL_STREAM": stream}
            assert subprocess.run([sys.executable, "-c", code], stderr=file, env=environment).returncode == 2
            assert (tmp_path / "journal").read_text().startswith(start)


def test_records_of_the_log_in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = journal.Formatter("fp: %(message)s")
    levels = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
    for level, priority in levels.items():
        record = logging.LogRecord("libfp", level, "", 0, "two\nlines", None, None)
        monkeypatch.setattr(journal, "in_journal", lambda: True)
        assert formatter.format(record) == f"<{priority}>fp: two\n<{priority}>lines"
        monkeypatch.setattr(journal, "in_journal", lambda: False)
        assert formatter.format(record) == "fp: two\nlines"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the program systemd-analyze")
@pytest.mark.parametrize("app", APPS)
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path, app: str) -> None:
    units = []
    for file in unit_of(app).parent.glob("*.service"):
        units.append(tmp_path / file.name)
        units[-1].write_text(file.read_text().replace("/usr/local/bin/fp", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *map(str, units)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("app", APPS)
def test_the_unit_says_what_the_application_does(app: str) -> None:
    text = unit_of(app).read_text()
    for line in ("Type=notify", "WatchdogSec=10", "RestartPreventExitStatus=2", "ExecReload=/bin/kill -HUP $MAINPID"):
        assert line in text.splitlines()
    assert f"fp {app} --config /etc/libfp/{app}.toml" in text
