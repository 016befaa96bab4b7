"""A checkpoint as people think of it: a tree of names in which layers and experts that are alike are one entry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

from transcoder.errors import printable
from transcoder.spec import Box, DType

NAME_LIMIT = 400  # characters of a part of a name
DEPTH = 32  # parts of a name; the rest is one


@dataclass(frozen=True, slots=True)
class Held:
    """A stored tensor and where its chunks lie: box, file, offset in bytes."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    places: tuple[tuple[Box, str, int], ...]

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return prod(self.shape) * self.dtype.size


@dataclass(slots=True)
class Node:
    """A part of a name, with the parts below it and the tensors that end here.

    numbers: those of the alike ones that an entry stands for. held: a tensor for each choice of the numbers on the way
    here, those of the outermost entry slowest; empty where no tensor ends. sign: equal for what is alike.
    """

    name: str
    below: list[Node] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    sign: int = 0

    def totals(self) -> tuple[int, int]:
        """How many tensors are here and below, and their bytes."""
        found = [node.totals() for node in self.below]
        own = sum(held.nbytes for held in self.held)
        return len(self.held) + sum(count for count, _ in found), own + sum(size for _, size in found)


@dataclass(slots=True)
class _Name:
    below: dict[str, _Name] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)


def outline(tensors: Iterable[Held]) -> Node:
    """The tree of all names; numbered ones that follow each other and are alike are one entry."""
    root = _Name()
    for held in tensors:
        place = root
        for part in held.key.split(".", DEPTH):
            place = place.below.setdefault(part, _Name())
        place.held.append(held)
    signs: dict[object, int] = {}
    return _node("", root, signs)


def _node(name: str, found: _Name, signs: dict[object, int]) -> Node:
    below = _joined(
        [_node(part, inner, signs) for part, inner in sorted(found.below.items(), key=lambda item: _order(item[0]))]
    )
    kinds = tuple((held.dtype.name, held.shape, tuple(box for box, _, _ in held.places)) for held in found.held)
    facts = kinds, tuple((node.name, tuple(node.numbers), node.sign) for node in below)
    number = [int(name)] if _is_number(name) else []
    return Node(printable(name, NAME_LIMIT), below, number, found.held, signs.setdefault(facts, len(signs)))


def _is_number(name: str) -> bool:
    """Whether a part of a name is a number as Python and JavaScript write it."""
    return name.isascii() and name.isdigit() and len(name) < 16 and str(int(name)) == name


def _order(name: str) -> tuple[int, int, str]:
    """Numbers as numbers, before names."""
    return (0, int(name), "") if _is_number(name) else (1, 0, name)


def _joined(nodes: list[Node]) -> list[Node]:
    """Numbered neighbours that are alike, as one."""
    found: list[Node] = []
    for node in nodes:
        if found and found[-1].numbers and node.numbers and found[-1].sign == node.sign:
            _add(found[-1], node)
            found[-1].numbers += node.numbers
        else:
            found.append(node)
    return found


def _add(one: Node, two: Node) -> None:
    one.held += two.held
    for a, b in zip(one.below, two.below, strict=True):
        _add(a, b)


def natural(name: str) -> list[tuple[int, int, str]]:
    """What sorts names with numbers in them by these.

    >>> sorted(["__10_0.distcp", "__9_1.distcp"], key=natural)
    ['__9_1.distcp', '__10_0.distcp']
    """
    return [_order(part) for part in re.split(r"(\d+)", name)]


def spelled(numbers: list[int]) -> str:
    """Numbers as ranges.

    >>> spelled([0, 1, 2, 7])
    '0–2, 7'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def tree(root: Node) -> Iterator[str]:
    """The tree as text: a line for each part of a name, with tensors, bytes, dtype, shape and chunks."""
    for node in root.below:
        yield from _lines(node, "", "")


def _lines(node: Node, indent: str, before: str) -> Iterator[str]:
    label = spelled(node.numbers) if node.numbers else node.name
    alike = f" ({len(node.numbers)} alike)" if len(node.numbers) > 1 else ""
    name = f"{before}{label}"
    if len(node.below) == 1 and not node.held and not alike and not node.below[0].numbers:
        yield from _lines(node.below[0], indent, f"{name}.")
        return
    tensors, size = node.totals()
    count = f"{tensors:,} tensors, " if tensors > 1 else ""
    yield f"{indent}{name}{alike}  {_kind(node)}{count}{size:,} bytes"
    for inner in node.below:
        yield from _lines(inner, indent + "  ", "")


def _kind(node: Node) -> str:
    if not node.held:
        return ""
    held = node.held[0]
    files = {file for each in node.held for _, file, _ in each.places}
    where = printable(next(iter(files))) if len(files) == 1 else f"{len(files)} files"
    chunks = f"{len(held.places)} chunks, " if len(held.places) > 1 else ""
    return f"{held.dtype.name} {list(held.shape)}, {chunks}{where}, "
