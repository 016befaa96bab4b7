"""Which spelling of a model lies on disk, decided by its keys and never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transcoder.codecs import CODECS
from transcoder.errors import Problem, UsageError, refuse
from transcoder.recipe import Recipe, Variants, pattern


def import_variants(recipe: Recipe, names: Iterable[str], norm_names: str) -> dict[str, str]:
    """The choices of an import: the Hugging Face ones by the names in the files, the Megatron ones by option."""
    chosen = {name: next(iter(choices)) for name, choices in recipe.mcore_variants.items()}
    if "norm" in chosen and norm_names:
        if norm_names not in recipe.mcore_variants["norm"]:
            raise UsageError(f"--norm-names {norm_names}: megatron-core stores this model with te names", kind="layout")
        chosen["norm"] = norm_names
    return chosen | shown(recipe.hf_variants, names)


def export_variants(
    recipe: Recipe,
    keys: Iterable[str],
    stacked: bool,
    originally: Mapping[str, str],
    wanted: Mapping[str, str],
    quantised: bool,
) -> dict[str, str]:
    """The choices of an export: the Megatron ones by the keys, the Hugging Face ones as the original's.

    wanted: what is to be chosen instead. quantised: whether choices named after a codec may stand.
    """
    chosen = {name: next(iter(choices)) for name, choices in recipe.hf_variants.items()}
    kept = {name: choice for name, choice in originally.items() if quantised or choice not in CODECS}
    chosen |= kept | {name: choice for name, choice in wanted.items() if name in chosen}
    spelled = {
        name: {choice: text.replace("{l}.", "") if stacked else text for choice, text in choices.items()}
        for name, choices in recipe.mcore_variants.items()
    }
    return chosen | shown(spelled, keys)


def shown(variants: Variants, names: Iterable[str]) -> dict[str, str]:
    """For each variant the choice whose pattern some name matches; a pattern of "" is for when no other matches.

    Raises InputError, with the evidence, when two match or none.
    """
    keys = list(names)
    return {name: _choice(name, choices, keys) for name, choices in variants.items()}


def _choice(name: str, choices: Mapping[str, str], keys: list[str]) -> str:
    evidence = {choice: _first(pattern, keys) for choice, pattern in choices.items() if pattern}
    found = [choice for choice, key in evidence.items() if key]
    found = found or [choice for choice, pattern in choices.items() if not pattern]
    if len(found) == 1:
        return found[0]
    seen = "; ".join(f"{choice}: {key or 'no key like ' + choices[choice]}" for choice, key in evidence.items())
    problem = Problem(rule=f"variants of {name}", expected=f"one of {', '.join(choices)}", found=seen)
    raise refuse("variant", f"the files do not show which variant of {name} they hold", [problem])


def _first(name: str, keys: list[str]) -> str:
    """The first key that a name with axes fits."""
    fits = pattern(name).fullmatch
    return next((key for key in keys if fits(key)), "")
