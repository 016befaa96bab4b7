"""Which elements of which Hugging Face tensor are which elements of which Megatron chunk, as copies.

The copies of a family are computed once per chunk grid and band and reused for every layer and expert. Both directions
use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product as combinations

from transcoder.layout import Cell
from transcoder.moves import Copy, boxes_of_range, clip, copy_of
from transcoder.notation import Axis
from transcoder.planner import Filler, HfTensor, Pair
from transcoder.spec import Box, Catalog, Chunk

Boxes = tuple[Box, ...]
Groups = dict[tuple[int, ...], list[Chunk]]


@dataclass(slots=True)
class Atlas:
    """A model bound to the chunks of a Megatron catalog; answers which chunks a band touches."""

    catalog: Catalog
    _groups: dict[tuple[str, tuple[int, ...]], Groups] = field(default_factory=dict)
    _copies: dict[tuple[int, int, int, Boxes], list[tuple[int, Copy]]] = field(default_factory=dict)

    def pieces(self, tensor: HfTensor, start: int, stop: int) -> Iterator[tuple[str, Chunk, Copy]]:
        """Chunk and copy for every part of the flat elements [start, stop) of a Hugging Face tensor.

        Yields the Megatron key, the chunk, and a copy whose `hf` counts from `start`.
        """
        for pair in tensor.family.pairs[tensor.part]:
            key, chunks, boxes = self._near(tensor, pair)
            place = (id(pair), start, stop, boxes)
            if place not in self._copies:
                self._copies[place] = _copies(pair, tensor.shape, start, stop, boxes)
            for position, copy in self._copies[place]:
                yield key, chunks[position], copy

    def fillers(self, filler: Filler) -> Iterator[tuple[Chunk, Copy]]:
        """Chunk and copy of the elements that no Hugging Face tensor supplies."""
        cell = filler.cell
        flat = Cell(cell.sizes, (0,), (dict.fromkeys(cell.sizes, 0),))
        for chunk in self.catalog[filler.key].chunks:
            for ranges in clip(cell, chunk.box):
                yield chunk, copy_of(cell, chunk.box, flat, (1,), 0, ranges)

    def _near(self, tensor: HfTensor, pair: Pair) -> tuple[str, list[Chunk], Boxes]:
        """Key, chunks that hold parts of the tensor, and their boxes relative to its index."""
        side = tensor.family.mcore[pair.part]
        key = side.named({**tensor.index, **pair.fixed})
        names = [node.name if isinstance(node, Axis) else "" for node in side.layout.dims]
        dims = tuple(dim for dim, name in enumerate(names) if name in tensor.index)
        shifts = tuple(tensor.index.get(name, 0) for name in names)
        if (key, dims) not in self._groups:
            self._groups[key, dims] = _grouped(self.catalog[key].chunks, dims)
        chunks = self._groups[key, dims].get(tuple(shifts[dim] for dim in dims), [])
        return key, chunks, tuple(_shifted(chunk.box, shifts) for chunk in chunks)


def _grouped(chunks: tuple[Chunk, ...], dims: tuple[int, ...]) -> Groups:
    """Chunks by their indices along some dimensions."""
    found: Groups = {}
    for chunk in chunks:
        for place in combinations(*(range(*chunk.box[dim]) for dim in dims)):
            found.setdefault(place, []).append(chunk)
    return found


def _shifted(box: Box, shifts: tuple[int, ...]) -> Box:
    return tuple((start - shift, stop - shift) for (start, stop), shift in zip(box, shifts, strict=True))


def _copies(pair: Pair, shape: tuple[int, ...], start: int, stop: int, boxes: Boxes) -> list[tuple[int, Copy]]:
    found = []
    for hf_box in boxes_of_range(shape, start, stop):
        for inside in clip(pair.hf, hf_box):
            whole = {**dict.fromkeys(pair.mcore.sizes, (0, 1)), **inside}
            for position, box in enumerate(boxes):
                for ranges in clip(pair.mcore, box, whole):
                    found.append((position, _copy(pair, box, shape, start, ranges)))
    return found


def _copy(pair: Pair, box: Box, shape: tuple[int, ...], start: int, ranges: Mapping[str, tuple[int, int]]) -> Copy:
    hf = pair.hf
    steps = {name: 0 for name in ranges if name not in hf.sizes}
    padded = Cell({**hf.sizes, **dict.fromkeys(steps, 1)}, hf.origin, ({**hf.steps[0], **steps}, *hf.steps[1:]))
    return copy_of(pair.mcore, box, padded, shape, start, dict(ranges))
