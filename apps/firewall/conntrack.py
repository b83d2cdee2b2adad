"""Connection tracking as Linux's nf_conntrack does it: which packets are new, established, related or invalid.

Flows are those of `libfp.tables.Flow`, one table a worker, whose state numbers are here: RFC 9293's for TCP, by
Linux's table of transitions (`libfp.apps.firewall.conntrack_tcp`), and one for each other timeout. What Linux reads
from ``net.netfilter.nf_conntrack_*`` is read from there.

Sequence numbers are not held against windows. Linux does not refuse for them when ``tcp_be_liberal`` is 1; with 0
it may call a packet invalid that is none here: see `Settings.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libfp.apps.firewall.conntrack_tcp import (
    CHECKSUM,
    IGNORE_RST,
    INDEXES,
    LOOSE,
    MAX_RETRANS,
    MOVES,
    TCP_INDEX,
    TCP_MOVES,
)
from libfp.errors import BadInput, Unsupported
from libfp.jit import Arena, native, store64, word
from libfp.tables import Flow, FlowPart, FlowView
from libfp.tables.flow_record import LONGEST, TICKS, TIMEOUTS

#: States of a flow: TCP's, then numbers that only have a timeout, then those of other protocols.
STATES = (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
    "SYN_SENT2", "RETRANS", "UNACKNOWLEDGED", "UDP", "UDP_STREAM", "ICMP", "ICMPV6",
)  # fmt: skip
_SYSCTLS = (
    "", "tcp_timeout_syn_sent", "tcp_timeout_syn_recv", "tcp_timeout_established", "tcp_timeout_fin_wait",
    "tcp_timeout_close_wait", "tcp_timeout_last_ack", "tcp_timeout_time_wait", "tcp_timeout_close", "",
    "tcp_timeout_max_retrans", "tcp_timeout_unacknowledged", "udp_timeout", "udp_timeout_stream", "icmp_timeout",
    "icmpv6_timeout",
)  # fmt: skip
_TIMEOUTS = (10, 120, 60, 432_000, 120, 60, 30, 120, 10, 120, 300, 300, 30, 120, 30, 30)  # Linux's, in seconds

# A worker's scratch memory: byte offsets. A word of 32 bits for each packet, headers for the Acls, and what they said.
WHAT, HEADERS4, HEADERS6, RESULTS4, RESULTS6, SCRATCH = 0, 256, 1280, 3840, 4096, 4352
VALUES = 4  # value words of a flow


@dataclass(frozen=True)
class Settings:
    """What ``net.netfilter.nf_conntrack_*`` says, Linux's defaults first. Timeouts in seconds, by number of state."""

    tcp_loose: bool = True
    tcp_be_liberal: bool = False
    tcp_ignore_invalid_rst: bool = False
    tcp_max_retrans: int = 3
    checksum: bool = True
    helper: bool = False
    timeouts: tuple[int, ...] = field(default=_TIMEOUTS)

    @classmethod
    def read(cls, folder: str | Path = "/proc/sys/net/netfilter") -> Settings:
        """Those of the calling thread's network namespace; what the kernel does not have is its default."""

        def value(name: str, default: int) -> int:
            try:
                return int((Path(folder) / f"nf_conntrack_{name}").read_text())
            except OSError:
                return default  # not loaded, as long as no rule needs it
            except ValueError as error:
                raise BadInput(f"nf_conntrack_{name} is no number: {error}") from None

        flags = ("tcp_loose", "tcp_be_liberal", "tcp_ignore_invalid_rst", "checksum", "helper")
        found: dict[str, Any] = {name: value(name, int(getattr(cls, name))) != 0 for name in flags}
        pairs = zip(_SYSCTLS, _TIMEOUTS, strict=True)
        timeouts = tuple(value(name, default) if name else default for name, default in pairs)
        return cls(tcp_max_retrans=value("tcp_max_retrans", cls.tcp_max_retrans), timeouts=timeouts, **found)

    def check(self, depends: bool) -> None:
        """Raise Unsupported for a setting by which Linux refuses what would be accepted here, or the other way round.

        `depends`: whether the rules ask for invalid packets, or ask for states and drop what no rule accepts.
        """
        if depends and not self.tcp_be_liberal:
            what = "Linux holds TCP's sequence numbers against windows, and the rules drop what is invalid"
            raise Unsupported(what, "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1")
        if self.helper:
            what = "Linux's helpers make flows related by what packets say"
            raise Unsupported(what, "sysctl -w net.netfilter.nf_conntrack_helper=0")

    @property
    def seconds(self) -> tuple[float, ...]:
        """The timeouts of a `Flow`: a new flow's is the shortest, by which it enters the wheel."""
        most = LONGEST // TICKS
        bounded = [min(max(one, 1 / TICKS), most) for one in self.timeouts[1:]]
        return (min(bounded), *bounded)


@native
class ConnectionsView:
    """One worker's connections, as compiled code sees them."""

    flows: FlowView
    rules: word  # address of the words that all workers read
    scratch: word

    def each_turn(self):  # type: ignore[no-untyped-def]
        """See `FlowView.each_turn`."""
        return self.flows.each_turn()


class Connections(Flow):
    """The flows of a firewall: a `Flow` whose stage knows the kernel's settings. `capacity` as for that."""

    def __init__(self, settings: Settings | None = None, capacity: int = 1 << 18, capacity6: int | None = None) -> None:
        self.settings = settings or Settings()
        super().__init__(capacity, ("u64",) * VALUES, self.settings.seconds, capacity6=capacity6)
        self._rules = Arena(TCP_MOVES + len(MOVES))
        self._rules.buffer[TCP_INDEX : TCP_INDEX + len(INDEXES)] = INDEXES
        self._rules.buffer[TCP_MOVES : TCP_MOVES + len(MOVES)] = MOVES
        self.apply(self.settings)

    def make(self, worker: int) -> FlowPart:
        """See `PerWorker.make`."""
        return _Part(self, worker, self._rules.address)

    def apply(self, settings: Settings) -> None:
        """From now on those settings; a flow keeps the deadline it has until its next packet."""
        at = self._rules.address
        store64(at + LOOSE, int(settings.tcp_loose))
        store64(at + CHECKSUM, int(settings.checksum))
        store64(at + IGNORE_RST, int(settings.tcp_ignore_invalid_rst))
        store64(at + MAX_RETRANS, settings.tcp_max_retrans)
        self.settings, self.timeouts = settings, settings.seconds
        for part in self.parts:
            for table in part._tables:
                for state, seconds in enumerate(self.timeouts):
                    store64(table.at + TIMEOUTS + 8 * state, max(1, round(seconds * TICKS)))


class _Part(FlowPart):
    """One worker's own; `view` is a `ConnectionsView`."""

    view: Any

    def __init__(self, connections: Connections, worker: int, rules: int) -> None:
        super().__init__(connections, worker)
        self._scratch = Arena(SCRATCH)
        self.view = ConnectionsView(self.view, rules, self._scratch.address)

    def close(self) -> None:
        super().close()
        self._scratch.close()
