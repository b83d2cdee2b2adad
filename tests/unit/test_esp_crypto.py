"""AES-GCM through the calls that stages make: all of wycheproof's vectors, and RFC 4106's with ESN; no allocation."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libfp.apps.ipsec import libcrypto, record
from libfp.apps.ipsec.esp_in import associate
from libfp.errors import BadInput, Unsupported
from libfp.jit import Arena, kernel, load64
from libfp.jit.primitive import signed64

VECTORS = Path(os.environ.get("LIBFP_DATA", "")) / "vectors"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs LIBFP_DATA/vectors")
BLOCK, AAD, DATA = 0, 1024, 2048


@kernel
def seal(functions, block, aad, aad_size, data, size):  # type: ignore[no-untyped-def]
    return libcrypto.encrypt(functions, block, aad, aad_size, data, size, data + size)


@kernel
def unseal(functions, block, aad, aad_size, data, size):  # type: ignore[no-untyped-def]
    return libcrypto.decrypt(functions, block, block + libcrypto.NONCE, aad, aad_size, data, size, data + size)


@kernel
def associated(at, header, sequence, extended):  # type: ignore[no-untyped-def]
    return associate(at, header, sequence, extended)


class Bench:
    """A block, and memory beside it for AAD and data."""

    def __init__(self, arena: Arena) -> None:
        self.arena, self.at = arena, arena.address

    def run(self, work: Any, key: bytes, nonce: bytes, aad: bytes, data: bytes, tag: bytes = bytes(16)) -> Any:
        """(what `work` returned, data, tag)."""
        cipher = libcrypto.Cipher(key + nonce[:4], self.at, decrypting=work is unseal)
        memory, size = self.arena.buffer, len(data)
        memory[libcrypto.NONCE + 4 : libcrypto.NONCE + 12] = nonce[4:]
        memory[AAD : AAD + len(aad)] = aad
        memory[DATA : DATA + size + 16] = data + tag
        functions = libcrypto.functions()
        done = work(functions, self.at, self.at + AAD, len(aad), self.at + DATA, size)
        found = bytes(memory[DATA : DATA + size]), bytes(memory[DATA + size : DATA + size + 16])
        cipher.close()
        return bool(done), *found


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    arena = Arena(1 << 16)
    yield Bench(arena)
    arena.close()


@needs_vectors
def test_wycheproof(bench: Bench) -> None:
    """Every case, valid and invalid, with a nonce of 12 bytes, which is what RFC 4106 has."""
    seen = {"valid": 0, "invalid": 0}
    for group in json.loads((VECTORS / "wycheproof-aes_gcm_test.json").read_text())["testGroups"]:
        assert group["tagSize"] == 128
        for case in group["tests"] if group["ivSize"] == 96 else []:
            key, nonce, aad, plain, sealed, tag = (
                bytes.fromhex(case[name]) for name in ("key", "iv", "aad", "msg", "ct", "tag")
            )
            good, found, _ = bench.run(unseal, key, nonce, aad, sealed, tag)
            seen[case["result"]] += 1
            assert good == (case["result"] == "valid"), case
            if good:
                assert found == plain
                assert bench.run(seal, key, nonce, aad, plain) == (True, sealed, tag)
            else:
                assert bench.run(seal, key, nonce, aad, plain)[2] != tag
    assert seen == {"valid": 116, "invalid": 81}


@needs_vectors
def test_rfc4106_with_extended_sequence_numbers(bench: Bench) -> None:
    """The AAD, too, is the one that the stages write."""
    cases = json.loads((VECTORS / "rfc4106-draft-mcgrew-snabb.json").read_text())["vectors"]
    assert len(cases) == 11
    for case in cases:
        key, salt, iv, sealed, plain = (bytes.fromhex(case[name]) for name in ("key", "salt", "iv", "ct_tag", "plain"))
        header = case["spi"].to_bytes(4) + (case["seq"] & 0xFFFFFFFF).to_bytes(4)
        bench.arena.buffer[AAD : AAD + 8] = header
        size = associated(bench.at, bench.at + AAD, signed64(case["seq"]), True)
        aad = bytes(bench.arena.buffer[libcrypto.AAD : libcrypto.AAD + size])
        assert aad == header[:4] + case["seq"].to_bytes(8)
        assert bench.run(seal, key, salt + iv, aad, plain) == (True, sealed[:-16], sealed[-16:])
        assert bench.run(unseal, key, salt + iv, aad, sealed[:-16], sealed[-16:])[:2] == (True, plain)


def test_without_extended_sequence_numbers_the_header_is_the_aad(bench: Bench) -> None:
    bench.arena.buffer[AAD : AAD + 8] = b"SPI.\0\0\0\7"
    assert associated(bench.at, bench.at + AAD, 7, False) == 8
    assert bytes(bench.arena.buffer[libcrypto.AAD : libcrypto.AAD + 8]) == b"SPI.\0\0\0\7"


def test_a_closed_cipher_leaves_nothing(bench: Bench) -> None:
    key = bytes(range(1, 37))
    cipher = libcrypto.Cipher(key, bench.at, decrypting=False)
    context = load64(bench.at)
    assert context != 0
    cipher.close()
    cipher.close()
    assert bytes(bench.arena.buffer[: libcrypto.SIZE]) == bytes(libcrypto.SIZE)
    assert key[:32] not in ctypes.string_at(context, 64), "OpenSSL wipes what it frees"


def test_errors() -> None:
    with pytest.raises(Unsupported, match=r"no libcrypto\.so\.99 here, .*apt-get install libssl3"):
        libcrypto.library("libcrypto.so.99")
    with pytest.raises(Unsupported, match=r"install libssl3"):
        libcrypto.library("libc.so.6")
    with pytest.raises(BadInput, match=r"a key of 16 bytes; AES-128 takes 16 bytes and 4 of salt"):
        libcrypto.Cipher(bytes(16), 0, decrypting=False)


ALLOCATIONS = """
import ctypes, os
count = [0]
kinds = (ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int),
         ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int),
         ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int))
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
def malloc(size, file, line):
    count[0] += 1
    return libc.malloc(ctypes.c_size_t(size))
def realloc(at, size, file, line):
    count[0] += 1
    return libc.realloc(ctypes.c_void_p(at), ctypes.c_size_t(size))
def free(at, file, line):
    libc.free(ctypes.c_void_p(at))
hooks = [kind(hook) for kind, hook in zip(kinds, (malloc, realloc, free))]
assert ctypes.CDLL("libcrypto.so.3").CRYPTO_set_mem_functions(*hooks) == 1
from libfp.apps.ipsec import libcrypto
from libfp.jit import Arena
arena = Arena(8192)
at, functions = arena.address, libcrypto.functions()
blocks = [at, at + 1024]
ciphers = [libcrypto.Cipher(bytes(20), block, decrypting=bool(i)) for i, block in enumerate(blocks)]
made = count[0]
for packet in range(50):
    for block in blocks:
        arena.buffer[block - at + 20 : block - at + 28] = packet.to_bytes(8)
    rest = at + 2048, 12, at + 4096, 1420, at + 4096 + 1420
    nonce = blocks[1] + libcrypto.NONCE
    assert libcrypto.encrypt(functions, blocks[0], *rest)
    assert libcrypto.decrypt(functions, blocks[1], nonce, *rest)
    arena.buffer[4096] ^= 1
    assert not libcrypto.decrypt(functions, blocks[1], nonce, *rest)
print(made, count[0] - made, flush=True)
os._exit(0)  # OpenSSL frees by our hooks when Python has ended
"""


def test_packets_allocate_nothing() -> None:
    """OpenSSL's own allocations counted, in a process of its own: forged packets, too."""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", ALLOCATIONS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, after = map(int, done.stdout.split())
    assert made > 0, "or the count counts nothing"
    assert after == 0


def test_the_record_has_room() -> None:
    assert record.SIZE % 64 == 0
    assert record.COUNTERS + 8 * len(record.COUNTER_NAMES) <= record.WINDOW
