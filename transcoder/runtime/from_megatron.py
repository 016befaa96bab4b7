"""Fills parameter memory from a Megatron checkpoint: stored boxes against this rank's boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product as combinations
from pathlib import Path
from typing import Any

from transcoder.dialects import dialect_of
from transcoder.errors import refuse
from transcoder.formats.mcore import CONTENT
from transcoder.formats.opening import open_store
from transcoder.formats.rankfiles import RankStore
from transcoder.formats.store import Store
from transcoder.hfconfig import normalise
from transcoder.iterations import find_iteration
from transcoder.moves import Copy, fuse, strides
from transcoder.runtime.filling import Filled, Reader
from transcoder.runtime.matching import matched, unwrapped
from transcoder.runtime.model import config_of
from transcoder.runtime.omitted import optional_keys
from transcoder.runtime.shards import Target, check_whole, on_gpu, shards_of
from transcoder.spec import Box, Chunk, DType, box_shape


def fill_from_megatron(chunks: Sequence[Any], path: Path, hf_model: Path | None, verify: bool) -> Filled:
    """Read this rank's part."""
    store = open_store(find_iteration(path))
    if isinstance(store, RankStore):
        raise refuse("format", f"{path} has one file a rank: make it torch_dist with `transcode reshard` first")
    shards = shards_of(chunks, CONTENT[dialect_of(store.tensors)])
    count = check_whole(chunks, shards)
    shapes = {key: shape for key, (_, shape, _) in store.tensors.items()}
    optional = optional_keys(shapes, dialect_of(shapes))
    targets, left_out = matched(chunks, shards, shapes, _vocabulary(chunks, path, hf_model), optional)
    touched = _touched(targets, store)
    reader = Reader(store.path, False, on_gpu(shards))
    try:
        if verify:
            for key, chunk in dict.fromkeys((key, chunk) for key, _, found in touched for chunk in found):
                reader.check(key, chunk)
        for (_, dtype, found), target in zip(touched, targets, strict=True):
            _fill_stored(target, dtype, found, reader)
    finally:
        reader.close()
    return Filled(count, reader.bytes_read, tuple(sorted(left_out)))


def _vocabulary(chunks: Sequence[Any], path: Path, hf_model: Path | None) -> int:
    """Rows of a vocabulary that mean something, padding apart; 0 when nothing says so."""
    try:
        return int(normalise(config_of(path, hf_model))["vocab_size"])
    except (ValueError, KeyError):
        if hf_model is not None:
            raise
        return max(int(getattr(part, "real_vocab", 0)) for part in unwrapped(chunks))


def _touched(targets: Sequence[Target], store: Store) -> list[tuple[str, DType, list[Chunk]]]:
    """For each target the key, type and chunks that hold some of it; other chunks are never opened."""
    numbers: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        numbers.setdefault(target.key, []).append(number)
    boxes: list[list[Box]] = [[] for _ in targets]
    narrowed = {}
    for key, mine in numbers.items():
        dtype, shape, places = store.tensors[key]
        near = _near(targets, mine)
        pairs = [(number, place) for place in places for number in near(place[0])]
        for number, (box, _) in pairs:
            boxes[number].append(box)
        narrowed[key] = dtype, shape, tuple(dict.fromkeys(place for _, place in pairs))
    catalog = replace(store, tensors=narrowed).catalog
    chunks = {(key, chunk.box): chunk for key, spec in catalog.items() for chunk in spec.chunks}
    return [
        (target.key, catalog[target.key].dtype, [chunks[target.key, box] for box in found])
        for target, found in zip(targets, boxes, strict=True)
    ]


def _near(targets: Sequence[Target], numbers: Sequence[int]) -> Callable[[Box], list[int]]:
    """Which of some targets share elements with a box; looked up by layer and expert, of which there are many."""
    first = targets[numbers[0]].box
    depth = 0  # leading dimensions along which every target is one index wide
    while depth < min(2, len(first) - 1) and all(stop - start == 1 for start, stop in _along(targets, numbers, depth)):
        depth += 1
    index: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        index.setdefault(tuple(start for start, _ in targets[number].box[:depth]), []).append(number)

    def near(box: Box) -> list[int]:
        leads = combinations(*(range(*extent) for extent in box[:depth]))
        return [number for lead in leads for number in index.get(lead, ()) if _common(box, targets[number].box)]

    return near


def _along(targets: Sequence[Target], numbers: Sequence[int], dim: int) -> Iterator[tuple[int, int]]:
    return (targets[number].box[dim] for number in numbers)


def _common(one: Box, other: Box) -> Box | None:
    """The box of what two boxes share, or None."""
    box = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True))
    return box if all(start < stop for start, stop in box) else None


def _fill_stored(target: Target, dtype: DType, chunks: Sequence[Chunk], reader: Reader) -> None:
    """Copy what stored chunks hold of a target; rows of a vocabulary that are not stored become zeros."""
    first = end = target.box[0][0]
    for chunk in chunks:
        if common := _common(chunk.box, target.box):
            end = max(end, common[0][1])
            reader.fill(target.shard, _box_copy(common, target.box, chunk.box), chunk.file, chunk.offset, dtype)
    if target.shard.flexible:
        target.shard.data[end - first :].zero_()


def _box_copy(common: Box, mine: Box, stored: Box) -> Copy:
    """The copy of a box between two row-major arrays that hold larger boxes."""
    ranges = {str(dim): extent for dim, extent in enumerate(common)}
    starts, steps = [], []
    for box in (mine, stored):
        each = strides(box_shape(box))
        starts.append(sum((a[0] - b[0]) * step for a, b, step in zip(common, box, each, strict=True)))
        steps.append({str(dim): step for dim, step in enumerate(each)})
    return fuse(ranges, starts[0], steps[0], starts[1], steps[1])
