"""Zarr's own descriptions of an array, read and written as text: `.zarray` of version 2, `zarr.json` of version 3.

Version 2 as megatron-core 0.15.3 writes it: no compressor, no fill value, bfloat16 by its name (zarr has no such type;
megatron-core registers it). Version 3 with the sharding codec, whose index stands at the end of every file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transcoder.errors import Problem, printable, refuse
from transcoder.formats.grids import Grid, Sizes
from transcoder.spec import DTYPES, DType

V2_DTYPES = {
    "bfloat16": "bfloat16", "<f2": "float16", "<f4": "float32", "<f8": "float64", "|u1": "uint8", "|i1": "int8",
    "<i2": "int16", "<i4": "int32", "<i8": "int64", "|b1": "bool",
}  # fmt: skip
V2_NAMES = {ours: theirs for theirs, ours in V2_DTYPES.items()}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
INDEX_CODECS = [BYTES, {"name": "crc32c"}]
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def text(table: Mapping[str, Any]) -> bytes:
    """A description as bytes."""
    return json.dumps(table, sort_keys=True, indent=4).encode()


def zarray(grid: Grid) -> dict[str, Any]:
    """`.zarray` of an array."""
    fixed = {"compressor": None, "fill_value": None, "filters": None, "order": "C", "zarr_format": 2}
    return fixed | {"chunks": grid.cell, "dtype": V2_NAMES[grid.dtype.name], "shape": grid.shape}


def zarr_json(grid: Grid) -> dict[str, Any]:
    """`zarr.json` of an array."""
    sharding = {"chunk_shape": grid.inner, "codecs": [BYTES], "index_codecs": INDEX_CODECS, "index_location": "end"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": grid.shape,
        "data_type": grid.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid.cell}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
    }


class Description:
    """The fields of a description; one that is not what it must be raises InputError naming the array and field."""

    def __init__(self, table: object, key: str, file: str) -> None:
        self._key, self._file = key, file
        self.table = self.fields(table, "the description")

    def refuse(self, name: str, expected: str, found: object) -> Exception:
        """The error of a field."""
        problem = Problem(
            file=self._file, tensor=printable(self._key), expected=f"{name}: {expected}", found=f"{found!r:.80}"
        )
        return refuse("zarr", "an array is not described as it must be", [problem])

    def fields(self, value: object, name: str) -> dict[str, Any]:
        """A table."""
        if not isinstance(value, dict):
            raise self.refuse(name, "a table", value)
        return value

    def need(self, name: str, *expected: object, missing: object = None) -> Any:
        """The value of a field that can only have a few; `missing`: what its absence means."""
        found = self.table.get(name, missing)
        if not any(type(found) is type(value) and found == value for value in expected):
            raise self.refuse(name, " or ".join(map(str, expected)), found)
        return found

    def sizes(self, value: object, name: str, least: int, rank: int | None = None) -> Sizes:
        """Extents of `rank` dimensions, each at least `least`."""
        known = isinstance(value, list) and len(value) <= 32 and rank in (None, len(value))
        if not isinstance(value, list) or not known or not all(type(n) is int and least <= n < 1 << 62 for n in value):
            raise self.refuse(name, f"{'' if rank is None else f'{rank} '}sizes from {least}", value)
        return tuple(value)

    def dtype(self, name: str, known: Mapping[str, str]) -> DType:
        """An element type."""
        found = self.table.get(name)
        if not isinstance(found, str) or found not in known:
            raise self.refuse(name, "a type of weights, little-endian", found)
        return DTYPES[known[found]]

    def part(self, value: object, name: str, *names: str) -> tuple[str, dict[str, Any]]:
        """Name and configuration of an extension point: a codec, a chunk grid."""
        table = {"name": value} if isinstance(value, str) else self.fields(value, name)
        if table.get("name") not in names:
            raise self.refuse(name, " or ".join(names), table.get("name"))
        return str(table["name"]), self.fields(table.get("configuration", {}), name)

    def bare(self, value: object, name: str, *after: str) -> None:
        """Refuse codecs other than plain little-endian bytes, followed by those named."""
        codecs = value if isinstance(value, list) else []
        if len(codecs) != 1 + len(after):
            raise self.refuse(name, f"codecs {', '.join(('bytes', *after))}", value)
        _, fields = self.part(codecs[0], name, "bytes")
        if fields.get("endian", "little") != "little":
            raise self.refuse(name, "little-endian bytes", fields)
        for codec, wanted in zip(codecs[1:], after, strict=True):
            self.part(codec, name, wanted)


def read_v2(table: object, key: str, file: str) -> tuple[Grid, str]:
    """Grid of a `.zarray`, and what separates the indices in a chunk's name. Raises InputError."""
    found = Description(table, key, file)
    found.need("zarr_format", 2)
    found.need("compressor", None)
    found.need("filters", None, [])
    found.need("order", "C")
    shape = found.sizes(found.table.get("shape"), "shape", 1)
    cell = found.sizes(found.table.get("chunks"), "chunks", 1, len(shape))
    separator = found.need("dimension_separator", ".", "/", missing=".")
    return Grid(found.dtype("dtype", V2_DTYPES), shape, cell, cell), separator


def read_v3(table: object, key: str, file: str) -> tuple[Grid, str, str]:
    """Grid of a `zarr.json`, its separator, and where a file's index is: "start", "end" or "" without sharding."""
    found = Description(table, key, file)
    found.need("zarr_format", 3)
    found.need("node_type", "array")
    if found.table.get("storage_transformers"):
        raise found.refuse("storage_transformers", "none", found.table["storage_transformers"])
    shape = found.sizes(found.table.get("shape"), "shape", 1)
    _, fields = found.part(found.table.get("chunk_grid"), "chunk_grid", "regular")
    cell = found.sizes(fields.get("chunk_shape"), "chunk_shape", 1, len(shape))
    _, fields = found.part(found.table.get("chunk_key_encoding"), "chunk_key_encoding", "default")
    separator = fields.get("separator", "/")
    if separator not in ("/", "."):
        raise found.refuse("separator", "/ or .", separator)
    dtype = found.dtype("data_type", {name: name for name in DTYPES})
    codecs = found.table.get("codecs")
    if not isinstance(codecs, list) or len(codecs) != 1 or not _is_sharding(codecs[0]):
        found.bare(codecs, "codecs")
        return Grid(dtype, shape, cell, cell), separator, ""
    _, fields = found.part(codecs[0], "codecs", "sharding_indexed")
    inner = found.sizes(fields.get("chunk_shape"), "inner chunk_shape", 1, len(shape))
    if any(size % step for size, step in zip(cell, inner, strict=True)):
        raise found.refuse("inner chunk_shape", f"divisors of {list(cell)}", list(inner))
    found.bare(fields.get("codecs"), "inner codecs")
    found.bare(fields.get("index_codecs"), "index_codecs", "crc32c")
    location = fields.get("index_location", "end")
    if location not in ("start", "end"):
        raise found.refuse("index_location", "start or end", location)
    return Grid(dtype, shape, cell, inner), separator, location


def _is_sharding(codec: object) -> bool:
    return isinstance(codec, dict) and codec.get("name") == "sharding_indexed"
