"""Megatron checkpoints whose tensors are zarr arrays, a folder each, read in place: `zarr` of megatron-core, `zarr3`.

Zarr reads an absent chunk as the fill value, and megatron-core fills nothing in: here it is damage. Every file that an
array needs must be there with all its bytes; compressed arrays are refused by name.
"""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import Problem, printable, reason, refuse
from transcoder.formats import shards
from transcoder.formats.grids import Grid, Sizes, parts
from transcoder.formats.statefiles import backend_notes, dialect_notes, read_common
from transcoder.formats.store import Item, LeftOut, Store, training_state
from transcoder.formats.zarr_documents import read_v2, read_v3
from transcoder.hfconfig import parse_json
from transcoder.paths import extent, read_small, stays_inside
from transcoder.spec import Box, Chunk, DType, TensorSpec

DOCUMENT_LIMIT = 1 << 20  # bytes
CHUNK_LIMIT = 1 << 18  # of one array; the largest published mixture has 125,000
SHOWN = 20  # problems of one array
Places = tuple[tuple[Box, Item], ...]
DOCUMENTS = {"zarr": ".zarray", "zarr3": "zarr.json"}


@dataclass(frozen=True)
class Zarr(Store):
    """An opened checkpoint of these formats."""

    documents: tuple[str, ...] = ()
    form = "zarr"

    @property
    def index(self) -> tuple[str, ...]:
        """metadata.json and the description of every array."""
        return ("metadata.json", *self.documents)

    @cached_property
    def catalog(self) -> dict[str, TensorSpec]:
        """Every weight tensor with its payload places."""
        return {key: _spec(key, *tensor) for key, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Zarr3(Zarr):
    """Of version 3."""

    form = "zarr3"


def _spec(key: str, dtype: DType, shape: Sizes, places: Places) -> TensorSpec:
    return TensorSpec(key, dtype, shape, tuple(Chunk(box, item.file, item.offset, item.length) for box, item in places))


def open_zarr(path: Path, form: str) -> Zarr:
    """The checkpoint in an iteration directory. form: `zarr` or `zarr3`. Raises InputError for what is not whole."""
    notes = list(backend_notes(path, form))
    common = read_common(path)
    store = _opened(path, form, common)
    notes += dialect_notes(common.get("content_metadata"), store.tensors)
    return replace(store, warnings=tuple(notes))


def _opened(path: Path, form: str, common: Mapping[str, Any]) -> Zarr:
    tensors: dict[str, tuple[DType, Sizes, Places]] = {}
    objects: dict[str, Item] = {}
    ignored = defaultdict[str, LeftOut](LeftOut)
    for folder in _folders(path):
        key, document = folder.name, folder / DOCUMENTS[form]
        found = {f"{key}/{file.stem}": Item(f"{key}/{file.name}", 0, file.stat().st_size) for file in _objects(folder)}
        if not there(document) and not found:
            continue
        if prefix := training_state(key):
            ignored[prefix] += LeftOut(1, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        elif found:
            objects |= found
        else:
            tensors[key] = _array(path, key, form)
    if not tensors:
        problem = Problem(expected=f"a folder with {DOCUMENTS[form]} for every tensor", found="none")
        raise refuse("zarr", f"{path} holds no arrays", [problem])
    documents = tuple(f"{key}/{DOCUMENTS[form]}" for key in tensors)
    return {"zarr": Zarr, "zarr3": Zarr3}[form](path, tensors, objects, dict(ignored), common, (), documents)


def _folders(path: Path) -> Iterator[Path]:
    """The folders that may be arrays, none of which leads out of the checkpoint."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            if not stays_inside(entry, entry.resolve(), path):
                problem = Problem(file=entry.name, found="a link that leads out of the checkpoint")
                raise refuse("link", "a folder of the checkpoint is a link", [problem])
            yield entry


def _objects(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard_*.pt"))


def _array(root: Path, key: str, form: str) -> tuple[DType, Sizes, Places]:
    """Type, shape and the place of every chunk of an array."""
    name = f"{key}/{DOCUMENTS[form]}"
    table = _document(root, name, key)
    location = ""
    if form == "zarr":
        grid, separator = read_v2(table, key, name)
    else:
        grid, separator, location = read_v3(table, key, name)
    _check_count(prod(grid.counts) * (prod(grid.cell) // prod(grid.inner)), key, name)
    places = list[tuple[Box, Item]]()
    problems = list[Problem]()
    for place in grid.files():
        names = map(str, place) if form == "zarr" else ("c", *map(str, place))
        file = f"{key}/{separator.join(names) or '0'}"
        try:
            for cell in _cells(root, key, file, grid, place, location):
                places.append(cell)
                _check_count(len(places), key, name)
        except _DamagedError as error:
            problems.append(error.problem)
            if len(problems) == SHOWN:
                break
    if problems:
        raise refuse("chunk", "chunks of an array are missing or damaged", problems)
    return grid.dtype, grid.shape, tuple(places)


def _document(root: Path, name: str, key: str) -> Any:
    try:
        return parse_json(read_small(root / name, DOCUMENT_LIMIT, root))
    except (OSError, ValueError, RecursionError) as error:
        problem = Problem(file=name, tensor=printable(key), message=reason(error))
        raise refuse("zarr", "the description of an array cannot be read", [problem]) from error


def _check_count(count: int, key: str, name: str) -> None:
    """Refuse grids that no folder holds before anything is done for each of their cells."""
    if count > CHUNK_LIMIT:
        problem = Problem(file=name, tensor=printable(key), expected=f"at most {CHUNK_LIMIT} chunks", found=f"{count}")
        raise refuse("zarr", "an array has too many chunks", [problem])


class _DamagedError(Exception):
    """What is wrong with one file of an array."""

    def __init__(self, key: str, file: str, expected: str, found: str) -> None:
        hint = "zarr would read it as if it were filled: copy the file again"
        self.problem = Problem(file=file, tensor=printable(key), expected=expected, found=found, hint=hint)


def _cells(root: Path, key: str, file: str, grid: Grid, place: Sizes, location: str) -> Iterator[tuple[Box, Item]]:
    """Every contiguous box that a file holds of an array, with its place."""
    size, payload = grid.dtype.size, prod(grid.cell) * grid.dtype.size
    found = _size_of(root, key, file, f"a chunk of {payload} bytes")
    if location:
        index = _index(root, key, file, grid, location, found)
    elif found != payload:
        raise _DamagedError(key, file, f"{payload} bytes", f"{found} bytes")
    else:
        index = [(0, payload)]
    for number, (box, (start, _)) in enumerate(zip(grid.cells(place), index, strict=True)):
        for part, offset in parts(box, grid.shape, size):
            if start == shards.ABSENT:
                raise _DamagedError(key, file, f"inner chunk {number}", "none in the index")
            yield part, Item(file, start + offset, prod(high - low for low, high in part) * size)


def _size_of(root: Path, key: str, file: str, expected: str) -> int:
    """Bytes of a file of an array that is there and does not lead out of the checkpoint."""
    path = root / file
    try:
        facts = path.lstat()
        if stat.S_ISLNK(facts.st_mode):
            if not stays_inside(path, path.resolve(strict=True), root):
                raise _DamagedError(key, file, expected, "a link that leads out of the checkpoint")
            facts = path.stat()
    except FileNotFoundError as error:
        raise _DamagedError(key, file, expected, "no such file") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _DamagedError(key, file, expected, reason(error)) from error
    if not stat.S_ISREG(facts.st_mode):
        raise _DamagedError(key, file, expected, "not a regular file")
    return facts.st_size


def _index(root: Path, key: str, file: str, grid: Grid, location: str, size: int) -> list[tuple[int, int]]:
    """Offset and length of every inner chunk; those beyond the array may be absent."""
    count = prod(grid.cell) // prod(grid.inner)
    length = count * shards.ENTRY + shards.CHECKSUM
    if size < length:
        raise _DamagedError(key, file, f"an index of {length} bytes", f"{size} bytes")
    view = extent(root / file, root=root)
    entries = shards.parse(bytes(view[:length] if location == "start" else view[size - length :]))
    if entries is None:
        raise _DamagedError(key, file, "an index with its own checksum", "another one")
    payloads = (length, size) if location == "start" else (0, size - length)
    return _checked(key, file, list(entries), grid, payloads)


def _checked(
    key: str, file: str, entries: list[tuple[int, int]], grid: Grid, payloads: tuple[int, int]
) -> list[tuple[int, int]]:
    """The entries of an index, each inside the file's payloads and none over another one."""
    end = payloads[0]
    for offset, length in sorted(entry for entry in entries if entry != (shards.ABSENT, shards.ABSENT)):
        if length != grid.inner_bytes or offset < end or offset + length > payloads[1]:
            expected = f"{grid.inner_bytes} bytes between {end} and {payloads[1]}"
            raise _DamagedError(key, file, expected, f"a chunk of {length} bytes at {offset}")
        end = offset + length
    return entries
