"""The layout notation: text → named axes → cells.

    layout := dim (space dim)*            one entry per tensor dimension, row-major
    dim    := axis | "(" dim … ")" | "[" dim … "]"        each may carry  /mesh
    ( )  product: flattened together, last fastest        [ ]  sum: laid end to end
    /tp /ep /etp  cut into that many equal parts          /each  one chunk per index

Choosing one alternative of every `[ ]` gives a `Cell`; the cells of a layout tile its tensor. An axis whose name
begins with `pad` or `zero` is filler that no other side supplies. This module knows integers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product as combinations
from math import prod

FILLER = ("pad", "zero")
MESHES = ("tp", "ep", "etp", "each")
_TOKEN = re.compile(r"\s*([()\[\]]|/?[a-z][a-z0-9_]*)")


class LayoutError(ValueError):
    """The text is not a layout, or its sizes do not fit it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis."""

    name: str
    mesh: str = ""

    def __str__(self) -> str:
        return self.name + (f"/{self.mesh}" if self.mesh else "")


@dataclass(frozen=True, slots=True)
class Group:
    """Dimensions flattened together (`kind` "(") or laid end to end (`kind` "[")."""

    kind: str
    items: tuple[Node, ...]
    mesh: str = ""

    def __str__(self) -> str:
        closing = ")" if self.kind == "(" else "]"
        inside = " ".join(str(item) for item in self.items)
        return f"{self.kind}{inside}{closing}" + (f"/{self.mesh}" if self.mesh else "")


Node = Axis | Group


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
        return tuple(axis.name for dim in self.dims for axis in _leaves(dim))

    @property
    def meshes(self) -> frozenset[str]:
        """The meshes that cut some part of the tensor.

        >>> sorted(parse("l/each [gate/tp up/tp] h").meshes)
        ['each', 'tp']
        """
        return frozenset(mesh for dim in self.dims for mesh in _meshes(dim))

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
    tokens = _tokens(text)
    dims = _items(tokens, "", text)
    names = [axis.name for dim in dims for axis in _leaves(dim)]
    _check_products(dims, text)
    _check_meshes(dims, text)
    if not names:
        raise LayoutError(f"{text!r}: no axes")
    return Layout(text, dims)


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if not match:
            raise LayoutError(f"{text!r}: unexpected {text[place:].strip()[0]!r} at {place}")
        found.append(match[1])
        place = match.end()
    return found[::-1]


def _items(tokens: list[str], closing: str, text: str) -> tuple[Node, ...]:
    items: list[Node] = []
    while tokens and tokens[-1] != closing:
        items.append(_item(tokens, text))
    if closing and not tokens:
        raise LayoutError(f"{text!r}: missing {closing!r}")
    if closing:
        tokens.pop()
        if not items:
            raise LayoutError(f"{text!r}: empty group")
    return tuple(items)


def _item(tokens: list[str], text: str) -> Node:
    token = tokens.pop()
    if token in "([":
        items = _items(tokens, ")" if token == "(" else "]", text)
        return Group(token, items, _mesh(tokens, text))
    if token in ")]" or token.startswith("/"):
        raise LayoutError(f"{text!r}: unexpected {token!r}")
    return Axis(token, _mesh(tokens, text))


def _mesh(tokens: list[str], text: str) -> str:
    if not tokens or not tokens[-1].startswith("/"):
        return ""
    name = tokens.pop()[1:]
    if name not in MESHES:
        raise LayoutError(f"{text!r}: unknown mesh /{name}; known are {', '.join(MESHES)}")
    return name


def _check_products(dims: tuple[Node, ...], text: str) -> None:
    for cell_axes in combinations(*(list(_choices(dim)) for dim in dims)):
        names = [name for part in cell_axes for name in part]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), ""):
            raise LayoutError(f"{text!r}: axis {twice} occurs twice in one part")


def _check_meshes(nodes: tuple[Node, ...], text: str, inside: bool = False) -> None:
    for node in nodes:
        if inside and node.mesh:
            raise LayoutError(f"{text!r}: /{node.mesh} on {node} inside a product or another cut; mark the whole")
        if isinstance(node, Group):
            _check_meshes(node.items, text, inside or bool(node.mesh) or node.kind == "(")


def _choices(node: Node) -> Iterator[tuple[str, ...]]:
    if isinstance(node, Axis):
        yield (node.name,)
    elif node.kind == "[":
        for item in node.items:
            yield from _choices(item)
    else:
        for parts in combinations(*(list(_choices(item)) for item in node.items)):
            yield tuple(name for part in parts for name in part)


def _leaves(node: Node) -> Iterator[Axis]:
    if isinstance(node, Axis):
        yield node
    else:
        for item in node.items:
            yield from _leaves(item)


def _meshes(node: Node) -> Iterator[str]:
    if node.mesh:
        yield node.mesh
    for item in node.items if isinstance(node, Group) else ():
        yield from _meshes(item)


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
    if node.mesh:
        yield from _equal_parts(node.mesh, size, size if node.mesh == "each" else mesh.get(node.mesh, 1), base, text)
    elif isinstance(node, Group) and node.kind == "[" and any(axis.mesh for axis in _leaves(node)):
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
