"""Proof: a worker's loop takes no lock and, with a helper to make its system calls, calls nothing at all.

Read from the machine code, compiled afresh. Faults put in on purpose must each be found, or the proof proves nothing.
"""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import pytest

from libfp import Pipeline, stage
from libfp.apps.firewall.conntrack import Connections
from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.hits import Hits
from libfp.apps.ipsec.policies import Policies
from libfp.apps.ipsec.sa import SaTable
from libfp.apps.ipsec.stages import decrypt, protect, select, to_sa
from libfp.engine import loop
from libfp.gen.loop import RingPorts
from libfp.gen.loop import run as generate
from libfp.jit import INTERPRETED, call, fetch_add64, kernel, load64, native, store64, word
from libfp.jit.libc import address_of
from libfp.jit.primitive import I64, declare, primitive
from libfp.packet.burst import Burst
from libfp.rings import Mpmc, Mpsc, Spsc
from libfp.stages import Routes, by_flow, forward, parse, rewrite, route
from libfp.tables import Acl, Flow, Hash
from libfp.testing.machine_code import Report, check, check_loop, compile_afresh, functions, loop_code

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(INTERPRETED, reason="about compiled code"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the checker reads x86-64"),
]


@stage
def deny(packet, blocked):  # type: ignore[no-untyped-def]
    if packet.is_ipv4 and packet.ipv4.src in blocked:
        packet.drop("denied")


@stage
def screen(packet, acl):  # type: ignore[no-untyped-def]
    if acl.classify(packet) == 1:
        packet.drop("screened")


@pytest.fixture(scope="module")
def router() -> Pipeline:
    """The walking skeleton: parse, a hash table, a classifier, a forwarding table."""
    tables = Hash(key="ipv4", capacity=64), Acl(capacity=64)
    return Pipeline(parse, deny(tables[0]), screen(tables[1]), forward(Routes(routes=1000, next_hops=16)))


def short(names: tuple[str, ...]) -> str:
    return " ".join(names)


@pytest.fixture(scope="module")
def code(router: Pipeline) -> tuple[str, str]:
    return loop_code(router, kick="helper", idle="spin")


def test_no_lock_and_no_call_with_a_helper(code: tuple[str, str]) -> None:
    report = check(*code)
    assert report.findings == ()
    assert report.indirect == 0, report.where
    assert report.calls <= {"memcpy"}, "the copy into the punt ring"
    for part in ("loop", "forwarding7forward", "lookup", "find_word", "acl"):
        assert part in short(report.functions), "or it was not read, and nothing is proven"


def test_no_lock_and_counted_calls_when_it_kicks_and_parks(router: Pipeline) -> None:
    """sendto, recv, write and poll, by address, and nothing else: `kick` and `park` count each in `syscalls`."""
    report = check_loop(router, kick="inline", idle="park")
    assert report.findings == ()
    assert 3 <= report.indirect <= 5, report.where
    homes = "engine4loop", "5plain", "7clocked"  # libfp.engine.loop, or the loops it was inlined into
    assert all(any(home in name for home in homes) for name in report.where), report.where
    assert report.calls <= {"memcpy"}


@stage
def away(packet):  # type: ignore[no-untyped-def]
    packet.forward(1 - packet.port)


def plain_code() -> dict[str, list[str]]:
    """The functions that the loop of a small pipeline runs while nobody looks; names without what numba adds."""
    assembly, _ = loop_code(Pipeline(away))
    found = functions(assembly)
    plain = next(name for name in found if "5plain" in name)
    tidy = {name: re.sub(r"pipeline_\w{24}", "pipeline", name.partition("c8tJTIe")[0]) for name in found}
    tidy = {name: re.sub(r"B\d?v\d+B\d+$", "", short) for name, short in tidy.items()}
    names = re.compile("|".join(map(re.escape, found)))
    kept = check(assembly, plain).functions
    return {tidy[one]: [names.sub(lambda name: tidy[name[0]], line) for line in found[one]] for one in kept}


def test_what_measures_is_not_in_the_loop_that_nobody_looks_at(code: tuple[str, str]) -> None:
    assembly, entry = code
    found = functions(assembly)
    plain = check(assembly, next(name for name in found if "5plain" in name)).functions
    for part in ("clocked", "watched", "tap_begin", "tap_stage"):
        assert part not in short(plain)
        assert part in short(check(assembly, entry).functions), "or it was not read, and nothing is proven"
    clocks = {name for name in plain if any("rdtsc" in line for line in found[name])}
    assert all("_punt" in name for name in clocks), "the token bucket of a punted packet"


@pytest.mark.skipif(not os.environ.get("LIBFP_FULL"), reason="compiles two loops: if LIBFP_FULL is set")
def test_the_loop_that_nobody_looks_at_is_the_same_without_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine code is the same, to the last instruction, with and without the loop that is watched."""
    with_it = plain_code()
    source, call = loop.SOURCE, "        clocked(context, burst, mailbox{arguments})\n"
    assert call in source
    monkeypatch.setattr(loop, "SOURCE", source.replace(call, ""))
    assert plain_code() == with_it
    assert sum(map(len, with_it.values())) > 500, "or it was not read"


def test_no_lock_and_no_call_where_packets_are_handed_off() -> None:
    report = check_loop(Pipeline(parse, by_flow, away))
    assert report.findings == ()
    assert report.indirect == 0, report.where
    assert report.calls <= {"memcpy"}
    for part in ("loop", "lend", "take_back", "give_back"):
        assert part in short(report.functions), "or it was not read, and nothing is proven"


def test_no_lock_and_no_call_in_the_firewalls_loop() -> None:
    routes, acls, hits, connections = Routes(routes=1000, next_hops=16), (Acl(8), Acl(8, "ipv6")), Hits(), Connections()
    stages = parse, by_flow, route(routes), filtering(routes, *acls, hits, connections), rewrite(routes)
    report = check_loop(Pipeline(*stages))
    assert report.findings == ()
    assert report.indirect == 0, report.where
    assert report.calls <= {"memcpy"}
    for part in ("tcp_packet", "read4", "find_lines", "acl", "_unknown", "rewrite"):
        assert part in short(report.functions), "or it was not read, and nothing is proven"


def test_no_lock_and_only_libcryptos_calls_in_the_ipsec_gateways_loop() -> None:
    """By address, to decrypt a packet four calls, to encrypt one five: see `libfp.apps.ipsec.libcrypto`."""
    routes = Routes(routes=1000, next_hops=16)
    with SaTable(capacity=8) as sas:
        policies = Policies(sas, capacity=8)
        stages = parse, to_sa(sas), decrypt(sas, policies), select(sas, policies, routes), protect(sas), forward(routes)
        report = check_loop(Pipeline(*stages))
    assert report.findings == ()
    assert report.indirect == 9, report.where
    assert sum("esp_in6verify" in one for one in report.where) == 4
    assert sum("esp_out4send" in one for one in report.where) == 5
    assert report.calls <= {"memcpy"}
    for part in ("verify", "send", "icmp", "find", "lend"):
        assert part in short(report.functions), "or it was not read, and nothing is proven"


@native
class Word:
    at: word


def _exchange(context: Any, builder: Any, address: Any, value: Any) -> Any:
    return builder.atomic_rmw("xchg", builder.inttoptr(address, I64.as_pointer()), value, "seq_cst")


def _store_seq_cst(context: Any, builder: Any, address: Any, value: Any) -> None:
    builder.store_atomic(value, builder.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


def _fence(context: Any, builder: Any, address: Any, value: Any) -> None:
    builder.fence("seq_cst")


def _malloc(context: Any, builder: Any, address: Any, value: Any) -> Any:
    return builder.call(declare(builder, "malloc", I64, I64), [value])


@primitive(_exchange)
def exchange(address: int, value: int) -> int:
    raise NotImplementedError


@primitive(_store_seq_cst, void=True)
def store_seq_cst(address: int, value: int) -> None:
    raise NotImplementedError


@primitive(_fence, void=True)
def fence(address: int, value: int) -> None:
    raise NotImplementedError


@primitive(_malloc)
def malloc(address: int, value: int) -> int:
    raise NotImplementedError


def seeded(fault: str) -> Report:
    """The report on a pipeline whose one stage has a fault where it handles a packet of one length."""

    @stage
    def locked(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            fetch_add64(word.at, 1)

    @stage
    def exchanged(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            packet.mark = exchange(word.at, 1)

    @stage
    def ordered(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            store_seq_cst(word.at, 1)

    @stage
    def fenced(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            fence(word.at, 1)

    @stage
    def allocated(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            packet.mark = malloc(word.at, packet.length)

    @stage
    def allocated_by_address(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            packet.mark = call(word.at, packet.length, 0, 0, 0, 0, 0)

    @stage
    def sound(packet, word):  # type: ignore[no-untyped-def]
        if packet.length == 61:
            packet.mark = word.at

    stages = {one.__name__: one for one in (locked, exchanged, ordered, fenced, allocated, allocated_by_address, sound)}
    return check_loop(Pipeline(stages[fault](Word(address_of("malloc")))))


FAULTS = {
    "locked": "lock",
    "exchanged": "xchg",
    "ordered": "xchg",
    "fenced": "",  # mfence, or an addition to the stack with a lock prefix: as LLVM likes it for this processor
    "allocated": "calls malloc",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found(fault: str) -> None:
    report = seeded(fault)
    assert report.findings
    assert any(FAULTS[fault] in one for one in report.findings), report.findings


def test_a_seeded_call_by_address_is_counted() -> None:
    assert seeded("allocated_by_address").indirect in (1, 2), "the stages are there twice: plain, and watched by a tap"


def test_without_a_fault_nothing_is_found() -> None:
    report = seeded("sound")
    assert (report.findings, report.indirect) == ((), 0)


def test_memory_of_pythons_is_refused_by_the_compiler() -> None:
    import numpy as np

    @stage
    def allocates(packet):  # type: ignore[no-untyped-def]
        packet.mark = np.empty(packet.length, np.int64)[0]

    with pytest.raises(Exception, match=r"No implementation of function Function.<built-in function empty>"):
        check_loop(Pipeline(allocates))


def test_the_generators_loop_locks_nothing_and_calls_but_its_kick() -> None:
    report = check(*compile_afresh(generate.function, (RingPorts(0), Burst(0), 0)))
    assert report.findings == ()
    assert (report.indirect, report.calls) == (1, {"memcpy"})


@kernel
def _whole_spsc(ring, at):  # type: ignore[no-untyped-def]
    """Every call of both sides."""
    done = ring.enqueue_burst(at, 4) + ring.enqueue_bulk(at, 4) + ring.dequeue_burst(at, 4) + ring.dequeue_bulk(at, 4)
    granted = ring.reserve(3)
    for i in range(granted):
        store64(ring.slot(i), i)
    ring.commit(granted)
    there = ring.peek(3)
    for i in range(there):
        done += load64(ring.item(i))
    ring.release(there)
    return done + len(ring) + ring.passed(ring.written())


@kernel
def _consumer(ring, at):  # type: ignore[no-untyped-def]
    """Every call of the consumer."""
    done = ring.dequeue_burst(at, 4) + ring.dequeue_bulk(at, 4)
    there = ring.peek(3)
    for i in range(there):
        done += load64(ring.item(i))
    ring.release(there)
    return done + len(ring)


@kernel
def _producer(ring, at):  # type: ignore[no-untyped-def]
    return ring.enqueue_burst(at, 4)


@kernel
def _dequeuer(ring, at):  # type: ignore[no-untyped-def]
    return ring.dequeue_burst(at, 4)


@pytest.mark.parametrize("element", [8, 16])
@pytest.mark.parametrize(("ring", "calls"), [(Spsc, _whole_spsc), (Mpsc, _consumer)])
def test_rings_between_two_and_the_one_consumer_lock_nothing(ring: Any, calls: Any, element: int) -> None:
    report = check(*compile_afresh(calls, (ring(64, element=element).view, 0)))
    assert report.findings == ()
    assert report.indirect == 0, report.where
    assert report.calls == set(), "copies are loops"


@pytest.mark.parametrize(("ring", "calls"), [(Mpsc, _producer), (Mpmc, _producer), (Mpmc, _dequeuer)])
def test_many_claim_by_a_locked_instruction_and_call_nothing(ring: Any, calls: Any) -> None:
    """Which shows that the reader gets to where a lock would be."""
    report = check(*compile_afresh(calls, (ring(64).view, 0)))
    assert report.findings
    assert all("lock" in one and "cmpxchg" in one for one in report.findings), report.findings
    assert (report.indirect, report.calls) == (0, set())


@kernel
def _hash_bursts(view, keys, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(keys, results, count)
    view.get_burst(keys, results, count, 0)


@pytest.mark.parametrize("key", ["u64", ("u64", "u64"), ("ipv6", "ipv6", "u64")])
def test_bursts_of_exact_matches_lock_and_call_nothing(key: Any) -> None:
    """Vectors too: an operation that the processor lacks must not have become a call of a library."""
    report = check(*compile_afresh(_hash_bursts, (Hash(key=key, capacity=64).view(), 0, 0, 64)))
    assert report.findings == ()
    assert (report.indirect, report.calls) == (0, set()), report.where
    assert "get_burst" in short(report.functions), "or it was not read, and nothing is proven"


@kernel
def _use(flow, i):  # type: ignore[no-untyped-def]
    if flow.found and not flow.new and flow.reply and flow.age > 3:
        flow.state = flow.state + 1
        flow.assured = not flow.assured
        flow.touch()
    flow.keep(i)
    flow.add(i, 1)
    flow.set_value(i, flow.value(0))
    flow.remove()


@kernel
def _flow_calls(view, burst):  # type: ignore[no-untyped-def]
    """Every call of a stage, and what the loop calls each turn."""
    left = view.each_turn()
    view.find_burst(burst)
    for i in range(burst.count):
        _use(view.at(i), i)
        _use(view.enter_at(i), i)
        _use(view.find(burst.packet(i)), i)
        _use(view.enter(burst.packet(i)), i)
    left += view.enter4(1, 2, 3, 4, 6).at + view.find4(1, 2, 3, 4, 6).at
    return left + view.enter6((1, 2), 2, (3, 4), 4, 6).at + view.find6((1, 2), 2, (3, 4), 4, 6).at


def test_flows_lock_and_call_nothing() -> None:
    flows = Flow(capacity=64)
    part = flows.join(0)
    report = check(*compile_afresh(_flow_calls, (part.view, Burst(0))))
    flows.leave(part)
    assert report.findings == ()
    assert (report.indirect, report.calls) == (0, set()), report.where
    for one in ("least_worthy", "look_on"):
        assert one in short(report.functions), "or it was not read, and nothing is proven"


@kernel
def _classification(view, headers, results, count):  # type: ignore[no-untyped-def]
    view.lookup_burst(headers, results, count)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_classification_locks_and_calls_nothing(family: str) -> None:
    report = check(*compile_afresh(_classification, (Acl(capacity=10, family=family).view(), 0, 0, 64)))
    assert report.findings == ()
    assert (report.indirect, report.calls) == (0, set()), report.where
    assert "find" in short(report.functions), "or it was not read, and nothing is proven"


# The reader, on assembly by hand.

HEAD = "\t.text\n\t.type\tf,@function\n"


def read(body: str, *others: str) -> Report:
    text = HEAD + "f:\n" + body
    for name in others:
        text += f"\t.type\t{name},@function\n{name}:\n\tretq\n"
    return check(text, "f")


@pytest.mark.parametrize(
    "line",
    ["lock\t\taddq\t$1, (%rdi)", "lock", "xchgq\t%rax, (%rdi)", "xchgl\t%eax, 8(%rsp)", "mfence", "syscall",
     "int\t$0x80", "lock\t\torl\t$0, -64(%rsp)", "lock\t\tcmpxchgq\t%rsi, (%rdi)"],
)  # fmt: skip
def test_forbidden_instructions(line: str) -> None:
    assert len(read(f"\t{line}\n\tretq\n").findings) == 1


@pytest.mark.parametrize(
    "line", ["xchgq\t%rax, %rbx", "pause", "movq\t%rax, lock(%rip)", "lfence # lock", "intx", "#lock"]
)
def test_harmless_instructions(line: str) -> None:
    assert read(f"\t{line}\n\tretq\n").findings == ()


CALLS = {
    "by name": ("\tcallq\tg\n", ["g"], 0),
    "through a register": ("\tmovabsq\t$g, %rax\n\tcallq\t*%rax\n", ["g"], 0),
    "through a copy": ("\tmovabsq\t$g, %rax\n\tmovq\t%rax, %rbx\n\tcallq\t*%rbx\n", ["g"], 0),
    "through a stack slot": (
        "\tmovabsq\t$g, %rax\n\tmovq\t%rax, 24(%rsp)\n\tpushq\t%rbx\n\tcallq\t*32(%rsp)\n",
        ["g"],
        0,
    ),
    "by address in memory": ("\tmovq\t8(%rdi), %rax\n\tcallq\t*%rax\n", [], 1),
    "straight from memory": ("\tcallq\t*104(%r14)\n", [], 1),
    "after the register was changed": ("\tmovabsq\t$g, %rax\n\tmovl\t$1, %eax\n\tcallq\t*%rax\n", [], 1),
    "after another call": ("\tmovabsq\t$g, %rax\n\tcallq\t*%rax\n\tcallq\t*%rax\n", ["g"], 1),
    "kept over another call": ("\tmovabsq\t$g, %rbx\n\tcallq\t*%rbx\n\tcallq\t*%rbx\n", ["g"], 0),
    "one name on both paths": ("\tmovabsq\t$g, %rbx\n\tje\t.L1\n\tnop\n.L1:\n\tcallq\t*%rbx\n", ["g"], 0),
    "two names": ("\tmovabsq\t$g, %rbx\n\tje\t.L1\n\tmovabsq\t$h, %rbx\n.L1:\n\tcallq\t*%rbx\n", [], 1),
    "changed later in the loop": (
        "\tmovabsq\t$g, %rbx\n.L1:\n\tcallq\t*%rbx\n\tmovq\t(%rdi), %rbx\n\tjmp\t.L1\n",
        [],
        1,
    ),
    "as a jump": ("\tmovabsq\t$g, %rax\n\tjmpq\t*%rax # TAILCALL\n", ["g"], 0),
    "as a jump by address": ("\tjmpq\t*8(%rdi)\n", [], 1),
    "a jump table": ("\tjmpq\t*.LJTI0_0(,%rax,8)\n.L1:\n\tcallq\tg\n\tretq\n", ["g"], 0),
}


@pytest.mark.parametrize("how", CALLS)
def test_calls(how: str) -> None:
    body, reached, indirect = CALLS[how]
    report = read(body + "\tretq\n", "g", "h")
    assert (list(report.functions[1:]), report.indirect, report.findings) == (reached, indirect, ())


def test_callees_are_read_too() -> None:
    text = HEAD + 'f:\n\tcallq\t"<g>"\n\tretq\n\t.type\t"<g>",@function\n"<g>":\n\tlock\n\tretq\n'
    assert check(text, "f").findings == ("<g>: lock",)


def test_unknown_names_are_findings() -> None:
    assert read("\tcallq\tmalloc@PLT\n\tcallq\tmemcpy\n\tretq\n").findings == ("f: calls malloc",)
    assert check(HEAD, "f").findings == ("f: its code is not there to be read",)
