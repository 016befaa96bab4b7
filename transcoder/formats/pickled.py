"""What pickles contain, as inert data, and the emitter of pickles; `pickles` has the reader.

`dumps` writes at protocol 2 the bytes of CPython's C pickler (Modules/_pickle.c: a memo slot for each value, batches
of 1000; only a dict of 1000, 2000, … items lacks CPython's empty last batch); at protocol 4 only names and strings
get a slot, since nothing else is fetched again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transcoder.errors import TranscoderError, refuse

INT_LIMIT = 16  # bytes
BATCH = 1000


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle refers to; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Pairs(list[tuple[object, object]]):
    """A dict as it was pickled: nothing is hashed before the caller has seen the keys."""

    def as_dict(self) -> dict[str, object]:
        """The dict, whose keys must be distinct strings."""
        found: dict[str, object] = {}
        for key, value in self:
            if type(key) is not str or key in found:
                raise refuse("pickle", f"dict key {brief(key)} is repeated or not a string")
            found[key] = value
        return found


@dataclass(frozen=True, slots=True)
class Made:
    """A dict of `count` pairs that are made one after another while they are written."""

    count: int
    pairs: Callable[[], Iterator[tuple[object, object]]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[object, object]]:
        return self.pairs()


@dataclass(slots=True)
class Record:
    """What calling `callable` with `args` would make, the state it would get, and the dict items put into it."""

    callable: Global
    args: tuple[object, ...]
    state: object = None
    items: Pairs | None = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something outside of the pickle, such as a tensor's storage."""

    value: object


SIZE = Global("torch", "Size")
ENCODE = Global("_codecs", "encode")


def brief(value: object) -> str:
    """A value as a message shows it."""
    return ascii(value)[:80] if isinstance(value, str | int | float | None) else type(value).__name__


def dumps(value: object, protocol: int = 2) -> bytes:
    """The pickle of plain values, `Global`, `Record`, `Persistent` and `Pairs`, at protocol 2 or 4.

    A record with a state is made by `__new__`, as `object.__reduce_ex__` asks for; one without by a call.

    >>> dumps({"a": [1, None]}, 4)
    b'\\x80\\x04}\\x8c\\x01a\\x94](K\\x01Nes.'
    """
    return bytes(dumped(value, protocol))


def dumped(value: object, protocol: int = 2) -> memoryview:
    """The same without a copy of what may be large."""
    if protocol not in (2, 4):
        raise TranscoderError(f"pickle protocol {protocol} is not written")
    writer = Writer(protocol)
    writer.out += bytes([0x80, protocol])
    writer.save(value)
    writer.out += b"."
    return memoryview(writer.out)


class Writer:
    """Collects the bytes of a pickle; `memo` holds the opcodes that fetch a value written before."""

    __slots__ = ("count", "forms", "memo", "names", "out", "protocol")

    def __init__(self, protocol: int) -> None:
        self.protocol, self.count = protocol, 0
        self.out = bytearray()
        self.memo: dict[object, bytes] = {}
        self.names: dict[int, tuple[bytes, Global]] = {}
        self.forms: dict[object, Any] = {}  # what `forms` compiles

    def save(self, value: object) -> None:
        """Write any value."""
        saver = SAVERS.get(type(value))
        if saver is None:
            raise TranscoderError(f"a {type(value).__name__} cannot be pickled")
        saver(self, value)

    def container(self) -> None:
        """Give the value just written a memo slot where CPython's pickler does and bytes should be the same."""
        if self.protocol < 4:
            self.out.extend(_indexed(b"q", b"r", self.count))
            self.count += 1

    def shared(self, key: object) -> None:
        """Give the value just written a memo slot that later occurrences use."""
        self.out.extend(b"\x94" if self.protocol >= 4 else _indexed(b"q", b"r", self.count))
        self.memo[key] = _indexed(b"h", b"j", self.count)
        self.count += 1

    def batches(self, values: Collection[object], one: bytes, many: bytes) -> None:
        """Write list elements or dict pairs, then the opcode that adds them."""
        save = self.save_pair if one == b"s" else self.save
        rest = iter(values)
        if len(values) == 1:
            save(next(rest))
            self.out.extend(one)
            return
        for _ in range(0, len(values), BATCH):
            self.out.extend(b"(")
            for value in islice(rest, BATCH):
                save(value)
            self.out.extend(many)

    def save_pair(self, pair: object) -> None:
        """Write a key and its value."""
        assert isinstance(pair, tuple)
        self.save(pair[0])
        self.save(pair[1])


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + bytes([index]) if index < 256 else long + index.to_bytes(4, "little")


def integer(value: int) -> bytes:
    """The opcode that pushes an integer, as small as it can be."""
    if 0 <= value < 256:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size = (value if value >= 0 else ~value).bit_length() // 8 + 1
    if size > INT_LIMIT:
        raise TranscoderError(f"an integer of {size} bytes cannot be pickled")
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _save_int(w: Writer, value: int) -> None:
    w.out.extend(integer(value))


def integers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers without the memo slot that it has at protocol 2."""
    if not values:
        return b")"
    return (b"(" if len(values) > 3 else b"") + b"".join(map(integer, values)) + _TUPLE.get(len(values), b"t")


def _save_str(w: Writer, value: str) -> None:
    if value in w.memo:
        w.out.extend(w.memo[value])
        return
    text = value.encode("utf-8", "surrogatepass")
    short = len(text) < 256 and w.protocol >= 4
    w.out.extend((b"\x8c" + bytes([len(text)]) if short else b"X" + len(text).to_bytes(4, "little")) + text)
    w.shared(value)


def _save_bytes(w: Writer, value: bytes) -> None:
    if w.protocol >= 4:
        w.out.extend(b"B" + len(value).to_bytes(4, "little") + value)
    else:
        _save_record(w, Record(ENCODE, (value.decode("latin1"), "latin1")))


def _save_global(w: Writer, value: Global) -> None:
    if known := w.names.get(id(value)):
        w.out.extend(known[0])
        return
    if value in w.memo:
        w.names[id(value)] = w.memo[value], value  # the value with it, so that its id stays its own
        w.out.extend(w.memo[value])
        return
    if w.protocol >= 4:
        _save_str(w, value.module)
        _save_str(w, value.name)
        w.out.extend(b"\x93")
    else:
        w.out.extend(f"c{value.module}\n{value.name}\n".encode())
    w.shared(value)


def _save_tuple(w: Writer, value: tuple[object, ...]) -> None:
    if not value:
        w.out.extend(b")")
        return
    if len(value) > 3:
        w.out.extend(b"(")
    for element in value:
        w.save(element)
    w.out.extend(_TUPLE.get(len(value), b"t"))
    w.container()


_TUPLE = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


def _save_list(w: Writer, value: list[object]) -> None:
    w.out.extend(b"]")
    w.container()
    w.batches(value, b"a", b"e")


def _save_pairs(w: Writer, value: Collection[tuple[object, object]]) -> None:
    w.out.extend(b"}")
    w.container()
    w.batches(value, b"s", b"u")


def _save_record(w: Writer, value: Record) -> None:
    _save_global(w, value.callable)
    _save_tuple(w, value.args)
    w.out.extend(b"R" if value.state is None else b"\x81")
    w.container()
    w.batches(value.items or (), b"s", b"u")
    if value.state is not None:
        w.save(value.state)
        w.out.extend(b"b")


def _save_persistent(w: Writer, value: Persistent) -> None:
    w.save(value.value)
    w.out.extend(b"Q")


SAVERS: dict[type, Callable[..., None]] = {
    type(None): lambda w, value: w.out.extend(b"N"),
    bool: lambda w, value: w.out.extend(b"\x88" if value else b"\x89"),
    float: lambda w, value: w.out.extend(struct.pack(">cd", b"G", value)),
    dict: lambda w, value: _save_pairs(w, list(value.items())),
    int: _save_int,
    str: _save_str,
    bytes: _save_bytes,
    tuple: _save_tuple,
    list: _save_list,
    Pairs: _save_pairs,
    Made: _save_pairs,
    Global: _save_global,
    Record: _save_record,
    Persistent: _save_persistent,
}
