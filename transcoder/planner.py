"""A recipe applied to a config: every tensor that should exist on both sides, with the cells they share.

A `Family` is a rule with sizes in one Megatron key dialect; it is the same for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product as combinations
from math import prod
from typing import Any

from transcoder.dialects import spellings
from transcoder.errors import Problem, TranscoderError, refuse
from transcoder.layout import Cell
from transcoder.recipe import Recipe, Rule, Side, evaluate

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
    mcore = tuple(spelled for side in rule.mcore for spelled in spellings(side, dialect))
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
