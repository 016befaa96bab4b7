"""Lengths, checksums and digests put right after an edit, so that what lies behind them is reached."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

from fuzz import jsons
from transcoder import manifest
from transcoder.formats.shards import crc32c

PAYLOAD = 1 << 16  # bytes: larger files are not made
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I16": 2, "I32": 4, "I64": 8}


def safetensors(data: bytes) -> bytes:
    """The length field, and the payload's size, as the header has them."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return _file(header, data[8 + len(header) :])


def _file(header: bytes, payload: bytes) -> bytes:
    size = _end(header, len(payload))
    return len(header).to_bytes(8, "little") + header + payload[:size].ljust(size, b"\1")


def _end(header: bytes, size: int) -> int:
    try:
        table = json.loads(header)
        return max([0, *(row["data_offsets"][1] for name, row in table.items() if name != "__metadata__")]) % PAYLOAD
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return size


def edited_safetensors(rng: Random, data: bytes) -> bytes:
    """A file whose header was edited; half of the time its ranges tile the payload again."""
    length = int.from_bytes(data[:8], "little")
    value = jsons.parse(data[8 : 8 + length])
    value = jsons.edited(rng, value, (*SIZES, "F8_E4M3", "F4", "U8", "BOOL"))
    if rng.random() < 0.5:
        _tile(value)
    header = jsons.dump(value).encode("utf-8", "surrogatepass")
    return _file(header + b" " * rng.choice((0, 0, 1, 8)), data[8 + length :])


def _tile(value: Any) -> None:
    """Give every entry the range that follows the one before it, sizes as dtype and shape say."""
    end = 0
    for name, entry in value if type(value) is list else ():
        row = dict(entry) if type(entry) is list and name != "__metadata__" else {}
        shape = row.get("shape")
        if isinstance(shape, jsons.Items) and all(type(size) is int for size in shape):
            start, end = end, end + _bytes(shape, str(row.get("dtype")))
            entry[:] = [(k, jsons.Items([start, end]) if k == "data_offsets" else v) for k, v in entry]


def _bytes(shape: list[int], dtype: str) -> int:
    count = SIZES.get(dtype, 1)
    for size in shape:
        count *= size
    return count


def digest(data: bytes) -> bytes:
    """A manifest with its own digest, as far as it is a JSON object that can be written again."""
    try:
        table = json.loads(data)
        return bytes(manifest.emit({key: value for key, value in table.items() if key != "self"}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def edited_manifest(rng: Random, data: bytes) -> bytes:
    """A manifest with a node changed, or with another header in its packed fields."""
    if rng.random() < 0.7:
        return digest(jsons.mutate(rng, data, WORDS))
    table = json.loads(data)
    headers = table["restore"]["headers"]
    name = rng.choice(sorted(headers))
    headers[name] = manifest.pack(_header(rng, manifest.unpack(headers[name])))
    return bytes(manifest.emit({key: value for key, value in table.items() if key != "self"}))


def _header(rng: Random, header: bytes) -> bytes:
    whole = edited_safetensors(rng, header)
    return whole[: 8 + int.from_bytes(whole[:8], "little")]


WORDS = (
    "../latest_checkpointed_iteration.txt", "../../x", "hf/config.json", "name", "size", "digest", "tree", "restore",
    "headers", "index", "crc32:00000000", "xxh3-128:0", "folder", "files", "source", "tensors", "variants", "dtype",
)  # fmt: skip


NUMBERS = (0, 1, 15, 16, 1 << 20, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 17, (1 << 64) - 1)


def edited_shard(rng: Random, data: bytes) -> bytes:
    """Another number in the index at the end of a shard, or another length of the file."""
    if rng.random() < 0.2 or len(data) < 20:
        return data[: rng.randrange(len(data) + 1)] + bytes(rng.choice((0, 1, 16, 20)))
    at = len(data) - 4 - 8 * rng.randint(1, (len(data) - 4) // 8)
    return data[:at] + struct.pack("<Q", rng.choice((*NUMBERS, rng.randrange(1 << 16)))) + data[at + 8 :]


def shard(data: bytes) -> bytes:
    """The checksum of an index of one chunk made right."""
    return data[:-4] + struct.pack("<I", crc32c(data[-20:-4])) if len(data) >= 20 else data
