"""A recipe applied to a config: every tensor that should exist on both sides, with the cells they share.

A `Family` is a rule with sizes in one Megatron key dialect; it is the same for every layer and every expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product as combinations
from math import prod
from typing import Any

from transcoder.dialects import extra_state_keys, spellings
from transcoder.errors import Problem, TranscoderError, UsageError, refuse
from transcoder.layout import FILLER, Cell
from transcoder.recipe import Recipe, Rule, Side, evaluate
from transcoder.sizing import active_rules, guarded, layer_lists
from transcoder.spec import DTYPES, DType

NOUNS = {
    "mgate": "expert ffn size",
    "mup": "expert ffn size",
    "mf": "expert ffn size",
    "sgate": "shared expert ffn size",
    "sup": "shared expert ffn size",
    "sf": "shared expert ffn size",
    "gate": "ffn size",
    "up": "ffn size",
    "f": "ffn size",
    "g": "query groups",
    "mh": "Mamba heads",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A cell of a Hugging Face tensor and the Megatron cell with the same elements.

    fixed: axes that the Megatron name spells and the Hugging Face tensor has as dimensions, at one value each.
    """

    part: int
    fixed: Mapping[str, int]
    mcore: Cell
    hf: Cell


@dataclass(frozen=True, slots=True)
class Filler:
    """A cell of a stored Megatron tensor that no Hugging Face tensor supplies."""

    key: str
    cell: Cell
    rule: str


@dataclass(frozen=True, slots=True)
class Family:
    """A rule with sizes in one Megatron key dialect, for the layers that have it."""

    rule: Rule
    mcore: tuple[Side, ...]
    layers: tuple[int, ...]
    sizes: Mapping[str, int]
    pairs: tuple[tuple[Pair, ...], ...]  # per Hugging Face side
    unpaired: tuple[tuple[int, Cell], ...]  # Megatron side and cell

    def places(self, side: Side) -> Iterator[tuple[int, ...]]:
        """Every choice of the axes that the side's name spells, as their values."""
        return combinations(*(self.layers if axis == "l" else range(self.sizes[axis]) for axis in side.name_axes))

    def instances(self, side: Side) -> Iterator[dict[str, int]]:
        """The same, with the names of the axes."""
        return (dict(zip(side.name_axes, at, strict=True)) for at in self.places(side))

    @property
    def parameters(self) -> int:
        """Megatron parameters, one per layer, expert and name."""
        return 0 if self.rule.alias else sum(1 for side in self.rule.mcore for _ in self.places(side))

    @property
    def tensors(self) -> int:
        """Hugging Face tensors."""
        return sum(1 for side in self.rule.hf for _ in self.places(side))

    def dtype(self, usual: DType) -> DType:
        """The dtype of the rule's Megatron tensors in a model of dtype `usual`."""
        return DTYPES[self.rule.dtype] if self.rule.dtype else usual

    def accepts(self, found: DType, usual: DType) -> bool:
        """Whether files of a model of dtype `usual` can hold the rule's tensors as `found`, on either side."""
        return found in (usual, self.dtype(usual))


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A Hugging Face tensor that a family describes."""

    name: str
    shape: tuple[int, ...]
    family: Family
    part: int
    at: tuple[int, ...]  # values of the axes that its name spells

    @property
    def index(self) -> dict[str, int]:
        """The axes that its name spells, with their values."""
        return dict(zip(self.family.rule.hf[self.part].name_axes, self.at, strict=True))

    @property
    def key(self) -> str:
        """The stored Megatron tensor that it is part of; the first, where it is part of several."""
        pair = self.family.pairs[self.part][0]
        return self.family.mcore[pair.part].named({**self.index, **pair.fixed})


@dataclass(frozen=True, slots=True)
class McoreTensor:
    """A stored Megatron tensor that a family describes."""

    name: str
    shape: tuple[int, ...]
    family: Family
    part: int
    at: tuple[int, ...]  # values of the axes that its name spells

    @property
    def index(self) -> dict[str, int]:
        """The axes that its name spells, with their values."""
        return dict(zip(self.family.mcore[self.part].name_axes, self.at, strict=True))


@dataclass(frozen=True)
class Model:
    """A recipe applied to a config in one dialect: everything that should exist on both sides."""

    recipe: Recipe
    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    dialect: str
    families: tuple[Family, ...]
    alias_hint: str = ""  # what to do when a tensor differs from the one that it repeats

    @cached_property
    def hf(self) -> dict[str, HfTensor]:
        """Every Hugging Face tensor by name."""
        found = {}
        for family in self.families:
            for part, side in enumerate(family.rule.hf):
                shape = side.layout.shape(family.sizes)
                for at in family.places(side):
                    name = side.spelled(at)
                    found[name] = HfTensor(name, shape, family, part, at)
        return found

    @cached_property
    def mcore(self) -> dict[str, McoreTensor]:
        """Every stored Megatron tensor by key."""
        found = {}
        for family in (each for each in self.families if not each.rule.alias):
            for part, side in enumerate(family.mcore):
                shape = side.layout.shape(family.sizes)
                for at in family.places(side):
                    name = side.spelled(at)
                    found[name] = McoreTensor(name, shape, family, part, at)
        return found

    def fillers(self) -> Iterator[tuple[Family, Filler]]:
        """Every cell of every stored tensor that no Hugging Face tensor supplies."""
        for family in self.families:
            for part, cell in family.unpaired:
                for at in family.places(family.mcore[part]):
                    yield family, Filler(family.mcore[part].spelled(at), cell, family.rule.label)

    def objects(self) -> list[str]:
        """Keys of the `_extra_state` objects that a Transformer Engine model asks for."""
        found: list[str] = []
        for module, layers in guarded(self.recipe.extra_state, self.recipe, self.values, self.sizes):
            found += extra_state_keys(module, self.dialect, layers, self.sizes) if layers else ()
        return found

    def limits(self) -> Iterator[tuple[str, str, int]]:
        """What the meshes cut: (mesh, name, count), for counts that a mesh must divide."""
        for family in self.families:
            for side in family.mcore:
                for mesh, axes in side.layout.cut_axes():
                    if not any(axis.startswith(FILLER) for axis in axes):
                        yield mesh, *_limit(axes, family.sizes)
            if any("e" in side.name_axes for side in family.rule.mcore):
                yield "ep", "experts", family.sizes["e"]

    def fields(self) -> dict[str, Any]:
        """The TransformerConfig fields of the recipe; those that are None are left to megatron-core."""
        scope = {**self.values, **self.sizes, **layer_lists(self.recipe, self.values, self.sizes)}
        found = {name: evaluate(text, scope) for name, text in self.recipe.model.items()}
        return {name: value for name, value in found.items() if value is not None}

    def weights_only(self) -> list[str]:
        """Why the configuration that we write does not describe the model fully; empty when it does."""
        return [reason for test, reason in self.recipe.checks.items() if evaluate(test, self.values)]


def _limit(axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, int]:
    """Query heads count, not their rows: a rank holds whole heads."""
    if "q" in axes:
        return "attention heads", sizes["g"] * sizes["q"]
    return NOUNS.get(axes[0], axes[0]), prod(sizes[axis] for axis in axes)


def build_model(recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int], dialect: str = "") -> Model:
    """The model that `recipe` and the config describe. sizes: axis sizes, `pad` included.

    dialect: by default what Megatron itself uses: stacked keys when all layers are alike, else per-layer keys.
    Raises UsageError for stacked keys when the layers are not alike.
    """
    active = [(rule, layers) for rule, layers in active_rules(recipe, values, sizes) if layers]
    numbered = [layers for rule, layers in active if any("l" in side.name_axes for side in rule.mcore)]
    if empty := set(range(sizes.get("l", 0))) - {layer for layers in numbered for layer in layers}:
        problem = Problem(
            file="config.json", found=f"{recipe.axes['l']} = {sizes['l']}", message=f"layers {sorted(empty)[:8]}"
        )
        raise refuse("config", "the config says nothing of what some layers are", [problem])
    alike = all(len(layers) == sizes["l"] for layers in numbered)
    if dialect == "stacked" and not alike:
        raise UsageError("stacked keys need layers that are all alike; per-layer keys fit this model", kind="layout")
    chosen = dialect or ("stacked" if alike else "per-layer")
    families = tuple(family_of(rule, chosen, sizes, layers) for rule, layers in active)
    return Model(recipe, values, sizes, chosen, families)


def _with_fillers(rule: Rule, sizes: Mapping[str, int]) -> dict[str, int]:
    found = dict(sizes)
    for axis in (name for side in rule.mcore for name in side.layout.axes):
        if axis.startswith("zero_"):
            found[axis] = sizes[axis.removeprefix("zero_")]
    return found


def family_of(rule: Rule, dialect: str, given: Mapping[str, int], layers: tuple[int, ...]) -> Family:
    """A rule in one dialect, for the layers that have it. given: axis sizes."""
    sizes = _with_fillers(rule, given)
    mcore = tuple(spelled.shifted(sizes) for side in rule.mcore for spelled in spellings(side, dialect))
    pairs = tuple(tuple(_pairs(rule, side, mcore, sizes)) for side in rule.hf)
    rule = replace(rule, hf=tuple(side.shifted(sizes) for side in rule.hf))
    if rule.alias:
        return Family(rule, mcore, layers, sizes, pairs, ())
    used = {(pair.part, pair.mcore.key) for matched in pairs for pair in matched}
    whole = ((part, cell) for part, side in enumerate(mcore) for cell in _nonempty(side, sizes))
    unpaired = tuple((part, cell) for part, cell in whole if (part, cell.key) not in used)
    if any(not cell.filler for _, cell in unpaired):
        raise TranscoderError(f"rule {rule.label}: a part of the Megatron tensor has no source")
    return Family(rule, mcore, layers, sizes, pairs, unpaired)


def _pairs(rule: Rule, side: Side, mcore: tuple[Side, ...], sizes: Mapping[str, int]) -> Iterator[Pair]:
    """The pairs of one Hugging Face side; an axis that its name spells is one index wide on the Megatron side.

    Axes that only the name of an alias spells count its copies.
    """
    stored = {axis for other in mcore for axis in (*other.name_axes, *other.layout.axes)}
    spelled = set(side.name_axes) & stored if rule.alias else set(side.name_axes)
    single = {**sizes, **dict.fromkeys(spelled, 1)}
    others = [(part, cell) for part, other in enumerate(mcore) for cell in _nonempty(other, single)]
    for cell in side.layout.cells(sizes):
        axes = cell.key | spelled
        partners = [(part, other) for part, other in others if other.key | set(mcore[part].name_axes) == axes]
        if len(partners) != 1:
            raise TranscoderError(f"rule {rule.label}: {side.name} has {len(partners)} partners for {sorted(axes)}")
        part, other = partners[0]
        missing = [axis for axis in mcore[part].name_axes if axis not in spelled]
        for values in combinations(*(range(sizes[axis]) for axis in missing)):
            fixed = dict(zip(missing, values, strict=True))
            yield Pair(part, fixed, other, cell.at(fixed))


def _nonempty(side: Side, sizes: Mapping[str, int]) -> list[Cell]:
    return [cell for cell in side.layout.cells(sizes) if prod(cell.sizes.values())]
