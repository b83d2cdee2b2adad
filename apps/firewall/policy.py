"""The rules as compiled code asks them: one `Acl` for each family, and what its key and its value mean.

The key is a header of `AclView.lookup` (16 bytes for IPv4, 40 for IPv6), as on the wire, of packets that are tracked:

    source, destination        4 or 16 bytes each
    the transport header's first 4 bytes, as they are: the ports of TCP and UDP; type, code and checksum of ICMP (v6)
    protocol                   1 byte; that of a packet without extension headers
    TCP flags                  1 byte, 0 for others
    HAS_PORTS | where          2 bytes, big-endian: see `where`

The value is never 0: every table ends with a rule for all else. ``value & ACTION`` is what is done, ``value >> NUMBER``
the number of the outcome: the index of its counters in `Hits`. An outcome is what happens to a packet and the rules
that have counted it: rules that only count do not decide, so that each combination of them with a rule that does is an
outcome of its own.
"""

from __future__ import annotations

from libfp.jit import kernel
from libfp.tables.acl_layout import HAS_PORTS

#: States of connection tracking, in the key.
NEW, ESTABLISHED, RELATED, INVALID, UNTRACKED = range(5)
#: What is done, in ``value & ACTION``. PUNT: a rule that rejects; Linux does it.
ACTION = 3
ACCEPT, DROP, PUNT = 1, 2, 3
NUMBER = 2  # bits that the action takes

PORTS = 64  # ports that can be told apart
OUT_AT, STATE_AT = 6, 12


@kernel
def where(port_in, port_out, state):  # type: ignore[no-untyped-def]
    """The last two bytes of the key, in host order: indexes of ports, below `PORTS`, and a state."""
    return HAS_PORTS | port_in | port_out << OUT_AT | state << STATE_AT
