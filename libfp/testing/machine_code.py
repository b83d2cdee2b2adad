"""What a compiled function does, read from its machine code: that it takes no lock and calls nothing it should not.

`check_loop` compiles a pipeline's loop afresh (numba keeps no text of code it loads from disk) and reads every function
that the loop can reach:

    report = check_loop(Pipeline(parse, mine), kick="helper", idle="spin")
    assert not report.findings and report.indirect == 0

numba emits code for the large model, so every call goes through a register that was loaded with the callee's name.
`check` follows names through registers and spilled stack slots, over all paths; a call whose target is not one name on
all of them is an indirect call: the C functions that a worker calls by address (`libfp.jit.call`).

Knows x86-64 alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numba

from libfp.errors import Unsupported
from libfp.jit import Arena, policy

__all__ = ["Report", "check", "check_loop", "compile_afresh", "functions", "loop_code"]

#: C functions without locks or system calls that LLVM puts in for copies of memory.
ALLOWED = frozenset({"memcpy", "memmove", "memset"})

_FORBIDDEN = {"lock", "mfence", "syscall", "sysenter", "int", "xacquire"}
_NAME = r"[A-Za-z_.$][\w.$@]*"
_LABEL = re.compile(rf'^("(?P<quoted>[^"]+)"|(?P<plain>{_NAME})):')
_STACK = re.compile(r"^(-?\d*)\(%rsp\)$")
_LOADED = re.compile(rf'^\$"?({_NAME}[^"]*?)"?$')
_RELATIVE = re.compile(rf'^"?({_NAME}[^"(]*?)"?\(%rip\)$')
_SCRATCH = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")  # what a call may change (System V ABI)
_IMPLICIT = ("mul", "imul", "div", "idiv", "cqto", "cqo", "cltd", "cltq", "rdtsc", "cpuid", "xgetbv", "cmpxchg", "rep")
_NO_RESULT = ("cmp", "test", "bt", "nop", "pause", "prefetch", "ucomis", "comis", "vptest", "ptest")

_ALIASES: dict[str, str] = {}
for _wide, _rest in {
    "rax": "eax ax al ah", "rbx": "ebx bx bl bh", "rcx": "ecx cx cl ch", "rdx": "edx dx dl dh",
    "rsi": "esi si sil", "rdi": "edi di dil", "rbp": "ebp bp bpl", "rsp": "esp sp spl",
    **{f"r{n}": f"r{n}d r{n}w r{n}b" for n in range(8, 16)},
}.items():  # fmt: skip
    _ALIASES |= dict.fromkeys(["%" + name for name in (_wide, *_rest.split())], _wide)


@dataclass(frozen=True)
class Report:
    """`functions` are those read, by mangled name; `findings` one line each; `calls` the allowed names called;
    `indirect` the number of calls by address, and `where` the functions that hold them."""

    functions: tuple[str, ...]
    findings: tuple[str, ...]
    calls: frozenset[str]
    indirect: int
    where: tuple[str, ...]


@dataclass(frozen=True)
class _Instruction:
    mnemonic: str
    operands: tuple[str, ...]
    text: str


class _State:
    """What is known at one place: which register or stack slot holds which name, and how deep the stack is."""

    def __init__(self, names: dict[str | int, str], depth: int) -> None:
        self.names, self.depth = names, depth

    def meet(self, other: _State) -> _State | None:
        """What holds on both ways here; None if `self` says no more than that already."""
        both = {place: name for place, name in self.names.items() if other.names.get(place) == name}
        return None if both == self.names else _State(both, self.depth)


def compile_afresh(function: Callable[..., Any], arguments: Iterable[Any]) -> tuple[str, str]:
    """Compile a kernel (or a plain function) for `arguments`, past all caches: its assembly text and its entry's name.

    It is linked from the same parts as when it runs, which may have been kept (`libfp.jit.parts`). Options are those
    of `libfp.jit.kernel`. Raises Unsupported where nothing is compiled.
    """
    if policy.INTERPRETED:
        raise Unsupported("there is no machine code with NUMBA_DISABLE_JIT=1", "unset it")
    plain = getattr(function, "py_func", function)
    dispatcher = policy.kernel(plain)
    signature = tuple(numba.typeof(value) for value in arguments)
    dispatcher.compile(signature)
    compiled = dispatcher.overloads[signature]
    return compiled.library.get_asm_str(), compiled.fndesc.llvm_func_name


def loop_code(pipeline: Any, *, kick: str = "helper", idle: str = "spin", ports: int = 2) -> tuple[str, str]:
    """`compile_afresh` of the loop of a pipeline, as a worker with these policies runs it."""
    from libfp.engine.state import WorkerState
    from libfp.ports.memory import MemoryPort

    statistics = Arena(1 << 20)
    memory_ports = [MemoryPort(f"port{number}", ring_size=64) for number in range(ports)]
    state = WorkerState(pipeline, MemoryPort.open_all, memory_ports, 0, statistics.address, punt=True)
    try:
        return compile_afresh(pipeline.module(kick=kick, idle=idle).loop, state.arguments)
    finally:
        state.close()


def check_loop(pipeline: Any, *, kick: str = "helper", idle: str = "spin", ports: int = 2) -> Report:
    """`check` of `loop_code`."""
    return check(*loop_code(pipeline, kick=kick, idle=idle, ports=ports))


def functions(assembly: str) -> dict[str, list[str]]:
    """The instructions of every function in AT&T assembly text, as text."""
    return {name: [one.text for _, one in body if one is not None] for name, body in dict(_functions(assembly)).items()}


def check(assembly: str, entry: str, allowed: Iterable[str] = ALLOWED) -> Report:
    """Read `entry`, and every function it reaches, in AT&T assembly text as LLVM prints it.

    Findings: a lock prefix, an exchange with memory (locked without the prefix), a fence, a system call, a call of a
    function that is neither in the text nor in `allowed`.
    """
    bodies = dict(_functions(assembly))
    allowed = frozenset(allowed)
    findings: list[str] = []
    called: set[str] = set()
    where: list[str] = []
    read: list[str] = []
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in read:
            continue
        read.append(name)
        if name not in bodies:
            findings.append(f"{name}: its code is not there to be read")
            continue
        findings += [f"{name}: {one.text}" for _, one in bodies[name] if one is not None and _is_forbidden(one)]
        for target in _calls(bodies[name]):
            if target is None:
                where.append(name)
            elif target in bodies:
                waiting.append(target)
            elif target in allowed:
                called.add(target)
            else:
                findings.append(f"{name}: calls {target}")
    return Report(tuple(read), tuple(findings), frozenset(called), len(where), tuple(where))


def _is_forbidden(one: _Instruction) -> bool:
    exchanges = one.mnemonic.startswith("xchg") and not all(operand in _ALIASES for operand in one.operands)
    return exchanges or one.mnemonic in _FORBIDDEN


def _functions(assembly: str) -> Iterator[tuple[str, list[tuple[str, _Instruction | None]]]]:
    """Every function with its lines: (label, None), or ("", instruction)."""
    typed = {one.strip('"') for one in re.findall(r'\.type\s+("[^"]+"|[^,\s]+),\s*@function', assembly)}
    body: list[tuple[str, _Instruction | None]] | None = None
    for raw in assembly.splitlines():
        line = re.sub(r"(^|\s)#.*", "", raw).strip()
        if label := _LABEL.match(line):
            name = label["quoted"] or label["plain"]
            if name in typed:
                body = []
                yield name, body  # filled while the caller goes on
            elif body is not None:
                body.append((name, None))
        elif line.startswith((".section", ".size")):
            body = None if line.startswith(".section") else body
        elif body is not None and line and not line.startswith("."):
            body += [("", one) for one in _instructions(line)]


def _instructions(line: str) -> Iterator[_Instruction]:
    words = line.split(None, 1)
    while words and words[0] in ("lock", "rep", "repne", "notrack", "data16", "xacquire", "xrelease"):
        yield _Instruction(words[0], (), line)
        words = words[1].split(None, 1) if len(words) > 1 else []
    if words:
        rest = words[1] if len(words) > 1 else ""
        operands = tuple(one.strip() for one in re.split(r",(?![^(]*\))", rest)) if rest else ()
        yield _Instruction(words[0], operands, line)


def _calls(body: list[tuple[str, _Instruction | None]]) -> Iterator[str | None]:
    """The target of every call, and jump out of the function, in `body`; None where it is not one name."""
    places = {label: at for at, (label, _) in enumerate(body) if label}
    tables = any(one is not None and ".LJTI" in one.text for _, one in body)
    known: dict[int, _State] = {0: _State({}, 0)}
    targets: dict[int, str | None] = {}
    waiting = [0]

    def reach(at: int, state: _State) -> None:
        if at >= len(body):
            return
        met = known[at].meet(state) if at in known else _State(dict(state.names), state.depth)
        if met is not None:
            known[at] = met
            waiting.append(at)

    while waiting:
        at = waiting.pop()
        state = _State(dict(known[at].names), known[at].depth)
        one = body[at][1]
        if one is None:
            reach(at + 1, state)
            continue
        mnemonic, operands = one.mnemonic, one.operands
        if mnemonic.startswith("call"):
            targets[at] = _target(operands[0], state)
            for register in _SCRATCH:
                state.names.pop(register, None)
            reach(at + 1, state)
        elif mnemonic.startswith("j"):
            if operands[0] in places:
                reach(places[operands[0]], state)
            elif operands[0].startswith("*") and tables and _target(operands[0], state) is None:
                for place in places.values():  # one of the cases of a switch
                    reach(place, _State({}, state.depth))
            else:
                targets[at] = _target(operands[0], state)
            if not mnemonic.startswith("jmp"):
                reach(at + 1, state)
        elif not mnemonic.startswith(("ret", "ud2")):
            _step(one, state)
            reach(at + 1, state)
    return iter(targets.values())


def _target(operand: str, state: _State) -> str | None:
    """The name that a call's operand stands for."""
    if not operand.startswith("*"):
        return operand.strip('"').removesuffix("@PLT")
    return state.names.get(_place(operand[1:], state) or "")


def _place(operand: str, state: _State) -> str | int | None:
    """A register, or a stack slot as its distance from the stack pointer at the function's entry."""
    if operand in _ALIASES:
        return _ALIASES[operand]
    slot = _STACK.match(operand)
    return int(slot[1] or 0) - state.depth if slot else None


def _step(one: _Instruction, state: _State) -> None:
    """Apply an instruction that neither calls nor jumps."""
    mnemonic, operands = one.mnemonic, one.operands
    if mnemonic.startswith(("push", "pop")):
        state.depth += 8 if mnemonic.startswith("push") else -8
        if mnemonic.startswith("pop"):
            state.names.pop(_ALIASES.get(operands[0], ""), None)
        return
    if mnemonic.startswith(_IMPLICIT):
        for register in ("rax", "rcx", "rdx", "rsi", "rdi"):
            state.names.pop(register, None)
    if not operands or mnemonic.startswith(_NO_RESULT):
        return
    if operands[-1] == "%rsp" and mnemonic in ("subq", "addq") and operands[0].startswith("$"):
        state.depth += int(operands[0][1:], 0) * (1 if mnemonic == "subq" else -1)
        return
    if mnemonic.startswith("xchg"):
        for operand in operands:
            state.names.pop(_place(operand, state) or "", None)
        return
    place = _place(operands[-1], state)
    if place is None:
        return  # memory that holds no spilled name, or a vector register
    name = None
    if mnemonic in ("movq", "movabsq") and len(operands) == 2:
        loaded = _LOADED.match(operands[0])
        name = loaded[1] if loaded else state.names.get(_place(operands[0], state) or "")
    elif mnemonic == "leaq" and (relative := _RELATIVE.match(operands[0])):
        name = relative[1]
    if name is None:
        state.names.pop(place, None)
    else:
        state.names[place] = name
