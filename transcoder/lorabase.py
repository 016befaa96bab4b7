"""The base model of an adapter: its config, and its tensors where they are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transcoder.formats.huggingface import open_hf
from transcoder.hfconfig import architecture_of, normalise, read_config
from transcoder.planner import Model, build_model
from transcoder.recipes import recipe_for
from transcoder.sizing import axis_sizes, given_sizes
from transcoder.variants import shown

TENSORS = 1 << 20  # that a model can have whose weights are not at hand


@dataclass(frozen=True)
class Base:
    """A model that an adapter belongs to."""

    path: Path
    architecture: str
    config: dict[str, Any]
    model: Model


def base_of(
    path: Path, arch: str = "", *, dialect: str = "", divisor: int = 1, pad: int = 0, expert_layout: str = ""
) -> Base:
    """The base model in a directory, of which config.json is enough.

    divisor: of the padded vocabulary; or pad: its rows. expert_layout: other than its files have. Raises InputError.
    """
    config = read_config(path)
    architecture = arch or architecture_of(config)
    recipe = recipe_for(architecture)
    values = normalise(config, recipe.defaults)
    catalog = open_hf(path).weights.catalog if any(path.glob("*.safetensors")) else {}
    shapes = {name: spec.shape for name, spec in catalog.items()}
    variants = {**recipe.hf_variants, **recipe.mcore_variants}
    values |= {name: next(iter(choices)) for name, choices in variants.items()}
    values |= shown(recipe.hf_variants, shapes, given_sizes(recipe, values)[0]) if shapes else {}
    if expert_layout in recipe.hf_variants.get("experts", {}):
        values["experts"] = expert_layout
    sizes = axis_sizes(recipe, values, len(catalog) or TENSORS)
    sizes["pad"] = max(0, pad - sizes["vocab"]) if pad else -sizes["vocab"] % divisor
    return Base(path, architecture, config, build_model(recipe, values, sizes, dialect))
