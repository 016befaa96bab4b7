"""safetensors: headers read and validated as a whole, headers written for files whose payloads come later.

A file is an 8-byte little-endian header length, a JSON header, then the payloads. Limits and rules as in
safetensors/src/tensor.rs: the ranges, sorted, tile the payload exactly; a header has at most 100 MB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from isal.isal_zlib import compress, decompress

from transcoder.errors import Problem, reason, refuse
from transcoder.hfconfig import parse_json, read_json
from transcoder.paths import length, open_regular, plain_name
from transcoder.spec import BY_SAFETENSORS, DTYPES, DType, TensorSpec, Whole

HEADER_LIMIT = 100_000_000  # bytes
INDEX_LIMIT = 256 << 20  # bytes
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Packed:
    """Bytes that a plan keeps to the end, in a tenth of their room."""

    packed: bytes

    @property
    def data(self) -> bytes:
        """The bytes."""
        return bytes(decompress(self.packed))


def packed(data: bytes) -> Packed:
    """Bytes to keep. Packing 100 MB takes about 50 ms."""
    return Packed(compress(data, 1))


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its name, size in bytes, the raw header (length field included) and its tensors."""

    name: str
    size: int
    kept: Packed
    tensors: tuple[TensorSpec, ...]

    @property
    def header(self) -> bytes:
        """The raw header, length field included."""
        return self.kept.data


def shard(name: str, header: bytes, size: int) -> Shard:
    """The file of this name, header and size in bytes. Raises ValueError, TypeError, RecursionError."""
    return Shard(name, size, packed(header), shard_tensors(name, header, size))


def read_shard(path: Path, follow_links: bool = False) -> Shard:
    """The header of one file, validated. Raises InputError naming the file and what is wrong."""
    try:
        with open_regular(path, follow_links) as file:
            size = length(file)
            header = _header_bytes(file, size)
        return shard(path.name, header, size)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problem = Problem(file=path.name, message=_explained(path, follow_links) or reason(error))
        raise refuse("safetensors", "a safetensors file was refused", [problem]) from error


def _header_bytes(file: Any, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"header of {length} bytes in a file of {size} bytes")
    return bytes(prefix + file.read(length))


def _explained(path: Path, follow_links: bool) -> str:
    """What a refused file is, if it can be told."""
    try:
        with open_regular(path, follow_links) as file:
            start = bytes(file.read(40))
    except (OSError, ValueError):
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself: run `git lfs pull`"
    return "this is a GGUF file, which is not supported" if start.startswith(b"GGUF") else ""


def shard_tensors(name: str, header: bytes, size: int) -> tuple[TensorSpec, ...]:
    """The tensors of a header, by offset. Raises ValueError unless they tile the payload exactly."""
    if header[8:9] != b"{":
        raise ValueError("the header does not start with '{'")
    specs = usual_tensors(name, header) or _any_tensors(name, header)
    specs.sort(key=lambda spec: (spec.offset, spec.stored))
    end = len(header)
    for spec in specs:
        if spec.offset != end:
            raise ValueError(f"{spec.name!r} starts at byte {spec.offset}, expected {end}: a hole or an overlap")
        end += spec.stored
    if end != size:
        cut = [spec.name for spec in specs if spec.offset + spec.stored > size]
        where = f", within {cut[0]!r} or before" if cut else ""
        raise ValueError(f"the tensors end at byte {end}, the file has {size}: truncated or trailing bytes{where}")
    return tuple(specs)


def _any_tensors(file: str, header: bytes) -> list[Whole]:
    """The tensors of a header in any spelling, in its order. Raises ValueError."""
    table = parse_json(header[8:])
    _check_metadata(table.pop("__metadata__", {}))
    return [_spec(file, tensor, entry, len(header)) for tensor, entry in table.items()]


# An entry as safetensors' own writers spell it, without white space and escapes.
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\]\},'
)
_AROUND = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
_METADATA = re.compile(r'\{"__metadata__":(\{[^{}]*\}),')


def usual_tensors(file: str, header: bytes) -> list[Whole]:
    """What `_any_tensors` gives, in a third of its time; nothing where something is unusual or wrong."""
    try:
        text = header[8:].decode().rstrip(" ")
        metadata = _METADATA.match(text)
        _check_metadata(parse_json(metadata[1].encode()) if metadata else {})
    except ValueError:
        return []
    listed = f"{text[metadata.end() if metadata else 1 : -1]},"
    entries = _ENTRY.findall(listed)
    length = sum(len("".join(entry)) for entry in entries) + _AROUND * len(entries)
    names = {entry[0] for entry in entries}
    if not text.endswith("}}") or length != len(listed) or len(names) < len(entries) or "__metadata__" in names:
        return []
    specs, base = [], len(header)
    for name, dtype_text, shape_text, start, end in entries:
        dtype, shape, nbytes = _sized(dtype_text, shape_text)
        offset = int(start)
        if int(end) - offset != nbytes:
            return []
        specs.append(Whole(name, dtype, shape, file, base + offset, nbytes))
    return specs


@lru_cache(maxsize=4096)
def _sized(dtype_text: str, shape_text: str) -> tuple[DType, tuple[int, ...], int]:
    """Dtype, shape and bytes of tensors; a size that no tensor has where one of them is unusual or wrong."""
    dtype = BY_SAFETENSORS.get(dtype_text)
    parts = shape_text.split(",") if shape_text else []
    if dtype is None or any(not 0 < len(part) < 18 or part != str(int(part)) for part in parts):
        return DTYPES["uint8"], (), -1
    shape = _shared(tuple(map(int, parts)))
    return dtype, shape, prod(shape) * dtype.size if len(shape) <= 16 else -1


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a table of texts")


def _spec(file: str, name: str, entry: Any, base: int) -> Whole:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: expected dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r}: shape {shape!r:.100}, data_offsets {offsets!r:.100}")
    dtype = BY_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name!r}: unknown dtype {entry['dtype']!r:.80}")
    if prod(extent for extent in shape if extent) >= 1 << 63:
        raise ValueError(f"{name!r}: the extents {shape} are larger than any file")
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * dtype.size != nbytes:
        raise ValueError(f"{name!r}: {shape} of {dtype.name} needs {prod(shape) * dtype.size} bytes, found {nbytes}")
    return Whole(name, dtype, _shared(tuple(shape)), file, base + offsets[0], nbytes)


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One object for all tensors that have the shape."""
    return shape


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index file: tensor → shard. Raises InputError for anything but plain file names."""
    return weight_map(read_json(path, INDEX_LIMIT), path.name)


def weight_map(table: Any, file: str) -> dict[str, str]:
    """The same from an index that was read from a file of this name."""
    weights = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise refuse("index", "the index has no weight_map", [Problem(file=file)])
    plain = {value for value in {value for value in weights.values() if isinstance(value, str)} if plain_name(value)}
    bad = [
        Problem(file=file, tensor=name, found=f"{value!r:.120}")
        for name, value in weights.items()
        if not isinstance(value, str) or value not in plain
    ]
    if bad:
        raise refuse("index", "the index names files that are not plain file names", bad)
    return weights


def emit_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header, length field included, of a file that holds `tensors` in this order, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * dtype.size
        table[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
