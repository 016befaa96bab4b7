"""Stored zip archives like those of torch.save, with a knob for every lie that an archive can tell."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attacks.opcodes import Call, Name, Persistent, dumps

STORAGES = {"bfloat16": "BFloat16Storage", "float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
SIZES = {"bfloat16": 2, "float32": 4, "float16": 2, "int64": 8}


@dataclass(frozen=True)
class Record:
    """One member. None: the true value."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    local_crc: int | None = None
    local_size: int | None = None
    local_name: str | None = None
    central_size: int | None = None
    packed_size: int | None = None
    offset: int | None = None
    central_extra: bytes = b""
    comment: bytes = b""
    aligned: bool = False
    descriptor: bool = False


@dataclass(frozen=True)
class End:
    """The end records. None: the true value."""

    count: int | None = None
    size: int | None = None
    offset: int | None = None
    comment: bytes = b""
    zip64: tuple[int, int, int] | None = None  # count, size, offset of the zip64 record
    locator: int | None = None
    disk: int = 0
    tail: bytes = b""
    trailing: bytes = field(default=b"")


def _local(row: Record, at: int) -> bytes:
    name = (row.local_name or row.name).encode("utf-8", "surrogateescape")
    crc = zlib.crc32(row.data) if row.local_crc is None else row.local_crc
    size = len(row.data) if row.local_size is None else row.local_size
    flags = row.flags | (0x0808 if row.descriptor else 0)
    crc, size = (0, 0) if row.descriptor else (crc, size)
    fill = -(at + 30 + len(name) + 4) % 64 if row.aligned else 0
    extra = struct.pack("<2sH", b"FB", fill) + b"Z" * fill if row.aligned else b""
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, row.method, 0, 0, crc, size, size, len(name), len(extra))
    tail = struct.pack("<4s3I", b"PK\7\10", zlib.crc32(row.data), len(row.data), len(row.data))
    return head + name + extra + row.data + (tail if row.descriptor else b"")


def _central(row: Record, at: int) -> bytes:
    name = row.name.encode("utf-8", "surrogateescape")
    crc = zlib.crc32(row.data) if row.crc is None else row.crc
    size = len(row.data) if row.central_size is None else row.central_size
    packed = size if row.packed_size is None else row.packed_size
    flags = row.flags | (0x0808 if row.descriptor else 0)
    where = at if row.offset is None else row.offset
    lengths = len(name), len(row.central_extra), len(row.comment)
    head = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 0, 0, flags, row.method, 0, 0, crc, packed, size, *lengths, 0, 0, 0, where
    )
    return head + name + row.central_extra + row.comment


def archive(records: Sequence[Record], end: End | None = None) -> bytes:
    """The bytes of an archive that says what the records and the end say."""
    end = end or End()
    body, central = b"", b""
    for row in records:
        central += _central(row, len(body))
        body += _local(row, len(body))
    place = len(body)
    body += central
    if end.zip64:
        count, size, offset = end.zip64
        locator = len(body) if end.locator is None else end.locator
        body += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
        body += struct.pack("<4sIQI", b"PK\6\7", 0, locator, 1)
    count = len(records) if end.count is None else end.count
    size = len(central) if end.size is None else end.size
    offset = place if end.offset is None else end.offset
    row = struct.pack("<4s4H2IH", b"PK\5\6", end.disk, end.disk, count, count, size, offset, len(end.comment))
    return body + row + end.comment + end.trailing


def tensor_pickle(dtype: str, shape: Sequence[int], /, **lies: Any) -> bytes:
    """`_rebuild_tensor_v2` of a whole, contiguous storage, unless `lies` say otherwise."""
    count, strides = 1, []
    for size in reversed(shape):
        strides.insert(0, count)
        count *= size
    storage = Persistent(("storage", lies.get("storage", Name("torch", STORAGES[dtype])), lies.get("key", "0"),
                          lies.get("location", "cpu"), lies.get("count", count)))  # fmt: skip
    size, stride = tuple(lies.get("shape", shape)), tuple(lies.get("strides", strides))
    hooks = lies.get("hooks", Call(Name("collections", "OrderedDict"), ()))
    args = (storage, lies.get("offset", 0), size, stride, False, hooks)
    return dumps(Call(lies.get("rebuild", Name("torch._utils", "_rebuild_tensor_v2")), args))


def records_of(pickle: bytes, *payloads: bytes) -> list[Record]:
    """The records of torch.save, in its order."""
    rows = [("data.pkl", pickle), (".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")]
    rows += [(f"data/{index}", payload) for index, payload in enumerate(payloads)]
    rows += [("version", b"3\n"), (".data/serialization_id", b"0" * 40)]
    return [Record(f"archive/{name}", data, aligned=True, descriptor=True) for name, data in rows]


def saved(value: Any, *payloads: bytes) -> bytes:
    """What torch.save would write for a value of opcodes."""
    return archive(records_of(dumps(value), *payloads))


def tensor_item(dtype: str, shape: Sequence[int], payload: bytes, /, **lies: Any) -> bytes:
    """An item of a `.distcp` file."""
    return archive(records_of(tensor_pickle(dtype, shape, **lies), payload))
