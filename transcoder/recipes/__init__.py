"""The registry: Hugging Face architecture name → recipe. A new architecture is one module in this package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache

from transcoder.errors import Problem, refuse
from transcoder.recipe import Recipe

MODULES = ("llama", "qwen2", "qwen3")


@lru_cache(maxsize=1)
def registry() -> Mapping[str, Recipe]:
    """All recipes by the Hugging Face class that they describe."""
    recipes = [importlib.import_module(f"{__name__}.{module}").RECIPE for module in MODULES]
    return {name: recipe for recipe in recipes for name in recipe.hf}


def recipe_for(architecture: str, file: str = "config.json") -> Recipe:
    """The recipe of a Hugging Face class. Raises InputError that lists the supported ones."""
    found = registry().get(architecture)
    if found is None:
        known = ", ".join(sorted(registry()))
        problem = Problem(file=file, expected=f"one of {known}", found=architecture or "no architecture")
        raise refuse("architecture", "this architecture is not supported", [problem])
    return found
