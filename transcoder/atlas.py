"""Which elements of which Hugging Face tensor are which elements of which Megatron chunk, as copies.

The copies of a family are computed once per chunk grid and band and reused for every layer. Both directions use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from transcoder.layout import Cell
from transcoder.moves import Copy, boxes_of_range, clip, copy_of
from transcoder.planner import Family, HfTensor
from transcoder.spec import Box, Catalog, Chunk


@dataclass(slots=True)
class Atlas:
    """A model bound to the chunks of a Megatron catalog; answers which chunks a band touches."""

    catalog: Catalog
    _near: dict[tuple[str, tuple[int, ...]], tuple[tuple[Chunk, ...], tuple[Box, ...]]] = field(default_factory=dict)
    _cache: dict[tuple[int, int, int, int, tuple[Box, ...]], list[tuple[int, Copy]]] = field(default_factory=dict)

    def pieces(self, tensor: HfTensor, start: int, stop: int) -> Iterator[tuple[str, Chunk, Copy]]:
        """Chunk and copy for every part of the flat elements [start, stop) of a Hugging Face tensor.

        Yields the Megatron key, the chunk, and a copy whose `hf` counts from `start`.
        """
        for number, (part, mcore, hf) in enumerate(tensor.family.pairs[tensor.part]):
            key, chunks, boxes = self.near(tensor.family, part, tensor.index)
            place = (id(tensor.family), tensor.part * 64 + number, start, stop, boxes)
            if place not in self._cache:
                self._cache[place] = _copies(mcore, hf, tensor.shape, start, stop, boxes)
            for position, copy in self._cache[place]:
                yield key, chunks[position], copy

    def fillers(self, family: Family, index: Mapping[str, int]) -> Iterator[tuple[str, Chunk, Copy, str]]:
        """Chunk, copy and filler axis of the elements that no Hugging Face tensor supplies."""
        for part, cell in family.fillers:
            key, chunks, boxes = self.near(family, part, index)
            flat = Cell(cell.sizes, (0,), (dict.fromkeys(cell.sizes, 0),))
            for chunk, box in zip(chunks, boxes, strict=True):
                for ranges in clip(cell, box):
                    yield key, chunk, copy_of(cell, box, flat, (1,), 0, ranges), cell.filler

    def near(
        self, family: Family, part: int, index: Mapping[str, int]
    ) -> tuple[str, tuple[Chunk, ...], tuple[Box, ...]]:
        """Key, chunks that hold an instance, and their boxes relative to it."""
        side = family.mcore[part]
        key = side.named(index)
        shifts = tuple(index[node.name] if getattr(node, "name", "") in index else 0 for node in side.layout.dims)  # type: ignore[union-attr]
        inside = tuple(getattr(node, "name", "") in index for node in side.layout.dims)
        if (key, shifts) not in self._near:
            self._near[key, shifts] = _relative(self.catalog[key].chunks, shifts, inside)
        return (key, *self._near[key, shifts])


def _relative(
    chunks: tuple[Chunk, ...], shifts: tuple[int, ...], index_dims: tuple[bool, ...]
) -> tuple[tuple[Chunk, ...], tuple[Box, ...]]:
    near, boxes = [], []
    for chunk in chunks:
        box = tuple((start - shift, stop - shift) for (start, stop), shift in zip(chunk.box, shifts, strict=True))
        if all(start <= 0 < stop for (start, stop), is_index in zip(box, index_dims, strict=True) if is_index):
            near.append(chunk)
            boxes.append(box)
    return tuple(near), tuple(boxes)


def _copies(
    mcore: Cell, hf: Cell, shape: tuple[int, ...], start: int, stop: int, boxes: tuple[Box, ...]
) -> list[tuple[int, Copy]]:
    found = []
    for hf_box in boxes_of_range(shape, start, stop):
        for inside in clip(hf, hf_box):
            whole = {**dict.fromkeys(mcore.sizes, (0, 1)), **inside}
            for position, box in enumerate(boxes):
                for ranges in clip(mcore, box, whole):
                    found.append((position, _copy(mcore, box, hf, shape, start, ranges)))
    return found


def _copy(
    mcore: Cell, box: Box, hf: Cell, shape: tuple[int, ...], start: int, ranges: dict[str, tuple[int, int]]
) -> Copy:
    steps = {name: 0 for name in ranges if name not in hf.sizes}
    padded = Cell({**hf.sizes, **dict.fromkeys(steps, 1)}, hf.origin, ({**hf.steps[0], **steps}, *hf.steps[1:]))
    return copy_of(mcore, box, padded, shape, start, ranges)
