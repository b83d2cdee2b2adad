"""Addresses of C library functions, for `call`: a number passed at run time keeps compiled code cacheable."""

from __future__ import annotations

import ctypes
import functools

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def address_of(name: str) -> int:
    """The address of a function of the C library. Raises AttributeError if there is none of that name."""
    return ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value or 0
