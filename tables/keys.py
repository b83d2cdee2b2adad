"""What a table's keys and values are: text and objects outside, words in host order inside.

    "ipv4"                   "192.0.2.7", IPv4Address, an int, 4 bytes in wire order      one word
    "ipv6"                   "2001:db8::7", IPv6Address, an int, 16 bytes in wire order   two: high, low 64 bits
    "mac"                    "02:00:00:00:00:07", an int, 6 bytes in wire order           one word
    "u8" ... "u64", "i8" ... "i64", "bool", numpy dtypes of those                         one word
    a tuple of them, a structured dtype                a tuple: the words of its fields, one after another

A word is an int64 in compiled code: a u64 of 2**63 and more is the negative int64 of the same bits.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from libfp.errors import BadInput
from libfp.jit.primitive import MASK64, signed64

_MOST_WORDS = 8


@dataclass(frozen=True)
class Codec:
    """One type of key or value: `words` int64 words each; `encode` raises BadInput for what does not fit."""

    name: str
    words: int
    encode: Callable[[Any], tuple[int, ...]]
    decode: Callable[[tuple[int, ...]], Any]


def codec(kind: Any) -> Codec:
    """The codec of a type named as in this module's text. Raises BadInput for a type that is none."""
    if isinstance(kind, tuple):
        return _tuple(kind)
    if isinstance(kind, str) and kind in _NAMED:
        return _NAMED[kind]()
    if isinstance(kind, str) and (match := re.fullmatch(r"([ui])(8|16|32|64)", kind)):
        return _integer(match[1] == "i", int(match[2]))
    try:
        dtype = np.dtype({"bool": bool, "int": np.int64}.get(kind, kind) if isinstance(kind, str) else kind)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.fields:
        return _tuple(tuple(field[0] for field in dtype.fields.values()))
    if dtype.kind == "b":
        return Codec("bool", 1, lambda value: (int(_bool(value)),), lambda words: bool(words[0]))
    if dtype.kind in "ui":
        return _integer(dtype.kind == "i", 8 * dtype.itemsize)
    remedy = (
        '"ipv4", "ipv6", "mac", "u8" to "u64", "i8" to "i64", "bool", numpy dtypes of integers, or a tuple of those'
    )
    raise BadInput(f"{kind!r} is not a type of key or value", remedy)


def _refuse(value: Any, name: str) -> BadInput:
    return BadInput(f"{value!r} is not of type {name}")


def _bool(value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or value in (0, 1):
        return bool(value)
    raise _refuse(value, "bool")


def _integer(signed: bool, bits: int) -> Codec:
    name = f"{'i' if signed else 'u'}{bits}"
    least, most = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)

    def encode(value: Any) -> tuple[int, ...]:
        try:
            number = value.__index__()
        except AttributeError:
            raise _refuse(value, name) from None
        if not least <= number < most:
            raise _refuse(value, name)
        return (signed64(number),)

    return Codec(name, 1, encode, lambda words: words[0] if signed else words[0] & MASK64)


def _ipv4() -> Codec:
    def encode(value: Any) -> tuple[int, ...]:
        try:
            return (int(ipaddress.IPv4Address(value.__index__() if isinstance(value, np.integer) else value)),)
        except ValueError:
            raise _refuse(value, "ipv4") from None

    return Codec("ipv4", 1, encode, lambda words: str(ipaddress.IPv4Address(words[0])))


def _ipv6() -> Codec:
    def encode(value: Any) -> tuple[int, ...]:
        try:
            number = int(ipaddress.IPv6Address(value))
        except ValueError:
            raise _refuse(value, "ipv6") from None
        return signed64(number >> 64), signed64(number)

    def decode(words: tuple[int, ...]) -> str:
        return str(ipaddress.IPv6Address((words[0] & MASK64) << 64 | words[1] & MASK64))

    return Codec("ipv6", 2, encode, decode)


_MAC = r"[0-9a-fA-F]{2}([:-])[0-9a-fA-F]{2}(\1[0-9a-fA-F]{2}){4}"


def _mac() -> Codec:
    def encode(value: Any) -> tuple[int, ...]:
        if isinstance(value, str) and re.fullmatch(
            r"[0-9a-fA-F]{2}(?:([:-])[0-9a-fA-F]{2})(?:\1[0-9a-fA-F]{2}){4}", value
        ):
            return (int(value.replace(value[2], ""), 16),)
        if isinstance(value, bytes | bytearray) and len(value) == 6:
            return (int.from_bytes(value, "big"),)
        if isinstance(value, int | np.integer) and 0 <= value < 1 << 48:
            return (int(value),)
        raise _refuse(value, "mac")

    return Codec("mac", 1, encode, lambda words: words[0].to_bytes(6, "big").hex(":"))


_NAMED: dict[str, Callable[[], Codec]] = {"ipv4": _ipv4, "ipv6": _ipv6, "mac": _mac}


def _tuple(kinds: tuple[Any, ...]) -> Codec:
    fields = [codec(kind) for kind in kinds]
    name = f"({', '.join(field.name for field in fields)})"
    words = sum(field.words for field in fields)
    if not 0 < words <= _MOST_WORDS:
        raise BadInput(f"keys of type {name}", f"a key has 1 to {_MOST_WORDS} words of 64 bits")

    def encode(value: Any) -> tuple[int, ...]:
        if isinstance(value, np.void):
            value = value.item()
        if not isinstance(value, tuple | list) or len(value) != len(fields):
            raise _refuse(value, name)
        return tuple(word for field, one in zip(fields, value, strict=True) for word in field.encode(one))

    def decode(given: tuple[int, ...]) -> Any:
        out, at = [], 0
        for field in fields:
            out.append(field.decode(given[at : at + field.words]))
            at += field.words
        return tuple(out)

    return Codec(name, words, encode, decode)
