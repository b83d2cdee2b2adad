"""What a gateway with fixed keys does when it starts again, and what it lets nobody see."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libfp.apps.ipsec import libcrypto, record, replay
from libfp.apps.ipsec import sa as module
from libfp.apps.ipsec.policies import Policies, Policy
from libfp.apps.ipsec.sa import Sa, SaTable, Secret
from libfp.errors import AlreadyRunning, BadInput, TableFull
from libfp.jit import load64, store64
from libfp.jit.memory import view
from libfp.jit.primitive import MASK64, signed64

KEY = bytes(range(100, 120))
ENDS = {"local": "198.51.100.1", "remote": "203.0.113.9"}


def outbound(key: bytes = KEY, **more: Any) -> Sa:
    return Sa("t", "out", **({"spi": 0x1001} | ENDS | more), key=key)


def inbound(key: bytes = KEY[::-1], **more: Any) -> Sa:
    return Sa("t", "in", **({"spi": 0x2001} | ENDS | more), key=key)


def send(sa: Sa, count: int) -> list[int]:
    """What `protect` does of it: the IVs of the next packets, as many as may be sent."""
    ivs = list[int]()
    for _ in range(count):
        sequence, limit = (load64(sa.at + one) & MASK64 for one in (record.SEQUENCE, record.LIMIT))
        if sequence >= limit:
            break
        store64(sa.at + record.SEQUENCE, signed64(sequence + 1))
        ivs.append((load64(sa.at + record.IV) + sequence + 1) & MASK64)
    return ivs


def test_no_iv_and_no_sequence_number_comes_twice(tmp_path: Path) -> None:
    """Ends of every kind: orderly, and without a word."""
    ivs, sequences = list[int](), [0]
    for how in ("closed", "killed", "closed", "killed", "killed"):
        sas = SaTable(tmp_path / "state")
        sas.add(sa := outbound())
        assert sa.sequence >= sequences[-1]
        ivs += send(sa, 1000)
        sequences.append(sa.sequence)
        if how == "closed":
            sas.close()
        else:
            assert sas._file
            sas._file.close()  # as the kernel does it
    assert len(ivs) == len(set(ivs)) == 5000
    assert sequences[1:3] == [1000, 2000], "after an orderly end, not one is lost"
    assert sequences[3] == 2000 + (1 << 20), "after another, what was reserved"


@pytest.mark.parametrize("clock", [0, -(10**18)])
def test_neither_a_lost_file_nor_a_clock_that_was_set_back_repeats_an_iv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    ivs = list[int]()
    for start in range(3):
        if clock:
            monkeypatch.setattr(module.time, "time_ns", lambda: 2 * 10**18 + start * clock)  # noqa: B023
        else:
            (tmp_path / "state").unlink(missing_ok=True)
        with SaTable(tmp_path / "state") as sas:
            sas.add(sa := outbound())
            sas.keep()
            ivs += send(sa, 100)
    assert len(set(ivs)) == 300


def test_numbers_are_on_disk_before_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SaTable(tmp_path / "state") as sas:
        sas.add(sa := outbound())
        sas.keep()
        kept = json.loads((tmp_path / "state").read_text())["sas"][sa.digest]["sequence"]
        assert kept == load64(sa.at + record.LIMIT) == 1 << 20
        store64(sa.at + record.SEQUENCE, kept - 10)
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(BadInput, match="No space left on device"):
            sas.keep()
        assert len(send(sa, 100)) == 10, "and then nothing leaves"
        monkeypatch.undo()
        sas.keep()
        assert len(send(sa, 100)) == 100


def test_more_is_reserved_for_the_busy(tmp_path: Path) -> None:
    with SaTable(tmp_path / "state") as sas:
        sas.add(sa := outbound())
        sas.keep()
        store64(sa.at + record.SEQUENCE, 900_000)
        sas.keep()
        assert load64(sa.at + record.LIMIT) == 900_000 + 16 * 900_000
        sas.add(other := outbound(KEY[1:] + b"1", spi=0x1002, esn=False))
        store64(other.at + record.SEQUENCE, 0xFFFFFFF0)
        store64(other.at + record.LIMIT, 0xFFFFFFF0)
        sas.keep()
        assert load64(other.at + record.LIMIT) == 0xFFFFFFFF
        assert len(send(other, 100)) == 15
        assert other.exhausted


def test_windows_go_on_where_they_were(tmp_path: Path) -> None:
    for start in range(3):
        with SaTable(tmp_path / "state") as sas:
            sas.add(sa := inbound(window=64))
            window = replay.Window(sa.at + record.WINDOW)
            top = 5 << 32 if start else 0
            assert sa.sequence == top + max(start - 1, 0)
            assert not window.is_new(sa.sequence)
            assert not window.is_new(max(sa.sequence - 63, 0)), "nothing that was in the window comes again"
            assert window.is_new(sa.sequence + 1)
            window.accept((5 << 32) + start)


def test_another_key_begins_anew(tmp_path: Path) -> None:
    """And the old one, should it come back, goes on."""
    for key, first in ((KEY, 0), (KEY[1:] + b"1", 0), (KEY, 50), (KEY[1:] + b"1", 50)):
        with SaTable(tmp_path / "state") as sas:
            sas.add(sa := outbound(key))
            sas.keep()
            assert sa.sequence == first
            send(sa, 50)


def test_a_thread_keeps_it(tmp_path: Path) -> None:
    with SaTable(tmp_path / "state") as sas:
        sas.add(sa := outbound())
        sas.start()
        assert len(send(sa, 10)) == 10
    assert (tmp_path / "state").stat().st_mode == stat.S_IFREG | 0o600
    assert json.loads((tmp_path / "state").read_text())["sas"][sa.digest]["sequence"] == 10


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with SaTable(tmp_path / "state"), pytest.raises(AlreadyRunning, match="state is in use by another process; end"):
        SaTable(tmp_path / "state")
    SaTable(tmp_path / "state").close()


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.write_text("{"), "does not hold IPsec sequence numbers; restore it"),
        (lambda path: path.write_text('{"version": 1, "sas": {"x": {"sequence": -1, "iv": 0}}}'), "does not hold"),
        (lambda path: path.write_text('{"version": 2, "sas": {}}'), "does not hold"),
        (lambda path: path.write_text("[]"), "does not hold"),
        (lambda path: path.chmod(0o644), "others can read or write it"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "cannot keep IPsec state"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot keep IPsec state"),
    ],
)
def test_a_file_that_cannot_be_trusted(tmp_path: Path, spoil: Callable[[Path], Any], what: str) -> None:
    SaTable(tmp_path / "state").close()
    spoil(tmp_path / "state")
    with pytest.raises(BadInput, match=what):
        SaTable(tmp_path / "state")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"No such file or directory\); name a file in a folder that is yours"):
        SaTable(tmp_path / "none" / "state")


def test_keys_show_nowhere(tmp_path: Path) -> None:
    secret = Secret.from_hex("0x" + KEY.hex())
    assert len(secret) == 20
    sa = Sa("t", "out", spi=0x1001, key=secret, **ENDS)
    with SaTable(tmp_path / "state") as sas:
        assert KEY.hex() not in f"{secret!r} {secret} {sa!r} {sa.__dict__!r}"
        sas.add(sa)
        shown = f"{sa!r} {sa.__dict__!r} {sas.__dict__!r} {(tmp_path / 'state').read_text()}"
        assert KEY.hex()[:8] not in shown
        assert repr(KEY)[2:10] not in shown
        assert bytes(secret.use()) == bytes(20), "used once"
        for thing in (secret, sa):
            with pytest.raises(TypeError):
                pickle.dumps(thing)
    with pytest.raises(BadInput) as caught:
        Secret.from_hex("0123456789abcdefg")
    assert "0123" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(BadInput, match=r"a key of 19 bytes for SPI 0x1001; AES-128 takes 16") as caught:
        outbound(KEY[1:])
    assert KEY.hex()[2:6] not in str(caught.value)


BAD = {
    "an SPI of 255; it is 256 to 2\\*\\*32 - 1": {"spi": 255},
    "an SPI of 4294967296": {"spi": 1 << 32},
    "an anti-replay window of 63; it is 64 to 4096": {"window": 63},
    "'198.51.100' is not an IP address": {"local": "198.51.100"},
    "a tunnel's end at 224.0.0.1; give a unicast": {"remote": "224.0.0.1"},
    "an SA from 198.51.100.1 to 2001:db8::1; give two addresses of one family": {"remote": "2001:db8::1"},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_sas(what: str) -> None:
    with pytest.raises(BadInput, match=what):
        inbound(**BAD[what])


def test_what_a_table_refuses() -> None:
    with SaTable(capacity=3) as sas:
        sas.add(inbound())
        with pytest.raises(BadInput, match="two inbound SAs with SPI 0x2001"):
            sas.add(inbound(KEY))
        with pytest.raises(BadInput, match="SAs 0x2001 and 0x1001 have the same key; give each direction"):
            sas.add(refused := outbound(KEY[::-1]))
        with pytest.raises(BadInput, match="has been added before"):
            sas.add(refused)  # its key has been wiped: it would encrypt with zeros
        sas.add(one := outbound())
        sas.add(outbound(KEY[1:] + b"2", spi=0x1003))
        with pytest.raises(TableFull, match="more than 3 SAs"):
            sas.add(outbound(KEY[1:] + b"3", spi=0x1004))
        with pytest.raises(BadInput, match="has been added before"):
            sas.add(one)
        assert len(sas) == 3
        sas.remove(one)
        assert one not in list(sas)
    with pytest.raises(BadInput, match="has been added before"), SaTable() as sas:
        sas.add(one)


def key(number: int) -> bytes:
    return number.to_bytes(20)


def test_removed_sas_make_room() -> None:
    """A gateway that rekeys for ever; keys of those that have gone are wiped."""
    with SaTable(capacity=2) as sas:
        sas.add(inbound())
        for number in range(100):
            sas.add(sa := outbound(key(number), spi=0x1000 + number))
            with pytest.raises(TableFull):
                sas.add(outbound(key(1000), spi=0x5000))
            at = sa.at
            assert load64(at) != 0
            assert sa.counters["packets"] == 0
            store64(at + record.PACKETS, number)
            sas.remove(sa)
            sas.keep()
            assert bytes(view(at, libcrypto.SIZE)) == bytes(libcrypto.SIZE)
            assert sa.counters["packets"] == number, "it remembers"
        assert len(sas) == 1


@pytest.mark.parametrize("make", [outbound, inbound])
def test_a_removed_sa_stays_while_a_worker_may_have_it_in_its_hands(make: Callable[..., Sa]) -> None:
    with SaTable(capacity=1) as sas:
        turns = [sas._turns.join(worker) for worker in range(3)]
        sas.add(sa := make())
        sas.remove(sa)
        for number, done in ((0, 2), (1, 1), (1, 1)):
            with pytest.raises(TableFull, match="more than 1 SAs"):
                sas.add(make(key(7)))
            assert load64(sa.at) != 0, "its cipher is there"
            store64(turns[number].view, load64(turns[number].view) + done)
        with pytest.raises(TableFull):
            sas.add(make(key(7)))
        sas._turns.leave(turns[2])
        sas.add(make(key(7)))


def test_an_sa_that_cannot_be_kept_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SaTable(tmp_path / "state", capacity=2) as sas:
        sas.add(first := outbound())
        tunnel = sas._shared.address + record.TUNNELS_AT + 8
        written = (tmp_path / "state").read_text()
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for _ in range(3):
            with pytest.raises(BadInput, match="No space left on device"):
                sas.add(second := outbound(KEY[1:] + b"1", spi=0x1002))
        assert (list(sas), second.at, load64(tunnel)) == ([first], 0, first.at)
        assert (tmp_path / "state").read_text() == written
        monkeypatch.undo()
        sas.add(second := outbound(KEY[1:] + b"1", spi=0x1002))
        assert load64(tunnel) == second.at
        assert len(send(second, 10)) == 10
        sas.remove(second)
        assert load64(tunnel) == first.at


POLICIES = {
    "'10.1.0.1/16' is not a prefix \\(10.1.0.1/16 has host bits set\\)": ("bypass", "10.1.0.1/16", "10.2.0.0/16", ""),
    "a policy of 'encrypt'; it is bypass, discard, protect": ("encrypt", "10.1.0.0/16", "10.2.0.0/16", ""),
    "a policy 'protect' with tunnel ''": ("protect", "10.1.0.0/16", "10.2.0.0/16", ""),
    "a policy 'bypass' with tunnel 't'": ("bypass", "10.1.0.0/16", "10.2.0.0/16", "t"),
    "give two prefixes of one family": ("bypass", "10.1.0.0/16", "2001:db8::/32", ""),
}


@pytest.mark.parametrize("what", POLICIES)
def test_bad_policies(what: str) -> None:
    with pytest.raises(BadInput, match=what):
        Policy(*POLICIES[what])  # type: ignore[arg-type]


def test_too_many_policies_change_nothing() -> None:
    with SaTable() as sas:
        policies = Policies(sas, capacity=2)
        policies.load(kept := [Policy("bypass", "10.1.0.0/16", "10.2.0.0/16")])
        with pytest.raises(TableFull, match="3 policies for 2"):
            policies.load(kept * 3)
        assert policies.policies == kept
        with pytest.raises(BadInput, match="a default of 'allow'"):
            Policies(sas, "allow")  # type: ignore[arg-type]
