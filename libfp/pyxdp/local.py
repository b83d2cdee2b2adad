"""The addresses that belong to this host, as the steering programs of all ports see them."""

from __future__ import annotations

import errno
import ipaddress
import struct
from collections.abc import Iterable, Iterator
from typing import Self

from libfp.errors import TableFull
from libfp.pyxdp import bpf, netlink
from libfp.pyxdp.filters import Prefix, parse_prefix


class PrefixSet:
    """A set of prefixes ("10.0.0.1", "2001:db8::/32") that XDP programs look up, longest prefix first.

    `map` holds those of IPv4, `map6` those of IPv6, each up to `capacity`. One thread changes it. Every change is one
    system call and is seen by the next packet on every port. Raises BadInput for text that is no prefix, and TableFull.
    """

    name = "libfp_prefixes"

    def __init__(self, prefixes: Iterable[str] = (), capacity: int = 16384) -> None:
        self._prefixes: set[Prefix] = set()
        self.map = bpf.Map(bpf.LPM_TRIE, 4 + 4, 4, capacity, self.name, bpf.NO_PREALLOC)
        self.map6 = bpf.Map(bpf.LPM_TRIE, 4 + 16, 4, capacity, self.name, bpf.NO_PREALLOC)
        try:
            for prefix in prefixes:
                self.add(prefix)
        except BaseException:
            self.close()
            raise

    def add(self, prefix: str) -> None:
        """Add a prefix; nothing happens when it is there."""
        self._add(parse_prefix(prefix))

    def remove(self, prefix: str) -> None:
        """Remove exactly this prefix; nothing happens when it is not there."""
        self._remove(parse_prefix(prefix))

    def replace(self, prefixes: Iterable[str]) -> None:
        """Make the set hold exactly these: new ones are added before old ones go."""
        wanted = {parse_prefix(prefix) for prefix in prefixes}
        for prefix in wanted - self._prefixes:
            self._add(prefix)
        for prefix in self._prefixes - wanted:
            self._remove(prefix)

    def covers(self, address: str) -> bool:
        """What a program's lookup of this address finds, asked from the kernel."""
        prefix = parse_prefix(address)
        try:
            self._map(prefix)[_key(prefix)]
        except KeyError:
            return False
        return True

    def _map(self, prefix: Prefix) -> bpf.Map:
        return self.map if prefix.version == 4 else self.map6

    def _add(self, prefix: Prefix) -> None:
        into = self._map(prefix)
        try:
            into[_key(prefix)] = struct.pack("=I", 1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.E2BIG):
                raise TableFull(
                    f"{self.name} holds {into.entries} IPv{prefix.version} prefixes and no more",
                    "make it with a larger capacity",
                ) from error
            raise
        self._prefixes.add(prefix)

    def _remove(self, prefix: Prefix) -> None:
        self._map(prefix).discard(_key(prefix))
        self._prefixes.discard(prefix)

    def __contains__(self, prefix: str) -> bool:
        return parse_prefix(prefix) in self._prefixes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(str(prefix) for prefix in self._prefixes))

    def __len__(self) -> int:
        return len(self._prefixes)

    def close(self) -> None:
        """Close the maps. Programs that look into them keep them as they are."""
        self.map.close()
        self.map6.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class LocalAddresses(PrefixSet):
    """This host's own prefixes (the kernel's local tables, broadcast and anycast too): packets to them stay with Linux.

    One object serves the steering of every port; whoever makes it keeps it current (`libfp.linux` does it from
    netlink messages).
    """

    name = "libfp_local"

    @classmethod
    def of_host(cls) -> Self:
        """What this network namespace delivers locally now. Nobody keeps it current."""
        return cls(f"{ipaddress.ip_address(address)}/{length}" for address, length in netlink.local_prefixes())


def _key(prefix: Prefix) -> bytes:
    return struct.pack("=I", prefix.prefixlen) + prefix.network_address.packed
