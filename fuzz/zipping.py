"""Edits of stored zips: the pickle inside rewritten, a header field made extreme, every checksum put right again."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from zlib import crc32

Records = list[tuple[str, bytes]]
SIGNATURES = {b"PK\1\2": 46, b"PK\3\4": 30, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20, b"PK\7\x08": 16}
FIELDS = {
    b"PK\1\2": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)),
    b"PK\3\4": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\5\6": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\6\6": ((4, 8), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\6\7": ((4, 4), (8, 8), (16, 4)),
    b"PK\7\x08": ((4, 4), (8, 4), (12, 4)),
}


def records(data: bytes) -> Records:
    """Names and contents, as the standard library reads them. Raises its errors."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(row.filename, archive.read(row)) for row in archive.infolist()]


def joined(parts: Records) -> bytes:
    """A stored zip of these records, names repeated if they are."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # names may be repeated
        for name, content in parts:
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def mutate(rng: Random, data: bytes, pickles: Callable[[Random, bytes], bytes]) -> bytes:
    """The pickle changed, or records, or one field of a header. Raises errors for what is no zip."""
    kind = rng.randrange(10)
    if kind < 6:
        return joined([(name, _edited(rng, name, content, pickles)) for name, content in records(data)])
    return _rearranged(rng, records(data)) if kind == 6 else _field(rng, data)


def _edited(rng: Random, name: str, content: bytes, pickles: Callable[[Random, bytes], bytes]) -> bytes:
    return pickles(rng, content) if name.endswith("/data.pkl") else content


def _rearranged(rng: Random, parts: Records) -> bytes:
    at = rng.randrange(len(parts))
    name, content = parts[at]
    edits = (
        [], [parts[at]] * 2, [(f"{name}x", content)], [(name.replace("archive", "b"), content)],
        [(name, content[:-1])], [(name, content + b"\0")], [("archive/constants.pkl", b"")], [(name, b"")],
    )  # fmt: skip
    return joined([*parts[:at], *rng.choice(edits), *parts[at + 1 :]])


def _field(rng: Random, data: bytes) -> bytes:
    places = [(at, mark) for mark in SIGNATURES for at in _found(data, mark)]
    at, mark = rng.choice(places)
    offset, width = rng.choice(FIELDS[mark])
    old = int.from_bytes(data[at + offset : at + offset + width], "little")
    top = 1 << 8 * width
    value = rng.choice((0, 1, 8, old + 1, old - 1, top - 1, top // 2, len(data), rng.randrange(len(data)))) % top
    return data[: at + offset] + value.to_bytes(width, "little") + data[at + offset + width :]


def _found(data: bytes, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)
    return found


def repaired(data: bytes) -> bytes:
    """The same with the CRC-32 of every record put right where its headers can be followed."""
    fixed = bytearray(data)
    for at in _found(data, b"PK\1\2"):
        if at + 46 <= len(data):
            _repair(fixed, at)
    return bytes(fixed)


def _repair(data: bytearray, central: int) -> None:
    size, position = (struct.unpack_from("<I", data, central + at)[0] for at in (24, 42))
    if position + 30 > len(data):
        return
    flags, named, extra = (struct.unpack_from("<H", data, position + at)[0] for at in (6, 26, 28))
    start = position + 30 + named + extra
    crc = struct.pack("<I", crc32(data[start : start + size]))
    data[central + 16 : central + 20] = crc
    if not flags & 8:
        data[position + 14 : position + 18] = crc
    elif data[start + size : start + size + 4] == b"PK\7\x08":
        data[start + size + 4 : start + size + 8] = crc
