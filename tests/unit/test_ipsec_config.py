"""The file of `fp ipsec`: what it says, every mistake in one line with its place and the remedy, keys never shown."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libfp.apps.ipsec import cli, config, xfrm
from libfp.apps.ipsec.config import read
from libfp.cli import main
from libfp.errors import BadInput

Write = Callable[..., str]
KEYS = ["0123456789abcdef" * 4, "fedcba9876543210" * 4, "a1b2c3d4e5f60718" * 2, "5566778899aabbcc" * 4]
SALT = "d0d1d2d3"
GOOD = f"""\
interfaces = ["lan0", "wan0"]
default = "bypass"
state = "/run/ipsec.json"

[[sa]]
tunnel = "office"
direction = "out"
spi = 0x1001
local = "198.51.100.1"
remote = "203.0.113.9"
cipher = "aes-256-gcm"
key = "{KEYS[0]}"
salt = "{SALT}"

[[sa]]
tunnel = "office"
direction = "in"
spi = 0x2001
local = "198.51.100.1"
remote = "203.0.113.9"
cipher = "aes-256-gcm"
key = "{KEYS[1]}{SALT}"
esn = false
window = 64

[[policy]]
action = "bypass"
source = "10.1.9.0/24"
destination = "10.2.0.0/16"

[[policy]]
action = "protect"
source = "10.1.0.0/16"
destination = "10.2.0.0/16"
tunnel = "office"

[[policy]]
action = "discard"
source = "2001:db8:1::/48"
destination = "::/0"
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, mode: int = 0o600) -> str:
        path = tmp_path / "ipsec.toml"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return write


def changed(*pairs: tuple[str, str]) -> str:
    text = GOOD
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def refused(path: str) -> str:
    """The error, of which nothing may show a key."""
    with pytest.raises(BadInput) as caught:
        read(path)
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    for key in [*KEYS, SALT]:
        assert key not in shown
        assert key[:8] not in str(caught.value)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.remedy
    return text.removeprefix(os.path.dirname(path) + "/")


def test_what_it_says(write: Write) -> None:
    found = read(write(GOOD))
    assert [(sa.tunnel, sa.direction, sa.spi, sa.esn, sa.window) for sa in found.sas] == [
        ("office", "out", 0x1001, True, 1024),
        ("office", "in", 0x2001, False, 64),
    ]
    assert [bytes(sa.secret.use()).hex() for sa in found.sas] == [KEYS[0] + SALT, KEYS[1] + SALT]
    assert [(one.action, str(one.source), str(one.destination), one.tunnel) for one in found.policies] == [
        ("bypass", "10.1.9.0/24", "10.2.0.0/16", ""),
        ("protect", "10.1.0.0/16", "10.2.0.0/16", "office"),
        ("discard", "2001:db8:1::/48", "::/0", ""),
    ]
    assert (found.default, found.state, found.locals) == ("bypass", Path("/run/ipsec.json"), ["198.51.100.1"])
    assert found.versions == {4, 6}


def test_a_key_in_a_file_of_its_own(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "office.key"
    file.write_text(f"0x{KEYS[0]}{SALT}\n")
    file.chmod(0o400)
    path = write(changed((f'key = "{KEYS[0]}"\nsalt = "{SALT}"', 'key-file = "office.key"')))
    assert bytes(read(path).sas[0].secret.use()).hex() == KEYS[0] + SALT
    file.chmod(0o440)
    assert refused(path).startswith(f"ipsec.toml, line 12: {file} has keys, and others may use it (mode 0440); chmod")
    file.unlink()
    assert refused(path).startswith(f"ipsec.toml, line 12: cannot read {file}: No such file or directory")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_file_that_others_may_use(write: Write, mode: int) -> None:
    path = write(GOOD, mode)
    text = refused(path)
    assert text.endswith(f"ipsec.toml has keys, and others may use it (mode {mode:04o}); chmod 600 {path}")


def test_no_file_and_no_toml(write: Write, tmp_path: Path) -> None:
    assert "cannot read" in refused(str(tmp_path / "none.toml"))
    assert "is no file" in refused(str(tmp_path))
    assert refused(write(changed((f'"{KEYS[0]}"', f'"{KEYS[0]}')))).startswith("ipsec.toml, line 12: ")
    assert refused(write(changed((f'"{KEYS[0]}"', KEYS[3])))).startswith("ipsec.toml, line 12: ")
    assert refused(write(GOOD + f'\n[sa]\nkey = "{KEYS[3]}"')).startswith("ipsec.toml, line ")
    path = Path(write(GOOD))
    path.write_bytes(b"\xff" + path.read_bytes())
    assert "is no text" in refused(str(path))


OUT, IN = "spi = 0x1001", "spi = 0x2001"
MISTAKES = [
    (("default = ", "x = "), 1, "it does not say what becomes of packets that no policy covers"),
    (('default = "bypass"', 'default = "drop"'), 2, "default is none that there is"),
    (('"/run/ipsec.json"', '"ipsec.json"'), 3, "state is not the path of a file"),
    (('tunnel = "office"', 'tunel = "office"'), 6, "there is no 'tunel' in [[sa]]"),
    (('tunnel = "office"\n', ""), 5, "[[sa]] without tunnel"),
    (('tunnel = "office"', 'tunnel = "of fice"'), 6, "tunnel is no name"),
    (('direction = "out"', 'direction = "both"'), 7, "direction is none that there is"),
    ((OUT, "spi = 255"), 8, "spi is no number from 256 to 4294967295"),
    ((OUT, "spi = 0x100000000"), 8, "spi is no number"),
    ((OUT, f'spi = "{KEYS[3]}"'), 8, "spi is no number"),
    ((OUT, "spi = true"), 8, "spi is no number"),
    (('local = "198.51.100.1"', f'local = "{KEYS[3]}"'), 9, "local is no address"),
    (('local = "198.51.100.1"', 'local = "224.0.0.1"'), 9, "local is no address that ESP could"),
    (('remote = "203.0.113.9"', 'remote = "fe80::1%eth0"'), 10, "remote is no address that ESP could"),
    (('remote = "203.0.113.9"', 'remote = "2001:db8::1"'), 10, "local and remote do not go together"),
    (('remote = "203.0.113.9"', 'remote = "198.51.100.1"'), 10, "local and remote do not go together"),
    (('remote = "203.0.113.9"', 'remote = "203.0.113.8"'), 15, "tunnel office has other addresses than in line 5"),
    (('cipher = "aes-256-gcm"', 'cipher = "aes-256-cbc"'), 11, "cipher is none that there is"),
    (('cipher = "aes-256-gcm"', 'cipher = "aes-128-gcm"'), 12, "the key and the salt has 36 bytes"),
    ((KEYS[0], KEYS[2]), 12, "the key and the salt has 20 bytes; aes-256-gcm has a key of 32 bytes and a salt of 4"),
    ((KEYS[0], KEYS[0][:-1]), 12, "key has an odd number of digits"),
    ((KEYS[0], KEYS[0][:-1] + "g"), 12, "key is not hexadecimal"),
    ((f'"{KEYS[0]}"', "12345678"), 12, "key is not hexadecimal"),
    ((f'salt = "{SALT}"\n', ""), 12, "the key, with the salt at its end, has 32 bytes"),
    ((f'"{SALT}"', f'"{SALT}00"'), 13, "salt has 5 bytes; it has 4"),
    ((f'key = "{KEYS[0]}"\n', ""), 5, "[[sa]] has neither key nor key-file"),
    ((f'salt = "{SALT}"', 'key-file = "x"'), 13, "[[sa]] has both key and key-file"),
    ((f'salt = "{SALT}"', 'window = 64'), 13, 'window in an SA with direction = "out"'),
    (("esn = false", "esn = 0"), 23, "esn is neither true nor false"),
    (("window = 64", "window = 63"), 24, "window is no number from 64 to 4096"),
    (("window = 64", "window = 4097"), 24, "window is no number from 64 to 4096"),
    ((KEYS[1], KEYS[0]), 15, "the key is that of line 5"),
    ((f'direction = "out"\n{OUT}', f'direction = "in"\n{IN}'), 15, "spi is that of line 5"),
    (("[[policy]]\naction", "[[policy]]\naktion"), 27, "there is no 'aktion' in [[policy]]"),
    (('action = "bypass"', f'"{KEYS[3]}" = 1'), 27, "there is no such key in [[policy]]"),
    (('action = "bypass"', 'action = "allow"'), 27, "action is none that there is"),
    (('source = "10.1.9.0/24"', 'source = "10.1.9.1/24"'), 28, 'beyond its length; write source = "10.1.9.0/24"'),
    (('source = "10.1.9.0/24"', 'source = "10.1.9.0/33"'), 28, "source is no prefix"),
    (('source = "10.1.9.0/24"', "source = 10"), 28, "source is no prefix"),
    (('source = "10.1.9.0/24"', 'source = "::/0"'), 29, "source and destination are of two families"),
    (('destination = "10.2.0.0/16"', 'tunnel = "office"\ndestination = "10.2.0.0/16"'), 29, "with tunnel; remove"),
    (('10.2.0.0/16"\ntunnel = "office"', '10.2.0.0/16"'), 31, '[[policy]] with action = "protect" without tunnel'),
    (('10.2.0.0/16"\ntunnel = "office"', '10.2.0.0/16"\ntunnel = "x"'), 31, "tunnel x has no [[sa]] with direction"),
    (("10.1.9.0/24", "10.1.0.0/16"), 31, "the same source and destination as in line 26"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line", "words"), MISTAKES, ids=[words for _, _, words in MISTAKES])
def test_mistakes(write: Write, change: tuple[str, str], line: int, words: str) -> None:
    text = refused(write(changed(change)))
    assert text.startswith(f"ipsec.toml, line {line}: "), text
    assert words in text


def test_tables_that_are_none(write: Write) -> None:
    head = GOOD.partition("[[sa]]")[0]
    assert "there is no policy" in refused(write(head))
    assert "line 5: policy is no table" in refused(write(head + "policy = 3"))
    assert "line 5: sa is no table" in refused(write(head + f'sa = "{KEYS[0]}"'))
    assert "line 6: sa is no table" in refused(write(head + f'\n[sa]\nkey = "{KEYS[0]}"'))


def test_keys_are_never_shown(write: Write) -> None:
    found = read(write(GOOD))
    shown = [repr(found), str(found), repr(found.sas[0]), f"{found.sas[0].secret!r} {found.sas[0].secret}"]
    for text in shown:
        assert not any(key in text for key in [*KEYS, SALT])
        assert not any(str(bytes.fromhex(key))[2:-1] in text for key in KEYS)
    attempts: list[Callable[[Any], Any]] = [pickle.dumps, copy.deepcopy, json.dumps]
    for attempt in attempts:
        with pytest.raises(TypeError):
            attempt(found.sas[0].secret)


def test_command_line(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line, before anything else is asked for; and no option that takes a key."""
    assert main(["ipsec", "lan0", "wan0"]) == 2
    assert capsys.readouterr().err == "fp: no --config; name the file with the SAs and policies\n"
    for command in (["ipsec", "--config"], ["ipsec", "release", "--config"]):
        assert main([*command, write(changed(("esn = false", "esn = 0")))]) == 2
        assert re.fullmatch(r"fp: \S+ipsec\.toml, line 23: esn is neither [^\n]+\n", capsys.readouterr().err)
    assert main(["ipsec", "--config", write(changed(("interfaces", "faces")))]) == 2
    wrong = r"line 1: there is no 'faces'; there are bypass, .*policy, profile, sa, state"
    assert re.search(wrong, capsys.readouterr().err)
    assert main(["ipsec", "--config", write(f'"{KEYS[0]}" = 1\n{GOOD}')]) == 2
    assert "line 1: there is no such key; there are bypass" in (said := capsys.readouterr().err)
    assert KEYS[0][:8] not in said
    assert main(["ipsec", "--help"]) == 0
    assert "key" not in capsys.readouterr().out.lower()


def test_sas_as_a_table() -> None:
    counters = {"packets": 10, "bytes": 840, "replayed": 2, "bad_icv": 1, "exhausted": 0}
    inbound = {
        "tunnel": "office", "direction": "in", "spi": 0x2001, "local": "198.51.100.1", "remote": "203.0.113.9",
        "esn": True, "window": 64, "sequence": 12, "remaining": 7, "exhausted": False, "counters": counters,
    }  # fmt: skip
    outbound = {
        **inbound,
        "direction": "out",
        "window": None,
        "exhausted": True,
        "counters": {"packets": 3, "bytes": 9},
    }
    assert cli.table([inbound, outbound]) == [
        "tunnel  direction  spi     local         remote       sequence  window  packets  bytes  dropped",
        "office  in         0x2001  198.51.100.1  203.0.113.9  12        64      10       840    3",
        "office  out        0x2001  198.51.100.1  203.0.113.9  12        -       3        9      0",
        "0x2001 dropped 2 replayed, 1 bad icv",
        "0x2001 has used all its sequence numbers: it sends nothing more; give it a successor",
    ]


def test_policies_of_the_kernel(write: Write) -> None:
    found = xfrm.wanted(read(write(GOOD)))
    first = xfrm.FIRST
    assert [(str(one.source), str(one.destination), one.direction, one.action, one.priority) for one in found] == [
        ("10.1.9.0/24", "10.2.0.0/16", "out", "allow", first),
        ("10.1.9.0/24", "10.2.0.0/16", "fwd", "allow", first),
        ("10.2.0.0/16", "10.1.9.0/24", "in", "allow", first),
        ("10.2.0.0/16", "10.1.9.0/24", "fwd", "allow", first),
        ("10.1.0.0/16", "10.2.0.0/16", "out", "block", first + 1),
        ("10.1.0.0/16", "10.2.0.0/16", "fwd", "block", first + 1),
        ("10.2.0.0/16", "10.1.0.0/16", "in", "block", first + 1),
        ("10.2.0.0/16", "10.1.0.0/16", "fwd", "block", first + 1),
        ("2001:db8:1::/48", "ff02::/16", "out", "allow", first + 2),
        ("2001:db8:1::/48", "::/0", "out", "block", first + 2),
        ("2001:db8:1::/48", "::/0", "fwd", "block", first + 2),
        ("::/0", "2001:db8:1::/48", "in", "block", first + 2),
        ("::/0", "2001:db8:1::/48", "fwd", "block", first + 2),
    ]
    more = xfrm.wanted(read(write(changed(('"bypass"', '"discard"')))))[len(found) :]
    assert [(one.destination, one.direction, one.action, one.priority) for one in more][:1] == [
        ("0.0.0.0/0", "fwd", "block", xfrm.LAST)
    ]
    assert config.TABLES == cli.TABLES


@pytest.mark.parametrize("keyed", [False, True])
def test_no_core_is_left(keyed: bool, tmp_path: Path) -> None:
    """A crash of a process with keys leaves none where one of another process would have."""
    code = "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30)); os.chdir({!r})\n"
    code += "from libfp.apps.ipsec.gateway import without_cores; without_cores()\n" if keyed else ""
    command = [sys.executable, "-c", code.format(str(tmp_path)) + "os.abort()"]
    _, status = os.waitpid(os.posix_spawn(sys.executable, command, os.environ), 0)
    assert os.WTERMSIG(status) == signal.SIGABRT
    if not keyed and not os.WCOREDUMP(status):
        pytest.skip("nothing leaves a core here")
    assert os.WCOREDUMP(status) != keyed
