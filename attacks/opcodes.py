"""Pickles assembled opcode by opcode: honest ones of inert parts, hostile ones of raw bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """REDUCE: a global applied to arguments."""

    name: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class New:
    """NEWOBJ without arguments, then BUILD with a state."""

    name: Any
    state: Any


@dataclass(frozen=True)
class Built:
    """BUILD on any value."""

    value: Any
    state: Any


@dataclass(frozen=True)
class Persistent:
    """A persistent id, as storages are."""

    value: Any


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are; they must leave one value on the stack."""

    code: bytes


def dumps(value: Any, protocol: int = 2) -> bytes:
    """A complete pickle."""
    return bytes((0x80, protocol)) + encode(value) + b"."


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    """BININT where it fits, else LONG1."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data


def encode(value: Any) -> bytes:
    """The opcodes that leave `value` on the stack."""
    simple = {None: b"N", True: b"\x88", False: b"\x89"}
    if value is None or isinstance(value, bool):
        return simple[value]
    if isinstance(value, (int, float)):
        return whole(value) if isinstance(value, int) else b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    return _compound(value)


def _compound(value: Any) -> bytes:
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
    if isinstance(value, Pairs):
        return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.pairs) + b"u"
    return _special(value)


def _special(value: Any) -> bytes:
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return encode(value.name) + encode(value.args) + b"R"
    if isinstance(value, New):
        return encode(value.name) + b")\x81" + encode(value.state) + b"b"
    if isinstance(value, Built):
        return encode(value.value) + encode(value.state) + b"b"
    if isinstance(value, Persistent):
        return encode(value.value) + b"Q"
    assert isinstance(value, Raw), value
    return value.code


@dataclass(frozen=True)
class Pairs:
    """A dictionary of keys that need not be hashable, nor differ."""

    pairs: tuple[tuple[Any, Any], ...]
