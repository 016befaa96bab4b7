"""Reads the directory of an untrusted zip whose records are all stored: PKWARE's APPNOTE.TXT 4.3 and 4.5.3.

Every length and offset is checked against the bytes that exist; the two headers and the data descriptor of each
record must agree, and no two records may overlap.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from transcoder.errors import InputError, refuse

_BIG = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_WIDE_END = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_FLAGS = 0x0808  # data descriptor, UTF-8 names


@dataclass(frozen=True, slots=True)
class Entry:
    """A record: `size` bytes from `start`, relative to the archive, and the CRC-32 that the archive states."""

    start: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Listed:
    name: bytes
    flags: int
    crc: int
    size: int
    position: int


def read_entries(view: memoryview, subject: str) -> dict[str, Entry]:
    """All records of the zip that fills `view`, by name; anything unusual is refused."""
    try:
        return _entries(view)
    except InputError as error:
        raise refuse("archive", f"{subject}: {error.args[0]}") from None
    except (struct.error, ValueError) as error:
        raise refuse("archive", f"{subject}: the archive is cut off or damaged") from error


def _entries(view: memoryview) -> dict[str, Entry]:
    count, size, start = _directory(view)
    listed = _list(view[start : start + size], count)
    found: dict[str, Entry] = {}
    free = 0
    for item in sorted(listed, key=lambda item: item.position):
        entry, end = _located(view[:start], item)
        name = item.name.decode()
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise refuse("archive", "a record of the archive is named as a path that leaves it")
        if item.position < free or name in found:
            raise refuse("archive", "two records of the archive overlap or have one name")
        found[name], free = entry, end
    return found


def _directory(view: memoryview) -> tuple[int, int, int]:
    """Number of records, size and start of the central directory."""
    at = len(view) - _END.size
    if at < 0:
        raise refuse("archive", f"{len(view)} bytes are too few for an archive")
    mark, disk, first, here, count, size, start, comment = _END.unpack_from(view, at)
    if mark != b"PK\5\6" or disk or first or comment or here != count:
        raise refuse("archive", "the archive has no end record: it is cut off, damaged or of another kind")
    wide = _wide_directory(view, at - _LOCATOR.size)
    if wide:
        if (min(wide[0], 0xFFFF), min(wide[1], _BIG), min(wide[2], _BIG)) != (count, size, start):
            raise refuse("archive", "the archive's end records disagree")
        (count, size, start), at = wide, at - _LOCATOR.size - _WIDE_END.size
    if start + size != at or count * _CENTRAL.size > size:
        raise refuse("archive", "the archive's directory is not where its end record says")
    return count, size, start


def _wide_directory(view: memoryview, at: int) -> tuple[int, int, int] | None:
    """The same from the zip64 end record, if there is one; its locator stands at `at`."""
    if at < _WIDE_END.size or bytes(view[at : at + 4]) != b"PK\6\7":
        return None
    _, disk, position, disks = _LOCATOR.unpack_from(view, at)
    if disk or disks != 1 or position != at - _WIDE_END.size:
        raise refuse("archive", "the archive's zip64 locator is wrong")
    mark, length, _, _, disk, first, here, count, size, start = _WIDE_END.unpack_from(view, position)
    if mark != b"PK\6\6" or length != 44 or disk or first or here != count:
        raise refuse("archive", "the archive's zip64 end record is wrong")
    return count, size, start


def _list(directory: memoryview, count: int) -> list[_Listed]:
    """The entries of the central directory, which they must fill."""
    listed = []
    at = 0
    for _ in range(count):
        item, at = _listed(directory, at)
        listed.append(item)
    if at != len(directory):
        raise refuse("archive", "the archive's directory has another length than its entries")
    return listed


def _listed(directory: memoryview, at: int) -> tuple[_Listed, int]:
    fields = _CENTRAL.unpack_from(directory, at)
    mark, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _, position = fields
    if mark != b"PK\1\2" or disk:
        raise refuse("archive", "an entry of the archive's directory is damaged")
    _check_plain(flags, method)
    begin = at + _CENTRAL.size
    end = begin + named + extra + comment
    if end > len(directory):
        raise refuse("archive", "the archive's directory is cut off")
    size, packed, position = _widened(bytes(directory[begin + named : begin + named + extra]), size, packed, position)
    if size != packed:
        raise refuse("archive", "a record of the archive is compressed")
    return _Listed(bytes(directory[begin : begin + named]), flags, crc, size, position), end


def _check_plain(flags: int, method: int) -> None:
    if method or flags & ~_FLAGS:
        raise refuse("archive", f"a record of the archive is compressed or encrypted (method {method}, {flags:#x})")


def _widened(extra: bytes, *numbers: int) -> list[int]:
    """32-bit numbers, those that are at their limit replaced by the 64-bit ones of the zip64 extra field."""
    wide = _extra_field(extra)
    found = []
    for number in numbers:
        if number == _BIG and wide is not None:
            number, wide = struct.unpack_from("<Q", wide)[0], wide[8:]
        found.append(number)
    return found


def _extra_field(extra: bytes) -> bytes | None:
    """The content of the zip64 extra field (id 1), of which there is at most one."""
    found = None
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if length > len(extra) - 4:
            raise refuse("archive", "an extra field of the archive is cut off")
        if kind == 1 and found is not None:
            raise refuse("archive", "a record of the archive has two zip64 fields")
        found = extra[4 : 4 + length] if kind == 1 else found
        extra = extra[4 + length :]
    return found


def _located(body: memoryview, item: _Listed) -> tuple[Entry, int]:
    """Where a record's content lies, and where the record ends; its local header must say the same as `item`."""
    mark, _, flags, method, _, _, crc, packed, size, named, extra = _LOCAL.unpack_from(body, item.position)
    begin = item.position + _LOCAL.size
    start = begin + named + extra
    _check_plain(flags, method)
    if mark != b"PK\3\4" or flags != item.flags or bytes(body[begin : begin + named]) != item.name:
        raise refuse("archive", "a record's header differs from the archive's directory")
    if start + item.size > len(body):
        raise refuse("archive", "a record lies outside of the archive")
    _check_sizes(bytes(body[begin + named : start]), flags, (crc, packed, size), item)
    end = start + item.size + (_descriptor(body, start + item.size, item) if flags & 8 else 0)
    return Entry(start, item.size, item.crc), end


def _check_sizes(extra: bytes, flags: int, local: tuple[int, int, int], item: _Listed) -> None:
    """CRC and sizes of a local header: all zero where a descriptor follows, else those of the directory."""
    if flags & 8 and not any(local):
        return
    size, packed = _widened(extra, local[2], local[1])
    if (local[0], packed, size) != (item.crc, item.size, item.size):
        raise refuse("archive", "a record's sizes differ from the archive's directory")


def _descriptor(body: memoryview, at: int, item: _Listed) -> int:
    """Length of the data descriptor at `at`, which must agree with the directory."""
    for form in ("<4s3I", "<4sI2Q"):
        length = struct.calcsize(form)
        expected = b"PK\7\x08", item.crc, item.size, item.size
        if at + length <= len(body) and struct.unpack_from(form, body, at) == expected:
            return length
    raise refuse("archive", "a record's descriptor differs from the archive's directory")
