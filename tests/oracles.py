"""What layouts, copies and chunks mean, spelled out element by element, and strategies that draw them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from transcoder.layout import Cell
from transcoder.moves import Copy, Run
from transcoder.planner import Model, build_model
from transcoder.recipe import Recipe, rule
from transcoder.spec import DTYPES, Box, Chunk, TensorSpec

Element = frozenset[tuple[str, int]]  # a logical element: the index on each of its axes
Tree = str | tuple[str, tuple["Tree", ...]]  # an axis name, or a bracket with what it encloses
Sizes = Mapping[str, int]
AXES = "abcdef"


def read(text: str) -> tuple[Tree, ...]:
    """The dimensions of a correct layout; meshes are dropped."""
    tokens = re.findall(r"[()\[\]]|[a-z]\w*", re.sub(r"/\w+", "", text))
    return _read_items(tokens)


def _read_items(tokens: list[str]) -> tuple[Tree, ...]:
    items: list[Tree] = []
    while tokens and (token := tokens.pop(0)) not in ")]":
        items.append((token, _read_items(tokens)) if token in "([" else token)
    return tuple(items)


def write(tree: Tree) -> str:
    """The notation of one dimension."""
    if isinstance(tree, str):
        return tree
    bracket, items = tree
    return bracket + " ".join(map(write, items)) + {"(": ")", "[": "]"}[bracket]


def along(tree: Tree, sizes: Sizes) -> list[Element]:
    """The elements that one dimension runs through, in order."""
    if isinstance(tree, str):
        return [frozenset({(tree, i)}) for i in range(sizes[tree])]
    bracket, items = tree
    parts = [along(item, sizes) for item in items]
    if bracket == "[":
        return [element for part in parts for element in part]
    return [frozenset().union(*choice) for choice in product(*parts)]


def places(text: str, sizes: Sizes) -> dict[tuple[int, ...], Element]:
    """Every coordinate of the tensor and the logical element that lies there."""
    dims = [list(enumerate(along(dim, sizes))) for dim in read(text)]
    return {tuple(i for i, _ in at): frozenset().union(*(e for _, e in at)) for at in product(*dims)}


def shape_of(text: str, sizes: Sizes) -> tuple[int, ...]:
    """Extents, by counting."""
    return tuple(len(along(dim, sizes)) for dim in read(text))


def keys(tree: Tree) -> list[frozenset[str]]:
    """The axis set of every cell of one dimension."""
    if isinstance(tree, str):
        return [frozenset({tree})]
    parts = [keys(item) for item in tree[1]]
    if tree[0] == "[":
        return [key for part in parts for key in part]
    return [frozenset().union(*choice) for choice in product(*parts)]


def cell_places(cell: Cell) -> Iterator[tuple[tuple[int, ...], Element]]:
    """Every coordinate of a cell and its element, by the definition in `Cell`."""
    for choice in product(*(range(size) for size in cell.sizes.values())):
        index = dict(zip(cell.sizes, choice, strict=True))
        sums = (sum(step * index[axis] for axis, step in steps.items()) for steps in cell.steps)
        yield tuple(start + more for start, more in zip(cell.origin, sums, strict=True)), frozenset(index.items())


def copy_pairs(copy: Copy) -> list[tuple[int, int]]:
    """Every pair (chunk element, Hugging Face element) of a copy."""
    return [
        (copy.chunk + _dot(i, copy.chunk_steps), copy.hf + _dot(i, copy.hf_steps))
        for i in product(*map(range, copy.shape))
    ]


def run_pairs(run: Run) -> list[tuple[int, int]]:
    """Every pair (chunk element, Hugging Face element) of a run."""
    others = [run.hf + _dot(i, run.hf_steps) for i in product(*map(range, run.shape))]
    return list(zip(range(run.chunk, run.chunk + run.count), others, strict=True))


def _dot(index: tuple[int, ...], steps: tuple[int, ...]) -> int:
    return sum(i * step for i, step in zip(index, steps, strict=True))


def box_places(box: Box) -> Iterator[tuple[int, ...]]:
    """The coordinates inside a box, row-major."""
    return product(*(range(start, stop) for start, stop in box))


def flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Row-major position."""
    position = 0
    for i, extent in zip(index, shape, strict=True):
        position = position * extent + i
    return position


def expected_pairs(
    mcore: Mapping[tuple[int, ...], Element], box: Box, hf: Mapping[tuple[int, ...], Element], start: int, stop: int
) -> list[tuple[int, int]]:
    """Sorted pairs (element of the chunk, element of the range) that hold the same logical element."""
    wanted = {element: n - start for n, element in enumerate(hf.values()) if start <= n < stop}
    inside = enumerate(mcore[place] for place in box_places(box))
    return sorted((n, wanted[element]) for n, element in inside if element in wanted)


@dataclass
class Memory:
    """Chunks of one model kept in memory; counts how often each byte is written."""

    data: dict[tuple[str, Box], np.ndarray[Any, Any]] = field(default_factory=dict)
    writes: dict[tuple[str, Box], np.ndarray[Any, Any]] = field(default_factory=dict)

    def sink(self, key: str, chunk: Chunk, start: int, data: memoryview) -> None:
        """Takes payload bytes of a chunk from `start`."""
        payload = np.frombuffer(data, np.uint8)
        for table in (self.data, self.writes):
            table.setdefault((key, chunk.box), np.zeros(chunk.nbytes, np.uint8))
        self.data[key, chunk.box][start : start + payload.size] = payload
        self.writes[key, chunk.box][start : start + payload.size] += 1

    def fetch(self, key: str, chunk: Chunk, start: int, count: int) -> memoryview:
        """Gives payload bytes [start, start + count) of a chunk."""
        return memoryview(self.data[key, chunk.box][start : start + count].tobytes())


def model_of(mcore: str, hf: tuple[str, ...], sizes: Sizes, dialect: str = "per-layer") -> Model:
    """A model of one rule, the sides given as "name layout"."""
    recipe = Recipe("oracle", ("OracleForCausalLM",), {}, (rule(mcore, *hf),), (), {})
    return build_model(recipe, {}, dict(sizes), dialect)


def spec_of(name: str, shape: tuple[int, ...], boxes: tuple[Box, ...], dtype: str = "int32") -> TensorSpec:
    """A stored tensor with these chunks."""
    width = DTYPES[dtype].size
    chunks = tuple(Chunk(box, "file", 0, width * prod(b - a for a, b in box)) for box in boxes)
    return TensorSpec(name, DTYPES[dtype], shape, chunks)


@st.composite
def trees(draw: st.DrawFn, axes: str = AXES, depth: int = 3) -> Tree:
    """A nested dimension; axes may recur in different alternatives of a sum, never within a product."""
    kind = draw(st.sampled_from("a(["[: 3 if len(axes) > 1 and depth else 1]))
    if kind == "a":
        return draw(st.sampled_from(axes))
    if kind == "[":
        pools = draw(st.lists(st.sets(st.sampled_from(axes), min_size=1), min_size=1, max_size=3))
        return "[", tuple(draw(trees("".join(sorted(pool)), depth - 1)) for pool in pools)
    cut = draw(st.integers(1, len(axes) - 1))
    mixed = "".join(draw(st.permutations(axes)))
    return "(", (draw(trees(mixed[:cut], depth - 1)), draw(trees(mixed[cut:], depth - 1)))


def dims_of(tree: Tree) -> tuple[Tree, ...]:
    """A product taken apart into tensor dimensions; anything else is one dimension."""
    return tree[1] if isinstance(tree, tuple) and tree[0] == "(" else (tree,)


def layouts() -> st.SearchStrategy[str]:
    """Layouts whose cells have different axis sets."""
    distinct = trees().filter(lambda tree: len(set(keys(tree))) == len(keys(tree)))
    return distinct.map(lambda tree: " ".join(map(write, dims_of(tree))))


@st.composite
def spelled(draw: st.DrawFn, cells: list[frozenset[str]]) -> Tree:
    """A nested dimension with exactly these cells: a product of common axes and of a sum of the rest."""
    if len(cells) == 1:
        return draw(_grouped(draw(st.permutations(sorted(cells[0])))))
    common = frozenset.intersection(*cells)
    outer = draw(st.sets(st.sampled_from(sorted(common)))) if common else set()
    rest = [cell - outer for cell in cells]
    if outer and frozenset() not in rest:
        inner = draw(_summed(rest))
        return draw(_grouped(draw(st.permutations([*sorted(outer), inner]))))
    return draw(_summed(cells))


@st.composite
def _summed(draw: st.DrawFn, cells: list[frozenset[str]]) -> Tree:
    mixed = draw(st.permutations(cells))
    cut = draw(st.integers(1, len(mixed) - 1))
    return "[", (draw(spelled(mixed[:cut])), draw(spelled(mixed[cut:])))


@st.composite
def _grouped(draw: st.DrawFn, items: list[Tree]) -> Tree:
    if len(items) == 1:
        return items[0]
    first = draw(st.integers(0, len(items) - 2))
    stop = draw(st.integers(first + 1, len(items)))
    inner = items[first] if stop == first + 1 else ("(", tuple(items[first:stop]))
    return "(", (*items[:first], inner, *items[stop:])


def sizes_of(limit: int = 3) -> st.SearchStrategy[dict[str, int]]:
    """A size for every axis."""
    return st.fixed_dictionaries({axis: st.integers(1, limit) for axis in AXES})


@dataclass(frozen=True)
class Case:
    """A Megatron layout, Hugging Face layouts over the same cells, and sizes."""

    mcore: str
    hf: tuple[str, ...]
    sizes: dict[str, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two spellings of the same cells, the second one spread over one or more tensors."""
    mcore = draw(layouts())
    cells = sorted(keys(("(", read(mcore))), key=sorted)
    cuts = sorted(draw(st.sets(st.integers(1, len(cells)), max_size=2)) | {0, len(cells)})
    mixed = draw(st.permutations(cells))
    sides = [draw(spelled(mixed[a:b])) for a, b in pairwise(cuts)]
    return Case(mcore, tuple(" ".join(map(write, dims_of(side))) for side in sides), draw(sizes_of()))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """Boxes that tile a tensor: cuts that each divide one box only, so hardly ever a grid."""
    boxes: list[Box] = [tuple((0, extent) for extent in shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        wide = [dim for dim, (start, stop) in enumerate(box) if stop - start > 1]
        dim = draw(st.sampled_from(wide)) if wide else -1
        boxes += _halves(box, dim, draw(st.integers(box[dim][0] + 1, box[dim][1] - 1))) if wide else [box]
    return tuple(draw(st.permutations(boxes)))


def _halves(box: Box, dim: int, at: int) -> list[Box]:
    start, stop = box[dim]
    return [(*box[:dim], part, *box[dim + 1 :]) for part in ((start, at), (at, stop))]


@st.composite
def ranges_within(draw: st.DrawFn, count: int) -> tuple[int, int]:
    """A flat range, empty ones included."""
    start = draw(st.integers(0, count))
    return start, draw(st.integers(start, count))
