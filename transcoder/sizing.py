"""Sizes and guards: which axes a config gives, and to which layers a rule applies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, TypeVar

from transcoder.errors import InputError, Problem, refuse
from transcoder.recipe import Recipe, Rule, evaluate

MAX_SIZE = 1 << 40  # no dimension of a real model comes near this
T = TypeVar("T", str, Rule)


def layer_scopes(recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per layer, everything that a guard may ask: config, sizes, the layer's number `l`, and the recipe's kinds."""
    scopes = []
    for layer in range(sizes.get("l", 0)):
        scope = {**sizes, **values, "l": layer, "layers": sizes["l"]}
        scopes.append(scope | {kind: bool(evaluate(text, scope)) for kind, text in recipe.kinds.items()})
    return scopes


def layer_lists(recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """For each kind `x` a list `x_layers` of 0 and 1, `all_x` and `any_x`."""
    scopes = layer_scopes(recipe, values, sizes) if recipe.kinds else []
    lists = {kind: [int(scope[kind]) for scope in scopes] for kind in recipe.kinds}
    return {
        name: value
        for kind, found in lists.items()
        for name, value in ((f"{kind}_layers", found), (f"all_{kind}", all(found)), (f"any_{kind}", any(found)))
    }


def axis_sizes(recipe: Recipe, values: Mapping[str, Any], tensors: int, largest: int = 1 << 20) -> dict[str, int]:
    """Axis sizes from the config, in the order of the table. Raises InputError for a size that is not sane.

    tensors: how many Hugging Face tensors there can be; largest: how many indices an axis of a name can have. Both
    keep a hostile config from costing time. Axes that no active rule uses may be 0.
    """
    sizes, wrong = given_sizes(recipe, values)
    if sizes["l"] > tensors:
        raise refuse("config", "the config does not describe a model", [_too_many(recipe, {"l"}, sizes, tensors)])
    active = [rule for rule, layers in active_rules(recipe, values, sizes) if layers]
    used = {"l"} | {axis for rule in active for axis in rule.axes}
    problems = [problem for name, problem in wrong.items() if name in used]
    problems += [_too_many(recipe, axes, sizes, limit) for axes, limit in _excesses(active, sizes, tensors, largest)]
    if problems:
        raise refuse("config", "the config does not describe a model", problems)
    return sizes


def given_sizes(recipe: Recipe, values: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Problem]]:
    """Axis sizes that the config gives, 0 for those that it does not, and what is wrong with these."""
    scope, wrong = dict(values), dict[str, Problem]()
    for name, text in recipe.axes.items():
        try:
            scope[name] = evaluate(text, scope)
        except InputError:
            scope[name] = None
        if type(scope[name]) is not int or not 0 < scope[name] < MAX_SIZE:
            message, scope[name] = f"{text} = {scope[name]!r}", 0
            wrong[name] = Problem(file="config.json", message=message, expected="a positive integer")
    return {name: scope[name] for name in recipe.axes}, wrong


def _excesses(
    rules: list[Rule], sizes: Mapping[str, int], tensors: int, largest: int
) -> Iterator[tuple[set[str], int]]:
    for rule in rules:
        for side in rule.hf:
            if prod(sizes[axis] for axis in side.name_axes) > tensors:
                yield set(side.name_axes), tensors
        for axis in {axis for side in rule.mcore for axis in side.name_axes}:
            if sizes[axis] > max(tensors, largest):
                yield {axis}, largest


def _too_many(recipe: Recipe, axes: set[str], sizes: Mapping[str, int], limit: int) -> Problem:
    message = ", ".join(f"{recipe.axes[axis]} = {sizes[axis]}" for axis in sorted(axes))
    return Problem(file="config.json", message=message, found=f"files that hold at most {limit}")


def active_rules(
    recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[tuple[Rule, tuple[int, ...]]]:
    """Every rule with the layers that it applies to; (0,) or () for a rule that names no layer."""
    return guarded([(rule, rule.only) for rule in recipe.rules], recipe, values, sizes)


def guarded(
    items: Iterable[tuple[T, str]], recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[tuple[T, tuple[int, ...]]]:
    """Rules or module names, each with the layers for which its guard holds; (0,) or () if it names no layer."""
    scopes = layer_scopes(recipe, values, sizes)
    for item, only in items:
        text = item if isinstance(item, str) else item.mcore[0].name
        asked = scopes if "{l}" in text else [{**sizes, **values, "l": 0}]
        yield item, tuple(scope["l"] for scope in asked if not only or evaluate(only, scope))
