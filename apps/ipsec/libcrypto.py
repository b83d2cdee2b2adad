"""AES-GCM (NIST SP 800-38D) by the system's libcrypto, called from compiled code by address.

The control plane makes a context of each key, once; packets only change its nonce, which allocates nothing. A cipher
is `SIZE` bytes of memory that compiled code reaches by address, here called a block:

    0    the EVP_CIPHER_CTX                 32   12 bytes, the caller's, for AAD
    8    scratch                            48   two OSSL_PARAM: the tag, and the end
    16   nonce, 12 bytes: 4 of salt, then 8 the caller's to fill in

`encrypt` and `decrypt` work in place. One thread at a time uses a block. `functions()` is the address of an array of
the functions' addresses, which they are given, too: what arrives at run time keeps compiled code cacheable.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from libfp.errors import BadInput, Unsupported
from libfp.jit import Arena, call, kernel, load64, store64

SIZE, NONCE, AAD = 128, 16, 32
TAG_SIZE, SALT_SIZE = 16, 4

_CTX, _SCRATCH, _PARAMS = 0, 8, 48
_TAG_AT = _PARAMS + 16  # of an OSSL_PARAM: key, type, data, data_size, return_size
_OCTET_STRING = 5
_NAMES = (
    "EVP_EncryptInit_ex2", "EVP_EncryptUpdate", "EVP_EncryptFinal_ex", "EVP_CIPHER_CTX_get_params",
    "EVP_DecryptInit_ex2", "EVP_DecryptUpdate", "EVP_DecryptFinal_ex",
)  # fmt: skip
_ENCRYPT_INIT, _ENCRYPT_UPDATE, _ENCRYPT_FINAL, _GET_PARAMS, _DECRYPT_INIT, _DECRYPT_UPDATE, _DECRYPT_FINAL = range(
    0, 8 * len(_NAMES), 8
)
_LEAST_VERSION = 0x3000_0000
_NO_ATEXIT = 0x0008_0000  # worker threads may be in it until the process has ended
_KEYS = {size + SALT_SIZE: f"AES-{8 * size}-GCM".encode() for size in (16, 24, 32)}
KEY_REMEDY = "AES-128 takes 16 bytes and 4 of salt, AES-256 takes 32 and 4"


@functools.cache
def library(name: str = "libcrypto.so.3") -> Any:
    """OpenSSL's libcrypto, 3.0 or later. Raises Unsupported."""
    try:
        lib = ctypes.CDLL(name)
        version = lib.OpenSSL_version_num
    except (OSError, AttributeError):
        raise Unsupported(f"there is no {name} here, which encrypts", "apt-get install libssl3") from None
    version.restype, version.argtypes = ctypes.c_ulong, []
    if version() < _LEAST_VERSION or any(not hasattr(lib, one) for one in _NAMES):
        raise Unsupported(f"{name} is of OpenSSL {version():#x}", "install OpenSSL 3.0 or later")
    lib.OPENSSL_init_crypto(ctypes.c_uint64(_NO_ATEXIT), None)
    lib.EVP_CIPHER_CTX_new.restype = lib.EVP_CIPHER_fetch.restype = ctypes.c_void_p
    return lib


@functools.cache
def _functions() -> Arena:
    arena, lib = Arena(64 + 8 * len(_NAMES)), library()
    for number, name in enumerate(_NAMES):
        store64(arena.address + 8 * number, ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0)
    arena.buffer[8 * len(_NAMES) : 8 * len(_NAMES) + 4] = b"tag\0"
    return arena


def functions() -> int:
    """The address of the array of functions. Raises Unsupported without libcrypto."""
    return _functions().address


class Cipher:
    """The key material `key` (AES key, then 4 bytes of salt: RFC 4106 section 8.1) set up in the block at `block`.

    Raises BadInput for a key of another length, and says only that length; Unsupported without libcrypto.
    """

    def __init__(self, key: bytes | bytearray, block: int, *, decrypting: bool) -> None:
        name = _KEYS.get(len(key))
        if name is None:
            raise BadInput(f"a key of {len(key)} bytes", KEY_REMEDY)
        self._lib, self.block = library(), block
        ends = functions() + 8 * len(_NAMES)
        self._context = ctypes.c_void_p(self._lib.EVP_CIPHER_CTX_new())
        cipher = ctypes.c_void_p(self._lib.EVP_CIPHER_fetch(None, name, None))
        given = (ctypes.c_char * len(key)).from_buffer_copy(key)
        start = self._lib.EVP_DecryptInit_ex2 if decrypting else self._lib.EVP_EncryptInit_ex2
        done = cipher.value and self._context.value and start(self._context, cipher, given, None, None)
        self._lib.EVP_CIPHER_free(cipher)
        salt = int.from_bytes(key[-SALT_SIZE:], "little")
        ctypes.memset(given, 0, len(key))
        if done != 1:
            self.close()
            raise Unsupported(f"libcrypto cannot do {name.decode()}", "look at its openssl.cnf: which providers it has")
        for at in range(0, SIZE, 8):
            store64(block + at, 0)
        store64(block + _CTX, self._context.value or 0)
        store64(block + NONCE, salt)
        store64(block + _PARAMS, ends)
        store64(block + _PARAMS + 8, _OCTET_STRING)
        store64(block + _PARAMS + 24, TAG_SIZE)

    def close(self) -> None:
        """Free the context, which wipes the key, and wipe the block. Nobody uses it any more."""
        context, self._context = self._context, ctypes.c_void_p()
        if context.value:
            self._lib.EVP_CIPHER_CTX_free(context)
            for at in range(0, SIZE, 8):
                store64(self.block + at, 0)


@kernel
def _is_one(result: int) -> bool:
    """Whether an `int` is 1, of a result of which only the low half is the function's."""
    return result & 0xFFFFFFFF == 1


@kernel
def encrypt(functions: int, block: int, aad: int, aad_size: int, data: int, size: int, tag: int) -> bool:
    """Encrypt `size` bytes at `data` in place under the block's nonce and this AAD; 16 bytes of tag go to `tag`."""
    context, nonce, scratch = load64(block), block + NONCE, block + _SCRATCH
    store64(block + _TAG_AT, tag)
    good = _is_one(call(load64(functions + _ENCRYPT_INIT), context, 0, 0, nonce, 0, 0))
    update = load64(functions + _ENCRYPT_UPDATE)
    good &= _is_one(call(update, context, 0, scratch, aad, aad_size, 0))
    good &= _is_one(call(update, context, data, scratch, data, size, 0))
    good &= _is_one(call(load64(functions + _ENCRYPT_FINAL), context, tag, scratch, 0, 0, 0))
    return good & _is_one(call(load64(functions + _GET_PARAMS), context, block + _PARAMS, 0, 0, 0, 0))


@kernel
def decrypt(functions: int, block: int, nonce: int, aad: int, aad_size: int, data: int, size: int, tag: int) -> bool:
    """Decrypt `size` bytes at `data` in place under the 12 bytes at `nonce`, whose salt is the block's; whether the 16
    bytes at `tag` vouch for them, or they are garbage."""
    context, scratch = load64(block), block + _SCRATCH
    store64(block + _TAG_AT, tag)
    good = _is_one(call(load64(functions + _DECRYPT_INIT), context, 0, 0, nonce, block + _PARAMS, 0))
    update = load64(functions + _DECRYPT_UPDATE)
    good &= _is_one(call(update, context, 0, scratch, aad, aad_size, 0))
    good &= _is_one(call(update, context, data, scratch, data, size, 0))
    return good & _is_one(call(load64(functions + _DECRYPT_FINAL), context, tag, scratch, 0, 0, 0))
