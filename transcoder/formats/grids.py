"""Zarr's chunk grids as integers: which files an array has, and which boxes of it lie where in them.

A file holds one grid cell, row-major; with sharding it holds smaller cells one behind the other. Cells at the edge are
stored in full: what lies beyond the array is padding that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as combinations
from math import prod

from transcoder.spec import Box, DType

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """An array: its shape, the shape of a file's cell and, with sharding, of the cells in a file; all in elements."""

    dtype: DType
    shape: Sizes
    cell: Sizes
    inner: Sizes

    @property
    def counts(self) -> Sizes:
        """Files along each dimension."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.cell, strict=True))

    @property
    def inner_bytes(self) -> int:
        """Payload bytes of the smallest cell."""
        return prod(self.inner) * self.dtype.size

    def files(self) -> Iterator[Sizes]:
        """Every file by its place in the grid, the last dimension fastest."""
        return combinations(*map(range, self.counts))

    def cells(self, place: Sizes) -> Iterator[Box]:
        """The cells of a file in order, as boxes that may reach beyond the array."""
        start = tuple(i * size for i, size in zip(place, self.cell, strict=True))
        counts = (size // step for size, step in zip(self.cell, self.inner, strict=True))
        for index in combinations(*map(range, counts)):
            low = (at + i * step for at, i, step in zip(start, index, self.inner, strict=True))
            yield tuple((at, at + step) for at, step in zip(low, self.inner, strict=True))


def parts(box: Box, shape: Sizes, size: int) -> Iterator[tuple[Box, int]]:
    """The part of a stored cell inside an array as contiguous boxes, each with its byte offset. size: of an element.

    >>> list(parts(((0, 2), (4, 8)), (2, 6), 1))
    [(((0, 1), (4, 6)), 0), (((1, 2), (4, 6)), 4)]
    >>> list(parts(((2, 4), (0, 6)), (3, 6), 2))
    [(((2, 3), (0, 6)), 0)]
    """
    kept = tuple((low, min(high, limit)) for (low, high), limit in zip(box, shape, strict=True))
    if any(low >= high for low, high in kept):
        return
    split = next((dim for dim in reversed(range(len(box))) if kept[dim] != box[dim]), 0)  # whole behind it
    steps = [size * prod(high - low for low, high in box[dim + 1 :]) for dim in range(len(box))]
    for lead in combinations(*(range(*extent) for extent in kept[:split])):
        offset = sum((at - low) * step for at, (low, _), step in zip(lead, box, steps, strict=False))
        yield (*((at, at + 1) for at in lead), *kept[split:]), offset


def regular(cuts: list[Box], shape: Sizes) -> Sizes:
    """The shape of the cells of a regular grid along whose lines lie these cuts where they can.

    >>> regular([((0, 4),), ((4, 8),)], (8,)), regular([((0, 6),), ((6, 8),)], (8,))
    ((4,), (8,))
    """
    return tuple(_step(sorted({box[dim] for box in cuts}), size) for dim, size in enumerate(shape))


def _step(extents: list[tuple[int, int]], size: int) -> int:
    step = extents[0][1] - extents[0][0]
    return step if all(high - low == step for low, high in extents) else size


def cut(shape: Sizes, limit: int) -> Sizes:
    """`shape` divided evenly, along as few dimensions as can be, until it has at most `limit` elements.

    >>> cut((128256, 8192), 32 << 20), cut((151643, 8192), 32 << 20), cut((1, 92, 72), 1 << 20)
    ((4008, 8192), (151643, 128), (1, 92, 72))
    """
    while prod(shape) > limit:
        wanted = -(-prod(shape) // limit)
        choices = [(_divisor(size, wanted), dim) for dim, size in enumerate(shape) if size > 1]
        enough = [choice for choice in choices if choice[0] >= wanted]
        count, dim = min(enough) if enough else max(choices)
        shape = (*shape[:dim], shape[dim] // count, *shape[dim + 1 :])
    return shape


def _divisor(size: int, wanted: int) -> int:
    """The smallest divisor of `size` that is not below `wanted`; `size` itself when there is none."""
    small = [number for number in range(1, int(size**0.5) + 1) if size % number == 0]
    return min((n for n in {*small, *(size // n for n in small)} if n >= wanted), default=size)
