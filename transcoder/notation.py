"""The notation's grammar: text → a tree of named axes, products and sums. See `layout.py` for what it means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as combinations

MESHES = ("tp", "etp", "each")
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


def read(text: str) -> tuple[Node, ...]:
    """The nodes that `text` spells, one per dimension. Raises LayoutError with the place of the fault."""
    dims = _items(_tokens(text), "", text)
    _check_products(dims, text)
    _check_meshes(dims, text)
    if not dims:
        raise LayoutError(f"{text!r}: no axes")
    return dims


def leaves(node: Node) -> Iterator[Axis]:
    """The axes below a node, in reading order."""
    if isinstance(node, Axis):
        yield node
    else:
        for item in node.items:
            yield from leaves(item)


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
