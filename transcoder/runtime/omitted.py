"""Layers of multi-token prediction that a source holds and a live model leaves out: the recipes tell their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from transcoder import recipes
from transcoder.dialects import spellings
from transcoder.errors import printable
from transcoder.importing import ImportPlan
from transcoder.recipe import Recipe, Rule, pattern

VARIANT = "mtp"  # of recipes: whether a checkpoint holds such layers
NAMED = 8  # tensors in a warning


def predicts_more(rule: Rule) -> bool:
    """Whether a rule is of layers of multi-token prediction alone."""
    return bool(re.search(rf"\b{VARIANT}\b", rule.only))


def _patterns(recipe: Recipe, dialect: str) -> Iterator[re.Pattern[str]]:
    """What matches the Megatron keys of a recipe's layers of multi-token prediction."""
    for rule in (each for each in recipe.rules if predicts_more(each) and not each.alias):
        yield from (pattern(spelled.name) for side in rule.mcore for spelled in spellings(side, dialect))


def optional_keys(keys: Iterable[str], dialect: str) -> frozenset[str]:
    """Those of some Megatron keys that belong to multi-token prediction in any architecture."""
    known = {recipe.name: recipe for recipe in recipes.registry().values() if VARIANT in recipe.mcore_variants}
    patterns = {each for recipe in known.values() for each in _patterns(recipe, dialect)}
    return frozenset(key for key in keys if any(each.fullmatch(key) for each in patterns))


def optional_parts(plan: ImportPlan) -> frozenset[str]:
    """The Megatron keys of a planned import that belong to multi-token prediction."""
    return frozenset(key for key, tensor in plan.model.mcore.items() if predicts_more(tensor.family.rule))


def sources_of(plan: ImportPlan, left_out: Sequence[str]) -> list[str]:
    """The Hugging Face tensors that are not read when these Megatron keys are left out, further copies included."""
    if not left_out:
        return []
    return sorted(name for name, tensor in plan.model.hf.items() if predicts_more(tensor.family.rule))


def remarks(left_out: Sequence[str]) -> list[str]:
    """What to tell of the tensors that are left out."""
    if not left_out:
        return []
    names = ", ".join(map(printable, left_out[:NAMED])) + (", …" if len(left_out) > NAMED else "")
    return [f"{len(left_out)} tensors of multi-token prediction are left out, the model has no such layers: {names}"]
