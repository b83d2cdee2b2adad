"""From LLVM text to BPF instructions, by the BPF target that llvmlite's LLVM contains: no clang, no libbpf.

A map is reached by ``call i64 @llvm.bpf.pseudo(i64 MAP, i64 n)`` where n counts the maps of the text (MAP gives the
map, VALUE the first byte of an array map's only entry). Map descriptors are put in afterwards, so that the compiled
code is the same in every process and is made once for all the interfaces.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

MAP, VALUE = 1, 2  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE
LOAD_64 = 0x18  # the only instruction of two slots: opcode, registers (source in the high half), offset, immediate


@functools.cache
def compile_bpf(text: str) -> bytes:
    """Compile a module whose program is in `section "program"`. Raises RuntimeError with LLVM's words on a bad text."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    module.verify()
    machine = llvm.Target.from_triple("bpfel").create_target_machine(cpu="v3", opt=2)
    sections = llvm.ObjectFileRef.from_data(machine.emit_object(module)).sections()
    return bytes(next(section.data() for section in sections if section.name() == b"program"))


def link(code: bytes, maps: Sequence[int]) -> bytes:
    """The same code with map numbers replaced by the file descriptors in `maps`."""
    linked = bytearray(code)
    position = 0
    while position < len(linked):
        opcode, registers, number = struct.unpack_from("<BBxxi", linked, position)
        if opcode == LOAD_64 and registers >> 4 in (MAP, VALUE):
            struct.pack_into("<i", linked, position + 4, maps[number])
        position += 16 if opcode == LOAD_64 else 8
    return bytes(linked)
