"""Megatron `torch_dist` checkpoints, written in place: every item's place is known before the first byte moves.

A rank has two files, `__<rank>_0.distcp` and `__<rank>_1.distcp`; each tensor belongs to one of the two sets, balanced
by bytes in key order, so that workers own files. All `_extra_state` entries point at one blob, `torch.save([None])`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from isal.isal_zlib import crc32, crc32_combine

from transcoder.disk import PIECE, File, close, make_durable, sized, start_flush, sync_folder, write_all
from transcoder.formats.archive import TensorItem, archive, tensor_item
from transcoder.formats.pickled import Global, Made, Record, dumps
from transcoder.spec import Box, Chunk, DType, TensorSpec, box_shape
from transcoder.sums import Sums

DCP = "torch.distributed.checkpoint"
SETS = 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to store: its chunks as (box, rank, order), order being the place in the file (the layer)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[tuple[Box, int, int], ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Every chunk with its file and offset, every file with its size, and the objects' one blob."""

    catalog: Mapping[str, TensorSpec]
    items: Mapping[tuple[str, Box], tuple[str, int, int]]  # file, offset and length of the whole item
    sizes: Mapping[str, int]
    sets: Mapping[str, int]
    objects: tuple[str, ...]
    blob: bytes
    object_items: Mapping[str, tuple[str, int, int]]  # file, offset and length


@lru_cache(maxsize=4096)
def _container(dtype: DType, shape: tuple[int, ...]) -> TensorItem:
    return tensor_item(dtype, shape)


def place(tensors: Iterable[Wanted], objects: Iterable[str], ranks: int) -> Placement:
    """A file and an offset for every chunk. Pure: nothing is written. ranks: how many ranks write files."""
    wanted = sorted(tensors, key=lambda tensor: tensor.name)
    sets = balance({tensor.name: prod(tensor.shape) * tensor.dtype.size for tensor in wanted}, SETS)
    blob = archive(dumps([None]))
    sizes = {f"__{rank}_{number}.distcp": 0 for rank in range(ranks) for number in range(SETS)}
    sizes["__0_0.distcp"] = len(blob)
    items: dict[tuple[str, Box], tuple[str, int, int]] = {}
    chunks: dict[str, dict[Box, Chunk]] = {tensor.name: {} for tensor in wanted}
    ordered = sorted((order, n, i) for n, tensor in enumerate(wanted) for i, (_, _, order) in enumerate(tensor.chunks))
    for _, n, i in ordered:
        tensor, (box, rank, _) = wanted[n], wanted[n].chunks[i]
        file = f"__{rank}_{sets[tensor.name]}.distcp"
        item = _container(tensor.dtype, box_shape(box))
        items[tensor.name, box] = file, sizes[file], item.length
        chunks[tensor.name][box] = Chunk(box, file, sizes[file] + item.payload_offset, item.payload_size)
        sizes[file] += item.length
    catalog = {
        t.name: TensorSpec(t.name, t.dtype, t.shape, tuple(chunks[t.name][box] for box, _, _ in t.chunks))
        for t in wanted
    }
    keys = tuple(objects)
    return Placement(catalog, items, sizes, sets, keys, blob, dict.fromkeys(keys, ("__0_0.distcp", 0, len(blob))))


def balance(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Each name to one of `count` sets: in order, always to the set with the fewest bytes.

    >>> balance({"a": 3, "b": 1, "c": 1}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    totals, found = [0] * count, {}
    for name, size in sizes.items():
        found[name] = totals.index(min(totals))
        totals[found[name]] += size
    return found


class TorchDistWriter:
    """Writes payload ranges in any order; a chunk's container is closed when its payload is complete.

    flush: send every closed container to disk at once, so that little is left for `finish` to wait for.
    """

    def __init__(self, folder: Path, placement: Placement, flush: bool = False) -> None:
        self.folder, self.placement, self.flush = folder, placement, flush
        self.crcs: dict[tuple[str, Box], int] = {}
        self._sums = Sums()
        self._begun: dict[tuple[str, Box], object] = {}  # chunks whose prefix is written
        self._files: dict[str, File] = {}

    def prepare(self) -> None:
        """Make room for every file. Raises OSError when the disk is full."""
        for name, size in self.placement.sizes.items():
            self._files[name] = sized(self.folder / name, size)
        write_all(self._files["__0_0.distcp"], memoryview(self.placement.blob), 0)

    def write(self, key: str, chunk: Chunk, start: int, data: memoryview) -> int:
        """Store payload bytes [start, start + len(data)) of a chunk, each byte exactly once. Returns their CRC-32."""
        file, crc = self._files[chunk.file], 0
        for begin in range(0, len(data), PIECE):
            piece = data[begin : begin + PIECE]
            write_all(file, piece, chunk.offset + start + begin)
            crc = crc32(piece, crc)
        self.passed(key, chunk, start, len(data), crc)
        return crc

    def passed(self, key: str, chunk: Chunk, start: int, count: int, crc: int) -> None:
        """Payload bytes with this CRC-32 are in their place."""
        if self._begun.setdefault((key, chunk.box), mark := object()) is mark:
            item = _container(self.placement.catalog[key].dtype, box_shape(chunk.box))
            write_all(self._files[chunk.file], memoryview(item.prefix), chunk.offset - item.payload_offset)
        whole = self._sums.add(key, chunk, start, count, crc)
        if whole is not None:
            self._close(key, chunk, whole)

    def _close(self, key: str, chunk: Chunk, crc: int) -> None:
        self.crcs[key, chunk.box] = crc
        del self._begun[key, chunk.box]
        item = _container(self.placement.catalog[key].dtype, box_shape(chunk.box))
        file = self._files[chunk.file]
        write_all(file, memoryview(item.suffix(crc)), chunk.offset + chunk.nbytes)
        if self.flush:
            start_flush(file, chunk.offset - item.payload_offset, item.length)

    def sync(self) -> None:
        """Make everything written durable. Raises OSError."""
        for file in self._files.values():
            make_durable(file)
        sync_folder(self.folder)

    def finish(self) -> dict[str, str]:
        """The CRC-32 of every file, as a manifest has it. Raises RuntimeError if a chunk is incomplete."""
        open_chunks = [key for key in self.placement.items if key not in self.crcs]
        if open_chunks:
            raise RuntimeError(f"{len(open_chunks)} chunks are incomplete, first {open_chunks[0]}")
        return {name: f"crc32:{crc:08x}" for name, crc in self._file_crcs().items()}

    def close(self) -> None:
        """Release the file descriptors."""
        while self._files:
            close(self._files.popitem()[1])

    def _file_crcs(self) -> dict[str, int]:
        found = dict.fromkeys(self.placement.sizes, 0)
        found["__0_0.distcp"] = crc32(self.placement.blob)
        for (key, box), (file, _, _) in self.placement.items.items():  # ascending offsets within each file
            item = _container(self.placement.catalog[key].dtype, box_shape(box))
            crc = self.crcs[key, box]
            for part, size in ((crc32(item.prefix), len(item.prefix)), (crc, item.payload_size)):
                found[file] = crc32_combine(found[file], part, size)
            suffix = item.suffix(crc)
            found[file] = crc32_combine(found[file], crc32(suffix), len(suffix))
        return found


# One object per name: the pickler finds it by identity.
METADATA = Global(f"{DCP}.metadata", "Metadata")
BYTES_OBJECT = Global(f"{DCP}.metadata", "BytesStorageMetadata")
PROPERTIES = Global(f"{DCP}.metadata", "TensorProperties")
CHUNK = Global(f"{DCP}.metadata", "ChunkStorageMetadata")
TENSOR = Global(f"{DCP}.metadata", "TensorStorageMetadata")
INDEX = Global(f"{DCP}.metadata", "MetadataIndex")
INFO = Global(f"{DCP}.filesystem", "_StorageInfo")
SIZE = Global("torch", "Size")


def metadata(placement: Placement) -> bytes:
    """The bytes of `.metadata`: torch's Metadata with the two attributes that loaders need."""
    objects, stored = len(placement.objects), placement.catalog.values()
    tensors = Made(objects + len(stored), lambda: _tensors(placement))
    storage = Made(objects + sum(len(spec.chunks) for spec in stored), lambda: _storage(placement))
    return dumps(Record(METADATA, (tensors, None, storage)))


def _tensors(placement: Placement) -> Iterator[tuple[object, object]]:
    for key, spec in placement.catalog.items():
        yield key, _tensor_metadata(spec)
    for key in placement.objects:
        yield key, Record(BYTES_OBJECT, ())


def _storage(placement: Placement) -> Iterator[tuple[object, object]]:
    for key, spec in placement.catalog.items():
        for chunk in spec.chunks:
            yield _index(key, tuple(start for start, _ in chunk.box)), _info(*placement.items[key, chunk.box])
    for key in placement.objects:
        yield _index(key, None), _info(*placement.object_items[key])


def _tensor_metadata(spec: TensorSpec) -> Record:
    properties = Record(PROPERTIES, (Global("torch", spec.dtype.name),))
    chunks = [
        Record(CHUNK, (_size(start for start, _ in chunk.box), _size(box_shape(chunk.box)))) for chunk in spec.chunks
    ]
    return Record(TENSOR, (properties, _size(spec.shape), chunks))


def _size(values: Iterable[int]) -> Record:
    return Record(SIZE, (tuple(values),))


def _index(key: str, offset: tuple[int, ...] | None) -> Record:
    return Record(INDEX, (key, None if offset is None else _size(offset)))


def _info(file: str, offset: int, length: int) -> Record:
    return Record(INFO, (file, offset, length))
