"""The zip container of torch.save: writes what torch 2.13 writes, byte for byte, and reads what any torch wrote.

Sources: caffe2/serialize/inline_container.cc (records, their order, padding to 64 bytes with an extra field "FB"),
third_party/miniz-3.0.2 (headers, zip64), PKWARE's APPNOTE.TXT 4.3 and 4.5.3. Records are stored, never compressed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from zlib import crc32

from transcoder.errors import refuse
from transcoder.formats.pickles import Global, Names, Persistent, Record, dumps, loads
from transcoder.formats.zips import Entry, read_entries
from transcoder.spec import BY_STORAGE, DTYPES, DType

ALIGNMENT = 64
SERIALIZATION_ID = b"0" * 40
TENSOR_PICKLE_LIMIT = 1 << 20
COMMON_PICKLE_LIMIT = 1 << 26
_BIG = 0xFFFFFFFF
_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_REBUILD = "torch._utils", "_rebuild_tensor_v2"
_REBUILD_TYPED = "torch._utils", "_rebuild_tensor_v3"
_UNTYPED = "torch.storage", "UntypedStorage"
_ORDERED = "collections", "OrderedDict"
TENSOR_NAMES: Names = frozenset(
    {_REBUILD, _REBUILD_TYPED, _UNTYPED, _ORDERED, ("torch", "Size")}
    | {("torch", storage) for storage in BY_STORAGE}
    | {("torch", name) for name in DTYPES}
)

_Part = tuple[str, int, int, bytes]  # name, size, CRC-32, content (empty where the caller supplies it)


def _zip64(size: int, position: int) -> bytes:
    """The zip64 extra field of a record, if it needs one: its two sizes, its position."""
    numbers = [size] * 2 if size >= _BIG else []
    numbers += [position] if position >= _BIG else []
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _local(name: bytes, size: int, position: int) -> bytes:
    zip64 = _zip64(size, position)
    padding = -(position + 30 + len(name) + len(zip64) + 4) % ALIGNMENT
    extra = zip64 + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return _HEADER.pack(b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _flags(size: int) -> int:
    return 0x0808 if size else 0x0800


def _central(name: bytes, size: int, crc: int, position: int) -> bytes:
    extra, stored, at = _zip64(size, position), min(size, _BIG), min(position, _BIG)
    fields = 0, 0, _flags(size), 0, 0, 0, crc, stored, stored, len(name), len(extra), 0, 0, 0, 0, at
    return _CENTRAL.pack(b"PK\1\2", *fields) + name + extra


def _descriptor(size: int, crc: int, position: int) -> bytes:
    if not size:
        return b""
    return struct.pack("<4sI2Q" if max(size, position) >= _BIG else "<4s3I", b"PK\7\x08", crc, size, size)


def _end(count: int, size: int, start: int) -> bytes:
    """The zip64 end record, its locator and the end record; torch always writes all three."""
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    few, short, at = min(count, 0xFFFF), min(size, _BIG), min(start, _BIG)
    return wide + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, short, at, 0)


def _assemble(records: Sequence[_Part]) -> tuple[list[bytes], bytes]:
    """Per record header, content and descriptor; and the central directory with the end records."""
    parts: list[bytes] = []
    central: list[bytes] = []
    position = 0
    for name, size, crc, content in records:
        full = f"archive/{name}".encode()
        header, descriptor = _local(full, size, position), _descriptor(size, crc, position)
        parts += header, content, descriptor
        central.append(_central(full, size, crc, position))
        position += len(header) + size + len(descriptor)
    directory = b"".join(central)
    return parts, directory + _end(len(records), len(directory), position)


def _known(name: str, content: bytes) -> _Part:
    return name, len(content), crc32(content), content


def _records(pickle: bytes, data: Sequence[_Part]) -> list[_Part]:
    heads = ("data.pkl", pickle), (".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")
    tails = ("version", b"3\n"), (".data/serialization_id", SERIALIZATION_ID)
    return [_known(*head) for head in heads] + [*data] + [_known(*tail) for tail in tails]


def archive(pickle: bytes, payloads: Sequence[bytes] = ()) -> bytes:
    """A whole file as torch.save writes it; `payloads` are the storages 0, 1, … that the pickle refers to."""
    parts, rest = _assemble(_records(pickle, [_known(f"data/{i}", data) for i, data in enumerate(payloads)]))
    return b"".join([*parts, rest])


class TensorItem:
    """The bytes around one tensor's payload: `prefix` before it, `suffix(crc)` after it."""

    __slots__ = ("_crc_at", "_id_at", "_id_crcs", "_suffix", "length", "payload_offset", "payload_size", "prefix")

    def __init__(self, pickle: bytes, payload_size: int) -> None:
        records = _records(pickle, [("data/0", payload_size, 0, b"")])
        parts, rest = _assemble(records)
        self.prefix, tail = b"".join(parts[:13]), b"".join(parts[13:])
        self._suffix = tail + rest
        self._crc_at = len(tail) + rest.index(b"archive/data/0") - 30  # in the central header
        self._id_at = tail.rindex(SERIALIZATION_ID)
        self._id_crcs = self._id_at + 44, len(tail) + rest.index(b"archive/.data/serialization_id") - 30
        self.payload_offset, self.payload_size = len(self.prefix), payload_size
        self.length = self.payload_offset + payload_size + len(self._suffix)

    def suffix(self, crc: int, identity: bytes = b"") -> bytes:
        """The bytes after a payload whose CRC-32 is `crc`. identity: 40 bytes that torch draws from the content."""
        found, value = bytearray(self._suffix), crc.to_bytes(4, "little")
        found[self._crc_at : self._crc_at + 4] = value
        if self.payload_size:
            found[4:8] = value
        if identity:
            found[self._id_at : self._id_at + 40] = identity
            for place in self._id_crcs:
                found[place : place + 4] = crc32(identity).to_bytes(4, "little")
        return bytes(found)

    def read(self, view: memoryview) -> int | None:
        """The payload's CRC-32 as an archive records it that has exactly these bytes around the payload, else None."""
        end = self.payload_offset + self.payload_size
        if len(view) != self.length or view[: self.payload_offset] != self.prefix:
            return None
        suffix = view[end:]
        crc = int.from_bytes(suffix[self._crc_at : self._crc_at + 4], "little")
        same = suffix == self.suffix(crc, bytes(suffix[self._id_at : self._id_at + 40]))
        return crc if same and (self.payload_size or not crc) else None


def layout(pickle_size: int, payload_size: int) -> tuple[int, int]:
    """Where the payload of a one-tensor archive starts, and the archive's length.

    >>> layout(163, 8192)
    (704, 9769)
    """
    item = TensorItem(bytes(pickle_size), payload_size)
    return item.payload_offset, item.length


@lru_cache(maxsize=4096)
def tensor_item(dtype: DType, shape: tuple[int, ...]) -> TensorItem:
    """The archive around a contiguous tensor."""
    return TensorItem(dumps(tensor_record(0, dtype, shape)), prod(shape) * dtype.size)


def tensor_record(index: int, dtype: DType, shape: tuple[int, ...]) -> Record:
    """A contiguous tensor whose payload is the record `data/<index>`, as torch/_tensor.py reduces it."""
    typed = dtype.storage == "UntypedStorage"  # newer dtypes have no storage class of their own; the size is in bytes
    storage = Global(*_UNTYPED) if typed else Global("torch", dtype.storage)
    count = prod(shape) * (dtype.size if typed else 1)
    source = Persistent(("storage", storage, str(index), "cpu", count))
    args = (source, 0, shape, strides(shape), False, Record(Global(*_ORDERED), ()))
    if typed:
        return Record(Global(*_REBUILD_TYPED), (*args, Global("torch", dtype.name)))
    return Record(Global(*_REBUILD), args)


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours per axis of a contiguous tensor; an empty axis counts as one.

    >>> strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(prod(max(extent, 1) for extent in shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A contiguous tensor of an archive; its payload is `size` bytes from `start`."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    size: int
    crc: int | None  # of the record that the tensor is the whole of


def read_archive(view: memoryview, subject: str) -> dict[str, Entry]:
    """The records of an archive by name, without the folder that holds them all."""
    found: dict[str, Entry] = {}
    entries = read_entries(view, subject)
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1:
        raise refuse("archive", f"{subject}: the archive's records are not in one folder")
    for name, entry in entries.items():
        found[name.partition("/")[2]] = entry
    if "" in found or "data.pkl" not in found or "constants.pkl" in found:
        raise refuse("archive", f"{subject}: not an archive of torch.save")
    return found


def read_pickle(view: memoryview, names: Names | None, subject: str, limit: int = COMMON_PICKLE_LIMIT) -> object:
    """The pickled value of an archive."""
    return unpickle(view, read_archive(view, subject)["data.pkl"], names, subject, limit)


def unpickle(view: memoryview, entry: Entry, names: Names | None, subject: str, limit: int) -> object:
    """The value of a pickle record, whose checksum is compared."""
    if entry.size > limit:
        raise refuse("archive", f"{subject}: its pickle has {entry.size} bytes, more than {limit}")
    data = view[entry.start : entry.start + entry.size]
    if crc32(data) != entry.crc:
        raise refuse("checksum", f"{subject}: the checksum of its pickle differs: the file is damaged")
    return loads(data, names, subject)


def read_tensor(view: memoryview, subject: str) -> StoredTensor:
    """Where and what the one tensor of an archive is."""
    entries = read_archive(view, subject)
    check_order(view, entries, subject)
    record = unpickle(view, entries["data.pkl"], TENSOR_NAMES, subject, TENSOR_PICKLE_LIMIT)
    stored = place_tensor(record, entries, subject)
    if stored.crc is None:
        raise refuse(
            "archive", f"{subject}: its {stored.dtype.name} tensor of shape {list(stored.shape)[:16]} is a view"
        )
    return stored


def check_order(view: memoryview, entries: Mapping[str, Entry], subject: str) -> None:
    """Refuse an archive of a machine with another byte order."""
    order = entries.get("byteorder")
    if order and bytes(view[order.start : order.start + min(order.size, 8)]) != b"little":
        raise refuse("archive", f"{subject}: its byte order is not little")


def place_tensor(record: object, entries: Mapping[str, Entry], subject: str) -> StoredTensor:
    """Where and what a pickled tensor is, whose storage may hold others, too. Raises InputError."""
    key, dtype, first, shape, count = _described(record, subject)
    entry, size = entries.get(f"data/{key}"), prod(shape) * dtype.size
    if entry is None or entry.size != count or first * dtype.size + size > count:
        found = "no storage" if entry is None else f"a storage of {entry.size} bytes"
        raise refuse("archive", f"{subject}: {found} for a {dtype.name} tensor of shape {list(shape)[:16]}")
    crc = entry.crc if size == entry.size else None
    return StoredTensor(dtype, shape, entry.start + first * dtype.size, size, crc)


def _described(record: object, subject: str) -> tuple[str, DType, int, tuple[int, ...], int]:
    """Storage key, dtype, first element, shape and storage bytes of a pickled tensor."""
    args = record.args if isinstance(record, Record) else ()
    if not isinstance(record, Record) or record.state is not None or not 6 <= len(args) <= 8:
        raise refuse("archive", f"{subject}: it does not hold one tensor")
    key, dtype, count = _storage(args[0], record.callable, args[6:], subject)
    first, shape = _extents((args[1],)), _extents(args[2])
    if shape is None or first is None or not _contiguous(shape, args[3]):
        raise refuse("archive", f"{subject}: the tensor is a view, not contiguous or has no valid shape")
    return key, dtype, first[0], shape, count


def _storage(source: object, rebuild: Global, rest: tuple[object, ...], subject: str) -> tuple[str, DType, int]:
    """Key, dtype and bytes of a storage reference `("storage", class, key, device, count)`."""
    fields = source.value if isinstance(source, Persistent) else None
    if isinstance(fields, tuple) and len(fields) == 5 and fields[0] == "storage":
        _, storage, key, _, count = fields
        dtype = _dtype(rebuild, storage, rest)
        if dtype is not None and type(key) is str and type(count) is int and count >= 0:
            return key, dtype, count * (1 if storage == Global(*_UNTYPED) else dtype.size)
    raise refuse("archive", f"{subject}: its tensor has an unknown storage or element type")


def _dtype(rebuild: Global, storage: object, rest: tuple[object, ...]) -> DType | None:
    if rebuild == Global(*_REBUILD_TYPED) and storage == Global(*_UNTYPED):
        typed = rest[0] if rest else None
        return DTYPES.get(typed.name) if isinstance(typed, Global) and typed.module == "torch" else None
    if rebuild == Global(*_REBUILD) and isinstance(storage, Global) and storage.module == "torch":
        return BY_STORAGE.get(storage.name)
    return None


def _extents(value: object) -> tuple[int, ...] | None:
    """`value` if it is a tuple of at most 64 sizes that fit in 63 bits."""
    if not isinstance(value, tuple) or len(value) > 64:
        return None
    return value if all(type(extent) is int and 0 <= extent < 1 << 63 for extent in value) else None


def _contiguous(shape: tuple[int, ...], found: object) -> bool:
    """Whether strides are those of a row-major tensor; they mean nothing on an axis of one, or without elements."""
    actual = _extents(found)
    if actual is None or len(actual) != len(shape):
        return False
    triples = zip(shape, actual, strides(shape), strict=True)
    return 0 in shape or all(extent == 1 or stride == right for extent, stride, right in triples)
