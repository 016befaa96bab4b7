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

from transcoder.disk import File, close, make_durable, sized, start_flush, sync_folder, write_all
from transcoder.formats.archive import TensorItem, archive, tensor_item
from transcoder.formats.forms import HOLE, Filled, Form, Sizes
from transcoder.formats.mcore import metadata_json
from transcoder.formats.pickled import Global, Made, Record, dumped, dumps
from transcoder.formats.placement import SETS, Placement, Wanted, balance
from transcoder.spec import DTYPES, Box, Chunk, DType, TensorSpec, box_shape
from transcoder.sums import Sums, write_summed

DCP = "torch.distributed.checkpoint"


Item = tuple[str, int, int]  # file, offset and length of a container


@dataclass(frozen=True)
class TorchDistPlacement(Placement):
    """Every chunk with its item's place, and the objects' one blob."""

    form = "torch_dist"
    items: Mapping[tuple[str, Box], Item]  # of chunks whose containers are not as we write them
    blob: bytes
    object_items: Mapping[str, Item]

    def item(self, spec: TensorSpec, chunk: Chunk) -> Item:
        """The container of a chunk of `spec`."""
        if self.items:
            return self.items[spec.name, chunk.box]
        container = _around(spec.dtype, chunk.box)
        return chunk.file, chunk.offset - container.payload_offset, container.length

    def chunks(self) -> Iterator[tuple[TensorSpec, Chunk]]:
        """Every chunk and whose it is."""
        return ((spec, chunk) for spec in self.catalog.values() for chunk in spec.chunks)

    def writer(self, folder: Path, flush: bool) -> TorchDistWriter:
        """What writes the payload files into `folder`."""
        return TorchDistWriter(folder, self, flush)

    def index(self) -> dict[str, bytes | memoryview]:
        """`.metadata` and metadata.json."""
        return {".metadata": metadata(self), "metadata.json": metadata_json(self.form)}

    def confirm(self, folder: Path) -> None:
        """Nothing: what could read it is not needed to write it."""


def _around(dtype: DType, box: Box) -> TensorItem:
    """The container of a chunk."""
    return _container(dtype.name, box_shape(box))


@lru_cache(maxsize=4096)
def _container(dtype: str, shape: tuple[int, ...]) -> TensorItem:
    return tensor_item(DTYPES[dtype], shape)


def place(tensors: Iterable[Wanted], objects: Iterable[str], ranks: int) -> TorchDistPlacement:
    """A file and an offset for every chunk. Pure: nothing is written. ranks: how many ranks write files."""
    wanted = sorted(tensors, key=lambda tensor: tensor.name)
    sets = balance({tensor.name: prod(tensor.shape) * tensor.dtype.size for tensor in wanted}, SETS)
    blob = archive(dumps([None]))
    sizes = {f"__{rank}_{number}.distcp": 0 for rank in range(ranks) for number in range(SETS)}
    sizes["__0_0.distcp"] = len(blob)
    names = [[f"__{rank}_{number}.distcp" for number in range(SETS)] for rank in range(ranks)]
    boxes: dict[Box, Box] = {}  # one object for all chunks that have it
    chunks: list[dict[int, Chunk]] = [{} for _ in wanted]
    ordered = sorted((order, n, i) for n, tensor in enumerate(wanted) for i, (_, _, order) in enumerate(tensor.chunks))
    for _, n, i in ordered:
        tensor, (box, rank, _) = wanted[n], wanted[n].chunks[i]
        file, item = names[rank][sets[tensor.name]], _around(tensor.dtype, box)
        start = sizes[file] + item.payload_offset
        chunks[n][i] = Chunk(boxes.setdefault(box, box), file, start, item.payload_size)
        sizes[file] += item.length
    catalog = {
        t.name: TensorSpec(t.name, t.dtype, t.shape, tuple(chunks[n][i] for i in range(len(t.chunks))))
        for n, t in enumerate(wanted)
    }
    keys = tuple(objects)
    places = dict.fromkeys(keys, ("__0_0.distcp", 0, len(blob)))
    return TorchDistPlacement(catalog, sizes, sets, keys, {}, blob, places)


class TorchDistWriter:
    """Writes payload ranges in any order; a chunk's container is closed when its payload is complete.

    flush: send every closed container to disk at once, so that little is left for `finish` to wait for.
    """

    def __init__(self, folder: Path, placement: TorchDistPlacement, flush: bool = False) -> None:
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
        crc = write_summed(self._files[chunk.file], data, chunk.offset + start)
        self.passed(key, chunk, start, len(data), crc)
        return crc

    def passed(self, key: str, chunk: Chunk, start: int, count: int, crc: int) -> None:
        """Payload bytes with this CRC-32 are in their place."""
        if self._begun.setdefault((key, chunk.box), mark := object()) is mark:
            item = _around(self.placement.catalog[key].dtype, chunk.box)
            write_all(self._files[chunk.file], memoryview(item.prefix), chunk.offset - item.payload_offset)
        whole = self._sums.add(key, chunk, start, count, crc)
        if whole is not None:
            self._close(key, chunk, whole)

    def _close(self, key: str, chunk: Chunk, crc: int) -> None:
        self.crcs[key, chunk.box] = crc
        del self._begun[key, chunk.box]
        item = _around(self.placement.catalog[key].dtype, chunk.box)
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
        places = ((spec.name, chunk.box) for spec, chunk in self.placement.chunks())
        open_chunks = [place for place in places if place not in self.crcs]
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
        for spec, chunk in sorted(self.placement.chunks(), key=lambda pair: pair[1].offset):
            item, file = _around(spec.dtype, chunk.box), chunk.file
            crc = self.crcs[spec.name, chunk.box]
            for part, size in ((crc32(item.prefix), len(item.prefix)), (crc, item.payload_size)):
                found[file] = crc32_combine(found[file], part, size)
            suffix = item.suffix(crc)
            found[file] = crc32_combine(found[file], crc32(suffix), len(suffix))
        return found


# One object per name: the pickler finds it by identity.
METADATA = Global(f"{DCP}.metadata", "Metadata")
OBJECT = Form(Record(Global(f"{DCP}.metadata", "BytesStorageMetadata"), ()))
PROPERTIES = Global(f"{DCP}.metadata", "TensorProperties")
TENSOR = Global(f"{DCP}.metadata", "TensorStorageMetadata")
SIZE = Global("torch", "Size")
SIZES = Record(SIZE, (HOLE,))
CHUNK = Form(Record(Global(f"{DCP}.metadata", "ChunkStorageMetadata"), (SIZES, SIZES)))
INDEX = Form(Record(Global(f"{DCP}.metadata", "MetadataIndex"), (HOLE, SIZES)))
OBJECT_INDEX = Form(Record(Global(f"{DCP}.metadata", "MetadataIndex"), (HOLE, None)))
INFO = Form(Record(Global(f"{DCP}.filesystem", "_StorageInfo"), (HOLE, HOLE, HOLE)))


def metadata(placement: TorchDistPlacement) -> memoryview:
    """The bytes of `.metadata`: torch's Metadata with the two attributes that loaders need."""
    objects, stored = len(placement.objects), placement.catalog.values()
    tensors = Made(objects + len(stored), lambda: _tensors(placement))
    storage = Made(objects + sum(len(spec.chunks) for spec in stored), lambda: _storage(placement))
    return dumped(Record(METADATA, (tensors, None, storage)))


def _tensors(placement: TorchDistPlacement) -> Iterator[tuple[object, object]]:
    for key, spec in placement.catalog.items():
        yield key, _tensor_metadata(spec)
    for key in placement.objects:
        yield key, Filled(OBJECT, ())


def _storage(placement: TorchDistPlacement) -> Iterator[tuple[object, object]]:
    for spec, chunk in placement.chunks():
        yield Filled(INDEX, (spec.name, _starts(chunk.box))), Filled(INFO, placement.item(spec, chunk))
    for key in placement.objects:
        yield Filled(OBJECT_INDEX, (key,)), Filled(INFO, placement.object_items[key])


def _tensor_metadata(spec: TensorSpec) -> Record:
    properties = Record(PROPERTIES, (Global("torch", spec.dtype.name),))
    chunks = [Filled(CHUNK, (_starts(chunk.box), Sizes(box_shape(chunk.box)))) for chunk in spec.chunks]
    return Record(TENSOR, (properties, Record(SIZE, (spec.shape,)), chunks))


def _starts(box: Box) -> Sizes:
    return Sizes([start for start, _ in box])
