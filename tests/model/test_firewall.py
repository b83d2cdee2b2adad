"""The firewall's stages beside connection tracking in plain Python and a linear scan over the rules.

The model is written from what the kernel documents, with a dict for the flows; `tests/netns/test_firewall_kernel.py`
holds the same stages against the kernel itself. Here packets come in bursts, time passes, and settings change.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libfp import Pipeline
from libfp.apps.firewall.conntrack import Connections, Settings
from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.hits import Hits
from libfp.apps.firewall.policy import where
from libfp.jit import INTERPRETED
from libfp.stages import Forward, Routes, by_flow, parse, rewrite, route
from libfp.tables import Acl, Rule
from libfp.tables.flow_wheel import LOOKS
from libfp.testing import icmp_error, ipv4, tcp, udp
from libfp.testing.packets import internet_checksum
from libfp.testing.plain_rules import Header, first

pytestmark = pytest.mark.timeout(240)

NEW, ESTABLISHED, RELATED, INVALID = range(4)
S, SA, F, A, R = "syn", "syn-ack", "fin", "ack", "rst"
STATES = ["none", "syn-sent", "syn-recv", "established", "fin-wait", "close-wait", "last-ack", "time-wait", "close",
          "syn-sent-2"]  # fmt: skip
NEXT = {  # for each of STATES; - is invalid, . is ignored
    (0, S): "syn-sent syn-sent . . . . . syn-sent syn-sent syn-sent-2",
    (0, SA): "- - syn-recv - - - - - - syn-recv",
    (0, F): "- - fin-wait fin-wait last-ack last-ack last-ack time-wait close -",
    (0, A): "established - established established close-wait close-wait time-wait time-wait close -",
    (0, R): "- close close close close close close close close close",
    (1, S): "- syn-sent-2 - - - - - syn-sent - syn-sent-2",
    (1, SA): "- syn-recv . . . . . . . syn-recv",
    (1, F): "- - fin-wait fin-wait last-ack last-ack last-ack time-wait close -",
    (1, A): "- . syn-recv established close-wait close-wait time-wait time-wait close .",
    (1, R): "- close close close close close close close close close",
}
SECONDS = dict(zip(STATES, (0, 120, 60, 432_000, 120, 60, 30, 120, 10, 120), strict=True))
UNREPLIED, STREAM, PING, SHORT = 30, 120, 30, 300


@dataclass
class Flow:
    began: tuple[str, int]
    until: float
    made: float
    state: str = "none"
    replied: bool = False
    assured: bool = False
    last: tuple[str, int] = ("none", 0)  # kind of segment, way
    last_end: int = 0
    last_ack: int = -1
    last_window: int = 0
    repeats: int = 0
    closing: bool = False
    both: bool = False  # a simultaneous open
    challenge: bool = False
    acked: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)  # ways whose data is not acknowledged


@dataclass(frozen=True)
class Seen:
    """A packet: `way` 0 from the client. `kind` is a segment's, "data", "ask", "answer" or "error"."""

    protocol: int
    flow: int
    way: int
    kind: str
    seq: int = 0
    ack: int = 0
    size: int = 0
    window: int = 1000
    about: Seen | None = None

    @property
    def ends(self) -> tuple[tuple[str, int], tuple[str, int]]:
        ports = {6: 80, 17: 53, 1: 7 + self.flow}[self.protocol]
        own = 7 + self.flow if self.protocol == 1 else 1000 + self.flow
        one, two = ("10.0.1.2", own), ("10.0.2.2", ports)
        return (two, one) if self.way else (one, two)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.protocol, *sorted(self.ends)

    @property
    def frame(self) -> bytes:
        (src, sport), (dst, dport) = self.ends
        if self.about is not None:
            back = {"src": "10.0.2.99" if self.way else "10.0.1.99", "dst": "10.0.1.2" if self.way else "10.0.2.2"}
            return icmp_error(self.about.frame, **back)
        if self.protocol == 6:
            flags = {S: "S", SA: "SA", F: "FA", A: "A", R: "R"}[self.kind]
            return tcp(bytes(self.size), sport, dport, flags, self.seq, self.ack if "A" in flags else 0, self.window,
                       src=src, dst=dst)  # fmt: skip
        if self.protocol == 17:
            return udp(bytes(self.size), sport, dport, src=src, dst=dst)
        bare = struct.pack("!BBHHH", 8 if self.kind == "ask" else 0, 0, 0, sport, 1)
        bare = bare[:2] + struct.pack("!H", internet_checksum(bare)) + bare[4:]
        return ipv4(bare, protocol=1, src=src, dst=dst)


class Model:
    def __init__(self, rules: dict[int, Rule], kernel: Settings) -> None:
        self.rules, self.kernel, self.now = rules, kernel, 0.0
        self.flows: dict[tuple[Any, ...], Flow] = {}

    def verdict(self, seen: Seen, state: int) -> int:
        frame = seen.frame
        (sport, dport) = struct.unpack_from("!HH", frame, 34)
        header = Header(int.from_bytes(frame[26:30]), int.from_bytes(frame[30:34]), frame[23], (sport, dport),
                        frame[47] if frame[23] == 6 else 0, where(seen.way, 1 - seen.way, state) & 0x7FFF)  # fmt: skip
        return first(self.rules, header) & 3

    def known(self, seen: Seen) -> Flow | None:
        found = self.flows.get(seen.key)
        return found if found is not None and found.until > self.now else None

    def see(self, seen: Seen) -> str:
        begins = seen.kind in (S, "data", "ask") or (seen.kind == A and self.kernel.tcp_loose)
        flow = self.known(seen.about or seen)
        state = None
        if seen.about is not None:
            about = seen.about
            if flow is not None:
                crossed = about.protocol == 1 and (about.kind == "answer") != (about.ends[0] != flow.began)
                state = None if crossed else RELATED
        elif flow is not None:
            way = int(seen.ends[0] != flow.began)
            if seen.protocol == 1 and (seen.kind == "answer") != (way == 1):
                return "punt crossed-echo"
            state = self.segment(flow, way, seen) if seen.protocol == 6 else self.other(flow, way, seen)
        unknown = state is None
        if unknown:
            state = NEW if begins and seen.about is None else INVALID
        verdict = self.verdict(seen, state)
        if verdict == 1:
            if unknown and state == NEW:
                self.flows[seen.key] = self.open(seen)
            return "forward"
        if verdict == 3:
            return "punt reject"
        if unknown and seen.kind not in (S, "ask") and 1 in (self.verdict(seen, one) for one in (ESTABLISHED, RELATED)):
            return "punt flow-unknown"
        return "drop filtered"

    def open(self, seen: Seen) -> Flow:
        flow = Flow(seen.ends[0], self.now + (PING if seen.protocol == 1 else UNREPLIED), self.now)
        if seen.protocol == 6:
            flow.state = "syn-sent" if seen.kind == S else "established"
            flow.until = self.now + min(SECONDS[flow.state], SHORT)
            flow.last, flow.end = (seen.kind, 0), {0: self.end_of(seen)}
        return flow

    def other(self, flow: Flow, way: int, seen: Seen) -> int:
        state = ESTABLISHED if way or flow.replied else NEW
        seconds = PING if seen.protocol == 1 else UNREPLIED
        if seen.protocol == 17 and flow.replied and self.now - flow.made > 2:
            seconds, flow.assured = STREAM, True
        flow.until = self.now + seconds
        flow.replied |= way == 1
        return state

    @staticmethod
    def end_of(seen: Seen) -> int:
        return seen.seq + seen.size + (seen.kind in (S, SA, F))

    def segment(self, flow: Flow, way: int, seen: Seen) -> int | None:
        state, old, kind = ESTABLISHED if way or flow.replied else NEW, flow.state, seen.kind
        new, end, other = NEXT[way, kind].split()[STATES.index(flow.state)], self.end_of(seen), 1 - way
        if new == "-":
            return INVALID
        if new == "." or (new == "syn-sent" and old in ("time-wait", "close")):
            if new == "syn-sent" and (flow.closing or flow.last == (R, way)):
                flow.until = self.now
                return None
            if kind == SA and flow.last == (S, other) and seen.ack == flow.last_end:
                old, new = "syn-sent", "syn-recv"
                flow.end, flow.acked, flow.waiting, flow.closing = {other: flow.last_end}, {}, set(), False
            else:
                if kind == S and way == 0:
                    flow.both, flow.challenge = False, old == "last-ack"
                if old == "syn-sent" and kind == A and way == 1:
                    flow.last_ack = seen.ack
                flow.last, flow.last_end, flow.last_window = (kind, way), end, seen.window
                flow.replied |= way == 1
                return state
        elif new == "time-wait" and old == "last-ack" and kind == A and flow.last == (S, other) and flow.challenge:
            flow.challenge, flow.replied = False, flow.replied or way == 1
            return state
        elif new == "syn-sent-2":
            flow.both = True
        elif new == "syn-recv" and way == 1 and kind == A and flow.both:
            new = "established"
        elif new == "close" and kind == R and old in ("syn-sent", "syn-recv", "established", "syn-sent-2"):
            assured = old == "established" and flow.assured
            if other in flow.acked and flow.last[0] != S and not (seen.seq == 0 and not assured):
                if seen.seq < flow.acked[other] and not self.kernel.tcp_ignore_invalid_rst:
                    return INVALID
                train = flow.last == (A, way) and seen.seq == flow.last_end
                if assured and seen.seq != flow.acked[other] and not train:
                    new = old
        if kind != R or STATES.index(old) not in range(4, 9):
            self.window(flow, way, seen, old, end)
        flow.last = (kind, way)
        flow.closing |= new == "fin-wait" and old != new
        flow.state = new
        seconds = SECONDS[new]
        if flow.repeats >= self.kernel.tcp_max_retrans and seconds > SHORT:
            seconds = SHORT
        elif kind == R:
            seconds = SECONDS["close"]
        elif flow.waiting or flow.last_window == 0:
            seconds = min(seconds, SHORT)
        if not flow.replied:
            flow.replied = way == 1
            if kind == R:
                flow.until = self.now
                return state
            if kind == S and old == "syn-sent":
                return state
            if new == "established":
                seconds = min(seconds, SHORT)
        elif new == "established" and old in ("syn-recv", "established"):
            flow.assured = True
        flow.until = self.now + seconds
        return state

    def window(self, flow: Flow, way: int, seen: Seen, old: str, end: int) -> None:
        """What Linux learns from a segment: nothing, if it acknowledges what the other end has not sent."""
        other, ack = 1 - way, seen.ack
        again = seen.kind in (S, SA) and end > flow.end.get(way, end) and old in ("syn-sent", "syn-recv")
        if way not in flow.end or again:
            begins = way not in flow.end
            flow.end[way] = end
            flow.acked.pop(way, None)
            flow.waiting.discard(way)
            if seen.kind == S and (begins or way == 1):
                return
            if seen.kind != SA and seen.kind != S and ack == flow.end.get(other, 0) + 1:
                flow.end[other] = ack
        if seen.kind in (S, R):
            ack = flow.end.get(other, 0)
        elif ack > flow.end.get(other, -1):
            return
        if end > flow.end[way]:
            flow.end[way] = end
            flow.waiting.add(way)
        if seen.kind not in (S, R):
            flow.acked[way] = max(ack, flow.acked.get(way, 0))
        if ack == flow.end.get(other, 0):
            flow.waiting.discard(other)
        if seen.kind == A:
            now = flow.last[1], flow.last_window, flow.last_end, flow.last_ack
            if now == (way, seen.window, end, seen.ack):
                flow.repeats += 1
            else:
                flow.repeats, flow.last_end, flow.last_ack, flow.last_window = 0, end, seen.ack, seen.window


def by_state(state: int, action: int, **asks: Any) -> Rule:
    return Rule(4 | action, interface=(state << 12, 7 << 12), **asks)


POLICIES = {
    "stateful": [by_state(ESTABLISHED, 1), by_state(RELATED, 1), by_state(INVALID, 2),
                 by_state(NEW, 1, protocol="tcp", dport=80), by_state(NEW, 1, protocol="udp", dport=53),
                 by_state(NEW, 1, protocol="icmp", source="10.0.1.0/24"), Rule(8 | 3, sport=53), Rule(8 | 2)],
    "syn only": [by_state(ESTABLISHED, 1), by_state(RELATED, 1), Rule(8 | 1, protocol="tcp", tcp_flags=(2, 0x17)),
                 Rule(12 | 2)],
    "no replies": [by_state(ESTABLISHED, 2), Rule(8 | 1)],
    "no errors": [by_state(RELATED, 2), by_state(INVALID, 3), Rule(8 | 1)],
    "one way": [Rule(4 | 1, interface=(0, 63)), by_state(ESTABLISHED, 1, protocol="tcp"), Rule(8 | 2)],
    "new alone": [by_state(NEW, 1), Rule(8 | 2)],
}  # fmt: skip


class Bed:
    def __init__(self) -> None:
        routes = Routes(routes=1024, routes6=1024, next_hops=4096)
        for n in (0, 1):
            routes.fib[f"10.0.{n + 1}.0/24"] = routes.next_hops.add(Forward(n, bytes(6), bytes(6), 1500))
        self.acl, acl6 = Acl(100), Acl(100, "ipv6")
        self.connections = Connections(capacity=1000)
        stage = filtering(routes, self.acl, acl6, Hits(), self.connections)
        self.pipeline = Pipeline(parse, by_flow, route(routes), stage, rewrite(routes))


@pytest.fixture(scope="module")
def bed() -> Bed:
    return Bed()


ways = st.integers(0, 1)
near = st.integers(0, 3)
segments = st.builds(
    Seen, st.just(6), st.integers(0, 1), ways, st.sampled_from([S, SA, A, A, A, F, R]),
    near.map(lambda n: 1000 + n), near.map(lambda n: 1000 + n), st.sampled_from([0, 0, 1]), st.sampled_from([0, 1000]),
)  # fmt: skip
datagrams = st.builds(Seen, st.just(17), st.just(2), ways, st.just("data"))
pings = st.builds(Seen, st.just(1), st.just(3), ways, st.sampled_from(["ask", "answer"]))
plain = segments | segments | datagrams | pings
errors = plain.map(lambda one: Seen(one.protocol, one.flow, 1 - one.way, "error", about=one))
bursts = st.lists(plain | plain | plain | errors, min_size=1, max_size=64)
steps = st.lists(bursts | st.sampled_from([1.5, 5.5, 10.5, 31.5, 61.5, 121.5, 301.5]), max_size=12)
kernels = st.builds(Settings, tcp_loose=st.booleans(), tcp_ignore_invalid_rst=st.booleans(),
                    tcp_max_retrans=st.sampled_from([0, 1, 3]))  # fmt: skip


@settings(max_examples=15 if INTERPRETED else 250, deadline=None)
@given(policy=st.sampled_from(sorted(POLICIES)), kernel=kernels, steps=steps)
def test_verdicts_are_those_of_the_model(bed: Bed, policy: str, kernel: Settings, steps: list[Any]) -> None:
    bed.acl.load(POLICIES[policy])
    bed.connections.apply(kernel)
    bed.pipeline.run_once([])
    [part] = bed.connections.parts
    part.pass_time(500_000)  # what was there has ended
    for _ in range(4096 // LOOKS + 10):
        bed.pipeline.run_once([])
    model = Model(dict(enumerate(POLICIES[policy])), kernel)
    for step in steps:
        if isinstance(step, float):
            model.now += step
            part.pass_time(step)
        else:
            assert run(bed, step) == [model.see(one) for one in step]
    bed.pipeline.run_once([])
    live = {key: flow for key, flow in model.flows.items() if flow.until > model.now}
    shown = {(key.protocol, *sorted([(key.src, key.sport), (key.dst, key.dport)])): flow for key, flow in part.items()}
    assert set(shown) == set(live)
    for key, flow in live.items():
        assert shown[key].assured == flow.assured
        assert abs(shown[key].left - (flow.until - model.now)) < 0.5
        if key[0] == 6:
            assert shown[key].state == STATES.index(flow.state)


def run(bed: Bed, burst: list[Seen]) -> list[str]:
    """A burst is of one port: as many as the way stays the same."""
    told: list[str] = []
    rest = list(burst)
    while rest:
        count = next((n for n, one in enumerate(rest) if one.way != rest[0].way), len(rest))
        told += map(str, bed.pipeline.run_once([one.frame for one in rest[:count]], port=rest[0].way))
        rest = rest[count:]
    return told
