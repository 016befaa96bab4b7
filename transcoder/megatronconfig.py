"""Megatron's configuration → config.json, for checkpoints without one: the recipes' fields from right to left."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import InputError, Problem, refuse
from transcoder.formats.mcore import SPELLED
from transcoder.formats.statefiles import read_common
from transcoder.recipe import Field, Recipe, evaluate
from transcoder.yamltext import read_yaml

Fields = dict[str, Any]
DIMENSIONS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


def stored_fields(folder: Path, common: Mapping[str, Any] | None = None) -> Fields:
    """TransformerConfig fields of an iteration: run_config.yaml's, else those of Megatron-LM's arguments. Nothing runs.

    common: the plain values that hold the arguments; by default common.pt's.
    Raises InputError when the YAML cannot be read, or when the two name different dimensions.
    """
    found = (read_common(folder) if common is None else common).get("args")
    arguments = _of_arguments(found) if isinstance(found, dict) else {}
    table = _yaml(folder / "run_config.yaml")
    check_agreement({"run_config.yaml": table, "the arguments of common.pt": arguments})
    return arguments | table


def _of_arguments(arguments: Fields) -> Fields:
    """Megatron-LM's arguments with TransformerConfig's names beside their own."""
    fields = {name: arguments[spelled] for name, spelled in SPELLED.items() if spelled in arguments}
    if "untie_embeddings_and_output_weights" in arguments:
        fields["share_embeddings_and_output_weights"] = not arguments["untie_embeddings_and_output_weights"]
    if arguments.get("group_query_attention") is False and "num_attention_heads" in arguments:
        fields["num_query_groups"] = arguments["num_attention_heads"]  # the argument itself is 1 then
    return arguments | fields


def check_agreement(sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse dimensions on which two sources, given by their names, disagree. Raises InputError naming both."""
    problems = []
    for name in DIMENSIONS:
        said = [(source, fields[name]) for source, fields in sources.items() if type(fields.get(name)) is int]
        for (one, first), (two, second) in pairwise(said):
            if first != second:
                hint = "give --hf-model DIR, whose config.json then counts, or correct the wrong one"
                problems.append(Problem(tensor=name, expected=f"{first} ({one})", found=f"{second} ({two})", hint=hint))
    if problems:
        raise refuse("conflict", "the checkpoint's own files say different things of the model", problems)


def _yaml(path: Path) -> Fields:
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
