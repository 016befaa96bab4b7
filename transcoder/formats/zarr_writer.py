"""Zarr arrays, written in place: what a file holds and where is known before the first byte moves.

`zarr` (version 2) is what megatron-core up to 0.15 loads: one file for every part of the grid, parts near 64 MiB at
most. `zarr3` is for other readers: a file for every part of the grid, in which smaller chunks can be read alone.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zlib import crc32 as crc32_of

from isal.isal_zlib import crc32_combine

from transcoder.disk import File, close, opened, sized, start_flush, sync_folders, write_all
from transcoder.formats import shards, zarr_documents, zarr_witness
from transcoder.formats.archive import archive
from transcoder.formats.grids import Grid, cut, regular
from transcoder.formats.mcore import metadata_json
from transcoder.formats.pickled import dumps
from transcoder.formats.placement import SETS, Placement, Wanted, balance
from transcoder.spec import Box, Chunk, TensorSpec
from transcoder.sums import Sums, write_summed

CAPS = {"zarr": 64 << 20, "zarr3": 16 << 20}  # bytes of what is read at once
OPEN = 32  # descriptors of one thread


@dataclass(frozen=True)
class ZarrPlacement(Placement):
    """Every array's grid; version 3 has an index behind the chunks of every file."""

    form = "zarr"
    grids: Mapping[str, Grid]

    def writer(self, folder: Path, flush: bool) -> ZarrWriter:
        """What writes the payload files into `folder`."""
        return ZarrWriter(folder, self, flush)

    def tail(self, key: str) -> bytes:
        """What stands behind the payloads in every file of an array."""
        return b""

    def index(self) -> Mapping[str, bytes | memoryview]:
        """Every `.zarray`, the objects, a file each, and metadata.json."""
        arrays = {f"{key}/.zarray": zarr_documents.text(zarr_documents.zarray(g)) for key, g in self.grids.items()}
        objects = dict.fromkeys((f"{key}.pt" for key in self.objects), archive(dumps(None)))
        return {**arrays, **objects, "metadata.json": metadata_json(self.form)}

    def confirm(self, folder: Path) -> None:
        """Let tensorstore open every array. Raises RuntimeError."""
        zarr_witness.confirm(self.form, folder, self.grids, self.index())


@dataclass(frozen=True)
class Zarr3Placement(ZarrPlacement):
    """The arrays of a version 3 group; objects, which only megatron-core asks for, have no place in it."""

    form = "zarr3"

    def tail(self, key: str) -> bytes:
        """The index of a shard."""
        grid = self.grids[key]
        return shards.emit(prod(grid.cell) // prod(grid.inner), grid.inner_bytes)

    def index(self) -> Mapping[str, bytes | memoryview]:
        """Every `zarr.json`, that of the group included, and metadata.json."""
        arrays = {f"{key}/zarr.json": zarr_documents.text(zarr_documents.zarr_json(g)) for key, g in self.grids.items()}
        group = {"zarr.json": zarr_documents.text(zarr_documents.GROUP)}
        return {**arrays, **group, "metadata.json": metadata_json(self.form)}


def place(form: str, tensors: Iterable[Wanted], objects: Iterable[str]) -> ZarrPlacement:
    """A file and an offset for every chunk. Pure: nothing is written. form: `zarr` or `zarr3`. Raises UsageError."""
    zarr_witness.check_installed(form)
    wanted = sorted(tensors, key=lambda tensor: tensor.name)
    grids = {tensor.name: _grid(form, tensor) for tensor in wanted}
    sets = balance({tensor.name: prod(tensor.shape) * tensor.dtype.size for tensor in wanted}, SETS)
    catalog = {
        key: TensorSpec(key, grid.dtype, grid.shape, tuple(_chunks(form, key, grid))) for key, grid in grids.items()
    }
    made = {"zarr": ZarrPlacement, "zarr3": Zarr3Placement}[form](catalog, {}, sets, tuple(objects), grids)
    sizes: dict[str, int] = {}
    for key, spec in catalog.items():
        cell = prod(grids[key].cell) * spec.dtype.size + len(made.tail(key))
        sizes |= dict.fromkeys((chunk.file for chunk in spec.chunks), cell)
    return type(made)(catalog, sizes, sets, made.objects, grids)


def _grid(form: str, tensor: Wanted) -> Grid:
    cell = regular([box for box, _, _ in tensor.chunks], tensor.shape)
    inner = cut(cell, CAPS[form] // tensor.dtype.size)
    return Grid(tensor.dtype, tensor.shape, inner if form == "zarr" else cell, inner)


def _chunks(form: str, key: str, grid: Grid) -> Iterator[Chunk]:
    for place in grid.files():
        file = f"{key}/{'.'.join(map(str, place))}" if form == "zarr" else "/".join((key, "c", *map(str, place)))
        for number, box in enumerate(grid.cells(place)):
            yield Chunk(box, file, number * grid.inner_bytes, grid.inner_bytes)


class ZarrWriter:
    """Writes payload ranges in any order. flush: send every complete chunk to disk at once."""

    def __init__(self, folder: Path, placement: ZarrPlacement, flush: bool = False) -> None:
        self.folder, self.placement, self.flush = folder, placement, flush
        self.crcs: dict[tuple[str, Box], int] = {}
        self._sums, self._files = Sums(), Descriptors(folder, placement.sizes)

    def prepare(self) -> None:
        """Make room for every file. Raises OSError when the disk is full."""
        for name, size in self.placement.sizes.items():
            close(sized(self.folder / name, size))
            self._files.touch(name)
        if self.flush:
            sync_folders(self.folder)

    def _names(self) -> Iterator[tuple[str, list[str]]]:
        """Every array with the names of its files."""
        for key, spec in self.placement.catalog.items():
            yield key, list(dict.fromkeys(chunk.file for chunk in spec.chunks))

    def write(self, key: str, chunk: Chunk, start: int, data: memoryview) -> int:
        """Store payload bytes [start, start + len(data)) of a chunk, each byte exactly once. Returns their CRC-32."""
        file = self._files[chunk.file]
        crc = write_summed(file, data, chunk.offset + start)
        self._files.touch(chunk.file)
        self.passed(key, chunk, start, len(data), crc)
        if self.flush:
            start_flush(file, chunk.offset + start, len(data))
        return crc

    def passed(self, key: str, chunk: Chunk, start: int, count: int, crc: int) -> None:
        """Payload bytes with this CRC-32 are in their place."""
        whole = self._sums.add(key, chunk, start, count, crc)
        if whole is not None:
            self.crcs[key, chunk.box] = whole
            self._end(key, chunk)

    def _end(self, key: str, chunk: Chunk) -> None:
        """Write what stands behind the payloads of a file, with the last of them."""
        tail, end = self.placement.tail(key), chunk.offset + chunk.nbytes
        if tail and end + len(tail) == self.placement.sizes[chunk.file]:
            write_all(self._files[chunk.file], memoryview(tail), end)
            self._files.touch(chunk.file)

    def sync(self) -> None:
        """Make everything written durable. Raises OSError."""
        for name in self._files.take():
            file = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fdatasync(file)
            finally:
                os.close(file)

    def finish(self) -> dict[str, str]:
        """The CRC-32 of every file, as a manifest has it. Raises RuntimeError if a chunk is incomplete."""
        found: dict[str, int] = {}
        for key, spec in self.placement.catalog.items():
            for chunk in spec.chunks:
                if (key, chunk.box) not in self.crcs:
                    raise RuntimeError(f"a chunk is incomplete: {key} {chunk.box}")
                found[chunk.file] = crc32_combine(found.get(chunk.file, 0), self.crcs[key, chunk.box], chunk.nbytes)
        for key, names in self._names():
            tail = self.placement.tail(key)
            for name in names:
                found[name] = crc32_combine(found[name], crc32_of(tail), len(tail))
        return {name: f"crc32:{crc:08x}" for name, crc in found.items()}

    def close(self) -> None:
        """Release the file descriptors."""
        self._files.close()


class Descriptors:
    """Files of a folder, open for writing, a few at a time in each thread: a checkpoint can have 100,000."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._folder, self._sizes, self._lock, self._local = folder, sizes, threading.Lock(), threading.local()
        self._opened: list[OrderedDict[str, File]] = []
        self._touched: set[str] = set()

    def __getitem__(self, name: str) -> File:
        mine = self._mine()
        if name not in mine:
            if len(mine) >= OPEN:
                close(mine.popitem(last=False)[1])
            mine[name] = opened(self._folder / name, self._sizes[name])
        mine.move_to_end(name)
        return mine[name]

    def _mine(self) -> OrderedDict[str, File]:
        if not hasattr(self._local, "files"):
            self._local.files = OrderedDict[str, File]()
            with self._lock:
                self._opened.append(self._local.files)
        files: OrderedDict[str, File] = self._local.files
        return files

    def touch(self, name: str) -> None:
        """Something was written to a file."""
        with self._lock:
            self._touched.add(name)

    def take(self) -> list[str]:
        """Names of the files that were written to since the last call."""
        with self._lock:
            touched, self._touched = self._touched, set()
        return sorted(touched)

    def close(self) -> None:
        """Close them all; no thread may use one any more."""
        for files in self._opened:
            while files:
                close(files.popitem()[1])
