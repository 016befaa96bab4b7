"""Axis sizes from the shapes of stored Megatron tensors, for checkpoints whose files do not say them.

Every dimension of every rule is an equation over the recipe's axes, linear in each of them. An equation with one
unknown axis gives it; what then still hides in products (heads of a fused QKV) is tried out, and taken where one
number alone fits.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from transcoder.dialects import spellings
from transcoder.layout import FILLER, Layout, parse
from transcoder.recipe import Field, Recipe, evaluate, pattern

MOST_GROUPS = 1024
Shapes = Mapping[str, tuple[int, ...]]
Sizes = dict[str, int]


@dataclass(frozen=True, slots=True)
class Equation:
    """One dimension of a stored tensor: the extent that its layout's axes have to give."""

    layout: Layout  # of this dimension alone
    extent: int
    free: frozenset[str]  # axes, by the names that stand for all equal ones

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes, of all its axes, give the extent."""
        return self.layout.shape(sizes) == (self.extent,)

    def solved(self, sizes: Mapping[str, int], same: Mapping[str, str], axis: str) -> int:
        """The size of the only unknown axis; 0 where none fits."""
        none, one = (self.layout.shape(_spread({**sizes, axis: n}, same))[0] for n in (0, 1))
        size, rest = divmod(self.extent - none, one - none) if one != none else (0, 1)
        return size if not rest and size > 0 else 0


def fields_of_shapes(recipe: Recipe, shapes: Shapes, dialect: str) -> dict[str, int]:
    """The fields of Megatron's configuration that follow from stored tensors alone. Padded rows count as vocabulary."""
    sizes = sizes_of_shapes(recipe, shapes, dialect)
    found = {}
    for name, text in recipe.model.items():
        names = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
        if isinstance(text, Field) and names and names <= sizes.keys():
            found[name] = int(evaluate(text, sizes))
    return found


def fields_of_keys(keys: Collection[str]) -> dict[str, bool]:
    """What the presence of tensors says."""
    return {
        "share_embeddings_and_output_weights": not any(key.endswith("output_layer.weight") for key in keys),
        "add_qkv_bias": any(key.endswith("linear_qkv.bias") for key in keys),
        "add_bias_linear": any(key.endswith(("linear_proj.bias", "linear_fc1.bias")) for key in keys),
    }


def sizes_of_shapes(recipe: Recipe, shapes: Shapes, dialect: str) -> Sizes:
    """The axis sizes that the stored tensors determine."""
    same = {axis: _stands_for(axis, recipe.axes) for axis in recipe.axes}
    counted = dict[str, int]()
    equations = list(_equations(recipe, shapes, dialect, same, counted))
    known = _propagated(equations, {**_constants(recipe), **counted}, same)
    if "g" in recipe.axes and same["g"] not in known:
        tried = (_propagated(equations, {**known, same["g"]: n}, same) for n in range(1, MOST_GROUPS + 1))
        fitting = [sizes for sizes in tried if _complete(equations, sizes) and _consistent(equations, sizes, same)]
        known = fitting[0] if len(fitting) == 1 else known
    return _spread(known, same) if _consistent(equations, known, same) else {}


def _stands_for(axis: str, axes: Mapping[str, str]) -> str:
    """The axis that this one is always equal to, by the recipe's table."""
    return _stands_for(axes[axis], axes) if axes.get(axis) in axes and axes[axis] != axis else axis


def _constants(recipe: Recipe) -> Sizes:
    return {axis: int(text) for axis, text in recipe.axes.items() if text.isdigit()}


def _spread(sizes: Mapping[str, int], same: Mapping[str, str]) -> Sizes:
    return {**sizes, **{axis: sizes[other] for axis, other in same.items() if other in sizes}, "pad": 0}


def _equations(
    recipe: Recipe, shapes: Shapes, dialect: str, same: Mapping[str, str], counted: Sizes
) -> Iterator[Equation]:
    """The equations of the first stored tensor of every rule; axes that names spell are counted on the way."""
    for rule in (rule for rule in recipe.rules if not rule.alias):
        for side in (spelled for each in rule.mcore for spelled in spellings(each, dialect)):
            if any(axis.startswith("zero") for axis in side.layout.axes):
                continue
            fits = pattern(side.name)
            keys = [key for key in shapes if fits.fullmatch(key) and len(shapes[key]) == len(side.layout.dims)]
            for key in keys:
                _count(side.name, key, side.name_axes, same, counted)
            for node, extent in zip(side.layout.dims, shapes[keys[0]] if keys else (), strict=bool(keys)):
                layout = parse(str(node))
                axes = {axis for axis in layout.axes if not axis.startswith(FILLER)}
                yield Equation(layout, extent, frozenset(same.get(axis, axis) for axis in axes))


def _count(name: str, key: str, axes: tuple[str, ...], same: Mapping[str, str], counted: Sizes) -> None:
    numbers = [int(part) for part, text in zip(key.split("."), name.split("."), strict=True) if "{" in text]
    for axis, number in zip(axes, numbers, strict=True):
        counted[same.get(axis, axis)] = max(counted.get(same.get(axis, axis), 0), number + 1)


def _propagated(equations: list[Equation], known: Sizes, same: Mapping[str, str]) -> Sizes:
    """What follows from equations with one unknown axis, until none is left."""
    found, before = dict(known), -1
    while len(found) > before:
        before = len(found)
        for equation in equations:
            unknown = [axis for axis in equation.free if axis not in found]
            if len(unknown) == 1 and (size := equation.solved(_spread(found, same), same, unknown[0])):
                found[unknown[0]] = size
    return found


def _complete(equations: list[Equation], sizes: Sizes) -> bool:
    return all(equation.free <= sizes.keys() for equation in equations)


def _consistent(equations: list[Equation], sizes: Sizes, same: Mapping[str, str]) -> bool:
    spread = _spread(sizes, same)
    return all(equation.holds(spread) for equation in equations if equation.free <= sizes.keys())
