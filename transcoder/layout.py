"""The layout notation: text → named axes → cells.

    layout := dim (space dim)*            one entry per tensor dimension, row-major
    dim    := axis | "(" dim … ")" | "[" dim … "]"        each may carry  /mesh
    ( )  product: flattened together, last fastest        [ ]  sum: laid end to end
    /tp /etp  cut into that many equal parts              /each  one chunk per index of an axis

Choosing one alternative of every `[ ]` gives a `Cell`; the cells of a layout tile its tensor. An axis whose name
begins with `pad` or `zero` is filler that no other side supplies. This module knows integers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product as combinations
from math import prod

from transcoder.notation import Axis, Group, LayoutError, Node, leaves, read

FILLER = ("pad", "zero")


@dataclass(frozen=True, slots=True)
class Cell:
    """A block of a tensor: index[dim] = origin[dim] + sum(step * i[axis]), for i[axis] in range(sizes[axis])."""

    sizes: Mapping[str, int]
    origin: tuple[int, ...]
    steps: tuple[Mapping[str, int], ...]

    @property
    def key(self) -> frozenset[str]:
        """What identifies the cell among those of a layout: its axes."""
        return frozenset(self.sizes)

    def at(self, fixed: Mapping[str, int]) -> Cell:
        """The part of the cell where some axes have one value each."""
        origin = tuple(
            start + sum(steps[axis] * value for axis, value in fixed.items() if axis in steps)
            for start, steps in zip(self.origin, self.steps, strict=True)
        )
        steps = tuple({axis: step for axis, step in dim.items() if axis not in fixed} for dim in self.steps)
        return Cell({axis: size for axis, size in self.sizes.items() if axis not in fixed}, origin, steps)

    @property
    def filler(self) -> str:
        """The filler axis of the cell, or an empty string."""
        return next((name for name in self.sizes if name.startswith(FILLER)), "")


@dataclass(frozen=True, slots=True)
class Cut:
    """One part of a dimension: elements [start, stop) and its coordinates on the mesh."""

    start: int
    stop: int
    at: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A parsed layout, one node per tensor dimension."""

    text: str
    dims: tuple[Node, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """All axis names in reading order."""
        return tuple(axis.name for dim in self.dims for axis in leaves(dim))

    @property
    def meshes(self) -> frozenset[str]:
        """The meshes that cut some part of the tensor.

        >>> sorted(parse("l/each [gate/tp up/tp] h").meshes)
        ['each', 'tp']
        """
        return frozenset(node.mesh for dim in self.dims for node in _marked(dim))

    def cut_axes(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each mark of a mesh that cuts into equal parts, with the axes below it.

        >>> list(parse("l/each [gate/tp up/tp] h").cut_axes())
        [('tp', ('gate',)), ('tp', ('up',))]
        """
        for dim in self.dims:
            for node in _marked(dim):
                if node.mesh != "each":
                    yield node.mesh, tuple(axis.name for axis in leaves(node))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Extent of every dimension in elements.

        >>> parse("(g [(q d) k v])/tp h").shape({"g": 2, "q": 3, "d": 4, "k": 4, "v": 4, "h": 5})
        (40, 5)
        """
        return tuple(_size(dim, sizes) for dim in self.dims)

    def cells(self, sizes: Mapping[str, int]) -> tuple[Cell, ...]:
        """The cells of the layout, disjoint and complete. Raises LayoutError when two have the same axes.

        >>> [cell.origin for cell in parse("[gate up] h").cells({"gate": 3, "up": 3, "h": 2})]
        [(0, 0), (3, 0)]
        """
        found = [_join(parts) for parts in combinations(*(list(_expand(dim, sizes)) for dim in self.dims))]
        if len({cell.key for cell in found}) < len(found):
            raise LayoutError(f"{self.text!r}: two parts have the same axes")
        return tuple(found)

    def cuts(self, sizes: Mapping[str, int], mesh: Mapping[str, int]) -> tuple[tuple[Cut, ...], ...]:
        """Per dimension the parts into which `mesh` cuts it. Raises LayoutError when they are not equal.

        >>> [(cut.start, cut.stop) for cut in parse("[gate/tp up/tp]").cuts({"gate": 4, "up": 4}, {"tp": 2})[0]]
        [(0, 2), (2, 4), (4, 6), (6, 8)]
        """
        return tuple(tuple(_cut(dim, sizes, mesh, self.text)) for dim in self.dims)


@cache
def parse(text: str) -> Layout:
    """The layout that `text` spells. Raises LayoutError with the place of the fault.

    >>> parse("h (g q d)/tp").axes
    ('h', 'g', 'q', 'd')
    """
    return Layout(text, read(text))


def _marked(node: Node) -> Iterator[Node]:
    if node.mesh:
        yield node
    for item in node.items if isinstance(node, Group) else ():
        yield from _marked(item)


def _size(node: Node, sizes: Mapping[str, int]) -> int:
    if isinstance(node, Axis):
        return _given(node, sizes)
    parts = [_size(item, sizes) for item in node.items]
    return prod(parts) if node.kind == "(" else sum(parts)


def _given(axis: Axis, sizes: Mapping[str, int]) -> int:
    if axis.name not in sizes:
        raise LayoutError(f"axis {axis.name} has no size")
    return sizes[axis.name]


_Part = tuple[dict[str, int], int, dict[str, int]]  # axis sizes, origin, step per axis


def _expand(node: Node, sizes: Mapping[str, int]) -> Iterator[_Part]:
    if isinstance(node, Axis):
        yield {node.name: _given(node, sizes)}, 0, {node.name: 1}
    elif node.kind == "[":
        offset = 0
        for item in node.items:
            for axes, origin, steps in _expand(item, sizes):
                yield axes, origin + offset, steps
            offset += _size(item, sizes)
    else:
        yield from _flatten(node, sizes)


def _flatten(node: Group, sizes: Mapping[str, int]) -> Iterator[_Part]:
    extents = [_size(item, sizes) for item in node.items]
    strides = [prod(extents[i + 1 :]) for i in range(len(extents))]
    for parts in combinations(*(list(_expand(item, sizes)) for item in node.items)):
        axes: dict[str, int] = {}
        steps: dict[str, int] = {}
        for (part_axes, _, part_steps), stride in zip(parts, strides, strict=True):
            axes |= part_axes
            steps |= {name: step * stride for name, step in part_steps.items()}
        yield axes, sum(part[1] * stride for part, stride in zip(parts, strides, strict=True)), steps


def _join(parts: tuple[_Part, ...]) -> Cell:
    sizes: dict[str, int] = {}
    for axes, _, _ in parts:
        sizes |= axes
    return Cell(sizes, tuple(part[1] for part in parts), tuple(part[2] for part in parts))


def _cut(node: Node, sizes: Mapping[str, int], mesh: Mapping[str, int], text: str, base: int = 0) -> Iterator[Cut]:
    size = _size(node, sizes)
    if node.mesh == "each":
        yield from (Cut(base + i, base + i + 1, ((str(getattr(node, "name", "each")), i),)) for i in range(size))
    elif node.mesh:
        yield from _equal_parts(node.mesh, size, mesh.get(node.mesh, 1), base, text)
    elif isinstance(node, Group) and node.kind == "[" and any(_marked(node)):
        for item in node.items:
            yield from _cut(item, sizes, mesh, text, base)
            base += _size(item, sizes)
    else:
        yield Cut(base, base + size)


def _equal_parts(mesh: str, size: int, count: int, base: int, text: str) -> Iterator[Cut]:
    if count and size % count:
        raise LayoutError(f"{text!r}: {size} elements cannot be cut into {count} equal parts (/{mesh})")
    width = size // count if count else 0
    for i in range(count):
        yield Cut(base + i * width, base + (i + 1) * width, ((mesh, i),))
