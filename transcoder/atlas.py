"""Which elements of which Hugging Face tensor are which elements of which Megatron chunk, as copies.

The copies of a family are computed once per chunk grid and band and reused for every layer and expert. Both directions
use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product as combinations
from math import prod

from transcoder.layout import Cell
from transcoder.moves import Copy, boxes_of_range, clip, copy_of
from transcoder.notation import Axis
from transcoder.planner import Filler, HfTensor, Pair
from transcoder.recipe import Side
from transcoder.spec import Box, Catalog, Chunk

Boxes = tuple[Box, ...]
Near = tuple[list[Chunk], Boxes]  # chunks that hold parts of a tensor, and their boxes relative to its index
Share = tuple[int, int]  # position among such chunks, elements
Sight = tuple[Side, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # key, its values, dimensions, their values


@dataclass(slots=True)
class Atlas:
    """A model bound to the chunks of a Megatron catalog; answers which chunks a band touches."""

    catalog: Catalog
    _sights: dict[int, tuple[Pair, Sight]] = field(default_factory=dict)
    _groups: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], Near]] = field(default_factory=dict)
    _boxes: dict[Boxes, Boxes] = field(default_factory=dict)
    _copies: dict[tuple[int, int, int, int], list[tuple[int, Copy]]] = field(default_factory=dict)
    _shares: dict[tuple[int, int], list[Share]] = field(default_factory=dict)

    def pieces(self, tensor: HfTensor, start: int, stop: int) -> Iterator[tuple[str, Chunk, Copy]]:
        """Chunk and copy for every part of the flat elements [start, stop) of a Hugging Face tensor.

        Yields the Megatron key, the chunk, and a copy whose `hf` counts from `start`.
        """
        for pair in tensor.family.pairs[tensor.part]:
            key, (chunks, boxes) = self._near(tensor, pair)
            for position, copy in self._copied(pair, tensor.shape, start, stop, boxes):
                yield key, chunks[position], copy

    def shares(self, tensor: HfTensor) -> Iterator[tuple[list[Chunk], list[Share]]]:
        """Chunks that hold parts of a tensor, and how many of its elements `pieces` of all of it moves to which."""
        for pair in tensor.family.pairs[tensor.part]:
            _, (chunks, boxes) = self._near(tensor, pair)
            place = id(pair), id(boxes)
            if place not in self._shares:
                copies = self._copied(pair, tensor.shape, 0, prod(tensor.shape), boxes)
                self._shares[place] = [(position, copy.count) for position, copy in copies]
            yield chunks, self._shares[place]

    def fillers(self, filler: Filler) -> Iterator[tuple[Chunk, Copy]]:
        """Chunk and copy of the elements that no Hugging Face tensor supplies."""
        cell = filler.cell
        flat = Cell(cell.sizes, (0,), (dict.fromkeys(cell.sizes, 0),))
        for chunk in self.catalog[filler.key].chunks:
            for ranges in clip(cell, chunk.box):
                yield chunk, copy_of(cell, chunk.box, flat, (1,), 0, ranges)

    def _copied(
        self, pair: Pair, shape: tuple[int, ...], start: int, stop: int, boxes: Boxes
    ) -> list[tuple[int, Copy]]:
        place = id(pair), start, stop, id(boxes)  # both live as long as the atlas
        if place not in self._copies:
            self._copies[place] = _copies(pair, shape, start, stop, boxes)
        return self._copies[place]

    def _near(self, tensor: HfTensor, pair: Pair) -> tuple[str, Near]:
        """Key, chunks that hold parts of the tensor, and their boxes relative to its index."""
        if id(pair) not in self._sights:
            self._sights[id(pair)] = pair, _sight(tensor, pair)
        side, named, dims, shifted = self._sights[id(pair)][1]
        values = (*tensor.at, *pair.fixed.values())
        key, place = side.spelled(tuple([values[i] for i in named])), tuple([values[i] for i in shifted])
        if (key, dims) not in self._groups:
            self._groups[key, dims] = self._grouped(self.catalog[key].chunks, dims)
        return key, self._groups[key, dims].get(place, _NOTHING)

    def _grouped(self, chunks: tuple[Chunk, ...], dims: tuple[int, ...]) -> dict[tuple[int, ...], Near]:
        """Chunks by their indices along some dimensions, with their boxes relative to these."""
        found: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in chunks:
            for place in combinations(*(range(*chunk.box[dim]) for dim in dims)):
                found.setdefault(place, []).append(chunk)
        return {place: (near, self._relative(near, dims, place)) for place, near in found.items()}

    def _relative(self, chunks: list[Chunk], dims: tuple[int, ...], place: tuple[int, ...]) -> Boxes:
        """The chunks' boxes, counted from a place; equal ones are one object."""
        boxes = tuple([_shifted(chunk.box, dims, place) for chunk in chunks])
        return self._boxes.setdefault(boxes, boxes)


_NOTHING: Near = ([], ())


def _sight(tensor: HfTensor, pair: Pair) -> Sight:
    """Where to find the chunks of a pair's tensors: which of a tensor's own and the pair's fixed values are what."""
    side = tensor.family.mcore[pair.part]
    own = tensor.family.rule.hf[tensor.part].name_axes
    names = (*own, *pair.fixed)
    dims = tuple(dim for dim, node in enumerate(side.layout.dims) if isinstance(node, Axis) and node.name in own)
    places = {name: i for i, name in enumerate(names)}
    nodes = [side.layout.dims[dim] for dim in dims]
    shifted = tuple(places[node.name] for node in nodes if isinstance(node, Axis))
    return side, tuple(places[axis] for axis in side.name_axes), dims, shifted


def _shifted(box: Box, dims: tuple[int, ...], place: tuple[int, ...]) -> Box:
    found = list(box)
    for dim, shift in zip(dims, place, strict=True):
        found[dim] = found[dim][0] - shift, found[dim][1] - shift
    return tuple(found)


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
