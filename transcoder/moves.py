"""From two cells and two boxes to strided copies: clip, fuse, enumerate runs. Pure integers.

A copy pairs a box of a Megatron chunk with a contiguous range of a Hugging Face tensor. It is stored with the chunk
side first; reading it from right to left is the opposite direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product as combinations
from math import prod

from transcoder.layout import Cell
from transcoder.spec import Box

Ranges = dict[str, tuple[int, int]]  # per axis (start, stop)


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements `chunk + sum(i * chunk_steps)` and `hf + sum(i * hf_steps)` are the same, for i over `shape`."""

    shape: tuple[int, ...]
    chunk: int
    chunk_steps: tuple[int, ...]
    hf: int
    hf_steps: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements moved."""
        return prod(self.shape)

    @property
    def turned(self) -> bool:
        """Whether the two sides disagree on which axis lies closest: runs of the one are scattered over the other."""
        return bool(self.shape) and self.hf_steps[-1] > min(self.hf_steps)

    def inverse(self) -> Copy:
        """The same elements with the two sides swapped."""
        return Copy(self.shape, self.hf, self.hf_steps, self.chunk, self.chunk_steps)

    def slices(self) -> Iterator[Copy]:
        """The same elements, one copy for each index of the first axis."""
        for i in range(self.shape[0]):
            chunk, hf = self.chunk + i * self.chunk_steps[0], self.hf + i * self.hf_steps[0]
            yield Copy(self.shape[1:], chunk, self.chunk_steps[1:], hf, self.hf_steps[1:])


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive elements of a chunk from `chunk`, and their strided places on the other side."""

    chunk: int
    count: int
    hf: int
    shape: tuple[int, ...]
    hf_steps: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the other side's places are consecutive, too."""
        return not self.shape or (len(self.shape) == 1 and self.hf_steps[0] == 1)

    def parts(self, limit: int) -> Iterator[Run]:
        """The same elements in order, `limit` of them at a time or one index of the first axis if that is more.

        >>> [(part.chunk, part.hf, part.shape) for part in Run(8, 6, 1, (3, 2), (1, 3)).parts(4)]
        [(8, 1, (2, 2)), (12, 3, (1, 2))]
        """
        if self.count <= limit:
            yield self
            return
        inner = self.count // self.shape[0]
        step = max(1, limit // inner)
        for i in range(0, self.shape[0], step):
            size = min(step, self.shape[0] - i)
            shape, hf = (size, *self.shape[1:]), self.hf + i * self.hf_steps[0]
            yield Run(self.chunk + i * inner, size * inner, hf, shape, self.hf_steps)


def clip(cell: Cell, box: Box, ranges: Ranges | None = None) -> list[Ranges]:
    """Axis ranges of `cell` (inside `ranges`) whose tensor indices fall inside `box`, disjoint and complete.

    box: per dimension (start, stop), in elements. Raises ValueError if its rank differs from the cell's.

    >>> clip(Cell({"v": 10}, (0,), ({"v": 1},)), ((8, 16),))
    [{'v': (8, 10)}]
    """
    if len(box) != len(cell.origin):
        raise ValueError(f"box of rank {len(box)} for a cell of rank {len(cell.origin)}")
    whole = ranges or {name: (0, size) for name, size in cell.sizes.items()}
    per_dim = []
    for (start, stop), origin, steps in zip(box, cell.origin, cell.steps, strict=True):
        axes = sorted(steps, key=lambda name: -steps[name])
        per_dim.append(list(_inside(axes, steps, whole, start - origin, stop - origin)))
    return [_merged(parts) for parts in combinations(*per_dim)]


def _merged(parts: tuple[Ranges, ...]) -> Ranges:
    found: Ranges = {}
    for part in parts:
        found |= part
    return found


def _inside(axes: list[str], steps: Mapping[str, int], whole: Ranges, low: int, high: int) -> Iterator[Ranges]:
    """Ranges of `axes` with low <= sum(step * i) < high; axes from the largest step to the smallest."""
    if not axes:
        if low <= 0 < high:
            yield {}
        return
    name, inner = axes[0], axes[1:]
    step, (first, last) = steps[name], whole[name]
    least = sum(steps[axis] * whole[axis][0] for axis in inner)
    most = sum(steps[axis] * (whole[axis][1] - 1) for axis in inner)
    begin = max(first, -(-(low - least) // step))  # from here on the smallest inner index is inside
    end = min(last, (high - 1 - most) // step + 1)  # up to here the largest one is
    touched = range(max(first, -(-(low - most) // step)), min(last, (high - 1 - least) // step + 1))
    full = {axis: whole[axis] for axis in inner}
    if begin < end:
        yield {name: (begin, end), **full}
    for i in (*range(touched.start, min(begin, touched.stop)), *range(max(begin, end, touched.start), touched.stop)):
        for part in _inside(inner, steps, whole, low - step * i, high - step * i):
            yield {name: (i, i + 1), **part}


def copy_of(chunk: Cell, chunk_box: Box, hf: Cell, hf_shape: tuple[int, ...], hf_start: int, ranges: Ranges) -> Copy:
    """The copy over `ranges` between a chunk that holds `chunk_box` and a row-major tensor of `hf_shape`.

    hf_start: flat element of the tensor that counts as 0 (the start of a band).
    """
    chunk_strides = strides([stop - start for start, stop in chunk_box])
    chunk_base, chunk_steps = _flat(chunk, chunk_strides, ranges)
    chunk_base -= sum(start * stride for (start, _), stride in zip(chunk_box, chunk_strides, strict=True))
    hf_base, hf_steps = _flat(hf, strides(hf_shape), ranges)
    return fuse(ranges, chunk_base, chunk_steps, hf_base - hf_start, hf_steps)


def strides(shape: tuple[int, ...] | list[int]) -> list[int]:
    """Row-major strides in elements.

    >>> strides((2, 3, 4))
    [12, 4, 1]
    """
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def _flat(cell: Cell, dim_strides: list[int], ranges: Ranges) -> tuple[int, dict[str, int]]:
    base = sum(origin * stride for origin, stride in zip(cell.origin, dim_strides, strict=True))
    steps = {
        name: step * stride for dim, stride in zip(cell.steps, dim_strides, strict=True) for name, step in dim.items()
    }
    return base + sum(steps[name] * ranges[name][0] for name in steps), steps


def fuse(ranges: Ranges, chunk: int, chunk_steps: Mapping[str, int], hf: int, hf_steps: Mapping[str, int]) -> Copy:
    """A copy with as few axes as possible, ordered by the step in the chunk, largest first."""
    order = [name for name in sorted(ranges, key=lambda a: -chunk_steps[a]) if ranges[name][1] - ranges[name][0] != 1]
    axes: list[tuple[int, int, int]] = []
    for name in order:
        size, a, b = ranges[name][1] - ranges[name][0], chunk_steps[name], hf_steps[name]
        if axes and axes[-1][1] == a * size and axes[-1][2] == b * size:
            axes[-1] = (axes[-1][0] * size, a, b)
        else:
            axes.append((size, a, b))
    shape, first, second = zip(*axes, strict=True) if axes else ((), (), ())
    return Copy(tuple(shape), chunk, tuple(first), hf, tuple(second))


def runs(copy: Copy) -> Iterator[Run]:
    """The copy as contiguous ranges of the chunk, in ascending order where the layout allows.

    >>> [run.chunk for run in runs(Copy((2, 3), 10, (8, 1), 0, (3, 1)))]
    [10, 18]
    """
    split, extent = len(copy.shape), 1
    while split and copy.chunk_steps[split - 1] == extent:
        split -= 1
        extent *= copy.shape[split]
    inner, inner_steps = copy.shape[split:], copy.hf_steps[split:]
    for index in combinations(*(range(size) for size in copy.shape[:split])):
        chunk = copy.chunk + sum(i * step for i, step in zip(index, copy.chunk_steps, strict=False))
        hf = copy.hf + sum(i * step for i, step in zip(index, copy.hf_steps, strict=False))
        yield Run(chunk, extent, hf, inner, inner_steps)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The flat elements [start, stop) of a row-major tensor, as disjoint boxes in ascending order.

    >>> boxes_of_range((3, 4), 2, 12)
    [((0, 1), (2, 4)), ((1, 3), (0, 4))]
    """
    if start >= stop:
        return []
    if not shape:
        return [()]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _inner_boxes(shape, stop // row, start, stop, row)
    boxes = _inner_boxes(shape, first - 1, start, first * row, row)
    if first < last:
        boxes.append(((first, last), *((0, size) for size in shape[1:])))
    return boxes + _inner_boxes(shape, last, last * row, stop, row)


def _inner_boxes(shape: tuple[int, ...], index: int, start: int, stop: int, row: int) -> list[Box]:
    found = boxes_of_range(shape[1:], start - index * row, stop - index * row)
    return [((index, index + 1), *box) for box in found]
