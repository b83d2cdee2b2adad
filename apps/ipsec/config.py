"""The file of `fp ipsec`: TOML, the security associations and the policies, beside a key for each option.

    default = "bypass"                         # or "discard": what no policy names

    [[sa]]
    tunnel = "office"
    direction = "out"                          # one "out" and one "in" at least
    spi = 0x1001
    local = "198.51.100.1"                     # the outer addresses: ours, the peer's
    remote = "203.0.113.9"
    cipher = "aes-256-gcm"
    key = "..."                                # hexadecimal; or key-file = "/etc/libfp/office.key"
    salt = "..."                               # 4 bytes; without it they are the last ones of the key

    [[policy]]                                 # the first that covers a packet decides
    action = "protect"
    source = "10.1.0.0/16"
    destination = "10.2.0.0/16"
    tunnel = "office"

Errors name the file and the line, and never repeat what a line of an SA says: it might be a key.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from libfp.apps.ipsec import TABLES
from libfp.apps.ipsec.sa import Secret
from libfp.cli import config as files
from libfp.errors import BadInput

STATE = "/var/lib/libfp/ipsec.json"
CIPHERS = {"aes-128-gcm": 16, "aes-256-gcm": 32}  # bytes of the key
SALT = 4  # bytes (RFC 4106, 4)
SA = ("tunnel", "direction", "spi", "local", "remote", "cipher", "key", "key-file", "salt", "esn", "window")
NEEDED = SA[:6]
POLICY = ("action", "source", "destination", "tunnel")
ACTIONS = ("protect", "bypass", "discard")
MOST_POLICIES = 4096
_REMEDY = "README.md of apps/ipsec has an example"
_SECRETS = os.urandom(32)  # fingerprints mean nothing outside this process

Action = Literal["protect", "bypass", "discard"]
Default = Literal["bypass", "discard"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class SaLine:
    """One [[sa]]. `fingerprint` tells keys apart, in this process only; it is no part of what is shown."""

    tunnel: str
    direction: Literal["in", "out"]
    spi: int
    local: str
    remote: str
    secret: Secret = field(repr=False, compare=False)
    fingerprint: bytes = field(repr=False)
    esn: bool = True
    window: int = 1024
    line: int = field(default=0, compare=False)

    @property
    def names(self) -> tuple[str, str, int]:
        """What no two may have in common: those coming in differ by SPI, those going out by peer and SPI."""
        return self.direction, self.remote if self.direction == "out" else "", self.spi


@dataclass(frozen=True)
class PolicyLine:
    """One [[policy]], written as for packets that leave: `source` is behind us, `destination` behind the peer."""

    action: Action
    source: Network
    destination: Network
    tunnel: str = ""
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Config:
    """What a file says."""

    path: str
    default: Default
    state: Path
    sas: tuple[SaLine, ...]
    policies: tuple[PolicyLine, ...]

    @property
    def locals(self) -> list[str]:
        """Our outer addresses."""
        return sorted({sa.local for sa in self.sas})

    @property
    def versions(self) -> set[int]:
        """IP versions of packets that come in or go out, inner and outer."""
        return {policy.source.version for policy in self.policies} | {
            ipaddress.ip_address(address).version for address in self.locals
        }


def read(path: str) -> Config:
    """Raises BadInput: one line with the file, the line in it and the remedy."""
    require_private(path)
    text, table = files.parse(path)
    return _File(path, text).config(table)


def require_private(path: str) -> None:
    """Raise BadInput where somebody but the owner, who must be root or us, may read or change the file."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "name a configuration file") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{path} is no file", "name a configuration file")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise BadInput(f"{path} has keys, and others may use it (mode {mode:04o})", f"chmod 600 {path}")
    if found.st_uid not in (0, os.geteuid()):
        raise BadInput(f"{path} has keys, and belongs to user {found.st_uid}", f"chown root {path}")


class _Lines:
    """Where things are in the file, which tomllib does not say: good enough for a message."""

    def __init__(self, text: str) -> None:
        self._at: dict[tuple[str, int, str], int] = {}
        table, counts = "", dict.fromkeys(TABLES, 0)
        for number, line in enumerate(text.splitlines(), 1):
            if found := re.match(r"""\s*\[\[?\s*["']?([\w-]+)["']?\s*\]""", line):
                table = found[1]
                counts[table] = counts.get(table, 0) + 1
                self._at.setdefault((table, counts[table], ""), number)
            elif found := re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line):
                self._at.setdefault((table, counts.get(table, 0) if table else 0, found[1]), number)

    def __call__(self, table: str, number: int = 0, key: str = "") -> int:
        """Of a key in the `number`th (from 1) table of that name, of the table, or of a key outside of tables."""
        places = ((table, number, key), (table, number, "")) if number else (("", 0, table), (table, 1, ""))
        return next((self._at[place] for place in places if place in self._at), 1)


class _File:
    def __init__(self, path: str, text: str) -> None:
        self.path, self.lines = path, _Lines(text)
        self.line = 1
        self.key_files: dict[str, str] = {}

    def wrong(self, what: str, remedy: str = _REMEDY, line: int | None = None) -> NoReturn:
        raise BadInput(f"{self.path}, line {self.line if line is None else line}: {what}", remedy) from None

    def config(self, table: Mapping[str, Any]) -> Config:
        default = self._default(table)
        self.line = self.lines("state")
        state = table.get("state", STATE)
        if not isinstance(state, str) or not os.path.isabs(state):
            self.wrong("state is not the path of a file", f'write state = "{STATE}"')
        sas = tuple(self._each("sa", table, self._sa))
        policies = tuple(self._each("policy", table, self._policy))
        self._check(sas, policies)
        return Config(self.path, default, Path(state), sas, policies)

    def _default(self, table: Mapping[str, Any]) -> Default:
        self.line = self.lines("default")
        if "default" not in table:
            what = "it does not say what becomes of packets that no policy covers"
            self.wrong(what, 'write default = "bypass" or default = "discard"')
        default: Default = self._one_of(table, "default", ("bypass", "discard"))
        return default

    def _each(self, name: str, table: Mapping[str, Any], make: Callable[[Mapping[str, Any], int], Any]) -> list[Any]:
        self.line = self.lines(name)
        found = table.get(name, [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            self.wrong(f"{name} is no table", f"write [[{name}]] on a line of its own")
        if not found and name == "policy":
            self.wrong("there is no policy", "write [[policy]] and what it does with which packets")
        if len(found) > MOST_POLICIES:
            self.wrong(f"{len(found)} tables [[{name}]]", f"{MOST_POLICIES} is the most")
        return [make(one, number) for number, one in enumerate(found, 1)]

    # -- values; `self.line` is set to the line of what is looked at

    def _keys(
        self, name: str, number: int, table: Mapping[str, Any], known: Sequence[str], needed: Sequence[str]
    ) -> None:
        for key in table:
            if key not in known:
                self.line = self.lines(name, number, key)
                shown = repr(key) if re.fullmatch(r"[\w-]{1,20}", key) else "such key"
                self.wrong(f"there is no {shown} in [[{name}]]", f"there are {', '.join(known)}")
        self.line = self.lines(name, number)
        for key in needed:
            if key not in table:
                self.wrong(f"[[{name}]] without {key}", f"add {key} = ...")

    def _one_of(self, table: Mapping[str, Any], key: str, values: Collection[str]) -> Any:
        value = table[key]
        if not isinstance(value, str) or value not in values:
            self.wrong(f"{key} is none that there is", f"{key} is " + " or ".join(f'"{one}"' for one in values))
        return value

    def _name(self, table: Mapping[str, Any]) -> str:
        value = table["tunnel"]
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", value):
            self.wrong("tunnel is no name", 'write tunnel = "office": letters, digits, dots, dashes, 32 at most')
        return value

    def _number(self, table: Mapping[str, Any], key: str, default: int | None, least: int, most: int) -> int:
        value = table.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.wrong(f"{key} is no number from {least} to {most}", f"write {key} = {default or least}")
        return value

    def _sa(self, table: Mapping[str, Any], number: int) -> SaLine:
        def at(key: str) -> Mapping[str, Any]:
            self.line = self.lines("sa", number, key)
            return table

        self._keys("sa", number, table, SA, NEEDED)
        line = self.line
        tunnel = self._name(at("tunnel"))
        direction = self._one_of(at("direction"), "direction", ("in", "out"))
        spi = self._number(at("spi"), "spi", None, 256, 2**32 - 1)
        local, remote = (self._address(at(key), key) for key in ("local", "remote"))
        if local.version != remote.version or local == remote:
            self.wrong("local and remote do not go together", "they are two addresses of one family")
        cipher = self._one_of(at("cipher"), "cipher", CIPHERS)
        at("esn")
        if not isinstance(table.get("esn", True), bool):
            self.wrong("esn is neither true nor false", "write esn = true")
        at("window")
        if "window" in table and direction == "out":
            self.wrong('window in an SA with direction = "out"', "remove it: the window is the receiver's")
        window = self._number(table, "window", 1024, 64, 4096)
        material = self._material(table, number, CIPHERS[cipher])
        fingerprint = hashlib.blake2b(material, key=_SECRETS).digest()
        secret = Secret(material)
        material[:] = bytes(len(material))
        options = {"esn": table.get("esn", True), "window": window, "line": line}
        return SaLine(tunnel, direction, spi, str(local), str(remote), secret, fingerprint, **options)

    def _address(self, table: Mapping[str, Any], key: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        remedy = f'write {key} = "198.51.100.1", or an IPv6 address'
        address = None
        with contextlib.suppress(ValueError):  # which is not left in the way: it says the value
            address = ipaddress.ip_address(table[key] if isinstance(table[key], str) else "")
        if address is None:
            self.wrong(f"{key} is no address", remedy)
        scoped = isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None
        if address.is_multicast or address.is_unspecified or address.is_loopback or address.is_link_local or scoped:
            self.wrong(f"{key} is no address that ESP could come from or go to", remedy)
        return address

    def _material(self, table: Mapping[str, Any], number: int, size: int) -> bytearray:
        """The key and the salt."""
        self.line = self.lines("sa", number, "key-file" if "key-file" in table else "key")
        if ("key" in table) == ("key-file" in table):
            both = "both key and key-file" if "key" in table else "neither key nor key-file"
            self.wrong(f"[[sa]] has {both}", 'write key = "HEX", or key-file = "FILE" with that in it')
        text = table["key"] if "key" in table else self._key_file(table["key-file"])
        material = self._bytes(text, "key" if "key" in table else "what key-file holds")
        if "salt" in table:
            line, self.line = self.line, self.lines("sa", number, "salt")
            salt = self._bytes(table["salt"], "salt")
            if len(salt) != SALT:
                self.wrong(f"salt has {len(salt)} bytes", f"it has {SALT}: {2 * SALT} hexadecimal digits")
            self.line = line
            material += salt
        if len(material) != size + SALT:
            salted = " and the salt" if "salt" in table else ", with the salt at its end,"
            what = f"the key{salted} has {len(material)} bytes"
            self.wrong(what, f"{table['cipher']} has a key of {size} bytes and a salt of {SALT}")
        return material

    def _bytes(self, text: Any, what: str) -> bytearray:
        if not isinstance(text, str) or not re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", text.strip()):
            self.wrong(f"{what} is not hexadecimal", "write two digits a byte, 0 to 9 and a to f")
        digits = text.strip().lower().removeprefix("0x")
        if len(digits) % 2:
            self.wrong(f"{what} has an odd number of digits", "write two digits a byte")
        return bytearray.fromhex(digits)

    def _key_file(self, name: Any) -> str:
        if not isinstance(name, str):
            self.wrong("key-file is no path", 'write key-file = "/etc/libfp/office.key"')
        path = os.path.join(os.path.dirname(self.path), name)
        try:
            require_private(path)
            with open(path, "rb") as file:
                return file.read(1024).decode("ascii", "replace")
        except BadInput as error:
            self.wrong(error.what, error.remedy)
        except OSError as error:
            self.wrong(f"cannot read {path}: {error.strerror}", "name a file with a key in hexadecimal digits")

    def _policy(self, table: Mapping[str, Any], number: int) -> PolicyLine:
        self._keys("policy", number, table, POLICY, POLICY[:3])
        line = self.line
        self.line = self.lines("policy", number, "action")
        action = self._one_of(table, "action", ACTIONS)
        source, destination = (self._prefix(table, number, key) for key in ("source", "destination"))
        if source.version != destination.version:
            self.wrong("source and destination are of two families", "write two policies")
        self.line = self.lines("policy", number, "tunnel")
        if (action == "protect") != ("tunnel" in table):
            remedy = "remove tunnel" if "tunnel" in table else 'write tunnel = "NAME" of an [[sa]]'
            self.wrong(f'[[policy]] with action = "{action}" with{"" if "tunnel" in table else "out"} tunnel', remedy)
        return PolicyLine(action, source, destination, self._name(table) if "tunnel" in table else "", line)

    def _prefix(self, table: Mapping[str, Any], number: int, key: str) -> Network:
        self.line = self.lines("policy", number, key)
        value = table[key]
        network = None
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(value if isinstance(value, str) else "", strict=False)
        if network is None:
            self.wrong(f"{key} is no prefix", f'write {key} = "10.1.0.0/16", or an IPv6 prefix')
        if isinstance(network, ipaddress.IPv6Network) and "%" in value:
            self.wrong(f"{key} has a zone", "a policy is about addresses in packets: they have none")
        if network.network_address != ipaddress.ip_address(value.partition("/")[0]):
            self.wrong(f"{key} is {value}, which has bits beyond its length", f'write {key} = "{network}"')
        return network

    # -- what only several tables together can say

    def _check(self, sas: Sequence[SaLine], policies: Sequence[PolicyLine]) -> None:
        names: dict[Any, SaLine] = {}
        for sa in sas:
            before = names.setdefault(sa.names, sa)
            if before is not sa:
                what = f"spi is that of line {before.line}, with the same direction"
                self.wrong(what, "choose another: the receiver tells SAs apart by it", sa.line)
            before = names.setdefault(sa.fingerprint, sa)
            if before is not sa:
                what = f"the key is that of line {before.line}"
                self.wrong(what, "make one for each SA and direction: head -c 36 /dev/urandom | xxd -p -c 36", sa.line)
            before = names.setdefault(sa.tunnel, sa)
            if (before.local, before.remote) != (sa.local, sa.remote):
                what = f"tunnel {sa.tunnel} has other addresses than in line {before.line}"
                self.wrong(what, "all SAs of a tunnel have one local and one remote", sa.line)
        sending = {sa.tunnel for sa in sas if sa.direction == "out"}
        selectors: dict[tuple[Network, Network], PolicyLine] = {}
        for policy in policies:
            if policy.tunnel and policy.tunnel not in sending:
                what = f'tunnel {policy.tunnel} has no [[sa]] with direction = "out"'
                self.wrong(what, "add one, or name another tunnel", policy.line)
            first = selectors.setdefault((policy.source, policy.destination), policy)
            if first is not policy:
                what = f"the same source and destination as in line {first.line}"
                self.wrong(what, "remove one: the first that covers a packet decides", policy.line)
