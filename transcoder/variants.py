"""Which spelling of a model lies on disk, decided by its keys and shapes and never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transcoder.codecs import CODECS
from transcoder.errors import Problem, UsageError, refuse
from transcoder.notation import LayoutError
from transcoder.recipe import Recipe, Variants, pattern, side

Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, int]


def import_variants(recipe: Recipe, tensors: Shapes, sizes: Sizes, norm_names: str) -> dict[str, str]:
    """The choices of an import: the Hugging Face ones by the tensors in the files, the Megatron ones by option."""
    chosen = {name: next(iter(choices)) for name, choices in recipe.mcore_variants.items()}
    return chosen | norm_variant(recipe, norm_names) | shown(recipe.hf_variants, tensors, sizes)


def norm_variant(recipe: Recipe, norm_names: str) -> dict[str, str]:
    """The choice of norm names, if one is wanted and the model's keys differ by it. Raises UsageError."""
    choices = recipe.mcore_variants.get("norm", {})
    if norm_names and choices and norm_names not in choices:
        raise UsageError(f"--norm-names {norm_names}: megatron-core stores this model with te names", kind="layout")
    return {"norm": norm_names} if norm_names and choices else {}


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
    for name, choice in wanted.items():
        if choice not in recipe.hf_variants.get(name, {choice: ""}):
            fits = ", ".join(choice for choice in recipe.hf_variants[name] if choice not in CODECS)
            raise UsageError(f"{name} cannot be {choice} in this architecture; they can be {fits}", kind="layout")
    kept = {name: choice for name, choice in originally.items() if quantised or choice not in CODECS}
    chosen |= kept | {name: choice for name, choice in wanted.items() if name in chosen}
    spelled = {
        name: {choice: text.replace("{l}.", "") if stacked else text for choice, text in choices.items()}
        for name, choices in recipe.mcore_variants.items()
    }
    return chosen | shown(spelled, dict.fromkeys(keys, ()), {})


def shown(variants: Variants, tensors: Shapes, sizes: Sizes) -> dict[str, str]:
    """For each variant the choice whose evidence some tensor is; evidence of "" is for when no other is there.

    Evidence is a name with axes, and a layout where the shape decides. Raises InputError when two match or none.
    """
    return {name: _choice(name, choices, tensors, sizes) for name, choices in variants.items()}


def _choice(name: str, choices: Mapping[str, str], tensors: Shapes, sizes: Sizes) -> str:
    evidence = {choice: _first(text, tensors, sizes) for choice, text in choices.items() if text}
    found = [choice for choice, key in evidence.items() if key]
    found = found or [choice for choice, text in choices.items() if not text]
    if len(found) == 1:
        return found[0]
    seen = "; ".join(f"{choice}: {key or 'no tensor like ' + choices[choice]}" for choice, key in evidence.items())
    problem = Problem(rule=f"variants of {name}", expected=f"one of {', '.join(choices)}", found=seen)
    raise refuse("variant", f"the files do not show which variant of {name} they hold", [problem])


def _first(text: str, tensors: Shapes, sizes: Sizes) -> str:
    """The first tensor that is such evidence, or an empty string."""
    name, _, layout = text.partition(" ")
    fits = pattern(name, sizes).fullmatch
    found = next((key for key in tensors if fits(key)), "")
    if not found or not layout:
        return found
    try:
        return f"{found} {list(tensors[found])}" if side(text).layout.shape(sizes) == tensors[found] else ""
    except LayoutError:
        return ""
