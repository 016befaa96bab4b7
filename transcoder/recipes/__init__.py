"""The registry: Hugging Face architecture name → recipe. A new architecture is one module here with a `RECIPE`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache

from transcoder.errors import Problem, refuse
from transcoder.recipe import Recipe


@lru_cache(maxsize=1)
def registry() -> Mapping[str, Recipe]:
    """All recipes by the Hugging Face class that they describe."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    recipes: list[Recipe] = [module.RECIPE for module in modules if hasattr(module, "RECIPE")]
    return {name: recipe for recipe in recipes for name in recipe.hf}


def recipe_for(architecture: str, file: str = "config.json") -> Recipe:
    """The recipe of a Hugging Face class. Raises InputError that lists the supported ones."""
    found = registry().get(architecture)
    if found is None:
        known = ", ".join(sorted(registry()))
        problem = Problem(file=file, expected=f"one of {known}", found=architecture or "no architecture")
        raise refuse("architecture", "this architecture is not supported", [problem])
    return found
