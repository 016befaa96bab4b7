"""Megatron `torch_dist` checkpoints, read without torch: `.metadata` and the `.distcp` items it points at.

Classes and attributes as in torch/distributed/checkpoint/metadata.py (2.13) and megatron-core 0.16. Everything that the
loaders do not check is checked here: holes, overlaps, dtypes, byte ranges; payload checksums while bytes pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from transcoder.errors import Problem, printable, refuse
from transcoder.formats.archive import read_pickle, read_tensor, tensor_item
from transcoder.formats.pickles import Global, Pairs, Record, measured
from transcoder.formats.statefiles import backend_notes, dialect_notes, plain, read_common
from transcoder.formats.store import Item, LeftOut, Store, training_state
from transcoder.paths import Extent, extent, map_file
from transcoder.remote.frames import Frame, ahead, framed
from transcoder.spec import DTYPES, Box, Chunk, DType, TensorSpec, box_shape

METADATA_LIMIT = 1 << 30  # bytes
COMMON_STATE = "common_state/"
DCP = "torch.distributed.checkpoint"
_DCP_NAMES = {
    f"{DCP}.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    f"{DCP}.filesystem": "_StorageInfo _StoragePrefix",
    f"{DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "torch": "Size " + " ".join(DTYPES),
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
}
METADATA_NAMES = frozenset((module, name) for module, names in _DCP_NAMES.items() for name in names.split())
_FIELDS = {
    "Metadata": ("state_dict_metadata", "planner_data", "storage_data", "storage_meta"),
    "MCoreMetadata": ("state_dict_metadata", "planner_data", "storage_data", "storage_meta"),
    "TensorStorageMetadata": ("properties", "size", "chunks"),
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "MetadataIndex": ("fqn", "offset", "index"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}


@dataclass(frozen=True)
class TorchDist(Store):
    """An opened checkpoint of this format."""

    form = "torch_dist"
    index = (".metadata",)

    @cached_property
    def catalog(self) -> dict[str, TensorSpec]:
        """Every weight tensor with its payload places; item containers are read and checked here."""
        views: dict[str, Extent] = {}
        return {key: self._spec(key, views) for key in ahead(self.tensors, self._frames(views))}

    def _frames(self, views: dict[str, Extent]) -> Iterator[list[Frame]]:
        """Per tensor what has to be read of its items."""
        for dtype, _, places in self.tensors.values():
            yield [(self._view(i, views), i.offset, i.length, dtype, box_shape(box)) for box, i in places]

    def _view(self, item: Item, views: dict[str, Extent]) -> Extent:
        path = self.path / item.file
        return views.get(item.file) or views.setdefault(item.file, extent(path, root=self.path))

    def _spec(self, key: str, views: dict[str, Extent]) -> TensorSpec:
        dtype, shape, places = self.tensors[key]
        return TensorSpec(key, dtype, shape, tuple(self._chunk(key, dtype, box, item, views) for box, item in places))

    def _chunk(self, key: str, dtype: DType, box: Box, item: Item, views: dict[str, Extent]) -> Chunk:
        view = self._view(item, views)
        if item.offset + item.length > len(view):
            found = f"{len(view)} bytes"
            raise refuse(
                "truncated",
                "an item lies beyond the end of its file",
                [Problem(file=item.file, tensor=key, expected=f"{item.offset + item.length} bytes", found=found)],
            )
        data = framed(view, item.offset, item.length, dtype, box_shape(box))
        if prod(box_shape(box)) * dtype.size < len(data):
            usual = tensor_item(dtype, box_shape(box))
            if (crc := usual.read(data)) is not None:
                return Chunk(box, item.file, item.offset + usual.payload_offset, usual.payload_size, crc)
        stored = read_tensor(data, f"{printable(item.file)}: {printable(key)}")
        if (stored.dtype, stored.shape) != (dtype, box_shape(box)):
            expected, found = f"{dtype.name} {list(box_shape(box))}", f"{stored.dtype.name} {list(stored.shape)}"
            raise refuse(
                "item",
                "an item is not what .metadata says",
                [Problem(file=item.file, tensor=key, expected=expected, found=found)],
            )
        return Chunk(box, item.file, item.offset + stored.start, stored.size, stored.crc)


def open_torch_dist(path: Path) -> TorchDist:
    """The checkpoint in an iteration directory. Raises InputError for anything that is not whole."""
    data = map_file(path / ".metadata")
    if len(data) > METADATA_LIMIT:
        raise refuse("metadata", ".metadata is too large", [Problem(file=".metadata", found=f"{len(data)} bytes")])
    root, length = measured(data, METADATA_NAMES, ".metadata")
    notes = [f".metadata has {len(data) - length} bytes behind its end"] if length < len(data) else []
    notes += backend_notes(path, TorchDist.form)
    common = read_common(path)
    try:
        store = _opened(path, root, common)
        notes += dialect_notes(store.common.get("content_metadata"), store.tensors)
        return replace(store, warnings=tuple(notes))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        if hasattr(error, "problems"):
            raise
        raise refuse(
            "metadata", ".metadata is not checkpoint metadata", [Problem(file=".metadata", message=str(error))]
        ) from error


def _opened(path: Path, root: object, common: Mapping[str, Any]) -> TorchDist:
    fields = record_fields(root, "Metadata", "MCoreMetadata")
    places = _storage(fields["storage_data"])
    tensors, objects, ignored = {}, {}, defaultdict[str, LeftOut](LeftOut)
    for key, value in _pairs(fields["state_dict_metadata"]):
        if prefix := training_state(key):
            ignored[prefix] += _left_out(value, places[key])
        elif value.callable.name == "TensorStorageMetadata":
            tensors[key] = _tensor(key, value, places)
        else:
            objects[key] = places[key][None]
    _check_ranges(places)
    state = next((item for key in places if key.startswith(COMMON_STATE) for item in places[key].values()), None)
    common = common or read_common(path, None if state is None else _item_view(path, state))
    if not common and "args" in objects:  # of Megatron-FSDP, key by key
        common = {"args": plain(read_pickle(_item_view(path, objects["args"]), None, "args"))}
    return TorchDist(path, tensors, objects, dict(ignored), common)


def _left_out(value: Record, items: Mapping[tuple[int, ...] | None, Item]) -> LeftOut:
    """The bytes of a tensor's values, or of an object's items."""
    if value.callable.name != "TensorStorageMetadata":
        return LeftOut(1, sum(item.length for item in items.values()))
    fields = record_fields(value, "TensorStorageMetadata")
    return LeftOut(1, prod(_integers(fields["size"])) * _dtype(fields["properties"]).size)


def _item_view(path: Path, item: Item) -> memoryview:
    return extent(path / item.file, root=path)[item.offset : item.offset + item.length]


def record_fields(value: object, *classes: str) -> dict[str, Any]:
    """Fields of an inert record of one of `classes`, whether given as arguments or as state. Raises ValueError."""
    if not isinstance(value, Record) or value.callable.name not in classes:
        raise ValueError(f"expected {' or '.join(classes)}, found {value!r:.80}")
    fields = dict(zip(_FIELDS[value.callable.name], value.args, strict=False))
    if value.state is not None:
        fields |= dict(_pairs(value.state))
    return fields


def _pairs(value: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Pairs):
        raise ValueError(f"expected a dictionary, found {value!r:.80}")
    for key, item in value:
        if not isinstance(key, str):
            raise ValueError(f"expected a text key, found {key!r:.80}")
        yield key, item


_Places = dict[str, dict[tuple[int, ...] | None, Item]]


def _storage(value: object) -> _Places:
    if not isinstance(value, Pairs):
        raise ValueError("storage_data is not a dictionary")
    places: _Places = defaultdict(dict)
    for index, info in value:
        key = record_fields(index, "MetadataIndex")
        fields = record_fields(info, "_StorageInfo")
        if fields.get("transform_descriptors"):
            raise ValueError(f"{key['fqn']!r} is stored through a transform, which is not supported")
        offset = None if key.get("offset") is None else _integers(key["offset"])
        if offset in places[key["fqn"]]:
            raise ValueError(f"{key['fqn']!r} has two items at {offset}")
        places[key["fqn"]][offset] = _item(fields)
    return places


def _item(fields: Mapping[str, Any]) -> Item:
    name, (offset, length) = fields["relative_path"], _integers((fields["offset"], fields["length"]))
    if not isinstance(name, str):
        raise ValueError(f"{name!r:.80} is not a path inside the checkpoint")
    parts = name.split("/")
    if not all(part and part not in (".", "..") and not set(part) & set("\\\0") for part in parts):
        raise ValueError(f"{name!r:.120} is not a path inside the checkpoint")
    return Item(name, offset, length)


def _integers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in found):
        raise ValueError(f"{found!r:.80} are not sizes")
    return found


def _tensor(key: str, value: Record, places: _Places) -> tuple[DType, tuple[int, ...], tuple[tuple[Box, Item], ...]]:
    fields = record_fields(value, "TensorStorageMetadata")
    shape = _integers(fields["size"])
    boxes = []
    for chunk in fields["chunks"]:
        part = record_fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _integers(part["offsets"]), _integers(part["sizes"])
        box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
        if offsets not in places.get(key, {}):
            raise ValueError(f"{key!r}: the chunk at {offsets} has no item")
        if not _is_nothing(box, shape):
            boxes.append((box, places[key][offsets]))
    check_tiling(key, shape, [box for box, _ in boxes])
    return _dtype(fields["properties"]), shape, tuple(boxes)


def _is_nothing(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a chunk is what a rank of FSDP writes that holds no row of a tensor."""
    inside = len(box) == len(shape) and all(stop <= extent for (_, stop), extent in zip(box, shape, strict=True))
    return inside and prod(shape) > 0 == prod(box_shape(box))


def _dtype(properties: object) -> DType:
    if isinstance(properties, Record):
        first = (
            properties.state[0]
            if isinstance(properties.state, tuple)
            else properties.args[0]
            if properties.args
            else None
        )
        if properties.state and isinstance(properties.state, Pairs):
            first = dict(_pairs(properties.state)).get("dtype")
        if isinstance(first, Global) and first.module == "torch" and first.name in DTYPES:
            return DTYPES[first.name]
    raise ValueError(f"unknown tensor properties {properties!r:.80}")


def check_tiling(key: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Refuse boxes that do not tile the shape exactly: megatron-core loads such holes without a word."""
    inside = all(
        len(box) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True)) for box in boxes
    )
    volume = sum(prod(box_shape(box)) for box in boxes)
    if inside and volume == prod(shape) and (_is_grid(boxes) or not _overlap(boxes)):
        return
    expected, found = f"{prod(shape)} elements, each once", f"{len(boxes)} chunks with {volume} elements"
    raise refuse(
        "chunks",
        "the chunks of a tensor do not tile it",
        [Problem(file=".metadata", tensor=key, expected=expected, found=found)],
    )


def _is_grid(boxes: list[Box]) -> bool:
    parts = [sorted(set(intervals)) for intervals in zip(*boxes, strict=True)] if boxes else []
    disjoint = all(a[1] <= b[0] for dim in parts for a, b in pairwise(dim))
    return disjoint and len(set(boxes)) == len(boxes)


def _overlap(boxes: list[Box]) -> bool:
    if len(boxes) > 512:  # the comparison is quadratic
        return True
    return any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, two, strict=True))
        for number, one in enumerate(boxes)
        for two in boxes[:number]
    )


def _check_ranges(places: _Places) -> None:
    """Refuse items that overlap, or two chunks at one place; objects may share one."""
    by_file: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    shared: dict[str, set[tuple[int, int, str]]] = defaultdict(set)
    for key, items in places.items():
        for item in items.values():
            if items.keys() == {None}:
                shared[item.file].add((item.offset, item.length, ""))
            else:
                by_file[item.file].append((item.offset, item.length, key))
    for file in by_file.keys() | shared.keys():
        ranges = [*by_file[file], *shared[file]]
        ordered = sorted(ranges)
        for (start, length, key), (after, _, other) in pairwise(ordered):
            if start + length > after:
                raise refuse(
                    "metadata",
                    "two items overlap",
                    [Problem(file=file, tensor=key or other, found=f"bytes {after} to {start + length}")],
                )
