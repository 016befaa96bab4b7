"""Megatron's configuration → config.json, for checkpoints without one: the recipes' fields from right to left."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import InputError, Problem, refuse
from transcoder.formats.mcore import SPELLED
from transcoder.formats.statefiles import read_common
from transcoder.recipe import Field, Recipe, evaluate
from transcoder.yamltext import read_yaml


def stored_fields(folder: Path) -> dict[str, Any]:
    """TransformerConfig fields of an iteration: run_config.yaml's, else the arguments' of common.pt. Nothing is run.

    Raises InputError when the YAML cannot be read.
    """
    common = read_common(folder).get("args")
    arguments = common if isinstance(common, dict) else {}
    fields = {name: arguments[spelled] for name, spelled in SPELLED.items() if spelled in arguments}
    if "untie_embeddings_and_output_weights" in arguments:
        fields["share_embeddings_and_output_weights"] = not arguments["untie_embeddings_and_output_weights"]
    return arguments | fields | _yaml(folder / "run_config.yaml")


def _yaml(path: Path) -> dict[str, Any]:
    if not there(path):
        return {}
    table = read_yaml(path)
    model = table.get("model") if isinstance(table, dict) else None
    if not isinstance(model, dict):
        raise refuse("config", "a YAML file has no table `model`", [Problem(file=path.name)])
    return model


def config_from(recipe: Recipe, architecture: str, fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json that Megatron's fields imply, with those of its fields that the recipe reads."""
    config: dict[str, Any] = {"architectures": [architecture], "model_type": recipe.hf[architecture]}
    known = set(_names_read(recipe))
    for text in recipe.model.values():
        for name, expression in text.back.items() if isinstance(text, Field) else ():
            value = _value(expression, fields) if name in known else None
            if value is not None:
                config[name] = value
    return config | {"torch_dtype": dtype}


def _value(expression: str, fields: Mapping[str, Any]) -> Any:
    try:
        return evaluate(expression, fields)
    except InputError:
        return None


def _names_read(recipe: Recipe) -> Iterator[str]:
    guards = [rule.only for rule in recipe.rules if rule.only]
    for text in (*recipe.axes.values(), *recipe.kinds.values(), *recipe.model.values(), *guards):
        for node in ast.walk(ast.parse(text, mode="eval")):
            if isinstance(node, ast.Name):
                yield node.id
