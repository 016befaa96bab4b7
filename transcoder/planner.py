"""The plan: which elements of which Hugging Face tensor are which elements of which Megatron chunk.

Decided from headers and config alone. A `Family` is a rule with sizes: its copies are the same for every layer, so
they are computed once per chunk grid and reused (`Atlas.pieces`). Both directions use the same pieces.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product as combinations
from math import prod
from typing import Any

from transcoder.errors import Problem, TranscoderError, refuse
from transcoder.layout import Cell, parse
from transcoder.moves import Copy, boxes_of_range, clip, copy_of
from transcoder.recipe import Recipe, Rule, Side, evaluate
from transcoder.spec import Box, Catalog, Chunk, DType, TensorSpec, box_shape

MAX_SIZE = 1 << 40  # no dimension of a real model comes near this


@dataclass(frozen=True, slots=True)
class Family:
    """A rule with sizes in one Megatron key dialect; `index` are the axes that names spell on some side."""

    rule: Rule
    mcore: tuple[Side, ...]
    index: tuple[str, ...]
    sizes: Mapping[str, int]
    pairs: tuple[tuple[tuple[int, Cell, Cell], ...], ...]  # per Hugging Face side: (Megatron side, its cell, HF cell)
    fillers: tuple[tuple[int, Cell], ...]

    def instances(self) -> Iterator[dict[str, int]]:
        """Every choice of the index axes."""
        for values in combinations(*(range(self.sizes[name]) for name in self.index)):
            yield dict(zip(self.index, values, strict=True))


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A Hugging Face tensor that a family describes."""

    name: str
    shape: tuple[int, ...]
    family: Family
    part: int
    index: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class McoreTensor:
    """A stored Megatron tensor that a family describes."""

    name: str
    shape: tuple[int, ...]
    family: Family
    part: int


@dataclass(frozen=True)
class Model:
    """A recipe applied to a config in one dialect: everything that should exist on both sides."""

    recipe: Recipe
    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    dialect: str
    families: tuple[Family, ...]

    @cached_property
    def hf(self) -> dict[str, HfTensor]:
        """Every Hugging Face tensor by name."""
        found = {}
        for family in self.families:
            shapes = [side.layout.shape(family.sizes) for side in family.rule.hf]
            for index in family.instances():
                for part, side in enumerate(family.rule.hf):
                    name = side.named(index)
                    found[name] = HfTensor(name, shapes[part], family, part, index)
        return found

    @cached_property
    def mcore(self) -> dict[str, McoreTensor]:
        """Every stored Megatron tensor by key."""
        found = {}
        for family in self.families:
            for part, side in enumerate(family.mcore):
                for values in combinations(*(range(family.sizes[axis]) for axis in side.name_axes)):
                    name = side.named(dict(zip(side.name_axes, values, strict=True)))
                    found[name] = McoreTensor(name, side.layout.shape(family.sizes), family, part)
        return found

    def fields(self) -> dict[str, Any]:
        """The TransformerConfig fields of the recipe."""
        scope = {**self.values, **self.sizes}
        return {name: evaluate(text, scope) for name, text in self.recipe.model.items()}

    def weights_only(self) -> list[str]:
        """Why the configuration that we write does not describe the model fully; empty when it does."""
        return [reason for test, reason in self.recipe.checks.items() if evaluate(test, self.values)]


def axis_sizes(recipe: Recipe, values: Mapping[str, Any], limit: int) -> dict[str, int]:
    """Axis sizes from the config, in the order of the table. Raises InputError for a size that is not sane.

    limit: no more layers than this, the number of tensors that the files hold.
    """
    scope, problems = dict(values), []
    for name, text in recipe.axes.items():
        try:
            scope[name] = evaluate(text, scope)
        except (TypeError, ZeroDivisionError):
            scope[name] = None
        if type(scope[name]) is not int or not 0 < scope[name] < MAX_SIZE:
            problems.append(
                Problem(file="config.json", message=f"{text} = {scope[name]!r}", expected="a positive integer")
            )
    if not problems and scope["l"] > limit:
        found = f"{limit} tensors in the files"
        problems.append(Problem(file="config.json", message=f"num_hidden_layers = {scope['l']}", found=found))
    if problems:
        raise refuse("config", "the config does not describe a model", problems)
    return {name: scope[name] for name in recipe.axes}


def build_model(recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int], dialect: str) -> Model:
    """The model that `recipe` and the config describe. sizes: axis sizes, `pad` included."""
    active = [rule for rule in recipe.rules if not rule.only or evaluate(rule.only, values)]
    families = tuple(_family(rule, dialect, _with_fillers(rule, sizes)) for rule in active)
    return Model(recipe, values, sizes, dialect, families)


def _with_fillers(rule: Rule, sizes: Mapping[str, int]) -> dict[str, int]:
    found = dict(sizes)
    for axis in (name for side in rule.mcore for name in side.layout.axes):
        if axis.startswith("zero_"):
            found[axis] = sizes[axis.removeprefix("zero_")]
    return found


def _family(rule: Rule, dialect: str, sizes: Mapping[str, int]) -> Family:
    index = tuple(dict.fromkeys(axis for side in (*rule.mcore, *rule.hf) for axis in side.name_axes))
    mcore = tuple(_stacked(side) if dialect == "stacked" else side for side in rule.mcore)
    single = {**sizes, **dict.fromkeys(index, 1)}
    cells = [(part, cell) for part, side in enumerate(mcore) for cell in _nonempty(side, single)]
    pairs, used = [], set()
    for side in rule.hf:
        matched = []
        for cell in side.layout.cells(single):
            partner = [(part, other) for part, other in cells if other.key - set(index) == cell.key - set(index)]
            if len(partner) != 1:
                raise TranscoderError(
                    f"rule {rule.label}: {side.name} has {len(partner)} partners for {sorted(cell.key)}"
                )
            used.add(partner[0][1].key)
            matched.append((*partner[0], cell))
        pairs.append(tuple(matched))
    fillers = tuple((part, cell) for part, cell in cells if cell.key not in used)
    if any(not cell.filler for _, cell in fillers):
        raise TranscoderError(f"rule {rule.label}: a part of the Megatron tensor has no source")
    return Family(rule, mcore, index, sizes, tuple(pairs), fillers)


def _nonempty(side: Side, sizes: Mapping[str, int]) -> list[Cell]:
    return [cell for cell in side.layout.cells(sizes) if prod(cell.sizes.values())]


def _stacked(side: Side) -> Side:
    if "{l}." not in side.name:
        return side
    return Side(side.name.replace("{l}.", "", 1), parse(f"l/each {side.layout.text}"))


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


def check_hf(model: Model, catalog: Catalog, dtype: DType, ignored: Iterable[str] = ()) -> None:
    """Refuse unless the files hold exactly the tensors of the model. Raises InputError listing every problem."""
    problems = [*_missing(model, catalog), *_unknown(model, catalog, set(ignored))]
    for name, tensor in model.hf.items():
        spec = catalog.get(name)
        if spec is not None and spec.shape != tensor.shape:
            problems.append(
                _problem(
                    tensor, spec, str(list(tensor.shape)), str(list(spec.shape)), "the config disagrees with the files"
                )
            )
        elif spec is not None and spec.dtype != dtype:
            problems.append(
                _problem(tensor, spec, dtype.name, spec.dtype.name, "convert the tensor or correct the config's dtype")
            )
    if problems:
        raise refuse("tensors", f"{len(problems)} tensors do not fit recipe {model.recipe.name}", problems)


def _problem(tensor: HfTensor, spec: TensorSpec, expected: str, found: str, hint: str) -> Problem:
    label = tensor.family.rule.label
    return Problem(file=spec.chunks[0].file, tensor=spec.name, rule=label, expected=expected, found=found, hint=hint)


def _missing(model: Model, catalog: Catalog) -> Iterator[Problem]:
    for name, tensor in model.hf.items():
        if name not in catalog:
            yield Problem(
                tensor=name,
                rule=tensor.family.rule.label,
                expected=f"a tensor of shape {list(tensor.shape)}",
                found="no such tensor in any file",
                hint="the download may be incomplete, or the config may not belong to these files",
            )


def _unknown(model: Model, catalog: Catalog, ignored: set[str]) -> Iterator[Problem]:
    patterns = {side.name: family.rule for family in model.families for side in family.rule.hf}
    for name, spec in catalog.items():
        if name not in model.hf and name not in ignored:
            near = difflib.get_close_matches(re.sub(r"\b\d+\b", "{l}", name), patterns, 1)
            nearest = f"nearest is {near[0]} in recipe {model.recipe.name}" if near else f"recipe {model.recipe.name}"
            hint = "add a rule, or list the name under ignore"
            yield Problem(file=spec.chunks[0].file, tensor=name, rule=nearest, found="no rule matches", hint=hint)


def ignored_names(model: Model, catalog: Catalog) -> set[str]:
    """Tensors of the files that the recipe lists under `ignore`."""
    patterns = [re.sub(r"\\\{l\\\}", r"\\d+", re.escape(text)) for text in model.recipe.ignore]
    return {name for name in catalog if any(re.fullmatch(pattern, name) for pattern in patterns)}


def check_mcore(model: Model, catalog: Catalog) -> None:
    """Refuse unless the checkpoint holds exactly the tensors of the model. Raises InputError listing every problem."""
    problems = []
    for name, tensor in model.mcore.items():
        spec = catalog.get(name)
        expected = f"a tensor of shape {list(tensor.shape)}"
        if spec is None:
            problems.append(Problem(tensor=name, rule=tensor.family.rule.label, expected=expected, found="no such key"))
        elif spec.shape != tensor.shape:
            problems.append(
                Problem(tensor=name, rule=tensor.family.rule.label, expected=expected, found=str(list(spec.shape)))
            )
    for name in catalog:
        if name not in model.mcore:
            problems.append(Problem(tensor=name, rule=f"recipe {model.recipe.name}", found="no rule matches"))
    if problems:
        raise refuse("tensors", f"{len(problems)} stored tensors do not fit recipe {model.recipe.name}", problems)


def check_coverage(model: Model, atlas: Atlas) -> None:
    """Prove from integers that every element of both sides is moved exactly once, filler apart.

    Cells of a layout are disjoint and chunks tile their tensors, so counts decide. Raises InputError.
    """
    filled: dict[tuple[str, Box], int] = {}
    problems = []
    for tensor in model.hf.values():
        moved = 0
        for key, chunk, copy in atlas.pieces(tensor, 0, prod(tensor.shape)):
            filled[key, chunk.box] = filled.get((key, chunk.box), 0) + copy.count
            moved += copy.count
        if moved != prod(tensor.shape):
            problems.append(
                Problem(tensor=tensor.name, expected=f"{prod(tensor.shape)} elements", found=f"{moved} in the chunks")
            )
    for family in model.families:
        for index in family.instances():
            for key, chunk, copy, _ in atlas.fillers(family, index):
                filled[key, chunk.box] = filled.get((key, chunk.box), 0) + copy.count
    for name in model.mcore:
        for chunk in atlas.catalog[name].chunks:
            if filled.get((name, chunk.box), 0) != prod(box_shape(chunk.box)):
                problems.append(Problem(tensor=name, message=f"chunk {chunk.box} is not covered exactly once"))
    if problems:
        raise refuse("coverage", "the plan does not cover every element exactly once", problems)
